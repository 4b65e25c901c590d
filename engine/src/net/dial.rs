//! Opens a connection of a session: connects, and says what it is for.

use crate::clock;
use crate::error::{Error, Result};
use crate::limits::SETUP_MAX;
use crate::net::{Address, Connection, Network};
use crate::protocol::Control;
use pageferry_transport::preamble::{Preamble, Role, Token};
use std::io::ErrorKind;

/// Opens one connection of a session and says what it is for.
pub(crate) fn dial(
    network: &dyn Network,
    to: &Address,
    preamble: Preamble,
) -> Result<Box<dyn Connection>> {
    let mut connection = network.connect(to, SETUP_MAX)?;
    greet(connection.as_mut(), to, preamble)?;
    Ok(connection)
}

/// Says what a connection is for.
pub(crate) fn greet(
    connection: &mut dyn Connection,
    to: &Address,
    preamble: Preamble,
) -> Result<()> {
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

/// A new control connection of a session whose old one is lost, to ask how it ended.
pub fn reopen(network: &dyn Network, to: &Address, token: Token) -> Result<Control> {
    dial(network, to, Preamble { role: Role::Control, token }).map(Control::new)
}
