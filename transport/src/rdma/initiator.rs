//! The end that pushes: finds the keys of each write, hands it to its lane, and collects what the
//! lanes have done. Everything happens on the caller's thread but registration and bad news.

use super::health::{Health, REASON_PATIENCE, wait_readable};
use super::lane::{Lane, News, Piece};
use crate::credit::Window;
use crate::error::{Error, Result};
use crate::failure::LaneFailure;
use crate::fences::Acks;
use crate::link::{Initiator, TransportKind};
use crate::preamble::Token;
use crate::rdma::admission::{Admission, Keys, Refused};
use crate::rdma::depths::chunk_stripes;
use crate::rdma::health::monitor::Monitor;
use crate::rdma::lane::chain::Local;
use crate::rdma::lane::message::{Message, Stripes};
use crate::rdma::memory::keys::{Pins, Remote, RemoteKeys};
use crate::rdma::memory::pinner::{DevicePinner, Side};
use crate::rdma::memory::registrar::{Job, Pinner, Registrar, expect, give_up_memory};
use crate::rdma::null::{NoPins, Null};
use crate::rdma::setup::connect::{Connections, connect};
use crate::rdma::setup::path::{Path, RdmaOptions};
use crate::rdma::verbs::objects::{Completions, Domain};
use crate::region::{MemoryRegion, RemoteRegion};
use crate::stripe::{STRIPE_BYTES, lane_of};
use crate::work::{Completion, FenceTag, WorkRequest};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The target is told how far we are at most this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

const STRIPE: usize = STRIPE_BYTES as usize;

/// The initiator of an RDMA link. Dropping it closes its lanes at once; only a fence that was
/// polled proves that what was posted has arrived.
#[derive(Debug)]
pub struct RdmaInitiator {
    lanes: Vec<Lane>,
    registrar: Option<Registrar>,
    health: Arc<Health>,
    device: Option<Device>,
    path: Path,
    /// Registered regions; the last that was posted from is looked at first.
    regions: Vec<Arc<Pins>>,
    recent: usize,
    remote: RemoteKeys,
    /// Stripes that the target must be asked for.
    wants: VecDeque<Stripes>,
    /// What a post was refused for, until it is there.
    refused: Option<Refused>,
    acks: Acks,
    news: News,
    written: Vec<Completion>,
    fenced: Vec<FenceTag>,
    told: (Instant, u64),
    /// Once the link has broken: until when we listen for the reason.
    explained_by: Option<Instant>,
    chunk: usize,
    write_bytes_max: usize,
}

/// What only a real device has.
pub(crate) struct Device {
    monitor: Monitor,
    completions: Arc<Completions>,
    domain: Arc<Domain>,
}

impl RdmaInitiator {
    /// Connects every lane to a target's listener, from this host's address `from` if one is given.
    ///
    /// # Errors
    /// [`Error::NoPath`] where this host and that one have no RDMA to each other: then another
    /// transport may do.
    pub fn connect(
        to: SocketAddr,
        from: Option<IpAddr>,
        token: Token,
        lanes: u8,
        options: &RdmaOptions,
        deadline: Instant,
    ) -> Result<Self> {
        let connections = connect(to, from, token, lanes, options, deadline)?;
        let health = Arc::new(Health::new()?);
        let watched = connections.watched();
        let Connections { queues, domain, completions, channel, path, limits } = connections;
        let pinner = DevicePinner::new(&domain, Side::Initiator);
        let window =
            Window { bytes: options.window_bytes, requests: options.window_requests.max(1) };
        let lanes = (queues.into_iter().enumerate())
            .map(|(index, queue)| {
                Lane::new(index, Box::new(queue), window, limits.writes, path.active_mtu)
            })
            .collect();
        let monitor = Monitor::new(watched, channel, Arc::clone(domain.id()), Arc::clone(&health))?;
        let mut this = Self::over(lanes, Box::new(pinner), health, path, options)?;
        this.device = Some(Device { monitor, completions, domain });
        this.write_bytes_max = limits.write_bytes as usize;
        // Of an iWARP connection it is the side that connected which must speak first (RFC 5044,
        // 7.1).
        this.lanes[0].send(&Message::Taken).map_err(|failure| Error::from(&failure))?;
        Ok(this)
    }

