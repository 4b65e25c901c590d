//! Protects a process' memory against writes and lets it go again, in short calls.
//!
//! One call over all of it keeps the process' other threads from mapping memory, and KVM from
//! filling its tables, for tens of milliseconds a GiB. So each call covers a window, and the next
//! comes after a pause as long as the call took.
//!
//! ```text
//!   arm       UFFDIO_REGISTER                 UFFDIO_WRITEPROTECT | UFFDIO_WRITEPROTECT | ...
//!   disarm    UFFDIO_UNREGISTER | UFFDIO_UNREGISTER | ...  from the beginning on: the pieces merge; then the close
//! ```
//!
//! Arming takes some 65 ms a GiB and ends as soon as the watch says so. Disarming takes as long and
//! must not be cut short; what is not done after `DISARM_WAIT_MAX` goes on in the background.
//! Whoever arms the same process meanwhile waits for it, watched.
//!
//! Closing the descriptor does all that is left in one call. So the last descriptor is never closed
//! on armed memory of a process that lives: whoever outlives the supervisor holds one more
//! ([`disarm`]).

pub mod background;

use super::{TrackedRange, abi, ioctl};
use crate::error::{Error, Result};
use crate::watch::Watch;
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// What one call should take: far less than a guest's timer tick, and enough that the call itself
/// does not show.
const CALL_TARGET: Duration = Duration::from_millis(1);
/// The first window, some half a millisecond on full memory here.
const WINDOW_BYTES_FIRST: u64 = 16 << 20;
/// A call over less gains nothing: waking up whoever waits takes longer, and a terabyte is a
/// hundred thousand calls.
const WINDOW_BYTES_MIN: u64 = 8 << 20;
/// Sparse memory is walked fast; without a bound one slow stretch behind it would be one long call.
const WINDOW_BYTES_MAX: u64 = 128 << 20;
/// The longest pause between two calls.
const PAUSE_MAX: Duration = CALL_TARGET;
/// How long whoever ends the tracking waits for it: as long as an operator hardly notices.
const DISARM_WAIT_MAX: Duration = Duration::from_millis(500);

/// Chooses the windows by what the ones before took. Pure.
#[derive(Debug)]
struct Windows {
    bytes: u64,
}

impl Windows {
    fn new() -> Self {
        Self { bytes: WINDOW_BYTES_FIRST }
    }

    /// The length of the next call, of whole pages of this size.
    fn next(&self, left: u64, page_bytes: u64) -> u64 {
        self.bytes.next_multiple_of(page_bytes.max(1)).min(left)
    }

    /// What a call over `bytes` took.
    fn took(&mut self, bytes: u64, time: Duration) {
        if time > CALL_TARGET {
            self.bytes = (self.bytes / 2).max(WINDOW_BYTES_MIN);
        } else if time < CALL_TARGET / 4 && bytes >= self.bytes {
            self.bytes = (self.bytes * 2).min(WINDOW_BYTES_MAX);
        }
    }
}

/// Of this thread: a call that waited for a processor, or for whoever was let in, has not held
/// anybody up for so long.
fn processor_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// Calls `call` with one window after the other, of all ranges, and leaves the process alone in
/// between.
fn in_windows<E>(
    ranges: &[TrackedRange],
    mut call: impl FnMut(abi::UffdioRange) -> Result<(), E>,
) -> Result<(), E> {
    let mut windows = Windows::new();
    for range in ranges {
        let mut at = range.process_address;
        while at < range.end() {
            let len = windows.next(range.end() - at, range.backing_page_bytes);
            let begun = processor_time();
            call(abi::UffdioRange { start: at, len })?;
            let time = processor_time().saturating_sub(begun);
            windows.took(len, time);
            at += len;
            std::thread::sleep(time.min(PAUSE_MAX));
        }
    }
    Ok(())
}

/// A process' memory, armed. Dropping it disarms in windows.
#[derive(Debug)]
pub(super) struct Armed {
    pid: u32,
    /// None once it is being disarmed.
    uffd: Option<OwnedFd>,
    ranges: Vec<TrackedRange>,
    /// The last field: it goes when the descriptor is closed, or left to the background.
    while_armed: Arc<()>,
}

