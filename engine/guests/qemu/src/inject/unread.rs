//! What can be known of seccomp filters that may not be read: those that pageferry has itself can
//! be tried, and QEMU's own is known.

use super::Process;
use super::filter::is_sandboxed_qemu;
use pageferry_engine::dirty::pagemap::USERFAULTFD_FLAGS;
use pageferry_engine::error::{Error, Result};
use rustix::io::Errno;
use std::fs;

/// What `/proc/PID/status` says of filters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seccomp {
    filtered: bool,
    /// How many filters there are; unknown before Linux 5.9.
    filters: Option<u32>,
}

impl Seccomp {
    fn of(status: &str) -> Self {
        let field = |name: &str| {
            let line =
                status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().parse::<u32>().ok()
        };
        // No such line: a kernel without seccomp.
        Self { filtered: field("Seccomp").unwrap_or(0) != 0, filters: field("Seccomp_filters") }
    }
}

/// Whether all filters of QEMU are accounted for: those that it has in common with us, and its own.
///
/// Filters are inherited and never removed. Two processes of one control group come from one unit
/// or one container, and so have its filters in common; what is beyond ours was added by QEMU. Its
/// own sandbox is one filter, and QEMU would not have started without it.
fn accounted_for(theirs: Seccomp, ours: Seccomp, together: bool, sandboxed: bool) -> bool {
    let common = if together && ours.filtered { ours.filters } else { Some(0) };
    match (theirs.filters, common) {
        (Some(all), Some(common)) => all == common + u32::from(sandboxed),
        _ => false,
    }
}

/// Refuses unless the filters of this process, which cannot be read for this reason, are known to
/// allow the injected call.
pub(super) fn allows(process: &Process<'_>, unreadable: Errno) -> Result<()> {
    let theirs = Seccomp::of(&process.text("status")?);
    if !theirs.filtered {
        return Ok(());
    }
    let own =
        |file: &str| fs::read_to_string(format!("/proc/thread-self/{file}")).unwrap_or_default();
    let ours = Seccomp::of(&own("status"));
    let together = process.text("cgroup")? == own("cgroup");
    let sandboxed = is_sandboxed_qemu(&process.read("cmdline")?);
    if !accounted_for(theirs, ours, together, sandboxed) {
        return Err(Error::refused(format!(
            "process {} runs under a seccomp filter that pageferry cannot read ({unreadable}), and one \
             that forbids userfaultfd could kill the guest: run pageferry with CAP_SYS_ADMIN (as root) \
             and outside of a filter, on a kernel with CONFIG_CHECKPOINT_RESTORE; or in QEMU's own \
             container or unit; or start QEMU without the filter (its own -sandbox may stay)",
            process.pid
        )));
    }
    if ours.filtered { try_our_own() } else { Ok(()) }
}

/// Makes the call in a child of our own, which has our filters.
pub(super) fn try_our_own() -> Result<()> {
    // SAFETY: the child of a process with many threads makes two system calls and nothing else.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(Error::os("starting a process", std::io::Error::last_os_error()));
    }
    if child == 0 {
        // SAFETY: no pointers; `_exit` runs nothing of ours.
        unsafe {
            let denied = libc::syscall(libc::SYS_userfaultfd, i64::from(USERFAULTFD_FLAGS)) < 0
                && matches!(*libc::__errno_location(), libc::EPERM | libc::EACCES | libc::ENOSYS);
            libc::_exit(i32::from(denied));
        }
    }
    let mut status = 0;
    // SAFETY: waits for a child of ours that nobody else knows of.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return Err(Error::Guest(
                "the process that tried userfaultfd was waited for by another".into(),
            ));
        }
    }
    if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 {
        return Ok(());
    }
    Err(Error::refused(
        "the seccomp filter that pageferry and QEMU run under forbids userfaultfd: allow it in the \
         container's seccomp profile, or with SystemCallFilter= of the systemd unit, and start both anew",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(count: u32) -> Seccomp {
        Seccomp { filtered: count > 0, filters: Some(count) }
    }

    #[test]
    fn lines_of_status_are_read() {
        let of = |text: &str| Seccomp::of(text);
        assert_eq!(of("Seccomp:\t2\nSeccomp_filters:\t3\n"), filters(3));
        assert_eq!(of("Seccomp:\t0\nSeccomp_filters:\t0\n"), filters(0));
        assert_eq!(of("Seccomp:\t2\n"), Seccomp { filtered: true, filters: None });
        assert_eq!(of("Name:\tqemu\n"), Seccomp::default());
    }

    #[test]
    fn every_filter_must_be_ours_or_qemus_own() {
        assert!(accounted_for(filters(1), filters(0), false, true), "QEMU's own");
        assert!(!accounted_for(filters(1), filters(0), true, false), "a stranger's");
        assert!(!accounted_for(filters(2), filters(0), true, true), "QEMU's own and a stranger's");
        assert!(accounted_for(filters(2), filters(2), true, false), "the container's two");
        assert!(accounted_for(filters(3), filters(2), true, true), "and QEMU's own");
        assert!(!accounted_for(filters(2), filters(2), false, false), "of another unit");
        assert!(!accounted_for(filters(1), filters(2), true, false), "we have more than they");
        let unknown = Seccomp { filtered: true, filters: None };
        assert!(!accounted_for(unknown, filters(0), true, true), "an older kernel");
    }

    #[test]
    fn without_a_filter_the_trial_succeeds() {
        try_our_own().unwrap();
    }
}
