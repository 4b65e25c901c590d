//! Whether a link is alive, known to every thread of one of its ends, and the bell that wakes the
//! thread that waits for the device.

pub(super) mod monitor;

use crate::error::{Error, Result};
use crate::failure::LaneFailure;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a flushed queue pair, or one whose peer has hung up, waits for somebody to say why:
/// that is on its way by then.
pub(crate) const REASON_PATIENCE: Duration = Duration::from_millis(300);

/// Something that another thread can ring and that can be waited for with file descriptors.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> Result<Self> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Self)
            .map_err(|e| Error::os("creating an eventfd", e))
    }

    pub(crate) fn ring(&self) {
        // It fails only where it has been rung more often than anybody can count, and so rings
        // already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn silence(&self) {
        // An error means that it did not ring.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors can be read, or the deadline.
pub(crate) fn wait_readable(fds: &[BorrowedFd<'_>], deadline: Option<Instant>) -> Result<()> {
    let mut polled: Vec<_> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let timeout = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    });
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        // The caller looks again in any case.
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(Error::os("waiting for the RDMA device", e)),
    }
}

/// How much a failure says of what went wrong.
fn says(failure: &LaneFailure) -> u8 {
    match failure {
        LaneFailure::Flushed { .. } => 0,
        LaneFailure::Closed { .. } => 1,
        _ => SAYS_ALL,
    }
}

const SAYS_ALL: u8 = 2;

#[derive(Debug)]
pub(crate) struct Health {
    failure: Mutex<Option<LaneFailure>>,
    changed: Condvar,
    broken: AtomicBool,
    /// This side is closing the link itself: what breaks now is no failure.
    ending: AtomicBool,
    pub(crate) bell: Bell,
}

impl Health {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            failure: Mutex::new(None),
            changed: Condvar::new(),
            broken: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            bell: Bell::new()?,
        })
    }

    /// Notes the first failure, or one that says more: what failed comes by another way than that
    /// the peer has hung up because of it.
    pub(crate) fn fail(&self, failure: LaneFailure) {
        if self.ending() {
            return;
        }
        let mut noted = self.failure();
        if noted.as_ref().is_none_or(|noted| says(noted) < says(&failure)) {
            *noted = Some(failure);
        }
        drop(noted);
        self.broken.store(true, Ordering::Release);
        self.changed.notify_all();
        self.bell.ring();
    }

    /// From now on nothing that breaks is a failure.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.bell.ring();
    }

    pub(crate) fn ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Whether there is a failure, for a quick look.
    #[inline]
    pub(crate) fn broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Whether all that is known is that the peer has hung up, or that work was flushed: what went
    /// wrong before may be on its way.
    pub(crate) fn wonders(&self) -> bool {
        self.failure().as_ref().is_some_and(|failure| says(failure) < SAYS_ALL)
    }

    /// The failure, if there is one. Waits a little for the reason if all that is known is that
    /// work was flushed.
    #[inline]
    pub(crate) fn check(&self) -> Result<()> {
        if !self.broken() {
            return Ok(());
        }
        let deadline = Instant::now() + REASON_PATIENCE;
        let mut failure = self.failure();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match &*failure {
                None => return Ok(()),
                Some(LaneFailure::Flushed { .. }) if !left.is_zero() => {
                    (failure, _) = self
                        .changed
                        .wait_timeout(failure, left)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Some(known) => return Err(known.into()),
            }
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<LaneFailure>> {
        // One value, whole at every moment.
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_flush_is_told_instead_of_it_and_the_first_reason_stays() {
        let health = Health::new().unwrap();
        assert!(health.check().is_ok());
        health.fail(LaneFailure::Flushed { lane: 1 });
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| health.check());
            health.fail(LaneFailure::Closed { lane: 1 });
            assert!(matches!(asked.join().unwrap(), Err(Error::Closed { lane: 1 })));
        });
        health.fail(LaneFailure::Closed { lane: 0 });
        health.fail(LaneFailure::Flushed { lane: 0 });
        assert!(matches!(health.check(), Err(Error::Closed { lane: 1 })));
        health.fail(LaneFailure::Protocol { lane: 2, what: "told".into() });
        health.fail(LaneFailure::Closed { lane: 0 });
        assert!(matches!(health.check(), Err(Error::Protocol { lane: 2, .. })));
    }

    #[test]
    fn a_flush_that_nobody_explains_is_an_error_in_the_end() {
        let health = Health::new().unwrap();
        health.fail(LaneFailure::Flushed { lane: 2 });
        assert!(matches!(health.check(), Err(Error::Lane { lane: 2, .. })));
    }

    #[test]
    fn what_breaks_while_we_close_is_no_failure() {
        let health = Health::new().unwrap();
        health.end();
        health.fail(LaneFailure::Closed { lane: 0 });
        assert!(health.check().is_ok());
    }

    #[test]
    fn a_bell_that_rings_is_readable_until_it_is_silenced() {
        let bell = Bell::new().unwrap();
        let soon = || Some(Instant::now() + Duration::from_millis(20));
        bell.ring();
        let asked = Instant::now();
        wait_readable(&[bell.as_fd()], Some(asked + Duration::from_secs(20))).unwrap();
        assert!(asked.elapsed() < Duration::from_secs(10));
        bell.silence();
        let asked = Instant::now();
        wait_readable(&[bell.as_fd()], soon()).unwrap();
        assert!(asked.elapsed() >= Duration::from_millis(20));
    }
}
