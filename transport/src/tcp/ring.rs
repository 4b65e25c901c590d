//! One io_uring, used by one thread: counts what the kernel still holds, so that no buffer is freed
//! under it, and explains a kernel where io_uring is switched off.

use crate::error::{Error, Result};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use std::io;
use std::time::{Duration, Instant};

/// Submissions in flight at most: a lane has a wake-up, an acknowledgement and a message.
const ENTRIES: u32 = 8;

/// Completions that wait to be read: zero-copy sends make a second one each, later.
const COMPLETION_ENTRIES: u32 = 512;

/// In the result of a notification: the kernel copied after all (linux/io_uring.h).
const IORING_NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;

/// Asks for that report (linux/io_uring.h).
pub(super) const IORING_SEND_ZC_REPORT_USAGE: u16 = 1 << 3;

/// An io_uring and the number of operations it holds.
pub(super) struct Ring {
    ring: IoUring,
    in_flight: usize,
    zero_copy: bool,
}

/// One completion.
#[derive(Debug)]
pub(crate) enum Done {
    /// The operation of this number ended; `more` if a notification follows.
    Operation { user_data: u64, result: io::Result<usize>, more: bool },
    /// The kernel let go of a zero-copy send's memory.
    Released { user_data: u64, copied: bool },
}

impl Ring {
    /// A ring that sleeps until [`Self::enable`] is called on the thread that will use it.
    pub(super) fn new() -> Result<Self> {
        // Linux 6.1: completions run on this thread when it waits, without interrupting anybody.
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(COMPLETION_ENTRIES)
            .build(ENTRIES)
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::builder()
                    .setup_r_disabled()
                    .setup_cqsize(COMPLETION_ENTRIES)
                    .build(ENTRIES),
                _ => Err(error),
            })
            .map_err(|error| unavailable(error, disabled_sysctl().as_deref()))?;
        let mut probe = Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(|e| Error::os("asking what io_uring can do", e))?;
        let missing = [
            ("RECVMSG", opcode::RecvMsg::CODE),
            ("SENDMSG", opcode::SendMsg::CODE),
            ("RECV", opcode::Recv::CODE),
            ("SEND", opcode::Send::CODE),
            ("READ", opcode::Read::CODE),
        ]
        .into_iter()
        .find(|&(_, code)| !probe.is_supported(code));
        if let Some((name, _)) = missing {
            return Err(Error::os(
                format!(
                    "this kernel's io_uring has no {name} operation; Linux 5.11 or newer is needed"
                ),
                io::Error::from_raw_os_error(libc::EOPNOTSUPP),
            ));
        }
        Ok(Self { ring, in_flight: 0, zero_copy: probe.is_supported(opcode::SendMsgZc::CODE) })
    }

    /// Whether the kernel has SENDMSG_ZC.
    pub(super) fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Makes the calling thread the one that submits.
    pub(super) fn enable(&self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    /// Queues an operation for the next wait.
    ///
    /// # Safety
    /// Everything that `entry` points to stays valid and unmoved until its last completion.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller vouches for what the entry points to.
        unsafe { self.ring.submission().push(&entry) }.expect("fewer operations than entries");
        self.in_flight += 1;
    }

    /// Submits what was queued and waits for a completion.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                // Interrupted, or short of memory for the moment: the queue is as it was.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                // Completions wait to be read before more can be submitted.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// The next completion, if there is one.
    pub(super) fn next(&mut self) -> Option<Done> {
        let entry = self.ring.completion().next()?;
        let (user_data, flags, result) = (entry.user_data(), entry.flags(), entry.result());
        let more = cqueue::more(flags);
        if !more {
            self.in_flight -= 1;
        }
        if cqueue::notif(flags) {
            let copied = result.cast_unsigned() & IORING_NOTIF_USAGE_ZC_COPIED != 0;
            return Some(Done::Released { user_data, copied });
        }
        let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        Some(Done::Operation { user_data, result, more })
    }

    /// Waits until the kernel holds nothing any more, `patience` at most, and throws the results
    /// away. True if it holds nothing: only then may buffers be freed.
    #[must_use]
    pub(super) fn drain(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            while self.next().is_some() {}
            let left = deadline.saturating_duration_since(Instant::now());
            if self.in_flight == 0 || left.is_zero() {
                return self.in_flight == 0;
            }
            let left = types::Timespec::from(left);
            let arguments = types::SubmitArgs::new().timespec(&left);
            // An error is a timeout or an interruption: the loop looks again either way.
            let _ = self.ring.submitter().submit_with_args(1, &arguments);
        }
    }
}

impl Drop for Ring {
    /// Reached with operations in flight only when a thread unwinds from a bug of ours. Its buffers
    /// are dropped next, so the kernel must be done with them.
    fn drop(&mut self) {
        if self.in_flight > 0 && !self.drain(super::DRAIN_PATIENCE) {
            std::process::abort();
        }
    }
}

fn disabled_sysctl() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()
}

/// Why io_uring could not be set up, and what to do. `sysctl` is what
/// `/proc/sys/kernel/io_uring_disabled` says, where it exists (Linux 6.6).
fn unavailable(error: io::Error, sysctl: Option<&str>) -> Error {
    let why = match (error.raw_os_error(), sysctl.map(str::trim)) {
        (Some(libc::ENOSYS), _) => {
            "this kernel has no io_uring: it is older than Linux 5.11, built without CONFIG_IO_URING, \
             or a seccomp filter (a container's, usually) hides it"
        }
        (Some(libc::EPERM), Some("2")) => {
            "io_uring is switched off on this host: set the sysctl kernel.io_uring_disabled to 0 \
             (sysctl -w kernel.io_uring_disabled=0)"
        }
        (Some(libc::EPERM), Some("1")) => {
            "io_uring is for privileged processes only on this host: run as root, or as a member of the group \
             in the sysctl kernel.io_uring_group, or set the sysctl kernel.io_uring_disabled to 0"
        }
        (Some(libc::EPERM), _) => {
            "io_uring is forbidden to this process, though the sysctl kernel.io_uring_disabled does not say so: \
             a seccomp filter (a container's, usually) or a security module refuses it; allow io_uring_setup, \
             io_uring_enter and io_uring_register"
        }
        (Some(libc::ENOMEM), _) => {
            "no memory for an io_uring: many kernels count it as locked memory of the user, so raise ulimit -l"
        }
        _ => "setting up an io_uring",
    };
    Error::os(why, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_io_uring_is_explained() {
        let say =
            |errno, sysctl| unavailable(io::Error::from_raw_os_error(errno), sysctl).to_string();
        assert!(say(libc::ENOSYS, None).contains("CONFIG_IO_URING"));
        assert!(say(libc::EPERM, Some("2\n")).contains("kernel.io_uring_disabled=0"));
        assert!(say(libc::EPERM, Some("1\n")).contains("kernel.io_uring_group"));
        assert!(say(libc::EPERM, Some("0\n")).contains("seccomp"));
        assert!(say(libc::EPERM, None).contains("seccomp"));
        assert!(say(libc::ENOMEM, None).contains("ulimit -l"));
    }
}
