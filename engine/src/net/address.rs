//! Where a destination listens.

use crate::error::{Error, Result};
use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

/// An address that can be listened on and connected to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// An IP address and a TCP port.
    Tcp(SocketAddr),
}

impl Address {
    /// Reads `HOST:PORT`, and asks for the address of a name.
    ///
    /// # Errors
    /// [`Error::Refused`], with the remedy.
    pub fn resolve(text: &str) -> Result<Self> {
        text.to_socket_addrs()
            .map_err(|e| {
                Error::refused(format!(
                    "{text}: not an address ({e}); write HOST:PORT, such as 10.0.0.2:7600"
                ))
            })?
            .next()
            .map(Self::Tcp)
            .ok_or_else(|| Error::refused(format!("{text}: the name has no address")))
    }

    /// The IP address, if it has one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
        }
    }

    /// Whether only processes of this very host can be behind it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self.ip() {
            None => true,
            Some(IpAddr::V4(ip)) => ip.is_loopback(),
            Some(IpAddr::V6(ip)) => {
                ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback())
            }
        }
    }

    /// The address of TCP, if it is one.
    #[must_use]
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::resolve(text)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written_and_knows_whether_it_is_local() {
        for (text, local) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("10.1.2.3:1", false),
            ("[::]:1", false),
        ] {
            let address = Address::resolve(text).unwrap();
            assert_eq!((address.to_string(), address.is_local()), (text.into(), local));
        }
        assert!(
            matches!(Address::resolve("10.1.2.3"), Err(Error::Refused(why)) if why.contains("HOST:PORT"))
        );
    }
}