    /// An initiator whose device does everything at once and nothing really, for measuring what a
    /// page costs on the way to it. The target's regions are known and ready.
    #[doc(hidden)]
    pub fn without_device(
        lanes: usize,
        regions: &[RemoteRegion],
        options: &RdmaOptions,
    ) -> Result<Self> {
        let window = Window { bytes: options.window_bytes, requests: options.window_requests };
        let lanes = (0..lanes)
            .map(|index| {
                Lane::new(index, Box::new(Null::default()), window, super::lane::WRITES_MAX, 4096)
            })
            .collect();
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let path = Path {
            device: "none".into(),
            port: 1,
            gid: String::new(),
            link: "nothing".into(),
            active_mtu: 4096,
            from: nowhere,
            to: nowhere,
        };
        let mut this =
            Self::over(lanes, Box::new(NoPins), Arc::new(Health::new()?), path, options)?;
        for region in regions {
            let (first, count) = (region.base / STRIPE_BYTES, region.len.div_ceil(STRIPE_BYTES));
            let count = u32::try_from(count).map_err(|_| Error::State("a region of that size"))?;
            let stripes = Stripes { region: region.key.0, first, count };
            this.remote
                .grant(crate::rdma::lane::message::Grant { stripes, key: 0 })
                .map_err(|what| Error::Bounds { what })?;
        }
        Ok(this)
    }

    fn over(
        lanes: Vec<Lane>,
        pinner: Box<dyn Pinner>,
        health: Arc<Health>,
        path: Path,
        options: &RdmaOptions,
    ) -> Result<Self> {
        let waiting = Arc::clone(&health);
        let ready = Box::new(move |_: &Job, _: u32| waiting.bell.ring());
        Ok(Self {
            acks: Acks::new(lanes.len()),
            lanes,
            registrar: Some(Registrar::new(pinner, ready, Arc::clone(&health))?),
            health,
            device: None,
            path,
            regions: Vec::new(),
            recent: 0,
            remote: RemoteKeys::default(),
            wants: VecDeque::new(),
            refused: None,
            news: News::default(),
            written: Vec::new(),
            fenced: Vec::new(),
            told: (Instant::now(), 0),
            explained_by: None,
            chunk: chunk_stripes(options.chunk_bytes),
            write_bytes_max: STRIPE,
        })
    }

    /// The way that the link takes.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes in what the lanes have done and what the target says, and answers it. True if there
    /// was anything.
    fn collect(&mut self) -> bool {
        let before = (self.written.len(), self.fenced.len());
        let mut heard = false;
        for index in 0..self.lanes.len() {
            let collected = self.lanes[index].collect(&mut self.written, &mut self.news);
            // What came before a failure, too.
            if let Err(failure) = self.digest(index, &mut heard).and(collected) {
                self.health.fail(failure);
                break;
            }
        }
        if !self.health.broken()
            && let Err(failure) = self.tell()
        {
            self.health.fail(failure);
        }
        heard || before != (self.written.len(), self.fenced.len())
    }

    fn digest(&mut self, lane: usize, heard: &mut bool) -> Result<(), LaneFailure> {
        let protocol = |what: String| LaneFailure::Protocol { lane, what };
        for message in self.news.messages.drain(..) {
            *heard = true;
            match message {
                Message::Ready(grants) => {
                    for grant in grants {
                        self.remote.grant(grant).map_err(protocol)?;
                    }
                }
                Message::Reached(tag) => {
                    if !self.acks.reach(tag, &mut self.fenced) {
                        return Err(protocol(format!("the fence {}, which was not sent", tag.0)));
                    }
                }
                Message::Shift { region, by } => self.remote.shift(region, by).map_err(protocol)?,
                other => return Err(protocol(format!("{other:?} from the target"))),
            }
        }
        Ok(())
    }

