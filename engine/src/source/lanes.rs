//! The choice of the link, at both ends: queue pairs where both hosts have a way to each other by
//! RDMA, TCP otherwise, and one line that says what was taken and why not the other.
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

use crate::error::{Error, Result};
use crate::net::choice::{CONNECT_MAX, LinkChoice, Transport, as_refusal, check_lanes, why_not};
use crate::net::{Address, Connection};
use crate::protocol::{Lanes, RdmaAnswer};
use pageferry_transport::Initiator;
use pageferry_transport::preamble::Token;
use pageferry_transport::rdma::RdmaInitiator;
use std::net::IpAddr;
use std::time::Instant;

/// A registration holds on to the pages that it found. Where a balloon punches a hole and the guest
/// touches that memory again, the guest has new pages and the device would go on reading the old.
pub(crate) const BALLOONED: &str = "the guest has a balloon, free page reporting or virtio-mem, which take memory away under a registration";

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
                return Err(Error::refused(format!(
                    "RDMA cannot go to {to}: give an address, HOST:PORT"
                )));
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

/// Opens the lanes of a session: by RDMA if both sides would, else the connections that `dial`
/// makes. `from` is this side's address of the control connection.
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
    let taken =
        if to.tcp().is_some() { format!("TCP, {why}") } else { format!("a local socket, {why}") };
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
    // The address that the control connection came from leads there, unless the user says
    // otherwise.
    let from = from.filter(|_| wish.choice.rdma_gid_index.is_none());
    at.set_port(port);
    let deadline = Instant::now() + CONNECT_MAX;
    RdmaInitiator::connect(at, from, token, lanes, &wish.choice.options(), deadline)
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
        for (transport, to, discards) in [
            (Transport::Auto, here, false),
            (Transport::Auto, away, true),
            (Transport::Tcp, away, false),
        ] {
            assert!(
                !wish(transport, to, discards).unwrap().rdma(),
                "{transport:?} {to} {discards}"
            );
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
