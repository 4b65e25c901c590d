//! The end that is written to: exposes regions, and knows which fences have come.

use super::receiver::Receiver as LaneReceiver;
use super::ring::Ring;
use super::socket::Socket;
use super::{check_lanes, prepare, spawn};
use crate::error::{Error, Result};
use crate::exposed::Exposed;
use crate::failure::LaneFailure;
use crate::fences::Arrivals;
use crate::link::Target;
use crate::region::{MemoryRegion, RemoteRegion};
use crate::tcp::placement::{Progress, Shared};
use crate::work::FenceTag;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// The target of a TCP link. Dropping it revokes.
#[derive(Debug)]
pub struct TcpTarget {
    shared: Arc<Shared>,
    lanes: Vec<Lane>,
    /// Whether every lane that ended left nothing to the kernel.
    settled: bool,
}

/// One lane's connection and thread.
#[derive(Debug)]
pub(crate) struct Lane {
    stream: Arc<Socket>,
    /// Hears whether the kernel has let go of all memory, once the lane has ended.
    end: Option<Receiver<bool>>,
    /// Dropped to let the thread go, which waits for it after the lane's end.
    release: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Shared {
    pub(super) fn exposed(&self) -> MutexGuard<'_, Exposed> {
        // Here and below: a table that is whole at every moment, so a panic elsewhere spoils
        // nothing.
        self.exposed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a fence; false if the peer may not send it.
    #[must_use]
    pub(super) fn arrive(&self, lane: usize, tag: FenceTag) -> bool {
        let rising = self.progress().arrivals.arrive(lane, tag);
        self.changed.notify_all();
        rising
    }

    /// Notes the first failure and tells whoever waits. Not one that we cause ourselves by ending.
    pub(super) fn fail(&self, failure: LaneFailure) {
        if !self.stopping.load(Ordering::Relaxed) {
            self.progress().failure.get_or_insert(failure);
            self.changed.notify_all();
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TcpTarget {
    /// Takes over connected streams, one a lane in this order, whose preambles have been exchanged.
    pub fn new(streams: Vec<impl Into<Socket>>) -> Result<Self> {
        check_lanes(&streams)?;
        let progress = Progress { arrivals: Arrivals::new(streams.len()), failure: None };
        let shared = Arc::new(Shared {
            exposed: Mutex::new(Exposed::new()),
            progress: Mutex::new(progress),
            changed: Condvar::new(),
            placed_bytes: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let mut this = Self { shared, lanes: Vec::with_capacity(streams.len()), settled: true };
        for (lane, stream) in streams.into_iter().map(Into::<Socket>::into).enumerate() {
            prepare(lane, &stream)?;
            let stream = Arc::new(stream);
            let receiver = LaneReceiver::new(
                lane,
                Ring::new()?,
                Arc::clone(&stream),
                Arc::clone(&this.shared),
            );
            let ((tell, end), (release, released)) = (bounded(1), bounded(0));
            let thread =
                spawn(format!("ferry-recv-{lane}"), move || receiver.run(&tell, &released))?;
            let (end, release, thread) = (Some(end), Some(release), Some(thread));
            this.lanes.push(Lane { stream, end, release, thread });
        }
        Ok(this)
    }

    /// Ends the lanes that have not ended by a last fence. Closing a socket alone would not do: the
    /// kernel goes on handing out what it had received before. So the threads are told, and it is
    /// waited until nothing writes memory any more.
    fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        for lane in &mut self.lanes {
            match lane.end.as_ref().map(Receiver::try_recv) {
                Some(Err(TryRecvError::Empty)) => {
                    // An error means that the connection is gone, which is what is wanted.
                    lane.stream.shutdown();
                }
                Some(Ok(settled)) => (self.settled, lane.end) = (self.settled & settled, None),
                // A thread that panicked says nothing, and has settled too: its ring does not drop
                // before.
                Some(Err(TryRecvError::Disconnected)) | None => lane.end = None,
            }
        }
        for end in self.lanes.iter_mut().filter_map(|lane| lane.end.take()) {
            self.settled &= end.recv().unwrap_or(true);
        }
    }
}

impl Target for TcpTarget {
    fn expose(&mut self, region: &Arc<MemoryRegion>) -> Result<RemoteRegion> {
        self.shared.exposed().expose(region)
    }

    fn wait_fence(&mut self, tag: FenceTag, deadline: Instant) -> Result<()> {
        let mut progress = self.shared.progress();
        loop {
            if progress.arrivals.reached(tag) {
                return Ok(());
            }
            if let Some(failure) = &progress.failure {
                return Err(failure.into());
            }
            if self.shared.stopping.load(Ordering::Relaxed) {
                return Err(Error::State("waiting for a fence after the link was revoked"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: "a fence on every lane" });
            }
            (progress, _) = self
                .shared
                .changed
                .wait_timeout(progress, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn bytes_placed(&mut self) -> Result<u64> {
        match &self.shared.progress().failure {
            Some(failure) => Err(failure.into()),
            None => Ok(self.shared.placed_bytes.load(Ordering::Relaxed)),
        }
    }

    fn revoke(&mut self) -> Result<()> {
        self.stop();
        self.shared.exposed().revoke();
        if self.settled {
            Ok(())
        } else {
            Err(Error::Timeout { what: "the kernel to let go of exposed memory" })
        }
    }
}

impl Drop for TcpTarget {
    fn drop(&mut self) {
        self.stop();
        self.lanes.iter_mut().for_each(|lane| lane.release = None);
        for thread in self.lanes.iter_mut().filter_map(|lane| lane.thread.take()) {
            // A panic in it has printed itself.
            let _ = thread.join();
        }
    }
}
