//! The contract that every kind of connection keeps.

use super::Address;
use crate::error::{Error, Result};
use pageferry_transport::{Initiator, Target};
use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// One connection of a session: first its preamble goes over it, then control messages; or it
/// becomes a lane. Every wait ends at its deadline with [`io::ErrorKind::TimedOut`]; a deadline
/// that has passed only looks.
pub trait Connection: Debug + Send {
    /// Takes some of what the peer has sent; zero once it has closed.
    fn read(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize>;

    /// Hands some of these bytes over to be sent.
    fn write(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<usize>;

    /// Whether something can be read, or the connection has ended, before the deadline.
    fn readable(&self, deadline: Instant) -> io::Result<bool>;

    /// This side's IP address, if the connection goes over IP: RDMA is looked for there.
    fn local_ip(&self) -> io::Result<Option<IpAddr>>;

    /// Fails if the other end is within this host and belongs to somebody who is not trusted.
    fn check_peer(&self) -> Result<()> {
        Ok(())
    }

    /// The source's end of a link, from this lane and those that follow it.
    fn into_initiator(
        self: Box<Self>,
        rest: Vec<Box<dyn Connection>>,
    ) -> Result<Box<dyn Initiator>>;

    /// The destination's end of a link, from this lane and those that follow it.
    fn into_target(self: Box<Self>, rest: Vec<Box<dyn Connection>>) -> Result<Box<dyn Target>>;

    /// For `into_initiator` and `into_target`, to find what the other lanes are.
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

/// Where a destination takes connections.
pub trait Listener: Debug + Send {
    /// Where it listens, with what was left to chance.
    fn address(&self) -> &Address;

    /// Waits for the next connection, and says who it comes from.
    fn accept(&self) -> io::Result<(Box<dyn Connection>, Address)>;
}

impl Listener for Box<dyn Listener> {
    fn address(&self) -> &Address {
        self.as_ref().address()
    }

    fn accept(&self) -> io::Result<(Box<dyn Connection>, Address)> {
        self.as_ref().accept()
    }
}

/// Where a source's connections come from.
pub trait Network: Debug + Send + Sync {
    /// Opens one, within this time.
    fn connect(&self, to: &Address, within: Duration) -> Result<Box<dyn Connection>>;

    /// Opens one to whichever of these addresses can be reached, within this time for all of them.
    /// Says which.
    fn connect_first(
        &self,
        to: &[Address],
        within: Duration,
    ) -> Result<(Box<dyn Connection>, Address)> {
        let (last, others) =
            to.split_last().ok_or_else(|| Error::refused("there is no address"))?;
        for address in others {
            if let Ok(connection) = self.connect(address, within) {
                return Ok((connection, address.clone()));
            }
        }
        Ok((self.connect(last, within)?, last.clone()))
    }
}