    /// Sends what the target must know: wishes, and now and then how far we are. Fences say that
    /// too.
    fn tell(&mut self) -> Result<(), LaneFailure> {
        self.lanes[0].acknowledge()?;
        if self.acks.check_open().is_err() {
            // Behind the last fence the target hears nothing.
            return Ok(());
        }
        while let Some(&stripes) = self.wants.front() {
            if !self.lanes[0].send(&Message::Want(stripes))? {
                return Ok(());
            }
            self.wants.pop_front();
        }
        let bytes = self.lanes.iter().map(Lane::written_bytes).sum();
        if bytes > self.told.1
            && self.told.0.elapsed() >= PROGRESS_EVERY
            && self.lanes[0].send(&Message::Progress(bytes))?
        {
            self.told = (Instant::now(), bytes);
        }
        Ok(())
    }

    /// Sends the wishes that have come up.
    #[inline]
    fn wish(&mut self) {
        if !self.wants.is_empty()
            && let Err(failure) = self.tell()
        {
            self.health.fail(failure);
        }
    }

    /// The failure of the link, if there is one. A peer that has hung up may have done so because
    /// of one of our own writes, whose completion then comes a little later and says more.
    fn check(&mut self) -> Result<()> {
        if !self.health.broken() {
            return Ok(());
        }
        let deadline = *self.explained_by.get_or_insert_with(|| Instant::now() + REASON_PATIENCE);
        while self.health.wonders()
            && !self.lanes.iter().all(Lane::is_idle)
            && Instant::now() < deadline
        {
            self.collect();
            std::thread::yield_now();
        }
        self.health.check()
    }

    /// The keys of a write, or what of its memory is missing and what is known of the remote part.
    #[inline]
    fn keys(
        &mut self,
        request: &WorkRequest,
    ) -> Result<std::result::Result<Keys, (Refused, Remote)>> {
        request.check()?;
        let region = self.find(request)?;
        let (offset, len) = (request.local.offset(), request.local.len());
        let stripes = offset / STRIPE..(offset + len - 1) / STRIPE + 1;
        let remote = (request.remote.key.0, request.remote.addr / STRIPE_BYTES);
        let pins = &self.regions[region];
        let first = pins.key(stripes.start);
        let last = if stripes.len() == 1 { first } else { pins.key(stripes.end - 1) };
        let known = self.remote.get(remote.0, remote.1);
        Ok(match (first, last, known) {
            (Some(first), Some(last), Remote::Ready(remote)) => {
                Ok(Keys { first, last, remote, stripes })
            }
            _ => Err((Refused { region, stripes, remote }, known)),
        })
    }

    /// Gives one request to its lane, if there is room and its memory is ready at both ends.
    #[inline]
    fn admit(&mut self, request: &WorkRequest) -> Result<Admission> {
        let Keys { first: first_key, last: last_key, remote: remote_key, stripes } =
            match self.keys(request)? {
                Ok(keys) => keys,
                Err((refused, known)) => {
                    self.prepare(refused, known)?;
                    return Ok(Admission::NotReady);
                }
            };
        let (offset, len) = (request.local.offset(), request.local.len());
        let on_device = self.remote.on_device(request.remote.key.0, request.remote.addr);
        let lane = lane_of(request.remote.addr, self.lanes.len());
        let lane = &mut self.lanes[lane];
        // Where the key of the local memory changes, if it does. A write is no longer than a
        // stripe.
        let first_len = if first_key == last_key {
            len
        } else {
            stripes.end.saturating_sub(1) * STRIPE - offset
        };
        let max = self.write_bytes_max;
        // Nearly always one, and then no division is spent on it.
        let whole = first_len == len && len <= max;
        let pieces =
            if whole { 1 } else { first_len.div_ceil(max) + (len - first_len).div_ceil(max) };
        if !lane.admit(len as u64, pieces) {
            return Ok(Admission::NoCredit);
        }
        let mut at = 0;
        while at < len {
            let (end, key) = if at < first_len { (first_len, first_key) } else { (len, last_key) };
            let piece = (end - at).min(max);
            // A piece is no longer than a stripe, so 32 bits hold its length.
            let addr = request.local.as_ptr().addr() as u64 + at as u64;
            let local = Local { addr, len: piece as u32, key };
            let to = on_device.wrapping_add(at as u64);
            at += piece;
            let piece = Piece { id: request.id, local, addr: to, key: remote_key, last: at == len };
            if let Err(failure) = lane.write(piece) {
                self.health.fail(failure);
                self.health.check()?;
            }
        }
        Ok(Admission::Posted)
    }

