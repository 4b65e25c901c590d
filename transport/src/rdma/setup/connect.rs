//! The active side's way to connected lanes, and what both sides have when all lanes stand.
//!
//! ```text
//!   initiator                                            target (listen.rs)
//!   resolve address -> device -> resolve route
//!   queue pair, receives posted, then
//!   rdma_connect(private data: preamble)  -------------> token and lane right?
//!                                                        queue pair, receives posted, then
//!   ESTABLISHED                           <------------- rdma_accept
//! ```
//!
//! Receives are posted before a peer can send, so a receive queue is never empty.

use super::path::{Path, Port, RdmaOptions};
use crate::error::{Error, Result};
use crate::preamble::{Preamble, Role, Token};
use crate::rdma::depths::initiator_depths;
use crate::rdma::health::monitor::Watched;
use crate::rdma::setup::limits::check_lanes;
use crate::rdma::setup::limits::{Limits, check_device, libraries, path_of};
use crate::rdma::verbs::cm::{Channel, Event, Id};
use crate::rdma::verbs::objects::{Completions, Domain};
use crate::rdma::verbs::queue_pair::VerbsQueue;
use crate::rdma::verbs::words::connection_event;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Looking for the device and the way may take this long: a neighbour that does not answer by then
/// is not there.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(2);

/// The status of a refusal that the application at the other end gave, with its reason.
const REFUSED_BY_APPLICATION: i32 = 28;

/// The status where nobody listens.
const REFUSED_NO_LISTENER: i32 = 8;

/// All lanes of one side, connected.
pub(crate) struct Connections {
    pub(crate) queues: Vec<VerbsQueue>,
    pub(crate) domain: Arc<Domain>,
    pub(crate) completions: Arc<Completions>,
    pub(crate) channel: Arc<Channel>,
    pub(crate) path: Path,
    pub(crate) limits: Limits,
}

impl Connections {
    /// What its monitor listens for.
    pub(crate) fn watched(&self) -> Watched {
        let id = self.domain.id();
        Watched {
            device: self.path.device.clone(),
            context: id.context().addr(),
            port: self.path.port,
            lanes: self.queues.iter().map(|queue| (queue.name(), queue.id().name())).collect(),
        }
    }
}

/// Connects every lane to a listener, from the address `from` if one is given.
pub(crate) fn connect(
    to: SocketAddr,
    from: Option<IpAddr>,
    token: Token,
    lanes: u8,
    options: &RdmaOptions,
    deadline: Instant,
) -> Result<Connections> {
    check_lanes(lanes)?;
    let channel = Channel::new(libraries()?)?;
    let attempt = Attempt { channel: &channel, to, options, deadline };
    let mut from = from.map(|from| SocketAddr::new(from, 0));
    let mut first = attempt.resolve(from)?;
    if let Some(index) = options.gid_index {
        let port = Port::new(&first.device(), first.port());
        let address = port.is_ethernet().then(|| port.gid_address(index)).flatten();
        if let Some(address) = address.filter(|&wanted| Some(wanted.ip()) != local_ip(&first)) {
            from = Some(address);
            first = attempt.resolve(from)?;
        }
    }
    check_device(&first, options)?;
    // The others take the same way, whatever the routes do meanwhile.
    let from = first.addresses().0.map(|address| match address {
        SocketAddr::V4(v4) => SocketAddr::new(IpAddr::V4(*v4.ip()), 0),
        SocketAddr::V6(mut v6) => {
            v6.set_port(0);
            SocketAddr::V6(v6)
        }
    });
    let first = Arc::new(first);
    let limits = Limits::of(&first)?;
    let domain = Domain::new(&first)?;
    let completions = Completions::new(&first)?;
    let depths = limits.clip(initiator_depths(limits.writes));
    let mut queues = Vec::with_capacity(usize::from(lanes));
    let mut path = None;
    for lane in 0..lanes {
        let id = if lane == 0 { Arc::clone(&first) } else { Arc::new(attempt.resolve(from)?) };
        if id.context() != first.context() {
            let what = format!(
                "lane {lane} leads by {}, the first lane by {}",
                id.device(),
                first.device()
            );
            return Err(Error::NoPath { what });
        }
        let queue = VerbsQueue::new(&domain, &id, &completions, depths)?;
        let preamble = Preamble { role: Role::Lane(lane), token };
        id.connect(&preamble.encode())
            .map_err(|e| attempt.no_path(format!("connecting failed: {e}")))?;
        attempt.expect(&id, rdma_sys::RDMA_CM_EVENT_ESTABLISHED)?;
        queue.shorten_not_ready();
        if path.is_none() {
            // Before the last lane: the listener takes no other once it has them all.
            path = Some(path_of(&queue, options)?);
        }
        queues.push(queue);
    }
    let path = path.ok_or(Error::State("a link without lanes"))?;
    Ok(Connections { queues, domain, completions, channel, path, limits })
}

