//! The choice of the link, at both ends: queue pairs where both hosts have a way to each other by RDMA,
//! TCP otherwise, and one line that says what was taken and why not the other.
//!
//! ```text
//!   source                                    destination
//!   Hello { rdma: true }           ---->      listens by RDMA at the address that Hello came to
//!                                  <----      Welcome { rdma: Port(p) | No(why) }
//!   lanes by RDMA to port p; if there is no way (auto): by TCP
//!   Offer { link: Rdma | Tcp }     ---->      takes those lanes
//! ```
//!
//! Only set-up falls back here. A path that breaks later aborts the migration, and
//! [`crate::source::migrate`] tries once more by TCP.

use crate::descriptors;
use crate::error::{Error, Result};
use crate::net::{Address, Connection};
use crate::output::say;
use crate::protocol::{Lanes, RdmaAnswer};
use clap::{Args, ValueEnum};
use pageferry_transport::preamble::Token;
use pageferry_transport::rdma::{RdmaInitiator, RdmaListener, RdmaOptions};
use pageferry_transport::{Initiator, Target};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// For all lanes to be connected by RDMA: milliseconds on a live path, but the connection manager repeats a
/// lost request only after 4.2 s (`cma_response_timeout`), and a link that has just come up loses some.
const CONNECT_MAX: Duration = Duration::from_secs(15);

/// What may carry the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RDMA where both hosts have a path to each other by it, TCP otherwise.
    #[default]
    Auto,
    /// RDMA or nothing.
    Rdma,
    /// TCP on io_uring; RDMA is not touched.
    Tcp,
}

/// What may carry the data, and how RDMA is used if it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct LinkChoice {
    /// What carries the data.
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,
    /// RDMA device that must be used, such as mlx5_0. [default: the one that has the address]
    #[arg(long, value_name = "DEVICE", help_heading = "RDMA")]
    pub rdma_device: Option<String>,
    /// Port of the device, from 1. [default: the one that has the address]
    #[arg(long, value_name = "PORT", help_heading = "RDMA", value_parser = clap::value_parser!(u8).range(1..))]
    pub rdma_port: Option<u8>,
    /// Index of the local GID; on RoCE it names an address and the version. [default: the system's]
    #[arg(long, value_name = "INDEX", help_heading = "RDMA")]
    pub rdma_gid_index: Option<u8>,
    /// Traffic class of all packets, such as 104 for the DSCP 26. [default: the system's]
    #[arg(long, value_name = "CLASS", help_heading = "RDMA")]
    pub rdma_traffic_class: Option<u8>,
}

impl LinkChoice {
    fn options(&self) -> RdmaOptions {
        RdmaOptions {
            device: self.rdma_device.clone(),
            port: self.rdma_port,
            gid_index: self.rdma_gid_index,
            traffic_class: self.rdma_traffic_class,
            ..RdmaOptions::default()
        }
    }
}

/// Before a receiver says that it waits: fails, with the fix, if this host can take no guest in the chosen way.
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

/// Before lanes are opened, at either end: fails, with the fix, if this process cannot have so many.
pub fn check_lanes(lanes: u8) -> Result<()> {
    descriptors::ensure(descriptors::PER_LANE * u64::from(lanes), &format!("{lanes} lanes"))
}

/// What this host lacks for lanes, found before anything is touched.
fn as_refusal(error: Error) -> Error {
    match error {
        Error::LocalTransport(_) => Error::Refused(error.chain()),
        other => other,
    }
}

/// A registration holds on to the pages that it found. Where a balloon punches a hole and the guest touches
/// that memory again, the guest has new pages and the device would go on reading the old.
pub(crate) const BALLOONED: &str =
    "the guest has a balloon, free page reporting or virtio-mem, which take memory away under a registration";

/// What a source asks for once it has looked at the user's choice, the address and the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    choice: LinkChoice,
    /// Why RDMA is not asked for.
    not_rdma: Option<String>,
}

impl Wish {
    /// `discards`: memory may be taken away from the guest while it runs.
    ///
    /// # Errors
    /// [`Error::Refused`] if the user wants RDMA or nothing and the guest cannot have it.
    pub fn new(choice: &LinkChoice, to: &Address, discards: bool) -> Result<Self> {
        let not_rdma = match choice.transport {
            Transport::Tcp => Some("as asked for".into()),
            Transport::Rdma if discards => {
                return Err(Error::refused(format!(
                    "RDMA cannot carry this guest: {BALLOONED}; unplug that device or use --transport tcp"
                )));
            }
            Transport::Rdma if to.tcp().is_none() => {
                return Err(Error::refused(format!("RDMA cannot go to {to}: give an address, HOST:PORT")));
            }
            Transport::Rdma => None,
            Transport::Auto if discards => Some(format!("not RDMA: {BALLOONED}")),
            Transport::Auto if to.is_local() => {
                let host = to.ip().map_or_else(|| to.to_string(), |ip| ip.to_string());
                Some(format!("not RDMA: {host} is this very host"))
            }
            Transport::Auto => None,
        };
        Ok(Self { choice: choice.clone(), not_rdma })
    }

    /// The same, by TCP.
    #[must_use]
    pub fn by_tcp(&self, why: &str) -> Self {
        Self { choice: self.choice.clone(), not_rdma: Some(why.into()) }
    }

    /// Whether the destination is asked to listen by RDMA.
    #[must_use]
    pub fn rdma(&self) -> bool {
        self.not_rdma.is_none()
    }
}

/// The lanes that a source has opened.
pub struct Opened {
    /// The lanes.
    pub link: Box<dyn Initiator>,
    /// What was taken and why not the other, in one line.
    pub taken: String,
}

