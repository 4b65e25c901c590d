//! The part of libibverbs and librdmacm that pageferry uses, opened at run time.
//!
//! ```text
//!   Libraries::open() --- once a process ---> libibverbs.so.1, librdmacm.so.1
//!       .verbs.ibv_*        what libibverbs exports
//!       .cm.rdma_*          what librdmacm exports
//!       .verbs_1_8, .cm_1_2 what only newer versions of them export: None where the host's are older
//!   ibv_post_send ...       what the C headers define themselves ([`inline`])
//! ```
//!
//! Nothing here is linked: a program that uses this crate builds without rdma-core and starts on a host without it,
//! where [`Libraries::open`] says what is missing. No function that a host's library lacks can be called.
//!
//! Names, types and rules of use are those of rdma-core, and its man pages (`man ibv_post_send`) are the reference.
//! Enums of C are integers with constants, because a newer library may give a value that is not known here. The
//! declarations in `generated` come from rdma-core's headers by `scripts/rdma-bindings`; their licence is in
//! `README.md`. 64-bit Linux only.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("the layouts here are those of 64-bit Linux");

mod generated {
    // Written by bindgen, in its own style.
    #![allow(missing_docs, non_camel_case_types, non_upper_case_globals, unsafe_op_in_unsafe_fn)]
    #![allow(
        rust_2018_idioms,
        unreachable_pub,
        unused_imports,
        dead_code,
        clippy::all,
        clippy::undocumented_unsafe_blocks
    )]

    pub mod cm;
    pub mod cm_1_2;
    pub mod types;
    pub mod verbs;
    pub mod verbs_1_8;
}
pub mod inline;
mod libraries;

pub use generated::cm::LibRdmacm;
pub use generated::cm_1_2::LibRdmacm1_2;
pub use generated::types::*;
pub use generated::verbs::LibIbverbs;
pub use generated::verbs_1_8::LibIbverbs1_8;
pub use inline::*;
pub use libraries::{Libraries, OpenError};
