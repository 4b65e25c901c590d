//! What a session's connections are made of. The engine speaks to [`Connection`], [`Listener`] and
//! [`Network`] alone; [`tcp`] keeps them with the kernel's sockets, a simulation with queues of its own.
//!
//! ```text
//!   source                                    destination
//!   Network::connect --> Connection <=======> Connection <-- Listener::accept
//!                           | a lane                | a lane
//!                           v                       v
//!                     into_initiator          into_target
//! ```

pub mod address;
pub mod connection;
pub mod tcp;

pub use address::Address;
pub use connection::{Connection, Listener, Network};
pub use tcp::System;
