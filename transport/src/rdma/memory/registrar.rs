//! Pins memory ahead of the data: threads that take jobs in order, register them with the device
//! and tell who waits. Jobs that somebody waits for right now go to the front.

use super::keys::Pins;
use crate::error::{Error, Result};
use crate::failure::LaneFailure;
use crate::rdma::health::Health;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Threads of one end. Registering is the kernel's work on page tables: two keep ahead of a fast
/// link and leave the other cores to the guest.
const THREADS: usize = 2;

/// Registers memory with a device.
pub(crate) trait Pinner: Send + Sync + 'static {
    /// Makes these bytes of the region known to the device. Returns the key, and what holds the
    /// registration until it is dropped.
    fn pin(&self, pins: &Pins, bytes: Range<usize>) -> Result<(u32, Hold), LaneFailure>;
}

/// A registration.
pub(crate) type Hold = Box<dyn Send>;

/// Stripes of a region that were claimed and must be pinned.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) pins: Arc<Pins>,
    pub(crate) stripes: Range<usize>,
}

/// Told when stripes are ready. By then their keys can be looked up.
pub(crate) type Ready = Box<dyn Fn(&Job, u32) + Send + Sync>;

pub(crate) struct Registrar {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

pub(crate) struct Shared {
    jobs: Mutex<Jobs>,
    changed: Condvar,
    pinner: Box<dyn Pinner>,
    ready: Ready,
    health: Arc<Health>,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    held: Vec<Hold>,
    made: u64,
    stopping: bool,
}

impl Registrar {
    pub(crate) fn new(pinner: Box<dyn Pinner>, ready: Ready, health: Arc<Health>) -> Result<Self> {
        let shared = Arc::new(Shared {
            jobs: Mutex::default(),
            changed: Condvar::new(),
            pinner,
            ready,
            health,
        });
        let mut this = Self { shared, threads: Vec::new() };
        for index in 0..THREADS {
            let shared = Arc::clone(&this.shared);
            let thread = std::thread::Builder::new()
                .name(format!("ferry-pin-{index}"))
                .spawn(move || shared.run())
                .map_err(|e| Error::os("starting a thread that registers memory", e))?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// Adds jobs behind those that wait.
    pub(crate) fn add(&self, jobs: impl IntoIterator<Item = Job>) {
        self.shared.jobs().waiting.extend(jobs);
        self.shared.changed.notify_all();
    }

    /// Puts what these stripes need before everything that waits, as somebody cannot go on without
    /// them: the jobs that have just been claimed for them, and those that were claimed before and
    /// still wait.
    pub(crate) fn urge(
        &self,
        pins: &Arc<Pins>,
        stripes: &Range<usize>,
        claimed: Vec<Range<usize>>,
    ) {
        let mut jobs = self.shared.jobs();
        let needed = |job: &Job| {
            let overlaps = job.stripes.start < stripes.end && stripes.start < job.stripes.end;
            overlaps && Arc::ptr_eq(&job.pins, pins)
        };
        for index in 0..jobs.waiting.len() {
            if needed(&jobs.waiting[index])
                && let Some(job) = jobs.waiting.remove(index)
            {
                jobs.waiting.push_front(job);
            }
        }
        for stripes in claimed.into_iter().rev() {
            jobs.waiting.push_front(Job { pins: Arc::clone(pins), stripes });
        }
        drop(jobs);
        self.shared.changed.notify_all();
    }

    /// How many registrations were made so far.
    pub(crate) fn made(&self) -> u64 {
        self.shared.jobs().made
    }

    /// Takes every registration back.
    pub(crate) fn forget(&self) {
        let held = std::mem::take(&mut self.shared.jobs().held);
        drop(held);
    }

    /// Begins no further job.
    pub(crate) fn stop(&self) {
        let mut jobs = self.shared.jobs();
        jobs.stopping = true;
        jobs.waiting.clear();
        drop(jobs);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        let mut jobs = self.jobs();
        loop {
            if jobs.stopping {
                return;
            }
            let Some(job) = jobs.waiting.pop_front() else {
                jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(jobs);
            let bytes = job.pins.bytes(&job.stripes);
            let pinned = self.pinner.pin(&job.pins, bytes);
            jobs = self.jobs();
            match pinned {
                Ok((key, hold)) => {
                    jobs.held.push(hold);
                    jobs.made += 1;
                    drop(jobs);
                    job.pins.ready(&job.stripes, key);
                    (self.ready)(&job, key);
                    jobs = self.jobs();
                }
                Err(failure) => {
                    jobs.waiting.clear();
                    self.health.fail(failure);
                }
            }
        }
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        // Whole at every moment, so a panic elsewhere spoils nothing.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registrar {
    /// Waits for the jobs under way, and takes every registration back.
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
        self.shared.jobs().held.clear();
    }
}

impl std::fmt::Debug for Registrar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registrar").finish_non_exhaustive()
    }
}

/// Gives the parts that are not pinned yet to the registrar.
pub(crate) fn expect(
    registrar: Option<&Registrar>,
    pins: &Arc<Pins>,
    parts: &[Range<usize>],
    chunk: usize,
) -> Result<()> {
    let registrar = registrar.ok_or(Error::State("expecting writes after the link has ended"))?;
    for part in parts {
        let len = part
            .end
            .checked_sub(part.start)
            .ok_or(Error::State("a part that ends before it begins"))?;
        pins.region().check(part.start, len)?;
    }
    for part in parts {
        let claimed = pins.claim(part, chunk);
        registrar.add(claimed.into_iter().map(|stripes| Job { pins: Arc::clone(pins), stripes }));
    }
    Ok(())
}

/// Runs what takes registrations back in a thread of its own: unpinning takes 20 ms a GiB, and
/// nobody should wait for it. See `docs/decisions/0015`.
pub(crate) fn give_up_memory(work: impl FnOnce() + Send + 'static) {
    // If there is no thread to be had, the closure runs no further than to drop what it holds:
    // here.
    if let Err(e) = std::thread::Builder::new().name("ferry-unpin".into()).spawn(work) {
        tracing::debug!("memory is given up at once: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::MemoryRegion;
    use crate::stripe::STRIPE_BYTES;
    use crossbeam_channel::{Receiver, Sender};
    use std::time::Duration;

    const STRIPE: usize = STRIPE_BYTES as usize;
    const LONG: Duration = Duration::from_secs(20);

    /// Pins one job for every word that comes through the gate; a false one fails.
    struct Gate(Receiver<bool>, Sender<()>);

    impl Pinner for Gate {
        fn pin(&self, pins: &Pins, bytes: Range<usize>) -> Result<(u32, Hold), LaneFailure> {
            assert!(pins.region().check(bytes.start, bytes.len()).is_ok());
            match self.0.recv_timeout(LONG) {
                Ok(true) => Ok(((bytes.start / STRIPE) as u32, Box::new(OnDrop(self.1.clone())))),
                _ => Err(LaneFailure::Memory { what: "pinning".into(), errno: libc::ENOMEM }),
            }
        }
    }

    struct OnDrop(Sender<()>);

    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }

    #[test]
    fn every_job_is_done_and_told_and_given_up_at_the_end() {
        let (gate, opened) = crossbeam_channel::unbounded();
        let (dropped, drops) = crossbeam_channel::unbounded();
        let (told, ready) = crossbeam_channel::unbounded();
        let health = Arc::new(Health::new().unwrap());
        let tell: Ready = Box::new(move |job, key| told.send((job.stripes.clone(), key)).unwrap());
        let registrar =
            Registrar::new(Box::new(Gate(opened, dropped)), tell, Arc::clone(&health)).unwrap();
        let pins = Arc::new(Pins::new(&MemoryRegion::anonymous(8 * STRIPE).unwrap(), 0, None));
        let jobs = |bytes: Range<usize>| -> Vec<Job> {
            let claimed = pins.claim(&bytes, 2);
            claimed.into_iter().map(|stripes| Job { pins: Arc::clone(&pins), stripes }).collect()
        };
        registrar.add(jobs(2 * STRIPE..8 * STRIPE));
        registrar.urge(&pins, &(0..1), pins.claim(&(0..STRIPE), 2));
        (0..4).for_each(|_| gate.send(true).unwrap());
        let mut all: Vec<_> = (0..4).map(|_| ready.recv_timeout(LONG).unwrap()).collect();
        all.sort_by_key(|(stripes, _)| stripes.start);
        assert_eq!(all, [(0..1, 0), (2..4, 2), (4..6, 4), (6..8, 6)]);
        assert_eq!((pins.key(3), pins.key(1)), (Some(2), None));
        registrar.add(jobs(STRIPE..2 * STRIPE));
        gate.send(false).unwrap();
        wait_until_broken(&health);
        assert_eq!(drops.len(), 0);
        drop(registrar);
        assert_eq!(drops.len(), 4);
    }

    #[test]
    fn what_somebody_waits_for_is_pinned_next_also_if_it_was_claimed_long_ago() {
        let (gate, opened) = crossbeam_channel::unbounded();
        let (dropped, _drops) = crossbeam_channel::unbounded();
        let (told, ready) = crossbeam_channel::unbounded();
        let health = Arc::new(Health::new().unwrap());
        let tell: Ready = Box::new(move |job, _| told.send(job.stripes.clone()).unwrap());
        let registrar = Registrar::new(Box::new(Gate(opened, dropped)), tell, health).unwrap();
        let pins = Arc::new(Pins::new(&MemoryRegion::anonymous(40 * STRIPE).unwrap(), 0, None));
        let claimed = pins.claim(&(0..40 * STRIPE), 2);
        registrar.add(claimed.into_iter().map(|stripes| Job { pins: Arc::clone(&pins), stripes }));
        registrar.urge(&pins, &(31..32), Vec::new());
        (0..3).for_each(|_| gate.send(true).unwrap());
        // Each thread may have had one job in hand already.
        let first: Vec<_> = (0..3).map(|_| ready.recv_timeout(LONG).unwrap()).collect();
        assert!(first.contains(&(30..32)), "{first:?}");
        (0..20).for_each(|_| gate.send(true).unwrap());
    }

    fn wait_until_broken(health: &Health) {
        use std::os::fd::AsFd;
        let deadline = std::time::Instant::now() + LONG;
        while !health.broken() {
            assert!(std::time::Instant::now() < deadline);
            crate::rdma::health::wait_readable(&[health.bell.as_fd()], Some(deadline)).unwrap();
        }
        assert!(matches!(health.check(), Err(Error::Os { .. })));
    }
}