    #[inline]
    fn find(&mut self, request: &WorkRequest) -> Result<usize> {
        let is = |pins: &Arc<Pins>| Arc::ptr_eq(pins.region(), request.local.region());
        if self.regions.get(self.recent).is_some_and(is) {
            return Ok(self.recent);
        }
        self.recent = (self.regions.iter().position(is))
            .ok_or(Error::State("posting memory of a region that was not registered"))?;
        Ok(self.recent)
    }

    /// Has memory made ready that nobody expected, at either end.
    #[cold]
    fn prepare(&mut self, refused: Refused, known: Remote) -> Result<()> {
        let (key, stripe) = refused.remote;
        match known {
            Remote::Foreign => {
                let what = format!(
                    "a write to {:#x}, which does not belong to the target's region {key}",
                    stripe.saturating_mul(STRIPE_BYTES)
                );
                return Err(Error::Bounds { what });
            }
            Remote::Unknown => {
                self.remote.asked(stripe);
                match self.wants.back_mut() {
                    // One that has not been sent yet takes in its neighbour.
                    Some(last)
                        if last.region == key && last.first + u64::from(last.count) == stripe =>
                    {
                        last.count += 1;
                    }
                    _ => self.wants.push_back(Stripes { region: key, first: stripe, count: 1 }),
                }
            }
            Remote::Asked | Remote::Ready(_) => {}
        }
        let pins = Arc::clone(&self.regions[refused.region]);
        let jobs = pins.claim(&pins.bytes(&refused.stripes), self.chunk);
        if let Some(registrar) = &self.registrar {
            registrar.urge(&pins, &refused.stripes, jobs);
        }
        self.refused = Some(refused);
        Ok(())
    }

    /// Whether what the last post was refused for is there now.
    fn may_retry(&self) -> bool {
        self.refused.as_ref().is_some_and(|Refused { region, stripes, remote }| {
            matches!(self.remote.get(remote.0, remote.1), Remote::Ready(_) | Remote::Foreign)
                && stripes.clone().all(|stripe| self.regions[*region].key(stripe).is_some())
        })
    }

    /// Hands out what is ready. Credits come back here and not before, so that completions which
    /// nobody reads cannot pile up.
    fn hand_out(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        out.append(&mut self.written);
        out.extend(self.fenced.drain(..).map(Completion::Fence));
        if out.len() > before {
            self.lanes.iter_mut().for_each(Lane::settle);
        }
        out.len() - before
    }

    fn send_fence(&mut self, tag: FenceTag, is_last: bool) -> Result<()> {
        self.collect();
        self.check()?;
        if !self.lanes.iter().all(Lane::can_fence) {
            return Err(Error::State("too many fences are on their way: poll first"));
        }
        self.acks.send(tag)?;
        let bytes = self.lanes.iter().map(Lane::posted_bytes).sum();
        self.on_lanes(|lane| lane.fence(tag, bytes, is_last))
    }