fn local_ip(id: &Id) -> Option<IpAddr> {
    id.addresses().0.map(|address| address.ip())
}

/// One attempt to reach a listener.
struct Attempt<'a> {
    channel: &'a Arc<Channel>,
    to: SocketAddr,
    options: &'a RdmaOptions,
    deadline: Instant,
}

impl Attempt<'_> {
    /// An identifier that knows its device and the way.
    fn resolve(&self, from: Option<SocketAddr>) -> Result<Id> {
        let id = Id::new(self.channel)?;
        id.set_options(self.options.traffic_class)?;
        let left = self.deadline.saturating_duration_since(Instant::now()).min(RESOLVE_PATIENCE);
        let within_ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1);
        let here = from.map_or_else(String::new, |from| format!(" from {}", from.ip()));
        id.resolve_address(from, self.to, within_ms)
            .map_err(|e| self.no_path(format!("no RDMA device leads there{here}: {e}")))?;
        self.expect(&id, rdma_sys::RDMA_CM_EVENT_ADDR_RESOLVED)?;
        id.resolve_route(within_ms)
            .map_err(|e| self.no_path(format!("no route there{here}: {e}")))?;
        self.expect(&id, rdma_sys::RDMA_CM_EVENT_ROUTE_RESOLVED)?;
        Ok(id)
    }

    /// Waits for the next event of an identifier, which must be of this kind.
    fn expect(&self, id: &Id, kind: u32) -> Result<()> {
        loop {
            let event = match self.channel.wait("the RDMA connection", self.deadline) {
                Err(Error::Timeout { .. }) => {
                    return Err(self.no_path("it did not answer in time".into()));
                }
                other => other?,
            };
            if event.id == id.name() {
                return if event.kind == kind { Ok(()) } else { Err(self.no_path(reason(&event))) };
            }
            if event.kind == rdma_sys::RDMA_CM_EVENT_DISCONNECTED {
                return Err(
                    self.no_path("it closed a lane while others were being connected".into())
                );
            }
        }
    }

    fn no_path(&self, why: String) -> Error {
        Error::NoPath { what: format!("to {}: {why}", self.to) }
    }
}

/// Why it was not to be, in words.
fn reason(event: &Event) -> String {
    let what = connection_event(event.kind);
    if event.kind == rdma_sys::RDMA_CM_EVENT_REJECTED {
        return match event.status {
            REFUSED_BY_APPLICATION => format!("it refused: {}", printable(&event.private)),
            REFUSED_NO_LISTENER => "it refused: nobody listens on that port for RDMA".into(),
            status => format!("it refused (reason {status})"),
        };
    }
    match event.status {
        0 => what,
        status if status < 0 => {
            format!("{what}: {}", std::io::Error::from_raw_os_error(status.saturating_neg()))
        }
        status => format!("{what}, status {status}"),
    }
}

/// A peer's words, safe to show.
fn printable(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let text = bytes[..end]
        .iter()
        .map(|&byte| if (0x20..0x7f).contains(&byte) { byte as char } else { '?' });
    match end {
        0 => "without a reason".into(),
        _ => text.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_and_cannot_confuse_a_terminal() {
        let event = |status, private: &[u8]| Event {
            kind: rdma_sys::RDMA_CM_EVENT_REJECTED,
            status,
            id: 1,
            new: None,
            private: private.to_vec(),
        };
        assert_eq!(reason(&event(28, b"wrong token\0\0\0")), "it refused: wrong token");
        assert_eq!(reason(&event(28, b"\x1b[2J\n")), "it refused: ?[2J?");
        assert_eq!(reason(&event(28, b"")), "it refused: without a reason");
        assert!(reason(&event(8, b"")).contains("nobody listens"));
    }

    #[test]
    fn the_number_of_lanes_is_checked() {
        assert!(check_lanes(1).is_ok() && check_lanes(64).is_ok());
        assert!(check_lanes(0).is_err() && check_lanes(65).is_err());
    }
}
