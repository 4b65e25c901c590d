//! The end that is written to. A service thread hears fences and messages and tells the peer which
//! memory is ready; the writes themselves are seen by nobody.

use super::health::{Health, wait_readable};
use super::lane::{Lane, News};
use crate::credit::Window;
use crate::error::{Error, Result};
use crate::exposed::Exposed;
use crate::failure::LaneFailure;
use crate::fences::Arrivals;
use crate::link::Target;
use crate::rdma::depths::chunk_stripes;
use crate::rdma::health::monitor::Monitor;
use crate::rdma::lane::message::{Grant, Message, READY_MAX, Stripes};
use crate::rdma::memory::keys::Pins;
use crate::rdma::memory::pinner::{DevicePinner, Side};
use crate::rdma::memory::registrar::{Job, Registrar, expect, give_up_memory};
use crate::rdma::setup::connect::Connections;
use crate::rdma::setup::path::Path;
use crate::rdma::verbs::objects::{Completions, Domain};
use crate::region::{MemoryRegion, RemoteRegion};
use crate::work::FenceTag;
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// The target of an RDMA link. Dropping it revokes.
pub struct RdmaTarget {
    shared: Arc<Shared>,
    exposed: Exposed,
    service: Option<JoinHandle<Service>>,
    monitor: Option<Monitor>,
    path: Path,
    /// See `Limits::names_memory`.
    names_memory: bool,
    revoked: bool,
}

/// What the service thread and the target have in common.
pub(crate) struct Shared {
    health: Arc<Health>,
    arrivals: Mutex<Arrivals>,
    pub(crate) changed: Condvar,
    placed_bytes: AtomicU64,
    pins: Mutex<Vec<Arc<Pins>>>,
    registrar: Registrar,
    /// Addresses of the device's own, and keys: not announced yet.
    shifts: Mutex<VecDeque<Message>>,
    grants: Arc<Mutex<VecDeque<Grant>>>,
    chunk: usize,
}

/// The service thread's own; it comes back when the thread ends.
struct Service {
    lanes: Vec<Lane>,
    completions: Arc<Completions>,
    /// After the lanes: their queue pairs stand on it.
    _domain: Arc<Domain>,
    shared: Arc<Shared>,
    news: News,
    /// Of each lane, what was posted on all of them before its last fence.
    fence_bytes: Vec<u64>,
    /// The last fence that has come on every lane, if the peer was not told yet.
    reached: Option<FenceTag>,
    /// Of each lane, whether its last fence has come.
    ended: Vec<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Tables that are whole at every moment, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RdmaTarget {
    pub(crate) fn new(connections: Connections, chunk_bytes: usize) -> Result<Self> {
        let health = Arc::new(Health::new()?);
        let watched = connections.watched();
        let Connections { queues, domain, completions, channel, path, limits } = connections;
        // It writes nothing, so its window is of no account.
        let window = Window { bytes: 0, requests: 0 };
        let lanes: Vec<_> = (queues.into_iter().enumerate())
            .map(|(index, queue)| Lane::new(index, Box::new(queue), window, 0, path.active_mtu))
            .collect();
        let monitor = Monitor::new(watched, channel, Arc::clone(domain.id()), Arc::clone(&health))?;
        let grants: Arc<Mutex<VecDeque<Grant>>> = Arc::default();
        let (announced, told) = (Arc::clone(&grants), Arc::clone(&health));
        let ready = Box::new(move |job: &Job, key: u32| {
            lock(&announced).push_back(job.pins.grant(&job.stripes, key));
            told.bell.ring();
        });
        let pinner = Box::new(DevicePinner::new(&domain, Side::Target));
        let shared = Arc::new(Shared {
            registrar: Registrar::new(pinner, ready, Arc::clone(&health))?,
            health,
            arrivals: Mutex::new(Arrivals::new(lanes.len())),
            changed: Condvar::new(),
            placed_bytes: AtomicU64::new(0),
            pins: Mutex::default(),
            shifts: Mutex::default(),
            grants,
            chunk: chunk_stripes(chunk_bytes),
        });
        let (_domain, serving) = (domain, Arc::clone(&shared));
        let (fence_bytes, ended) = (vec![0; lanes.len()], vec![false; lanes.len()]);
        let service = Service {
            lanes,
            completions,
            _domain,
            shared: serving,
            news: News::default(),
            fence_bytes,
            reached: None,
            ended,
        };
        let thread = std::thread::Builder::new()
            .name("ferry-rdma-serve".into())
            .spawn(move || service.run())
            .map_err(|e| Error::os("starting the thread that serves a link", e))?;
        let (service, monitor) = (Some(thread), Some(monitor));
        let names_memory = limits.names_memory;
        Ok(Self {
            shared,
            exposed: Exposed::new(),
            service,
            monitor,
            path,
            names_memory,
            revoked: false,
        })
    }

    /// The way that the link takes.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes every registration back, as nobody else does while the peer may still write.
    #[cfg(test)]
    pub(super) fn deregister(&self) {
        self.shared.registrar.forget();
    }

    /// Ends the queue pairs; afterwards no write can land, whatever keys the peer has: the
    /// protection domain is this link's alone, and a key opens nothing to a queue pair of another.
    /// What remains, unpinning, takes long and changes nothing: `later`, it goes on by itself.
    fn stop(&mut self, later: bool) {
        if std::mem::replace(&mut self.revoked, true) {
            return;
        }
        self.shared.registrar.stop();
        self.shared.health.end();
        let mut service = self.service.take().and_then(|thread| thread.join().ok());
        if let Some(service) = &mut service {
            service.lanes.iter_mut().for_each(|lane| lane.close(false));
        }
        self.exposed.revoke();
        let (monitor, shared) = (self.monitor.take(), Arc::clone(&self.shared));
        let unpin = move || {
            shared.registrar.forget();
            drop((monitor, service, shared));
        };
        if later { give_up_memory(unpin) } else { unpin() }
    }
}

impl Target for RdmaTarget {
    fn expose(&mut self, region: &Arc<MemoryRegion>) -> Result<RemoteRegion> {
        let remote = self.exposed.expose(region)?;
        if !self.names_memory {
            let by = (region.as_ptr().addr() as u64).wrapping_sub(remote.base);
            lock(&self.shared.shifts).push_back(Message::Shift { region: remote.key.0, by });
        }
        lock(&self.shared.pins).push(Arc::new(Pins::new(region, remote.key.0, Some(remote.base))));
        Ok(remote)
    }

