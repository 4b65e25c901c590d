//! Set-up of connections: who may listen and connect where, the first bytes of each connection, and
//! the choice of the link.

use crate::error::{Error, Result};
use crate::protocol::{Abort, Control, Hello, Message, Welcome};
use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry_transport::Initiator;
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, Role, Token};
use pageferry_transport::tcp::{TcpInitiator, TcpOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// For a connection to be made, and for a peer to say its first words. A live host on any network
/// answers within one or two retransmissions.
pub const SETUP_MAX: Duration = Duration::from_secs(5);

/// Connections that may be saying their first words at once; more are closed unheard.
const GREETINGS_MAX: usize = 64;

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
fn dial(to: SocketAddr, preamble: Preamble) -> Result<TcpStream> {
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
fn detect_dead_peers(stream: &TcpStream) -> Result<()> {
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
    pub link: Box<dyn Initiator>,
    /// Ties further connections to this session.
    pub token: Token,
    /// Round trip of the control connection, in microseconds.
    pub round_trip_us: u64,
}

/// Opens a session: Hello, Welcome, lanes.
pub fn open(to: SocketAddr, hello: Hello, tcp: TcpOptions) -> Result<Session> {
    let mut control = Control::new(dial(to, Preamble { role: Role::Control, token: Token::default() })?)?;
    let lanes_asked = hello.lanes;
    let asked = Instant::now();
    control.send(&Message::Hello(hello), asked + SETUP_MAX)?;
    let welcome = match control.receive("Welcome", asked + SETUP_MAX)? {
        Message::Welcome(welcome) => welcome,
        Message::Abort(abort) => return Err(aborted(abort)),
        other => return Err(Error::Protocol(format!("{} in answer to Hello", other.name()))),
    };
    let round_trip_us = asked.elapsed().as_micros() as u64;
    let token = welcome.check(lanes_asked)?;
    let streams = (0..welcome.lanes)
        .map(|lane| dial(to, Preamble { role: Role::Lane(lane), token }))
        .collect::<Result<Vec<_>>>()?;
    let link = Box::new(TcpInitiator::new(streams, tcp)?);
    Ok(Session { control, link, token, round_trip_us })
}

/// A new control connection of a session whose old one is lost, to ask how it ended.
pub fn reopen(to: SocketAddr, token: Token) -> Result<Control> {
    Control::new(dial(to, Preamble { role: Role::Control, token })?)
}

/// The error for a destination's Abort.
#[must_use]
pub fn aborted(abort: Abort) -> Error {
    if abort.refused {
        Error::Refused(format!("the destination refuses: {}", abort.reason))
    } else {
        Error::PeerAborted { side: "destination", reason: abort.reason }
    }
}

/// A new token. Whoever does not know it cannot open a lane of the session.
pub fn new_token() -> Result<Token> {
    let mut token = Token::default();
    getrandom::fill(&mut token.0)
        .map_err(|e| Error::os("drawing a session token", std::io::Error::other(e)))?;
    Ok(token)
}

/// A connection that has said its first words.
#[derive(Debug)]
pub enum Incoming {
    /// A control connection and its first message: Hello with no token, Commit with one.
    Control {
        /// The session, or none yet.
        token: Token,
        /// The connection.
        control: Box<Control>,
        /// What it said first.
        first: Message,
        /// Who it is.
        peer: SocketAddr,
    },
    /// A lane.
    Lane {
        /// The session.
        token: Token,
        /// Index of the lane.
        index: u8,
        /// The connection.
        stream: TcpStream,
    },
}

/// Listens, hears first words, and passes on what makes sense. Garbage and silence cost a log line.
#[derive(Debug)]
pub struct Doorway {
    /// Where it listens, with the port that the kernel chose if zero was asked for.
    pub address: SocketAddr,
    incoming: Receiver<Incoming>,
}

impl Doorway {
    /// Starts to listen.
    pub fn open(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|e| {
            Error::refused(format!(
                "cannot listen on {address}: {e}; choose another address or port with --listen"
            ))
        })?;
        let address = listener.local_addr().map_err(|e| Error::os("asking for the listening address", e))?;
        let (sender, incoming) = bounded(GREETINGS_MAX);
        std::thread::Builder::new()
            .name("doorway".into())
            .spawn(move || greet_all(&listener, &sender))
            .map_err(|e| Error::os("starting the listening thread", e))?;
        Ok(Self { address, incoming })
    }

    /// The next connection, or none before the deadline.
    #[must_use]
    pub fn next(&self, deadline: Instant) -> Option<Incoming> {
        self.incoming.recv_deadline(deadline).ok()
    }

    /// The connections, to wait on together with other things.
    #[must_use]
    pub fn incoming(&self) -> &Receiver<Incoming> {
        &self.incoming
    }
}

fn greet_all(listener: &TcpListener, sender: &Sender<Incoming>) {
    let greetings = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be accepted");
                // Out of descriptors, most likely: give others the time to end.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if greetings.load(Ordering::Relaxed) >= GREETINGS_MAX {
            tracing::warn!(%peer, "too many connections at once; closed");
            continue;
        }
        greetings.fetch_add(1, Ordering::Relaxed);
        let (sender, counted) = (sender.clone(), Arc::clone(&greetings));
        let spawned = std::thread::Builder::new().name("greeting".into()).spawn(move || {
            match hear(stream, peer) {
                Ok(incoming) => {
                    // Nobody takes it off the queue: the receiver is busy or ending.
                    let _ = sender.send_timeout(incoming, SETUP_MAX);
                }
                Err(e) => eprintln!("pageferry: ignored a connection from {peer}: {}", e.chain()),
            }
            counted.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(e) = spawned {
            greetings.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(error = %e, "no thread for a new connection");
        }
    }
}

/// Reads the preamble and, of a control connection, the first message, so that a silent stranger keeps
/// nobody waiting but this thread.
fn hear(stream: TcpStream, peer: SocketAddr) -> Result<Incoming> {
    let (preamble, stream) = hear_preamble(stream)?;
    let token = preamble.token;
    match preamble.role {
        Role::Lane(index) => Ok(Incoming::Lane { token, index, stream }),
        Role::Control => {
            let mut control = Box::new(Control::new(stream)?);
            let first = control.receive("its first message", Instant::now() + SETUP_MAX)?;
            Ok(Incoming::Control { token, control, first, peer })
        }
    }
}

/// Reads the preamble, within a deadline for the whole of it.
fn hear_preamble(mut stream: TcpStream) -> Result<(Preamble, TcpStream)> {
    let deadline = Instant::now() + SETUP_MAX;
    let mut bytes = [0; PREAMBLE_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Timeout { what: "waiting for its first words".into() });
        }
        stream.set_read_timeout(Some(left)).map_err(|e| Error::os("setting up a connection", e))?;
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(Error::Protocol("it closed without a word".into())),
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::os("waiting for its first words", e)),
        }
    }
    let preamble = Preamble::decode(&bytes).map_err(|e| {
        // A pageferry of another version reads an Abort of this shape since version 1.
        if matches!(e, pageferry_transport::preamble::PreambleError::Version { .. })
            && let Ok(clone) = stream.try_clone()
            && let Ok(mut control) = Control::new(clone)
        {
            control.abort(&e.to_string(), true, deadline);
        }
        Error::Protocol(e.to_string())
    })?;
    detect_dead_peers(&stream)?;
    Ok((preamble, stream))
}

