//! Set-up of connections, from the source's side: who may listen and connect where, and the opening of a
//! session.

use crate::error::{Error, Result};
use crate::link::{self, Opened, Wish};
use crate::protocol::{Abort, Cause, Control, Hello, Message};
use pageferry_transport::preamble::{Preamble, Role, Token};
use std::cell::Cell;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// For a connection to be made, and for a peer to say its first words. A live host on any network
/// answers within one or two retransmissions.
pub const SETUP_MAX: Duration = Duration::from_secs(5);

/// What travels in plain text, said to who tries it off loopback without `--insecure`.
const INSECURE: &str = "the connection is neither encrypted nor authenticated yet: whoever can reach or watch this network could read \
     all of the guest's memory, or write into it. Use a private network or a tunnel to a loopback address, and say --insecure";

/// Resolves `HOST:PORT` to one address.
pub fn resolve(address: &str) -> Result<SocketAddr> {
    address
        .to_socket_addrs()
        .map_err(|e| {
            Error::refused(format!("{address}: not an address ({e}); write HOST:PORT, such as 10.0.0.2:7600"))
        })?
        .next()
        .ok_or_else(|| Error::refused(format!("{address}: the name has no address")))
}

/// Refuses an address off loopback unless the user has accepted what that means.
pub fn check_exposure(address: SocketAddr, insecure: bool) -> Result<()> {
    let loopback = match address.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    };
    if loopback || insecure {
        Ok(())
    } else {
        Err(Error::refused(format!("{address} is not a loopback address, and {INSECURE}")))
    }
}

/// Opens one connection of a session and says what it is for.
pub(crate) fn dial(to: SocketAddr, preamble: Preamble) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, SETUP_MAX).map_err(|e| {
        Error::os(format!("connecting to {to} (is `pageferry receive` listening there, and does a firewall let it through?)"), e)
    })?;
    let setup = |e| Error::os(format!("setting up the connection to {to}"), e);
    stream.set_nodelay(true).map_err(setup)?;
    detect_dead_peers(&stream)?;
    stream.set_write_timeout(Some(SETUP_MAX)).map_err(setup)?;
    stream.write_all(&preamble.encode()).map_err(|e| Error::os(format!("greeting {to}"), e))?;
    Ok(stream)
}

/// A peer whose host vanished is noticed within about ten seconds even while nothing is sent.
pub(crate) fn detect_dead_peers(stream: &TcpStream) -> Result<()> {
    use rustix::net::sockopt;
    let setup = |e: rustix::io::Errno| Error::os("setting up TCP keep-alive", e);
    sockopt::set_socket_keepalive(stream, true).map_err(setup)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(4)).map_err(setup)?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2)).map_err(setup)?;
    sockopt::set_tcp_keepcnt(stream, 3).map_err(setup)
}

/// The source's side of an opened session.
pub struct Session {
    /// The control connection.
    pub control: Control,
    /// The data lanes.
    pub opened: Opened,
    /// Ties further connections to this session.
    pub token: Token,
    /// Round trip of the control connection, in microseconds.
    pub round_trip_us: u64,
}

/// Opens a session: Hello, Welcome, lanes. `patience` is for the destination to say Welcome.
pub fn open(to: SocketAddr, hello: Hello, wish: &Wish, patience: Duration) -> Result<Session> {
    // TCP's handshake is one round trip; the answer to Hello is one too, and what the destination does for it. The
    // shortest counts: others had to wait for a core, or for a packet to be sent again.
    let round_trip_us = Cell::new(u64::MAX);
    let dial = |preamble| {
        let dialled = Instant::now();
        let stream = dial(to, preamble)?;
        round_trip_us.set(round_trip_us.get().min(dialled.elapsed().as_micros() as u64));
        Ok(stream)
    };
    let mut control = Control::new(dial(Preamble { role: Role::Control, token: Token::default() })?)?;
    let lanes_asked = hello.lanes;
    let asked = Instant::now();
    control.send(&Message::Hello(hello), asked + SETUP_MAX)?;
    let welcome = match control.receive("Welcome", asked + patience)? {
        Message::Welcome(welcome) => welcome,
        Message::Abort(abort) => return Err(aborted(abort)),
        other => return Err(Error::Protocol(format!("{} in answer to Hello", other.name()))),
    };
    let (token, lanes) = (welcome.check(lanes_asked)?, welcome.lanes);
    let by_tcp = || (0..lanes).map(|lane| dial(Preamble { role: Role::Lane(lane), token })).collect();
    let opened = link::open(wish, &welcome.rdma, to, control.local_ip()?, token, lanes, by_tcp)
        .inspect_err(|e| control.abort(&e.chain(), Cause::Refused, Instant::now() + SETUP_MAX))?;
    Ok(Session { control, opened, token, round_trip_us: round_trip_us.get() })
}

/// A new control connection of a session whose old one is lost, to ask how it ended.
pub fn reopen(to: SocketAddr, token: Token) -> Result<Control> {
    Control::new(dial(to, Preamble { role: Role::Control, token })?)
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
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(check_exposure(address, false).is_ok(), allowed, "{address}");
            assert!(check_exposure(address, true).is_ok());
        }
    }
}