    fn expect(&mut self, region: &Arc<MemoryRegion>, parts: &[Range<usize>]) -> Result<()> {
        self.shared.health.check()?;
        if self.revoked {
            return Err(Error::State("expecting writes after the link was revoked"));
        }
        let exposed: Vec<_> = (lock(&self.shared.pins).iter())
            .filter(|pins| Arc::ptr_eq(pins.region(), region))
            .map(Arc::clone)
            .collect();
        if exposed.is_empty() {
            return Err(Error::State("expecting writes into a region that was not exposed"));
        }
        // A region may be exposed more than once, and each has addresses of its own.
        exposed.iter().try_for_each(|pins| {
            expect(Some(&self.shared.registrar), pins, parts, self.shared.chunk)
        })
    }

    fn wait_fence(&mut self, tag: FenceTag, deadline: Instant) -> Result<()> {
        let mut arrivals = lock(&self.shared.arrivals);
        loop {
            if arrivals.reached(tag) {
                return Ok(());
            }
            if self.revoked {
                return Err(Error::State("waiting for a fence after the link was revoked"));
            }
            if self.shared.health.broken() {
                drop(arrivals);
                self.shared.health.check()?;
                return Err(Error::State("waiting for a fence on a link that is broken"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: "a fence on every lane" });
            }
            (arrivals, _) = self
                .shared
                .changed
                .wait_timeout(arrivals, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn bytes_placed(&mut self) -> Result<u64> {
        self.shared.health.check()?;
        Ok(self.shared.placed_bytes.load(Ordering::Relaxed))
    }

    fn revoke(&mut self) -> Result<()> {
        self.stop(true);
        Ok(())
    }
}

impl Drop for RdmaTarget {
    /// Of a link that was not revoked: the guest is not here, and its memory may be wanted for the
    /// next.
    fn drop(&mut self) {
        self.stop(false);
    }
}

impl std::fmt::Debug for RdmaTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RdmaTarget")
            .field("path", &self.path)
            .field("revoked", &self.revoked)
            .finish()
    }
}

impl Service {
    fn run(mut self) -> Self {
        while !self.shared.health.broken() && !self.shared.health.ending() && !self.is_over() {
            if let Err(failure) = self.turn() {
                self.shared.health.fail(failure);
            }
        }
        if self.is_over() {
            // What is heard of the connections from here on is their end, and no failure.
            self.shared.health.end();
        }
        // What came before the end, such as a last fence. Why it ended is known.
        let _ = self.collect();
        // The peer learns of it, and nothing is written by a link that has broken.
        let healthy = !self.shared.health.broken();
        self.lanes.iter_mut().for_each(|lane| lane.close(healthy));
        // Under the lock, so that nobody misses it between looking and waiting.
        drop(lock(&self.shared.arrivals));
        self.shared.changed.notify_all();
        self
    }

