//! The passive side's way to connected lanes: a thread takes those whose private data is right,
//! refuses every other with a reason, and goes on until all are there.

use super::connect::Connections;
use super::limits::{Limits, check_device, check_lanes, libraries, path_of};
use super::path::RdmaOptions;
use crate::error::{Error, Result};
use crate::preamble::{PREAMBLE_BYTES, Preamble, Role, Token};
use crate::rdma::depths::TARGET_DEPTHS;
use crate::rdma::health::{Bell, wait_readable};
use crate::rdma::target::RdmaTarget;
use crate::rdma::verbs::cm::{Channel, Event, Id};
use crate::rdma::verbs::objects::{Completions, Domain};
use crate::rdma::verbs::queue_pair::VerbsQueue;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// Connection requests that wait to be looked at, beside those of our own peer.
const BACKLOG_OF_STRANGERS: i32 = 8;

/// Waits for the lanes of one session. Dropping it refuses those to come.
#[derive(Debug)]
pub struct RdmaListener {
    port: u16,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    outcome: Receiver<Result<Connections>>,
    chunk_bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Shared {
    stopping: AtomicBool,
    bell: Bell,
}

impl RdmaListener {
    /// Listens on a port of the system's choice for `lanes` lanes that know the token.
    ///
    /// # Errors
    /// [`Error::NoPath`] where this host has no RDMA at that address.
    pub fn bind(local: IpAddr, token: Token, lanes: u8, options: &RdmaOptions) -> Result<Self> {
        check_lanes(lanes)?;
        let libraries = libraries()?;
        if libraries.verbs_1_8.is_none() {
            let what = "libibverbs is too old; rdma-core 28 or newer is needed".into();
            return Err(Error::NoPath { what });
        }
        let channel = Channel::new(libraries)?;
        let id = Id::new(&channel)?;
        id.set_options(options.traffic_class)?;
        let address = SocketAddr::new(local, 0);
        id.bind(address).map_err(|e| Error::NoPath {
            what: format!("the address {local} is not one of an RDMA device of this host: {e}"),
        })?;
        if !id.context().is_null() {
            check_device(&id, options)?;
        }
        id.listen(i32::from(lanes) + BACKLOG_OF_STRANGERS)
            .map_err(|e| Error::NoPath { what: format!("listening on {local}: {e}") })?;
        let port = id.local_port();
        let shared = Arc::new(Shared { stopping: AtomicBool::new(false), bell: Bell::new()? });
        let (sender, outcome) = crossbeam_channel::bounded(1);
        let door = Door {
            channel,
            _id: id,
            token,
            options: options.clone(),
            device: None,
            lanes: (0..lanes).map(|_| None).collect(),
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name("ferry-rdma-listen".into())
            .spawn(move || {
                if let Some(connections) = door.run().transpose() {
                    // Nobody takes it if the listener is gone, and then the lanes go too.
                    let _ = sender.send(connections);
                }
            })
            .map_err(|e| Error::os("starting a thread that takes lanes", e))?;
        Ok(Self { port, shared, thread: Some(thread), outcome, chunk_bytes: options.chunk_bytes })
    }

    /// The port that lanes must connect to.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The target, once every lane is there.
    pub fn into_target(self, deadline: Instant) -> Result<RdmaTarget> {
        match self.outcome.recv_deadline(deadline) {
            Ok(connections) => RdmaTarget::new(connections?, self.chunk_bytes),
            Err(RecvTimeoutError::Timeout) => {
                Err(Error::Timeout { what: "every lane of the RDMA link to be connected" })
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::State("the thread that takes lanes has ended"))
            }
        }
    }
}

impl Drop for RdmaListener {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.bell.ring();
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// What the thread knows.
struct Door {
    channel: Arc<Channel>,
    /// Listens as long as it lives.
    _id: Id,
    token: Token,
    options: RdmaOptions,
    /// Known by the first lane.
    device: Option<Device>,
    lanes: Vec<Option<Lane>>,
    shared: Arc<Shared>,
}

pub(crate) struct Device {
    domain: Arc<Domain>,
    completions: Arc<Completions>,
    limits: Limits,
}

pub(crate) struct Lane {
    queue: VerbsQueue,
    established: bool,
}

impl Door {
    /// None if it was told to stop before all lanes were there.
    fn run(mut self) -> Result<Option<Connections>> {
        while !self.lanes.iter().all(|lane| lane.as_ref().is_some_and(|lane| lane.established)) {
            if self.shared.stopping.load(Ordering::Acquire) {
                return Ok(None);
            }
            match self.channel.next()? {
                Some(event) => self.note(event)?,
                None => wait_readable(&[self.channel.fd(), self.shared.bell.as_fd()], None)?,
            }
        }
        let queues: Vec<_> = self.lanes.into_iter().flatten().map(|lane| lane.queue).collect();
        let Some(Device { domain, completions, limits }) = self.device else {
            return Err(Error::State("lanes without a device"));
        };
        queues.iter().for_each(VerbsQueue::shorten_not_ready);
        let path = path_of(&queues[0], &self.options)?;
        Ok(Some(Connections { queues, domain, completions, channel: self.channel, path, limits }))
    }

