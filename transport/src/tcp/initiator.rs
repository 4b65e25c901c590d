//! The end that pushes: checks requests, charges credits, hands whole batches to the lanes' threads
//! and collects what they report.

use super::inbox::Inbox;
use super::outgoing::{Item, Piece};
use super::ring::Ring;
use super::sender::{Event, Sender};
use super::socket::Socket;
use super::zero_copy::{Choice, ZeroCopy};
use super::{Regions, TcpOptions, check_lanes, prepare, spawn};
use crate::credit::{Credits, Window};
use crate::error::{Error, Result};
use crate::failure::LaneFailure;
use crate::fences::Acks;
use crate::link::{Initiator, TransportKind};
use crate::region::MemoryRegion;
use crate::stripe::lane_of;
use crate::work::{Completion, FenceTag, WorkId, WorkRequest};
use crossbeam_channel::Receiver;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// The initiator of a TCP link. Dropping it closes its lanes at once; only a fence that was polled
/// proves that what was posted has arrived.
#[derive(Debug)]
pub struct TcpInitiator {
    lanes: Vec<Lane>,
    events: Receiver<Event>,
    acks: Acks,
    /// Frames that are done and not yet handed to the caller, with their credits.
    written: Vec<(usize, Vec<WorkId>, u64)>,
    fenced: Vec<FenceTag>,
    failure: Option<LaneFailure>,
    regions: Arc<Regions>,
    wire_bytes: Arc<AtomicU64>,
}

#[derive(Debug)]
pub(crate) struct Lane {
    inbox: Arc<Inbox>,
    stream: Arc<Socket>,
    thread: Option<JoinHandle<()>>,
    credits: Credits,
    /// Items of the batch that is being posted.
    batch: Vec<Item>,
}

impl TcpInitiator {
    /// Takes over connected streams, one a lane in this order, whose preambles have been exchanged.
    pub fn new(streams: Vec<impl Into<Socket>>, options: TcpOptions) -> Result<Self> {
        check_lanes(&streams)?;
        let (sender, events) = crossbeam_channel::unbounded();
        let mut this = Self {
            lanes: Vec::with_capacity(streams.len()),
            events,
            acks: Acks::new(streams.len()),
            written: Vec::new(),
            fenced: Vec::new(),
            failure: None,
            regions: Arc::default(),
            wire_bytes: Arc::default(),
        };
        let window = Window { bytes: options.window_bytes, requests: options.window_requests };
        for (lane, stream) in streams.into_iter().map(Into::<Socket>::into).enumerate() {
            prepare(lane, &stream)?;
            let ring = Ring::new()?;
            // A local socket copies in any case.
            let zero_copy = if stream.is_local() { ZeroCopy::Never } else { options.zero_copy };
            let choice = Choice::new(zero_copy, ring.zero_copy());
            let inbox = Arc::new(Inbox::new().map_err(|e| Error::os("creating an eventfd", e))?);
            let stream = Arc::new(stream);
            let thread = Sender::new(
                lane,
                ring,
                Arc::clone(&stream),
                Arc::clone(&inbox),
                sender.clone(),
                Arc::clone(&this.wire_bytes),
                choice,
                Arc::clone(&this.regions),
            );
            let thread = Some(spawn(format!("ferry-send-{lane}"), move || thread.run())?);
            this.lanes.push(Lane {
                inbox,
                stream,
                thread,
                credits: Credits::new(window),
                batch: Vec::new(),
            });
        }
        Ok(this)
    }

    /// Takes in what the lanes have reported.
    fn collect(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.note(event);
        }
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Written { lane, ids, bytes } => self.written.push((lane, ids, bytes)),
            Event::FenceAcked { lane } => {
                assert!(
                    self.acks.acknowledge(lane, &mut self.fenced),
                    "a lane reports what was sent on it"
                );
            }
            Event::Broken(failure) => {
                self.failure.get_or_insert(failure);
            }
        }
    }

    fn check(&self) -> Result<()> {
        self.failure.as_ref().map_or(Ok(()), |failure| Err(failure.into()))
    }

    fn put_on_all(&mut self, item: Item) {
        for lane in &mut self.lanes {
            lane.batch.push(item);
            lane.inbox.put(&mut lane.batch);
        }
    }

    /// Hands out what is ready. Credits come back here and not before, so that completions which
    /// nobody reads cannot pile up.
    fn hand_out(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        for (lane, ids, bytes) in self.written.drain(..) {
            self.lanes[lane].credits.give_back(ids.len(), bytes);
            out.extend(ids.into_iter().map(Completion::Write));
        }
        out.extend(self.fenced.drain(..).map(Completion::Fence));
        out.len() - before
    }
}

impl Initiator for TcpInitiator {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn register(&mut self, region: &Arc<MemoryRegion>) -> Result<()> {
        self.regions.add(region);
        Ok(())
    }

    fn post(&mut self, batch: &[WorkRequest]) -> Result<usize> {
        self.collect();
        self.check()?;
        self.acks.check_open()?;
        let mut accepted = 0;
        let mut refused = None;
        let regions = self.regions.list();
        for request in batch {
            if let Err(e) = admit(request, &regions) {
                refused = Some(e);
                break;
            }
            let lane = lane_of(request.remote.addr, self.lanes.len());
            let lane = &mut self.lanes[lane];
            if !lane.credits.take(request.local.len() as u64) {
                break;
            }
            lane.batch.push(Item::Write(Piece::of(request)));
            accepted += 1;
        }
        drop(regions);
        for lane in self.lanes.iter_mut().filter(|lane| !lane.batch.is_empty()) {
            lane.inbox.put(&mut lane.batch);
        }
        match refused {
            // What came before it is on its way: the caller hears of it when it posts the rest.
            Some(e) if accepted == 0 => Err(e),
            _ => Ok(accepted),
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>, deadline: Instant) -> Result<usize> {
        loop {
            self.collect();
            let count = self.hand_out(out);
            if count > 0 {
                return Ok(count);
            }
            self.check()?;
            match self.events.recv_deadline(deadline) {
                Ok(event) => self.note(event),
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => return Ok(0),
                Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                    return Err(Error::State("the threads of the lanes have ended"));
                }
            }
        }
    }

    fn fence(&mut self, tag: FenceTag) -> Result<()> {
        self.collect();
        self.check()?;
        self.acks.send(tag)?;
        self.put_on_all(Item::Fence(tag));
        Ok(())
    }

    fn last_fence(&mut self, tag: FenceTag) -> Result<()> {
        self.collect();
        self.check()?;
        self.acks.send_last(tag)?;
        self.put_on_all(Item::LastFence(tag));
        Ok(())
    }

    fn bytes_on_wire(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }
}

/// Whether the request may be posted at all.
fn admit(request: &WorkRequest, regions: &[Arc<MemoryRegion>]) -> Result<()> {
    request.check()?;
    if !regions.iter().any(|region| Arc::ptr_eq(region, request.local.region())) {
        return Err(Error::State("posting memory of a region that was not registered"));
    }
    Ok(())
}

impl Drop for TcpInitiator {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.inbox.stop();
            // An error means that the connection is gone, which is what is wanted.
            lane.stream.shutdown();
        }
        for lane in &mut self.lanes {
            if let Some(thread) = lane.thread.take() {
                // A thread that panicked has said so on stderr; there is nobody to tell here.
                let _ = thread.join();
            }
        }
    }
}
