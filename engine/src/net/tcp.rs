//! Connections by the kernel's TCP.

use super::socket::SocketConnection;
use super::{Address, Connection, Listener};
use crate::error::{Error, Result};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Connections that may wait to be accepted, as far as the kernel grants it (`net.core.somaxconn`,
/// 4096 by default). Where too many wait, the kernel drops a source's first packet, which is sent
/// again only after a second, then three, then seven.
const BACKLOG: i32 = 4096;

/// Connects to this address.
pub(super) fn connect(to: SocketAddr, within: Duration) -> Result<SocketConnection> {
    let stream = TcpStream::connect_timeout(&to, within).map_err(|e| {
        Error::os(format!("connecting to {to} (is `pageferry receive` listening there, and does a firewall let it through?)"), e)
    })?;
    SocketConnection::tcp(stream)
        .map_err(|e| Error::os(format!("setting up the connection to {to}"), e))
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
        // The standard library asks for 128.
        rustix::net::listen(&listener, BACKLOG)
            .map_err(|e| Error::os(format!("listening on {at} with a long queue"), e))?;
        let address =
            listener.local_addr().map_err(|e| Error::os("asking for the listening address", e))?;
        Ok(Self { listener, address: address.into() })
    }
}

impl Listener for TcpListening {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&self) -> io::Result<(Box<dyn Connection>, Address)> {
        let (stream, peer) = self.listener.accept()?;
        Ok((Box::new(SocketConnection::tcp(stream)?), peer.into()))
    }
}
