//! Where a destination listens.

use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// An address that can be listened on and connected to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// An IP address and a TCP port.
    Tcp(SocketAddr),
    /// The path of a socket within this host.
    Unix(PathBuf),
}

/// What stands before the path of a socket.
const UNIX: &str = "unix:";

impl Address {
    /// Reads `HOST:PORT` or `unix:PATH`, and asks for the address of a name.
    ///
    /// # Errors
    /// [`Error::Refused`], with the remedy.
    pub fn resolve(text: &str) -> Result<Self> {
        Ok(Self::resolve_all(text)?.remove(0))
    }

    /// The same with all addresses that a name has, at least one, in the order in which they are to
    /// be tried.
    ///
    /// # Errors
    /// [`Error::Refused`], with the remedy.
    pub fn resolve_all(text: &str) -> Result<Vec<Self>> {
        match text.strip_prefix(UNIX) {
            Some("") => {
                return Err(Error::refused(format!("{text}: the path is missing after {UNIX}")));
            }
            Some(path) => return Ok(vec![Self::Unix(path.into())]),
            None => {}
        }
        if let Some(scoped) = parse_scoped(text)? {
            return Ok(vec![Self::Tcp(scoped)]);
        }
        let resolved = text.to_socket_addrs().map_err(|e| not_an_address(text, &e))?;
        let addresses: Vec<Self> = in_turns(resolved).into_iter().map(Self::Tcp).collect();
        if addresses.is_empty() {
            return Err(Error::refused(format!("{text}: the name has no address")));
        }
        Ok(addresses)
    }

    /// The IP address, if it has one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
            Self::Unix(_) => None,
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
            Self::Unix(_) => None,
        }
    }
}

/// The order in which addresses are tried: the resolver's, but the families take turns, so that one
/// that leads nowhere costs a single attempt (RFC 8305).
fn in_turns(addresses: impl IntoIterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let mut families: [VecDeque<SocketAddr>; 2] = Default::default();
    let mut first = None;
    for address in addresses {
        let first = *first.get_or_insert(address.is_ipv4());
        let family = &mut families[usize::from(address.is_ipv4() != first)];
        if !family.contains(&address) {
            family.push_back(address);
        }
    }
    let mut ordered = Vec::new();
    while families.iter().any(|family| !family.is_empty()) {
        ordered.extend(families.iter_mut().filter_map(VecDeque::pop_front));
    }
    ordered
}

fn not_an_address(text: &str, why: &dyn fmt::Display) -> Error {
    Error::refused(format!(
        "{text}: not an address ({why}); write HOST:PORT, such as 10.0.0.2:7600 or [fe80::1%eth0]:7600, or \
         unix:PATH"
    ))
}

/// An IPv6 address with the interface on which it is meant, `[fe80::1%eth0]:7600`, by name or by
/// number. None if it is anything else.
fn parse_scoped(text: &str) -> Result<Option<SocketAddr>> {
    let Some((ip, rest)) = text.strip_prefix('[').and_then(|text| text.split_once('%')) else {
        return Ok(None);
    };
    let Some((interface, port)) = rest.rsplit_once("]:") else { return Ok(None) };
    let refused = |why: &dyn fmt::Display| not_an_address(text, why);
    let ip: Ipv6Addr = ip.parse().map_err(|e| refused(&e))?;
    let port: u16 = port.parse().map_err(|e| refused(&e))?;
    let index = match interface.parse() {
        Ok(index) => index,
        Err(_) => interface_index(interface)
            .map_err(|e| refused(&format!("there is no interface {interface} here: {e}")))?,
    };
    Ok(Some(SocketAddrV6::new(ip, port, 0, index).into()))
}

fn interface_index(name: &str) -> rustix::io::Result<u32> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    netdevice::name_to_index(&any, name)
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
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

/// What travels in plain text, said to who tries it off loopback without `--insecure`.
const INSECURE: &str = "the connection is neither encrypted nor authenticated yet: whoever can reach or watch this network could read \
     all of the guest's memory, or write into it. Use a private network or a tunnel to a loopback address, and say --insecure";

/// Refuses an address off loopback unless the user has accepted what that means.
pub fn check_exposure(address: &Address, insecure: bool) -> Result<()> {
    if address.is_local() || insecure {
        Ok(())
    } else {
        Err(Error::refused(format!("{address} is not a loopback address, and {INSECURE}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_families_take_turns_and_the_resolvers_first_is_first() {
        let ordered = in_turns(addresses(&[
            "[2001:db8::1]:1",
            "[2001:db8::2]:1",
            "[2001:db8::1]:1",
            "10.0.0.1:1",
            "[2001:db8::3]:1",
        ]));
        let expected = ["[2001:db8::1]:1", "10.0.0.1:1", "[2001:db8::2]:1", "[2001:db8::3]:1"];
        assert_eq!(ordered, addresses(&expected));
    }

    #[test]
    fn an_address_is_read_as_it_is_written_and_knows_whether_it_is_local() {
        for (text, local) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("10.1.2.3:1", false),
            ("[::]:1", false),
            ("[fe80::1%3]:1", false),
            ("unix:/run/ferry.sock", true),
        ] {
            let address = Address::resolve(text).unwrap();
            assert_eq!((address.to_string(), address.is_local()), (text.into(), local));
        }
        assert!(
            matches!(Address::resolve("10.1.2.3"), Err(Error::Refused(why)) if why.contains("HOST:PORT"))
        );
    }

    #[test]
    fn an_interface_may_be_named() {
        let by_name = Address::resolve("[fe80::1%lo]:7600").unwrap();
        let index = interface_index("lo").unwrap();
        assert_eq!(by_name, Address::resolve(&format!("[fe80::1%{index}]:7600")).unwrap());
        for (text, why) in [
            ("[fe80::1%nowhere]:1", "no interface nowhere"),
            ("[fe80::g%lo]:1", "IPv6"),
            ("[fe80::1%lo]:70000", "too large"),
            ("unix:", "path"),
        ] {
            let refused = Address::resolve(text).unwrap_err();
            assert!(matches!(&refused, Error::Refused(said) if said.contains(why)), "{refused}");
        }
    }

    #[test]
    fn off_loopback_needs_insecure() {
        for (address, allowed) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("10.1.2.3:1", false),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
        ] {
            let address: Address = address.parse().unwrap();
            assert_eq!(check_exposure(&address, false).is_ok(), allowed, "{address}");
            assert!(check_exposure(&address, true).is_ok());
        }
    }
}
