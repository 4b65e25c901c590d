//! Opens the two libraries, once a process, and keeps them open until it ends.

use crate::{LibIbverbs, LibIbverbs1_8, LibRdmacm, LibRdmacm1_2};
use libloading::Library;
use std::sync::OnceLock;

const VERBS: &str = "libibverbs.so.1";
const CM: &str = "librdmacm.so.1";

/// Both libraries. They are never closed: verbs keeps threads and file descriptors of its own.
pub struct Libraries {
    /// libibverbs.
    pub verbs: LibIbverbs,
    /// What libibverbs has since `IBVERBS_1.8` (rdma-core 28): registration with optional access flags, such as
    /// relaxed ordering.
    pub verbs_1_8: Option<LibIbverbs1_8>,
    /// librdmacm.
    pub cm: LibRdmacm,
    /// What librdmacm has since `RDMACM_1.2` (rdma-core 23): attributes for a queue pair that the caller moves
    /// from state to state by itself.
    pub cm_1_2: Option<LibRdmacm1_2>,
}

/// Why this host's libraries cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{library} cannot be used ({cause}): install it (Debian, Ubuntu: apt install ibverbs-providers \
         libibverbs1 librdmacm1; Fedora, RHEL: dnf install libibverbs librdmacm)"
)]
pub struct OpenError {
    /// Which of the two.
    pub library: &'static str,
    /// What the dynamic loader says.
    pub cause: String,
}

impl Libraries {
    /// Opens both, or says again what the first call of this process said.
    pub fn open() -> Result<&'static Self, OpenError> {
        static OPENED: OnceLock<Result<Libraries, OpenError>> = OnceLock::new();
        OPENED.get_or_init(|| Self::open_named(VERBS, CM)).as_ref().map_err(Clone::clone)
    }

    fn open_named(verbs: &'static str, cm: &'static str) -> Result<Self, OpenError> {
        // SAFETY: the symbols are given the types that rdma-core's headers give them, under the library versions
        // (`.so.1`) that keep them.
        unsafe {
            Ok(Self {
                verbs: LibIbverbs::from_library(load(verbs)?).map_err(|e| failed(verbs, &e))?,
                // `.ok()`: one of its symbols is missing.
                verbs_1_8: LibIbverbs1_8::from_library(load(verbs)?).ok(),
                cm: LibRdmacm::from_library(load(cm)?).map_err(|e| failed(cm, &e))?,
                cm_1_2: LibRdmacm1_2::from_library(load(cm)?).ok(),
            })
        }
    }
}

/// Takes another reference to a library that is loaded already.
fn load(name: &'static str) -> Result<Library, OpenError> {
    // SAFETY: what rdma-core's libraries run when they are loaded asks nothing of the process.
    unsafe { Library::new(name) }.map_err(|e| failed(name, &e))
}

fn failed(library: &'static str, cause: &libloading::Error) -> OpenError {
    // The loader's own words are in the source; the error itself only says which call failed.
    let cause =
        std::error::Error::source(cause).map_or_else(|| cause.to_string(), ToString::to_string);
    OpenError { library, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_what_to_install() {
        let error = Libraries::open_named("libibverbs-absent.so.1", CM)
            .err()
            .expect("there is no such library");
        assert_eq!(error.library, "libibverbs-absent.so.1");
        let text = error.to_string();
        assert!(
            text.contains("No such file") && text.contains("apt install") && text.contains("dnf"),
            "{text}"
        );
    }

    #[test]
    fn a_library_without_the_symbols_is_an_error_and_no_panic() {
        let error = Libraries::open_named("libc.so.6", CM).err().expect("libc has no verbs");
        assert!(error.cause.contains("ibv_"), "{error}");
    }

    #[test]
    fn opening_again_gives_the_same() {
        match (Libraries::open(), Libraries::open()) {
            (Ok(first), Ok(second)) => assert!(std::ptr::eq(first, second)),
            (Err(first), Err(second)) => assert_eq!(first, second),
            _ => panic!("two calls, two answers"),
        }
    }
}
