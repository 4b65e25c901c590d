//! Set-up of connections, from the source's side: who may listen and connect where, and the opening of a
//! session.

use crate::clock;
use crate::error::{Error, Result};
use crate::link::{self, Opened, Wish};
use crate::net::{Address, Connection, Network};
use crate::protocol::{Abort, Cause, Control, Hello, Message};
use pageferry_transport::preamble::{Preamble, Role, Token};
use std::cell::Cell;
use std::io::ErrorKind;
use std::time::Duration;

/// For a connection to be made, and for a peer to say its first words. A live host on any network
/// answers within one or two retransmissions.
pub const SETUP_MAX: Duration = Duration::from_secs(5);

/// What travels in plain text, said to who tries it off loopback without `--insecure`.
const INSECURE: &str = "the connection is neither encrypted nor authenticated yet: whoever can reach or watch this network could read \
     all of the guest's memory, or write into it. Use a private network or a tunnel to a loopback address, and say --insecure";

/// Refuses an address off loopback unless the user has accepted what that means.
pub fn check_exposure(address: &Address, insecure: bool) -> Result<()> {
    if address.is_local() || insecure {
        Ok(())
    } else {
        Err(Error::refused(format!("{address} is not a loopback address, and {INSECURE}")))
    }
}

/// Opens one connection of a session and says what it is for.
pub(crate) fn dial(network: &dyn Network, to: &Address, preamble: Preamble) -> Result<Box<dyn Connection>> {
    let mut connection = network.connect(to, SETUP_MAX)?;
    greet(connection.as_mut(), to, preamble)?;
    Ok(connection)
}

/// Says what a connection is for.
fn greet(connection: &mut dyn Connection, to: &Address, preamble: Preamble) -> Result<()> {
    let (bytes, deadline) = (preamble.encode(), clock::now() + SETUP_MAX);
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match connection.write(rest, deadline) {
            Ok(n) => rest = &rest[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::os(format!("greeting {to}"), e)),
        }
    }
    Ok(())
}

/// A destination that has been reached, and is to be asked for a session.
pub struct Reached {
    /// Which of its addresses it was: all further connections go there.
    pub address: Address,
    control: Control,
    round_trip_us: u64,
}

/// Reaches a destination at one of its addresses.
pub fn reach(network: &dyn Network, addresses: &[Address]) -> Result<Reached> {
    let dialled = clock::now();
    let (mut connection, address) = network.connect_first(addresses, SETUP_MAX)?;
    let connected = clock::elapsed(dialled).as_micros() as u64;
    greet(connection.as_mut(), &address, Preamble { role: Role::Control, token: Token::default() })?;
    // Where several were tried, it tells nothing of this one.
    let round_trip_us = if addresses.len() == 1 { connected } else { u64::MAX };
    Ok(Reached { address, control: Control::new(connection), round_trip_us })
}

/// The source's side of an opened session.
pub struct Session {
    /// The control connection, until Commit is out: then it is the inquiry's.
    pub control: Option<Control>,
    /// The data lanes.
    pub opened: Opened,
    /// Ties further connections to this session.
    pub token: Token,
    /// Round trip of the control connection, in microseconds.
    pub round_trip_us: u64,
}

impl Session {
    /// The control connection.
    ///
    /// # Errors
    /// If it was given to an inquiry.
    pub fn control(&mut self) -> Result<&mut Control> {
        self.control.as_mut().ok_or_else(over)
    }
}

/// The error of a session without a control connection.
pub(crate) fn over() -> Error {
    Error::Protocol("the session is over".into())
}

/// Opens a session: Hello, Welcome, lanes. `patience` is for the destination to say Welcome.
pub fn open(
    network: &dyn Network,
    reached: Reached,
    hello: Hello,
    wish: &Wish,
    patience: Duration,
) -> Result<Session> {
    let Reached { address: to, mut control, round_trip_us } = reached;
    // TCP's handshake is one round trip; the answer to Hello is one too, and what the destination does for it. The
    // shortest counts: others had to wait for a core, or for a packet to be sent again.
    let round_trip_us = Cell::new(round_trip_us);
    let dial = |preamble| {
        let dialled = clock::now();
        let connection = dial(network, &to, preamble)?;
        round_trip_us.set(round_trip_us.get().min(clock::elapsed(dialled).as_micros() as u64));
        Ok(connection)
    };
    let lanes_asked = hello.lanes;
    let asked = clock::now();
    control.send(&Message::Hello(hello), asked + SETUP_MAX)?;
    let welcome = match control.receive("Welcome", asked + patience)? {
        Message::Welcome(welcome) => welcome,
        Message::Abort(abort) => return Err(aborted(abort)),
        other => return Err(Error::Protocol(format!("{} in answer to Hello", other.name()))),
    };
    let (token, lanes) = (welcome.check(lanes_asked)?, welcome.lanes);
    let dial_lanes = || (0..lanes).map(|lane| dial(Preamble { role: Role::Lane(lane), token })).collect();
    let opened = link::open(wish, &welcome.rdma, &to, control.local_ip()?, token, lanes, dial_lanes)
        .inspect_err(|e| control.abort(&e.chain(), Cause::Refused, clock::now() + SETUP_MAX))?;
    Ok(Session { control: Some(control), opened, token, round_trip_us: round_trip_us.get() })
}

/// A new control connection of a session whose old one is lost, to ask how it ended.
pub fn reopen(network: &dyn Network, to: &Address, token: Token) -> Result<Control> {
    dial(network, to, Preamble { role: Role::Control, token }).map(Control::new)
}

/// The error for a destination's Abort.
#[must_use]
pub fn aborted(abort: Abort) -> Error {
    match abort.cause {
        Cause::Refused => Error::Refused(format!("the destination refuses: {}", abort.reason)),
        Cause::Busy => Error::Busy(abort.reason),
        Cause::Lanes | Cause::Failed => Error::PeerAborted {
            side: "destination",
            reason: abort.reason,
            lanes: abort.cause == Cause::Lanes,
        },
    }
}

/// A new token. Whoever does not know it cannot open a lane of the session.
pub fn new_token() -> Result<Token> {
    let mut token = Token::default();
    getrandom::fill(&mut token.0)
        .map_err(|e| Error::os("drawing a session token", std::io::Error::other(e)))?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn off_loopback_needs_insecure() {
        for (address, allowed) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("10.1.2.3:1", false),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
        ] {
            let address: Address = address.parse().unwrap();
            assert_eq!(check_exposure(&address, false).is_ok(), allowed, "{address}");
            assert!(check_exposure(&address, true).is_ok());
        }
    }
}
