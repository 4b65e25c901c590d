//! What a session's connections are made of. The engine speaks to [`Connection`], [`Listener`] and
//! [`Network`] alone; [`System`] keeps them with the kernel's sockets ([`tcp`], [`local`]), a simulation with queues of its own.
//!
//! ```text
//!   source                                    destination
//!   Network::connect --> Connection <=======> Connection <-- Listener::accept
//!                           | a lane                | a lane
//!                           v                       v
//!                     into_initiator          into_target
//! ```

pub mod address;
pub mod choice;
pub mod connection;
pub mod dial;
mod eyeballs;
mod identity;
pub mod local;
pub mod socket;
pub mod tcp;

pub use address::Address;
pub use connection::{Connection, Listener, Network};

use crate::error::Result;
use std::time::Duration;

/// The system's network. What it connects to within this host is trusted, or is no connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Network for System {
    fn connect(&self, to: &Address, within: Duration) -> Result<Box<dyn Connection>> {
        let connection = match to {
            Address::Tcp(address) => tcp::connect(*address, within)?,
            Address::Unix(path) => local::connect_to(path, within)?,
        };
        // Before a byte is sent, and before a word of the peer's is believed.
        connection.check_peer()?;
        Ok(Box::new(connection))
    }

    fn connect_first(
        &self,
        to: &[Address],
        within: Duration,
    ) -> Result<(Box<dyn Connection>, Address)> {
        let system = *self;
        eyeballs::connect_first(to, within, move |to, within| system.connect(to, within))
    }
}

impl System {
    /// Listens there.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] if that address cannot be had.
    pub fn listen(self, at: &Address) -> Result<Box<dyn Listener>> {
        Ok(match at {
            Address::Tcp(at) => Box::new(tcp::TcpListening::bind(*at)?),
            Address::Unix(path) => Box::new(local::LocalListening::bind(path)?),
        })
    }
}
