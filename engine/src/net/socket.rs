//! A connection that is a socket of the kernel's: of TCP, or local (`unix:PATH`).

use super::{Connection, identity};
use crate::clock;
use crate::error::{Error, Result};
use pageferry_transport::tcp::{Socket, TcpInitiator, TcpOptions, TcpTarget};
use pageferry_transport::{Initiator, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::any::Any;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connected socket.
#[derive(Debug)]
pub struct SocketConnection {
    socket: Socket,
    /// This side's address and the peer's, of a connection by TCP.
    ends: Option<(SocketAddr, SocketAddr)>,
}

impl SocketConnection {
    /// One by TCP: small messages go at once, and a peer whose host vanished is noticed.
    ///
    /// # Errors
    /// Those of `setsockopt(2)` and `getpeername(2)`.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        detect_dead_peers(&stream)?;
        let ends = Some((stream.local_addr()?, stream.peer_addr()?));
        Ok(Self { socket: stream.into(), ends })
    }

    /// One within this host.
    #[must_use]
    pub fn local(stream: UnixStream) -> Self {
        Self { socket: stream.into(), ends: None }
    }

    /// Waits until it is ready for this; false if it is not by the deadline.
    fn wait(&self, what: PollFlags, deadline: Instant) -> io::Result<bool> {
        loop {
            let wait = deadline.saturating_duration_since(clock::now());
            let wait =
                Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.socket, what)], Some(&wait)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) if clock::now() < deadline => {}
                Err(rustix::io::Errno::INTR) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
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

/// The sockets of all lanes.
fn sockets(first: Box<dyn Connection>, rest: Vec<Box<dyn Connection>>) -> Result<Vec<Socket>> {
    std::iter::once(first)
        .chain(rest)
        .map(|lane| match lane.into_any().downcast::<SocketConnection>() {
            Ok(connection) => Ok(connection.socket),
            Err(_) => Err(Error::Protocol("lanes of different kinds".into())),
        })
        .collect()
}

impl Connection for SocketConnection {
    fn read(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        loop {
            match recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((received, _)) => return Ok(received),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
            if !self.wait(PollFlags::IN, deadline)? {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }

    fn write(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<usize> {
        loop {
            match send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::AGAIN) => {}
                sent => return Ok(sent?),
            }
            if !self.wait(PollFlags::OUT, deadline)? {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }

    fn readable(&self, deadline: Instant) -> io::Result<bool> {
        self.wait(PollFlags::IN, deadline)
    }

    fn local_ip(&self) -> io::Result<Option<IpAddr>> {
        // Who listens on [::] is reached at an IPv4 address too, which nothing but TCP knows in
        // that form.
        Ok(self.ends.map(|(local, _)| local.ip().to_canonical()))
    }

    fn check_peer(&self) -> Result<()> {
        match self.ends {
            Some((local, peer)) => identity::check_tcp(local, peer),
            None => identity::check_local(&self.socket),
        }
    }

    fn into_initiator(
        self: Box<Self>,
        rest: Vec<Box<dyn Connection>>,
    ) -> Result<Box<dyn Initiator>> {
        Ok(Box::new(TcpInitiator::new(sockets(self, rest)?, TcpOptions::default())?))
    }

    fn into_target(self: Box<Self>, rest: Vec<Box<dyn Connection>>) -> Result<Box<dyn Target>> {
        Ok(Box::new(TcpTarget::new(sockets(self, rest)?)?))
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
