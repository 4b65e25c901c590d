//! Connections by the kernel's TCP.

use super::{Address, Connection, Listener, Network};
use crate::clock;
use crate::error::{Error, Result};
use pageferry_transport::tcp::{TcpInitiator, TcpOptions, TcpTarget};
use pageferry_transport::{Initiator, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::any::Any;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// The system's network.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Network for System {
    fn connect(&self, to: &Address, within: Duration) -> Result<Box<dyn Connection>> {
        let Address::Tcp(address) = to;
        let stream = TcpStream::connect_timeout(address, within).map_err(|e| {
            Error::os(format!("connecting to {to} (is `pageferry receive` listening there, and does a firewall let it through?)"), e)
        })?;
        let setup = |e| Error::os(format!("setting up the connection to {to}"), e);
        Ok(Box::new(TcpConnection::new(stream).map_err(setup)?))
    }
}

/// A connected socket.
#[derive(Debug)]
pub struct TcpConnection(TcpStream);

impl TcpConnection {
    /// Sets a connected socket up: small messages go at once, and a peer whose host vanished is noticed.
    ///
    /// # Errors
    /// Those of `setsockopt(2)`.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        detect_dead_peers(&stream)?;
        Ok(Self(stream))
    }
}

/// A peer whose host vanished is noticed within about ten seconds even while nothing is sent.
fn detect_dead_peers(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(4))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// Time left, as a socket takes it: none is for ever there.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(clock::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A socket whose timeout has passed says that it would block.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { ErrorKind::TimedOut.into() } else { error }
}

/// The sockets of all lanes.
fn sockets(first: Box<dyn Connection>, rest: Vec<Box<dyn Connection>>) -> Result<Vec<TcpStream>> {
    std::iter::once(first)
        .chain(rest)
        .map(|lane| match lane.into_any().downcast::<TcpConnection>() {
            Ok(tcp) => Ok(tcp.0),
            Err(_) => Err(Error::Protocol("lanes of different kinds".into())),
        })
        .collect()
}

impl Connection for TcpConnection {
    fn read(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        self.0.set_read_timeout(Some(left(deadline)?))?;
        self.0.read(buffer).map_err(timed_out)
    }

    fn write(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<usize> {
        self.0.set_write_timeout(Some(left(deadline)?))?;
        self.0.write(bytes).map_err(timed_out)
    }

    fn readable(&self, deadline: Instant) -> io::Result<bool> {
        let wait = deadline.saturating_duration_since(clock::now());
        let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&wait)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn local_ip(&self) -> io::Result<Option<IpAddr>> {
        // Who listens on [::] is reached at an IPv4 address too, which nothing but TCP knows in that form.
        Ok(Some(self.0.local_addr()?.ip().to_canonical()))
    }

    fn into_initiator(self: Box<Self>, rest: Vec<Box<dyn Connection>>) -> Result<Box<dyn Initiator>> {
        Ok(Box::new(TcpInitiator::new(sockets(self, rest)?, TcpOptions::default())?))
    }

    fn into_target(self: Box<Self>, rest: Vec<Box<dyn Connection>>) -> Result<Box<dyn Target>> {
        Ok(Box::new(TcpTarget::new(sockets(self, rest)?)?))
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct TcpListening {
    listener: TcpListener,
    address: Address,
}

impl TcpListening {
    /// Starts to listen.
    ///
    /// # Errors
    /// [`Error::Refused`] if that address cannot be had.
    pub fn bind(at: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(at).map_err(|e| {
            Error::refused(format!(
                "cannot listen on {at}: {e}; choose another address or port with --listen"
            ))
        })?;
        let address = listener.local_addr().map_err(|e| Error::os("asking for the listening address", e))?;
        Ok(Self { listener, address: address.into() })
    }
}

impl Listener for TcpListening {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&self) -> io::Result<(Box<dyn Connection>, Address)> {
        let (stream, peer) = self.listener.accept()?;
        Ok((Box::new(TcpConnection::new(stream)?), peer.into()))
    }
}
