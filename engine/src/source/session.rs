//! Set-up of connections, from the source's side: who may listen and connect where, and the opening
//! of a session.

use crate::clock;
use crate::error::{Error, Result};
use crate::limits::SETUP_MAX;
use crate::net::dial::{dial, greet};
use crate::net::{Address, Network};
use crate::protocol::features::{Need, agree};
use crate::protocol::refusal::aborted;
use crate::protocol::{Cause, Control, Hello, Message};
use crate::source::lanes;
use crate::source::lanes::{Opened, Wish};
use pageferry_transport::preamble::{Preamble, Role, Token};
use std::cell::Cell;
use std::time::Duration;

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
    greet(
        connection.as_mut(),
        &address,
        Preamble { role: Role::Control, token: Token::default() },
    )?;
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

/// Opens a session: Hello, Welcome, lanes. The destination must know what the migration `needs`.
/// `patience` is for it to say Welcome.
pub fn open(
    network: &dyn Network,
    reached: Reached,
    hello: Hello,
    needs: &[Need],
    wish: &Wish,
    patience: Duration,
) -> Result<Session> {
    let Reached { address: to, mut control, round_trip_us } = reached;
    // TCP's handshake is one round trip; the answer to Hello is one too, and what the destination
    // does for it. The shortest counts: others had to wait for a core, or for a packet to be sent
    // again.
    let round_trip_us = Cell::new(round_trip_us);
    let dial = |preamble| {
        let dialled = clock::now();
        let connection = dial(network, &to, preamble)?;
        round_trip_us.set(round_trip_us.get().min(clock::elapsed(dialled).as_micros() as u64));
        Ok(connection)
    };
    let (lanes_asked, ours) = (hello.lanes, hello.features.clone());
    let asked = clock::now();
    control.send(&Message::Hello(hello.into()), asked + SETUP_MAX)?;
    let welcome = match control.receive("Welcome", asked + patience)? {
        Message::Welcome(welcome) => welcome,
        Message::Abort(abort) => return Err(aborted(abort)),
        other => return Err(Error::Protocol(format!("{} in answer to Hello", other.name()))),
    };
    let (token, lanes) = (welcome.check(lanes_asked)?, welcome.lanes);
    let agreed = agree(&ours, &welcome.features);
    tracing::debug!(theirs = welcome.features.names(), ?agreed, "features");
    let dial_lanes =
        || (0..lanes).map(|lane| dial(Preamble { role: Role::Lane(lane), token })).collect();
    let from = control.local_ip()?;
    let opened = agreed
        .require(needs)
        .and_then(|()| lanes::open(wish, &welcome.rdma, &to, from, token, lanes, dial_lanes))
        .inspect_err(|e| control.abort(&e.chain(), Cause::Refused, clock::now() + SETUP_MAX))?;
    Ok(Session { control: Some(control), opened, token, round_trip_us: round_trip_us.get() })
}