impl Armed {
    /// Arms the memory of process `pid`, through a userfaultfd of its own that is enabled. What was
    /// armed when it fails is disarmed again. Asks the watch ahead of each call.
    pub(super) fn new(
        uffd: OwnedFd,
        pid: u32,
        ranges: &[TrackedRange],
        watch: &mut Watch<'_>,
    ) -> Result<Self> {
        background::wait(pid, watch)?;
        let mut armed = Self {
            pid,
            uffd: None,
            ranges: Vec::with_capacity(ranges.len()),
            while_armed: Arc::new(()),
        };
        let uffd = &*armed.uffd.insert(uffd);
        for range in ranges {
            register(uffd.as_fd(), pid, range)?;
            armed.ranges.push(*range);
        }
        in_windows(ranges, |range| {
            watch()?;
            let at = range.start;
            let mut arm = abi::UffdioWriteprotect { range, mode: abi::UFFDIO_WRITEPROTECT_MODE_WP };
            ioctl(uffd.as_fd(), abi::UFFDIO_WRITEPROTECT, &mut arm).map(drop).map_err(|errno| {
                match errno {
                    Errno::SRCH => Error::Guest(format!("process {pid} died")),
                    e => Error::os(format!("UFFDIO_WRITEPROTECT at {at:#x} in process {pid}"), e),
                }
            })
        })?;
        Ok(armed)
    }

    /// Can be upgraded for as long as the memory is armed.
    pub(super) fn while_armed(&self) -> Weak<()> {
        Arc::downgrade(&self.while_armed)
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        if let Some(uffd) = self.uffd.take() {
            background::disarm(self.pid, uffd, std::mem::take(&mut self.ranges), DISARM_WAIT_MAX);
        }
    }
}

/// Lets armed memory go in windows, so that closing the descriptor has nothing left to do. Goes on
/// with the next range at the first window that cannot be let go: the process has ended, or has
/// unmapped it (a DIMM was unplugged).
pub fn disarm(uffd: BorrowedFd<'_>, ranges: &[TrackedRange]) {
    for range in ranges {
        let ended = in_windows(std::slice::from_ref(range), |mut window| {
            let at = window.start;
            ioctl(uffd, abi::UFFDIO_UNREGISTER, &mut window).map(drop).map_err(|errno| (errno, at))
        });
        if let Err((errno, at)) = ended {
            tracing::debug!(%errno, "memory at {at:#x} could not be disarmed; closing the descriptor does it");
        }
    }
}

fn register(uffd: BorrowedFd<'_>, pid: u32, range: &TrackedRange) -> Result<()> {
    let uffd_range = abi::UffdioRange { start: range.process_address, len: range.bytes };
    let mut register =
        abi::UffdioRegister { range: uffd_range, mode: abi::UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    ioctl(uffd, abi::UFFDIO_REGISTER, &mut register).map(drop).map_err(|e| match e {
        Errno::BUSY => Error::refused(format!(
            "the memory of process {pid} is already followed by another userfaultfd: \
             is another migration or a background snapshot under way?"
        )),
        Errno::SRCH => Error::Guest(format!("process {pid} died")),
        other => Error::os(
            format!(
                "UFFDIO_REGISTER of {} bytes at {:#x} in process {pid}",
                range.bytes, range.process_address
            ),
            other,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_grow_over_sparse_memory_and_shrink_where_a_call_takes_long() {
        let mut windows = Windows::new();
        assert_eq!(windows.next(u64::MAX, 4096), WINDOW_BYTES_FIRST);
        for _ in 0..20 {
            windows.took(windows.next(u64::MAX, 4096), Duration::from_micros(10));
        }
        assert_eq!(windows.next(u64::MAX, 4096), WINDOW_BYTES_MAX);
        windows.took(WINDOW_BYTES_MAX, Duration::from_millis(5));
        assert_eq!(windows.next(u64::MAX, 4096), WINDOW_BYTES_MAX / 2);
        for _ in 0..20 {
            windows.took(windows.next(u64::MAX, 4096), Duration::from_millis(5));
        }
        assert_eq!(windows.next(u64::MAX, 4096), WINDOW_BYTES_MIN);
        assert_eq!(windows.next(u64::MAX, 1 << 30), 1 << 30, "no part of a huge page");
        assert_eq!(windows.next(4096, 4096), 4096);
        windows.took(4096, Duration::ZERO);
        assert_eq!(windows.next(u64::MAX, 4096), WINDOW_BYTES_MIN, "a short rest tells nothing");
    }

    #[test]
    fn every_byte_is_covered_once_and_in_order() {
        let range = |process_address, bytes| TrackedRange {
            process_address,
            bytes,
            first_page: 0,
            backing_page_bytes: 4096,
        };
        let ranges = [range(0, 100 << 20), range(1 << 40, 4096)];
        let mut calls = Vec::new();
        in_windows(&ranges, |window| {
            calls.push((window.start, window.len));
            Ok::<_, Errno>(())
        })
        .unwrap();
        assert_eq!(calls.iter().map(|(_, len)| len).sum::<u64>(), (100 << 20) + 4096);
        assert!(calls.len() > 2, "{calls:?}");
        let follows =
            |pair: &[(u64, u64)]| pair[0].0 + pair[0].1 == pair[1].0 || pair[1].0 == 1 << 40;
        assert!(calls.windows(2).all(follows), "{calls:?}");
    }
}
