//! Whether this process may still open what it needs: out of descriptors halfway, nobody could even
//! be told why.

use crate::error::{Error, Result};
use rustix::process::{Resource, getrlimit};

/// What a receiver has besides lanes: sockets, QEMU's monitor and memory, pipes, a guardian, a few
/// strangers.
pub const RECEIVER: u64 = 64;
/// What a lane has at each end: its socket, its io_uring, an eventfd, and one to spare.
pub const PER_LANE: u64 = 4;

/// Refuses, with the fix, if fewer than so many can still be opened.
pub fn ensure(needed: u64, what_for: &str) -> Result<()> {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return Ok(()) };
    // Without /proc there is nothing to compare with.
    let Ok(open) = std::fs::read_dir("/proc/self/fd").map(Iterator::count) else { return Ok(()) };
    check(limit, open as u64, needed, what_for)
}

fn check(limit: u64, open: u64, needed: u64, what_for: &str) -> Result<()> {
    if limit.saturating_sub(open) >= needed {
        return Ok(());
    }
    Err(Error::refused(format!(
        "too few descriptors: this process may have {limit} and has {open}, and {needed} more are needed for {what_for}; \
         raise the limit (ulimit -n {}, or LimitNOFILE= of its service)",
        (open + needed).next_power_of_two().max(1024)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_named_with_what_would_do() {
        check(1024, 20, 64, "a guest").unwrap();
        check(84, 20, 64, "a guest").unwrap();
        let refused = check(83, 20, 64, "4 lanes").unwrap_err();
        assert!(
            matches!(&refused, Error::Refused(text) if text.contains("for 4 lanes") && text.contains("ulimit -n 1024")),
            "{refused}"
        );
    }
}