    fn on_lanes(&mut self, work: impl FnMut(&mut Lane) -> Result<(), LaneFailure>) -> Result<()> {
        match self.lanes.iter_mut().try_for_each(work) {
            Ok(()) => Ok(()),
            Err(failure) => {
                self.health.fail(failure);
                self.check()
            }
        }
    }
}

impl Initiator for RdmaInitiator {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn register(&mut self, region: &Arc<MemoryRegion>) -> Result<()> {
        if !self.regions.iter().any(|pins| Arc::ptr_eq(pins.region(), region)) {
            let index =
                u32::try_from(self.regions.len()).map_err(|_| Error::State("so many regions"))?;
            self.regions.push(Arc::new(Pins::new(region, index, None)));
        }
        Ok(())
    }

    fn expect(&mut self, region: &Arc<MemoryRegion>, parts: &[Range<usize>]) -> Result<()> {
        self.health.check()?;
        let pins = (self.regions.iter().find(|pins| Arc::ptr_eq(pins.region(), region)))
            .ok_or(Error::State("expecting writes from a region that was not registered"))?;
        expect(self.registrar.as_ref(), pins, parts, self.chunk)
    }

    fn make_ready(&mut self, writes: &[WorkRequest]) -> Result<bool> {
        self.collect();
        self.check()?;
        self.refused = None;
        for write in writes {
            if let Err((refused, known)) = self.keys(write)? {
                self.prepare(refused, known)?;
            }
        }
        self.wish();
        Ok(self.refused.is_none())
    }

    fn is_ready(&mut self, write: &WorkRequest) -> Result<bool> {
        Ok(self.keys(write)?.is_ok())
    }

    fn registrations(&self) -> u64 {
        self.registrar.as_ref().map_or(0, Registrar::made) + self.remote.grants()
    }

    fn post(&mut self, batch: &[WorkRequest]) -> Result<usize> {
        self.collect();
        self.check()?;
        self.acks.check_open()?;
        let (mut accepted, mut wrong) = (0, None);
        self.refused = None;
        for request in batch {
            match self.admit(request) {
                Ok(Admission::Posted) => accepted += 1,
                Ok(Admission::NoCredit | Admission::NotReady) => break,
                Err(e) => {
                    wrong = Some(e);
                    break;
                }
            }
        }
        self.wish();
        self.on_lanes(Lane::flush)?;
        match wrong {
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
            if self.may_retry() {
                self.refused = None;
                return Ok(0);
            }
            if Instant::now() >= deadline {
                return Ok(0);
            }
            // Armed first, then looked at again: what comes in between rings the bell or is seen.
            self.on_lanes(Lane::arm)?;
            if self.collect() || self.health.broken() || self.may_retry() {
                continue;
            }
            let bell = &self.health.bell;
            match &self.device {
                Some(device) => {
                    wait_readable(&[device.completions.fd(), bell.as_fd()], Some(deadline))?;
                    device.completions.silence();
                }
                None => wait_readable(&[bell.as_fd()], Some(deadline))?,
            }
            bell.silence();
        }
    }

    fn fence(&mut self, tag: FenceTag) -> Result<()> {
        self.send_fence(tag, false)
    }

    fn last_fence(&mut self, tag: FenceTag) -> Result<()> {
        self.send_fence(tag, true)?;
        self.acks.end();
        Ok(())
    }

    fn bytes_on_wire(&self) -> u64 {
        self.lanes.iter().map(Lane::wire_bytes).sum()
    }
}

impl Drop for RdmaInitiator {
    fn drop(&mut self) {
        self.health.end();
        let healthy = !self.health.broken();
        self.lanes.iter_mut().for_each(|lane| lane.close(healthy));
        let lanes = std::mem::take(&mut self.lanes);
        let registrar = self.registrar.take();
        let device = self.device.take();
        give_up_memory(move || {
            drop(device.map(|device| (device.monitor, device.completions)));
            drop((lanes, registrar));
        });
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("id", self.domain.id()).finish_non_exhaustive()
    }
}