    fn note(&mut self, mut event: Event) -> Result<()> {
        if let Some(id) = event.new.take() {
            return self.request(id, &event.private);
        }
        let of = |lane: &Option<Lane>| {
            lane.as_ref().is_some_and(|lane| lane.queue.id().name() == event.id)
        };
        let Some(slot) = self.lanes.iter_mut().find(|lane| of(lane)) else { return Ok(()) };
        if event.kind == rdma_sys::RDMA_CM_EVENT_ESTABLISHED {
            if let Some(lane) = slot {
                lane.established = true;
            }
        } else {
            // It broke before it was of any use; the peer may try again.
            *slot = None;
        }
        Ok(())
    }

    /// Takes a lane, or refuses whoever that is. Fails only if no lane can ever be taken.
    fn request(&mut self, id: Id, private: &[u8]) -> Result<()> {
        let slot = match self.admit(&id, private) {
            Ok(slot) => slot,
            Err(why) => {
                tracing::info!("an RDMA connection was refused: {why}");
                id.reject(&why);
                return Ok(());
            }
        };
        let id = Arc::new(id);
        match self.accept(&id) {
            Ok(queue) => self.lanes[slot] = Some(Lane { queue, established: false }),
            Err(e) => {
                id.reject(&e.to_string());
                return Err(e);
            }
        }
        Ok(())
    }

    /// Which lane this is, or why it is none.
    fn admit(&self, id: &Id, private: &[u8]) -> Result<usize, String> {
        let bytes = private.first_chunk::<PREAMBLE_BYTES>().ok_or("not a pageferry lane")?;
        let preamble = Preamble::decode(bytes).map_err(|e| e.to_string())?;
        if !same(&preamble.token, &self.token) {
            return Err("the token is not this session's".into());
        }
        let Role::Lane(lane) = preamble.role else {
            return Err("a control connection does not come by RDMA".into());
        };
        let lane = usize::from(lane);
        match self.lanes.get(lane) {
            None => return Err(format!("there is no lane {lane}")),
            Some(Some(_)) => return Err(format!("lane {lane} is there already")),
            Some(None) => {}
        }
        match &self.device {
            Some(device) if device.domain.id().context() != id.context() => {
                return Err(format!(
                    "this lane came by {}, the others by {}: all must come by one device",
                    id.device(),
                    device.domain.id().device()
                ));
            }
            _ => check_device(id, &self.options).map_err(|e| e.to_string())?,
        }
        Ok(lane)
    }

    fn accept(&mut self, id: &Arc<Id>) -> Result<VerbsQueue> {
        if self.device.is_none() {
            let (domain, completions) = (Domain::new(id)?, Completions::new(id)?);
            self.device = Some(Device { domain, completions, limits: Limits::of(id)? });
        }
        let Some(device) = &self.device else {
            return Err(Error::State("a lane without a device"));
        };
        let depths = device.limits.clip(TARGET_DEPTHS);
        let queue = VerbsQueue::new(&device.domain, id, &device.completions, depths)?;
        id.accept().map_err(|e| Error::os("accepting a lane", e))?;
        Ok(queue)
    }
}

/// Takes the same time wherever they differ.
fn same(a: &Token, b: &Token) -> bool {
    std::hint::black_box(a.0.iter().zip(b.0).fold(0, |differences, (a, b)| differences | (a ^ b)))
        == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_the_same_only_if_every_bit_is() {
        let token = Token([7; 16]);
        assert!(same(&token, &Token([7; 16])));
        for bit in 0..128 {
            let mut other = token;
            other.0[bit / 8] ^= 1 << (bit % 8);
            assert!(!same(&token, &other));
        }
    }
}