    /// Whether the last fence has come on every lane, and the peer has heard that.
    fn is_over(&self) -> bool {
        self.ended.iter().all(|ended| *ended) && self.reached.is_none() && self.lanes[0].is_idle()
    }

    /// Does what there is to do, and waits if there is nothing.
    fn turn(&mut self) -> Result<(), LaneFailure> {
        if self.collect()? || self.announce()? {
            return Ok(());
        }
        // Armed first, then looked at again: what comes in between rings the bell or is seen.
        self.lanes.iter_mut().try_for_each(Lane::arm)?;
        if self.collect()? || self.announce()? {
            return Ok(());
        }
        let bell = &self.shared.health.bell;
        wait_readable(&[self.completions.fd(), bell.as_fd()], None).map_err(|_| {
            LaneFailure::Os { lane: 0, operation: "waiting for completions", errno: libc::EIO }
        })?;
        self.completions.silence();
        bell.silence();
        Ok(())
    }

    /// Takes in what came. True if there was anything.
    fn collect(&mut self) -> Result<bool, LaneFailure> {
        let mut any = false;
        // A target writes nothing.
        let mut written = Vec::new();
        for lane in 0..self.lanes.len() {
            let room = self.lanes[lane].can_send();
            let collected = self.lanes[lane].collect(&mut written, &mut self.news);
            any |= !self.news.messages.is_empty();
            any |= room != self.lanes[lane].can_send();
            // What came before a failure, too.
            self.digest(lane)?;
            collected?;
        }
        Ok(any)
    }

    fn digest(&mut self, lane: usize) -> Result<(), LaneFailure> {
        let protocol = |what: String| LaneFailure::Protocol { lane, what };
        for message in self.news.messages.drain(..) {
            if self.ended[lane] {
                return Err(protocol(format!("{message:?} behind the last fence")));
            }
            match message {
                Message::Progress(bytes) => {
                    self.shared.placed_bytes.fetch_max(bytes, Ordering::Relaxed);
                }
                Message::Want(stripes) => self.shared.want(stripes).map_err(protocol)?,
                Message::Fence { tag, bytes, is_last } => {
                    let mut arrivals = lock(&self.shared.arrivals);
                    if !arrivals.arrive(lane, tag) {
                        return Err(protocol(format!("the fence {} after a later one", tag.0)));
                    }
                    self.fence_bytes[lane] = bytes;
                    self.ended[lane] = is_last;
                    if let Some((slowest, tag)) = arrivals.slowest() {
                        // Before anybody hears of the fence: then all of it is placed.
                        let placed = self.fence_bytes[slowest];
                        self.shared.placed_bytes.fetch_max(placed, Ordering::Relaxed);
                        self.reached = Some(tag);
                    }
                    drop(arrivals);
                    self.shared.changed.notify_all();
                }
                other => return Err(protocol(format!("{other:?} from the initiator"))),
            }
        }
        Ok(())
    }

    /// Tells the peer which fence has come and what has become ready. True if there was anything.
    fn announce(&mut self) -> Result<bool, LaneFailure> {
        let mut any = false;
        // The initiator speaks first: an iWARP connection takes nothing from this side before that.
        if !self.lanes[0].heard() {
            return Ok(false);
        }
        self.lanes[0].acknowledge()?;
        if let Some(tag) = self.reached
            && self.lanes[0].send(&Message::Reached(tag))?
        {
            (self.reached, any) = (None, true);
        }
        while self.lanes[0].can_send() {
            // Before the keys of their regions: those come later than `expose`.
            if let Some(shift) = lock(&self.shared.shifts).pop_front() {
                any |= self.lanes[0].send(&shift)?;
                continue;
            }
            let mut grants = lock(&self.shared.grants);
            let count = grants.len().min(READY_MAX);
            if count == 0 {
                break;
            }
            let message = Message::Ready(grants.drain(..count).collect());
            drop(grants);
            any |= self.lanes[0].send(&message)?;
        }
        Ok(any)
    }
}

impl Shared {
    /// The peer wants to write where nobody said that it would.
    fn want(&self, stripes: Stripes) -> Result<(), String> {
        let pins = lock(&self.pins).get(stripes.region as usize).map(Arc::clone);
        let pins = pins.ok_or_else(|| {
            format!("a wish for the region {}, which there is not", stripes.region)
        })?;
        // What is claimed already is announced when it is ready.
        let bytes = pins.wanted(stripes)?;
        let claimed = pins.claim(&bytes, self.chunk);
        self.registrar.urge(&pins, &Pins::stripes(&bytes), claimed);
        Ok(())
    }
}