/// Collects the lanes of a session; other connections meanwhile are answered by `others`.
pub fn collect_lanes(
    doorway: &Doorway,
    welcome: &Welcome,
    mut others: impl FnMut(Incoming),
    deadline: Instant,
) -> Result<Vec<TcpStream>> {
    let mut lanes: Vec<Option<TcpStream>> = (0..welcome.lanes).map(|_| None).collect();
    while lanes.iter().any(Option::is_none) {
        let incoming = doorway
            .next(deadline)
            .ok_or_else(|| Error::Timeout { what: "waiting for the source to open its lanes".into() })?;
        match incoming {
            Incoming::Lane { index, token, stream } if token.0 == welcome.token => {
                match lanes.get_mut(usize::from(index)) {
                    Some(lane @ None) => *lane = Some(stream),
                    _ => {
                        return Err(Error::Protocol(format!(
                            "lane {index} was opened twice or not agreed on"
                        )));
                    }
                }
            }
            other => others(other),
        }
    }
    Ok(lanes.into_iter().flatten().collect())
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

    #[test]
    fn garbage_and_silence_at_the_door_do_not_keep_others_out() {
        let doorway = Doorway::open("127.0.0.1:0".parse().unwrap()).unwrap();
        let _silent = TcpStream::connect(doorway.address).unwrap();
        TcpStream::connect(doorway.address).unwrap().write_all(&[0x47; 100]).unwrap();
        let token = Token([7; 16]);
        let good = dial(doorway.address, Preamble { role: Role::Control, token }).unwrap();
        let mut good = Control::new(good).unwrap();
        good.send(&Message::Commit, Instant::now() + SETUP_MAX).unwrap();
        let incoming = doorway.next(Instant::now() + SETUP_MAX).expect("the good one comes through");
        assert!(matches!(incoming, Incoming::Control { token: t, first: Message::Commit, .. } if t == token));
    }
}
