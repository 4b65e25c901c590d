//! The lanes of a session at the destination: listens for them, by RDMA if both hosts can, and
//! takes them.

use crate::destination::listener::Incoming;
use crate::error::{Error, Result};
use crate::host::descriptors;
use crate::net::Connection;
use crate::net::choice::{CONNECT_MAX, LinkChoice, Transport, as_refusal, why_not};
use crate::notice::say;
use crate::protocol::{Lanes, RdmaAnswer};
use pageferry_transport::Target;
use pageferry_transport::preamble::Token;
use pageferry_transport::rdma::RdmaListener;
use std::net::IpAddr;
use std::time::Instant;

/// Before a receiver says that it waits: fails, with the fix, if this host can take no guest in the
/// chosen way.
pub fn check_receiver(choice: &LinkChoice) -> Result<()> {
    descriptors::ensure(descriptors::RECEIVER, "a receiver")?;
    match (pageferry_transport::tcp::probe().map_err(Error::from), choice.transport) {
        (Err(e), Transport::Tcp) => Err(as_refusal(e)),
        // RDMA may do without it, and which it will be is known when a source has come.
        (Err(e), Transport::Auto) => {
            say(&format!("guests can come by RDMA alone: {}", e.chain()));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// A destination's readiness to take lanes by RDMA, if it has any.
#[derive(Debug)]
pub struct Listening(Option<RdmaListener>);

impl Listening {
    /// Listens by RDMA at `local`, the address that the source has reached, if both sides would
    /// have it.
    #[must_use]
    pub fn start(
        choice: &LinkChoice,
        wanted: bool,
        local: Option<IpAddr>,
        token: Token,
        lanes: u8,
    ) -> (Self, RdmaAnswer) {
        if !wanted {
            return (Self(None), RdmaAnswer::No("it was not asked for".into()));
        }
        if choice.transport == Transport::Tcp {
            return (Self(None), RdmaAnswer::No("it was started with --transport tcp".into()));
        }
        let Some(local) = local else {
            return (
                Self(None),
                RdmaAnswer::No("the control connection does not go over IP".into()),
            );
        };
        match RdmaListener::bind(local, token, lanes, &choice.options()) {
            Ok(listener) => {
                let port = listener.port();
                (Self(Some(listener)), RdmaAnswer::Port(port))
            }
            Err(e) => (Self(None), RdmaAnswer::No(why_not(e))),
        }
    }

    /// Takes the lanes that the source says it has opened. `collect` waits for those that are
    /// connections.
    pub fn take(
        self,
        choice: &LinkChoice,
        lanes: Lanes,
        collect: impl FnOnce() -> Result<Vec<Box<dyn Connection>>>,
    ) -> Result<Box<dyn Target>> {
        match (lanes, self.0) {
            (Lanes::Rdma, Some(listener)) => {
                Ok(Box::new(listener.into_target(Instant::now() + CONNECT_MAX)?))
            }
            (Lanes::Rdma, None) => {
                Err(Error::Protocol("lanes by RDMA where none were offered".into()))
            }
            (Lanes::Tcp, _) if choice.transport == Transport::Rdma => Err(Error::refused(
                "this receiver takes guests by RDMA alone (--transport rdma), and the source came by TCP",
            )),
            (Lanes::Tcp, _) => {
                let mut connections = collect()?;
                let first = connections.remove(0);
                first.into_target(connections).map_err(as_refusal)
            }
        }
    }
}

/// The lanes of one session that are connections, as they come.
#[derive(Debug)]
pub struct LaneCollector {
    token: Token,
    lanes: Vec<Option<Box<dyn Connection>>>,
}

impl LaneCollector {
    /// For this many lanes that know the token.
    #[must_use]
    pub fn new(token: Token, lanes: u8) -> Self {
        Self { token, lanes: (0..lanes).map(|_| None).collect() }
    }

    /// Takes a connection if it is one of these lanes; gives it back if it is anything else.
    pub fn take(&mut self, incoming: Incoming) -> Result<Option<Incoming>> {
        match incoming {
            Incoming::Lane { index, token, connection } if token == self.token => {
                match self.lanes.get_mut(usize::from(index)) {
                    Some(lane @ None) => *lane = Some(connection),
                    _ => {
                        return Err(Error::Protocol(format!(
                            "lane {index} was opened twice or not agreed on"
                        )));
                    }
                }
                Ok(None)
            }
            other => Ok(Some(other)),
        }
    }

    /// Whether all of them are there.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.lanes.iter().all(Option::is_some)
    }

    /// The lanes that are there, in their order.
    #[must_use]
    pub fn into_lanes(self) -> Vec<Box<dyn Connection>> {
        self.lanes.into_iter().flatten().collect()
    }
}
