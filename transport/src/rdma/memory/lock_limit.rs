//! What to say when the kernel does not let this process pin memory.

use crate::error::Error;
use crate::failure::LaneFailure;
use std::io;

/// The failure of registering `bytes`, where `needed` is what the link needs pinned in all.
pub(crate) fn failure(bytes: u64, needed: u64, error: &io::Error) -> LaneFailure {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    LaneFailure::Memory {
        what: describe(bytes, needed, errno, crate::rdma::host::memory_lock_limit()),
        errno,
    }
}

/// The same as an error.
pub(crate) fn error(bytes: u64, needed: u64, error: &io::Error) -> Error {
    Error::from(&failure(bytes, needed, error))
}

fn describe(bytes: u64, needed: u64, errno: i32, limit: Option<u64>) -> String {
    let what = format!("registering {bytes} bytes of memory with the RDMA device");
    match (errno, limit) {
        (libc::ENOMEM, Some(limit)) if needed > limit => format!(
            "{what}: this process may lock {} KiB of memory and needs {} KiB for this link; raise the limit \
             (`ulimit -l unlimited` before starting, LimitMEMLOCK=infinity in a systemd unit, or memlock in \
             /etc/security/limits.conf)",
            limit >> 10,
            needed.div_ceil(1024),
        ),
        (libc::ENOMEM, _) => format!(
            "{what}: the host has no memory for it, or the memory-lock limit of a group of processes \
             (`ulimit -l`, a container's) is used up"
        ),
        (libc::EOPNOTSUPP, _) => {
            format!("{what}: libibverbs is too old; rdma-core 28 or newer is needed")
        }
        _ => what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_small_is_named_with_what_is_needed_and_the_mend() {
        let text = describe(64 << 20, 1 << 30, libc::ENOMEM, Some(8 << 20));
        for part in
            ["67108864 bytes", "8192 KiB", "1048576 KiB", "ulimit -l unlimited", "LimitMEMLOCK"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert!(!describe(1, 1, libc::ENOMEM, None).contains("KiB"));
    }
}