impl Opened {
    /// What the Offer says of it.
    #[must_use]
    pub fn lanes(&self) -> Lanes {
        match self.link.kind() {
            pageferry_transport::TransportKind::Rdma => Lanes::Rdma,
            _ => Lanes::Tcp,
        }
    }
}

/// Opens the lanes of a session: by RDMA if both sides would, else the connections that `dial` makes.
/// `from` is this side's address of the control connection.
pub fn open(
    wish: &Wish,
    answer: &RdmaAnswer,
    to: &Address,
    from: Option<IpAddr>,
    token: Token,
    lanes: u8,
    dial: impl FnOnce() -> Result<Vec<Box<dyn Connection>>>,
) -> Result<Opened> {
    let why = match (&wish.not_rdma, answer) {
        (Some(why), _) => why.clone(),
        (None, RdmaAnswer::No(why)) => format!("not RDMA: the destination says: {why}"),
        (None, RdmaAnswer::Port(port)) => match by_rdma(wish, *port, to, from, token, lanes) {
            Ok(link) => {
                let taken = format!("RDMA: {}", link.path());
                return Ok(Opened { link: Box::new(link), taken });
            }
            Err(e) => format!("not RDMA: {}", why_not(e)),
        },
    };
    if wish.choice.transport == Transport::Rdma {
        return Err(Error::refused(format!(
            "{why}; `pageferry doctor` on both hosts shows what is missing, --transport auto would take TCP"
        )));
    }
    check_lanes(lanes)?;
    let mut connections = dial()?;
    let first = connections.remove(0);
    let link = first.into_initiator(connections).map_err(as_refusal)?;
    let taken = if to.tcp().is_some() { format!("TCP, {why}") } else { format!("a local socket, {why}") };
    Ok(Opened { link, taken })
}

/// Connects all lanes by RDMA to that port of the destination.
fn by_rdma(
    wish: &Wish,
    port: u16,
    to: &Address,
    from: Option<IpAddr>,
    token: Token,
    lanes: u8,
) -> pageferry_transport::Result<RdmaInitiator> {
    let Some(mut at) = to.tcp() else {
        return Err(pageferry_transport::Error::NoPath { what: format!("{to} is no IP address") });
    };
    // The address that the control connection came from leads there, unless the user says otherwise.
    let from = from.filter(|_| wish.choice.rdma_gid_index.is_none());
    at.set_port(port);
    let deadline = Instant::now() + CONNECT_MAX;
    RdmaInitiator::connect(at, from, token, lanes, &wish.choice.options(), deadline)
}

/// A destination's readiness to take lanes by RDMA, if it has any.
#[derive(Debug)]
pub struct Listening(Option<RdmaListener>);

impl Listening {
    /// Listens by RDMA at `local`, the address that the source has reached, if both sides would have it.
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
            return (Self(None), RdmaAnswer::No("the control connection does not go over IP".into()));
        };
        match RdmaListener::bind(local, token, lanes, &choice.options()) {
            Ok(listener) => {
                let port = listener.port();
                (Self(Some(listener)), RdmaAnswer::Port(port))
            }
            Err(e) => (Self(None), RdmaAnswer::No(why_not(e))),
        }
    }

    /// Takes the lanes that the source says it has opened. `collect` waits for those that are connections.
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
            (Lanes::Rdma, None) => Err(Error::Protocol("lanes by RDMA where none were offered".into())),
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

/// Why there is no way by RDMA, for people.
fn why_not(error: pageferry_transport::Error) -> String {
    match error {
        pageferry_transport::Error::NoPath { what } => what,
        other => Error::from(other).chain(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Network, System};

    fn choice(transport: Transport) -> LinkChoice {
        LinkChoice { transport, ..LinkChoice::default() }
    }

    #[test]
    fn rdma_is_asked_for_only_where_it_can_serve() {
        let (away, here): (Address, Address) =
            ("10.0.0.2:1".parse().unwrap(), "127.0.0.1:1".parse().unwrap());
        let (away, here) = (&away, &here);
        let wish = |transport, to, discards| Wish::new(&choice(transport), to, discards);
        assert!(wish(Transport::Auto, away, false).unwrap().rdma());
        assert!(wish(Transport::Rdma, here, false).unwrap().rdma());
        for (transport, to, discards) in
            [(Transport::Auto, here, false), (Transport::Auto, away, true), (Transport::Tcp, away, false)]
        {
            assert!(!wish(transport, to, discards).unwrap().rdma(), "{transport:?} {to} {discards}");
        }
        let refused = wish(Transport::Rdma, away, true).unwrap_err();
        assert!(matches!(&refused, Error::Refused(why) if why.contains("balloon")), "{refused}");
    }

    #[test]
    fn a_destination_without_rdma_is_no_error_unless_nothing_else_will_do() {
        let to = &"10.0.0.2:1".parse().unwrap();
        let no = RdmaAnswer::No("no device".into());
        let from = Some("10.0.0.1".parse().unwrap());
        let open = |transport| {
            let wish = Wish::new(&choice(transport), to, false).unwrap();
            open(&wish, &no, to, from, Token::default(), 1, || {
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                let at = listener.local_addr().unwrap().into();
                System.connect(&at, CONNECT_MAX).map(|lane| vec![lane])
            })
        };
        let opened = open(Transport::Auto).unwrap();
        assert_eq!(opened.taken, "TCP, not RDMA: the destination says: no device");
        assert_eq!(opened.lanes(), Lanes::Tcp);
        let refused = open(Transport::Rdma).err().unwrap();
        assert!(matches!(&refused, Error::Refused(why) if why.contains("no device")), "{refused}");
    }
}
