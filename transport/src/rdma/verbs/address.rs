//! Addresses as librdmacm has them.

use std::ffi::c_int;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// An address as C has it.
pub(crate) enum RawAddress {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl RawAddress {
    pub(crate) fn as_ptr(&mut self) -> *mut libc::sockaddr {
        match self {
            Self::V4(address) => std::ptr::from_mut(address).cast(),
            Self::V6(address) => std::ptr::from_mut(address).cast(),
        }
    }
}

impl From<SocketAddr> for RawAddress {
    fn from(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(address) => Self::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(address) => Self::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            }),
        }
    }
}

/// # Safety
/// `raw` can be read, up to the size of its family's address.
pub(crate) unsafe fn read_address(raw: *const libc::sockaddr) -> Option<SocketAddr> {
    // SAFETY: as the caller says.
    match c_int::from(unsafe { (*raw).sa_family }) {
        libc::AF_INET => {
            // SAFETY: of this family, so of this type.
            let raw = unsafe { raw.cast::<libc::sockaddr_in>().read_unaligned() };
            let ip = IpAddr::V4(Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes()));
            Some(SocketAddr::new(ip, u16::from_be(raw.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: of this family, so of this type.
            let raw = unsafe { raw.cast::<libc::sockaddr_in6>().read_unaligned() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            let (port, flow) = (u16::from_be(raw.sin6_port), raw.sin6_flowinfo);
            Some(SocketAddr::V6(SocketAddrV6::new(ip, port, flow, raw.sin6_scope_id)))
        }
        _ => None,
    }
}
