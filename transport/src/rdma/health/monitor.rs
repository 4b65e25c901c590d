//! A thread that hears what the device and the connection manager say by themselves: port down,
//! device gone, the peer has disconnected. What ends the link is told to its [`Health`].
//!
//! All links of a process on one device read asynchronous events from one descriptor, and each
//! event comes once. So whoever reads it tells every link that it concerns.

use crate::error::{Error, Result};
use crate::failure::LaneFailure;
use crate::rdma::health::{Bell, Health, wait_readable};
use crate::rdma::verbs::cm::{Channel, Event, Id};
use crate::rdma::verbs::words::{connection_event, fatal_event};
use rdma_sys::ibv_async_event;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

/// What a link is made of, by the names that events use.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) device: String,
    pub(crate) context: usize,
    pub(crate) port: u8,
    /// A lane's queue pair and identifier.
    pub(crate) lanes: Vec<(usize, usize)>,
}

/// Every link of this process.
static LINKS: Mutex<Vec<(Watched, Weak<Health>)>> = Mutex::new(Vec::new());

fn links() -> MutexGuard<'static, Vec<(Watched, Weak<Health>)>> {
    // A list, whole at every moment.
    LINKS.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Monitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

pub(crate) struct Shared {
    watched: Watched,
    channel: Arc<Channel>,
    /// Holds the device open.
    id: Arc<Id>,
    health: Arc<Health>,
    bell: Bell,
    stopping: AtomicBool,
}

impl Monitor {
    /// Watches the link that `watched` names. `id` is on its device.
    pub(crate) fn new(
        watched: Watched,
        channel: Arc<Channel>,
        id: Arc<Id>,
        health: Arc<Health>,
    ) -> Result<Self> {
        let stopping = AtomicBool::new(false);
        let shared =
            Arc::new(Shared { watched, channel, id, health, bell: Bell::new()?, stopping });
        rustix::io::ioctl_fionbio(shared.events_fd(), true)
            .map_err(|e| Error::os("setting up the RDMA device's events", e))?;
        links().push((shared.watched.clone(), Arc::downgrade(&shared.health)));
        let mut this = Self { shared: Arc::clone(&shared), thread: None };
        let thread = std::thread::Builder::new()
            .name("ferry-rdma-events".into())
            .spawn(move || shared.run());
        this.thread =
            Some(thread.map_err(|e| Error::os("starting a thread that hears the device", e))?);
        Ok(this)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.bell.ring();
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
        let health = Arc::as_ptr(&self.shared.health);
        links().retain(|(_, other)| other.as_ptr() != health && other.strong_count() > 0);
    }
}

impl Shared {
    fn events_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context and its descriptor live as long as the identifier, which `self`
        // keeps.
        unsafe { BorrowedFd::borrow_raw((*self.id.context()).async_fd) }
    }

    fn run(&self) {
        let (mut connections, mut events) = (true, true);
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            connections = connections && self.hear_connections();
            events = events && self.hear_device();
            // A descriptor that cannot be read any more would be readable for ever.
            let mut fds = vec![self.bell.as_fd()];
            if connections {
                fds.push(self.channel.fd());
            }
            if events {
                fds.push(self.events_fd());
            }
            if let Err(e) = wait_readable(&fds, None) {
                self.report(format!("its events cannot be waited for: {e}"));
                return;
            }
        }
    }

    fn report(&self, event: String) {
        self.health.fail(LaneFailure::Device { device: self.watched.device.clone(), event });
    }

    /// False if there will be no more.
    fn hear_connections(&self) -> bool {
        loop {
            match self.channel.next() {
                Ok(Some(event)) => self.note(&event),
                Ok(None) => return true,
                Err(e) => {
                    self.report(format!("the connection manager is gone: {e}"));
                    return false;
                }
            }
        }
    }

    fn note(&self, event: &Event) {
        let Some(lane) = self.watched.lanes.iter().position(|&(_, id)| id == event.id) else {
            return;
        };
        match event.kind {
            rdma_sys::RDMA_CM_EVENT_DISCONNECTED | rdma_sys::RDMA_CM_EVENT_TIMEWAIT_EXIT => {
                self.health.fail(LaneFailure::Closed { lane });
            }
            // The way a lane began, which may be told late.
            rdma_sys::RDMA_CM_EVENT_ESTABLISHED => {}
            // A bond has failed over: the queue pair goes on if it can, and breaks by itself if
            // not.
            rdma_sys::RDMA_CM_EVENT_ADDR_CHANGE => tracing::warn!("lane {lane}: its address moved"),
            rdma_sys::RDMA_CM_EVENT_DEVICE_REMOVAL => self.report(connection_event(event.kind)),
            other => self.report(format!("lane {lane}: {}", connection_event(other))),
        }
    }

    /// False if there will be no more.
    fn hear_device(&self) -> bool {
        let verbs = &self.id.libraries().verbs;
        loop {
            let mut event = ibv_async_event::default();
            // SAFETY: the context is open as long as the identifier, and the event may be written.
            if unsafe { verbs.ibv_get_async_event(self.id.context(), &raw mut event) } != 0 {
                let e = std::io::Error::last_os_error();
                return match e.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => true,
                    _ => {
                        self.report(format!("the device is gone: {e}"));
                        false
                    }
                };
            }
            let told = Told::of(&event);
            // At once: a queue pair with an event that was not acknowledged cannot be destroyed.
            // SAFETY: gotten above.
            unsafe { verbs.ibv_ack_async_event(&raw mut event) };
            told.tell(self.watched.context);
        }
    }
}

/// An asynchronous event, copied.
#[derive(Debug, Clone, Copy)]
struct Told {
    kind: u32,
    about: About,
}

#[derive(Debug, Clone, Copy)]
enum About {
    QueuePair(usize),
    Port(i32),
    Device,
}

impl Told {
    fn of(event: &ibv_async_event) -> Self {
        let kind = event.event_type;
        let about = match kind {
            rdma_sys::IBV_EVENT_QP_FATAL
            | rdma_sys::IBV_EVENT_QP_REQ_ERR
            | rdma_sys::IBV_EVENT_QP_ACCESS_ERR => {
                // SAFETY: for these the element is a queue pair; only its address is taken.
                About::QueuePair(unsafe { event.element.qp }.addr())
            }
            rdma_sys::IBV_EVENT_PORT_ERR | rdma_sys::IBV_EVENT_LID_CHANGE => {
                // SAFETY: for these the element is a port.
                About::Port(unsafe { event.element.port_num })
            }
            _ => About::Device,
        };
        Self { kind, about }
    }

    /// Tells every link of this process that it concerns.
    fn tell(self, context: usize) {
        let Some(name) = fatal_event(self.kind) else {
            tracing::debug!("event {} of an RDMA device", self.kind);
            return;
        };
        for (watched, health) in links().iter().filter(|(watched, _)| watched.context == context) {
            let Some(health) = health.upgrade() else { continue };
            let event = match self.about {
                About::QueuePair(name_of) => {
                    match watched.lanes.iter().position(|&(queue_pair, _)| queue_pair == name_of) {
                        Some(lane) => format!("lane {lane}: {name}"),
                        None => continue,
                    }
                }
                About::Port(port) if port != i32::from(watched.port) => continue,
                About::Port(port) => format!("port {port}: {name}"),
                About::Device => name.to_owned(),
            };
            health.fail(LaneFailure::Device { device: watched.device.clone(), event });
        }
    }
}
