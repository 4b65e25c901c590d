//! Takes a user's QEMU command as it is, and adds what a move needs.
//!
//! ```text
//!   memory    a memfd that QEMU inherits, given to it as a named file:
//!             -object memory-backend-file,...,mem-path=/proc/self/fd/N,share=on
//!             in place of the machine's private memory, or of the user's own ram and memfd backends;
//!             a file that nobody can write (an image as NVDIMM) becomes a shared mapping of itself
//!   monitor   a listening socket that QEMU inherits: -chardev socket,fd=N -mon mode=control
//!             (it takes connections before QEMU even runs, so nobody has to wait for it to appear)
//!   -S -incoming defer                                                   for a destination only
//! ```
//!
//! Why a file and not a memfd backend: see [`crate::memory::find`]. What cannot work is refused
//! here, with the fix, before anything is started. `rewrite.rs` is pure but for the files that it
//! asks for.

mod backend;
mod memory_file;
mod options;
mod readconfig;
pub(crate) mod rewrite;
mod role;
mod start;

pub use role::Role;
pub use start::GuestCommand;
