//! How a link is run, and the way that it takes: device, port, GID, link layer.

use crate::rdma::host::{Gid, GidKind, Protocol};
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// How an RDMA link is run. What is not given is chosen by the addresses and by the system's
/// defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaOptions {
    /// The device must be this one, such as `mlx5_0`.
    pub device: Option<String>,
    /// The device's port must be this one, from 1.
    pub port: Option<u8>,
    /// The source GID must be the port's one of this index. On Ethernet it decides the source
    /// address.
    pub gid_index: Option<u8>,
    /// Traffic class of all packets (on RoCE v2 the DSCP times four), for lossless or prioritised
    /// traffic.
    pub traffic_class: Option<u8>,
    /// Memory is registered in pieces of this many bytes: whole stripes, one at least.
    pub chunk_bytes: usize,
    /// Bytes in flight on each lane at most.
    pub window_bytes: u64,
    /// Writes in flight on each lane at most; a device may hold fewer.
    pub window_requests: usize,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self {
            device: None,
            port: None,
            gid_index: None,
            traffic_class: None,
            // Large enough that a registration's fixed cost vanishes, small enough that data
            // follows soon.
            chunk_bytes: 64 << 20,
            // A hundred microseconds at 400 Gb/s, and more than the longest write.
            window_bytes: 8 << 20,
            window_requests: crate::rdma::lane::WRITES_MAX,
        }
    }
}

/// The way that a link takes, as this side sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Name of the device.
    pub device: String,
    /// Its port, from 1.
    pub port: u8,
    /// The source GID, or empty if the system does not tell.
    pub gid: String,
    /// `InfiniBand`, `RoCE v1`, `RoCE v2` or `iWARP`.
    pub link: String,
    /// Payload of a packet in bytes.
    pub active_mtu: u32,
    /// This side's address.
    pub from: SocketAddr,
    /// The other side's.
    pub to: SocketAddr,
}

impl fmt::Display for Path {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, port, gid, link, active_mtu, from, to } = self;
        write!(f, "{link} by {device} port {port}")?;
        if !gid.is_empty() {
            write!(f, " (GID {gid})")?;
        }
        write!(f, ", MTU {active_mtu}, {} to {}", from.ip(), to.ip())
    }
}

/// What the kernel tells of a device's port.
#[derive(Debug, Clone)]
pub(crate) struct Port {
    device: String,
    protocol: Protocol,
    gids: Vec<Gid>,
}

impl Port {
    pub(crate) fn new(device: &str, port: u8) -> Self {
        let (protocol, gids) = crate::rdma::host::port_of_kernel(device, port);
        Self { device: device.into(), protocol, gids }
    }

    /// Whether GIDs come from the addresses of a network interface.
    pub(crate) fn is_ethernet(&self) -> bool {
        self.protocol == Protocol::Roce
    }

    pub(crate) fn gid(&self, index: u8) -> Option<String> {
        self.find(index).map(|gid| Ipv6Addr::from(gid.value).to_string())
    }

    fn find(&self, index: u8) -> Option<&Gid> {
        self.gids.iter().find(|gid| gid.index == u32::from(index))
    }

    /// The address whose GID that is, with the interface's index where the address needs one.
    pub(crate) fn gid_address(&self, index: u8) -> Option<SocketAddr> {
        let gid = self.find(index)?;
        match gid.address(self.protocol)? {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                let file = format!("/sys/class/net/{}/ifindex", gid.netdev.as_deref()?);
                let scope = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
                Some(SocketAddr::V6(SocketAddrV6::new(v6, 0, 0, scope)))
            }
            other => Some(SocketAddr::new(other, 0)),
        }
    }

    /// The kind of link that packets with this GID take.
    pub(crate) fn link(&self, gid_index: u8) -> &'static str {
        match (self.protocol, self.find(gid_index).map(|gid| gid.kind)) {
            (Protocol::InfiniBand, _) => "InfiniBand",
            (Protocol::Iwarp, _) => "iWARP",
            (Protocol::Roce, Some(GidKind::RoceV2)) => "RoCE v2",
            (Protocol::Roce, Some(GidKind::InfiniBandOrRoceV1)) => "RoCE v1",
            (Protocol::Roce, _) => "RoCE",
            _ => "an unknown link",
        }
    }

    /// Which addresses lead to this port, for an error that says what would have done.
    pub(crate) fn addresses(&self) -> String {
        let addresses = self.gids.iter().filter_map(|gid| gid.address(self.protocol));
        let unique: BTreeSet<String> = addresses.map(|address| address.to_string()).collect();
        match unique.is_empty() {
            true => format!("no address of this host leads to {}", self.device),
            false => {
                let all: Vec<_> = unique.into_iter().collect();
                format!("{} has the addresses {}", self.device, all.join(", "))
            }
        }
    }
}

/// Bytes of an MTU as verbs count it.
pub(crate) fn mtu_bytes(mtu: u32) -> u32 {
    match mtu {
        rdma_sys::IBV_MTU_256 => 256,
        rdma_sys::IBV_MTU_512 => 512,
        rdma_sys::IBV_MTU_2048 => 2048,
        rdma_sys::IBV_MTU_4096 => 4096,
        // Also for a value of the future: it is used to estimate headers only.
        _ => 1024,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_line() {
        let path = Path {
            device: "mlx5_0".into(),
            port: 1,
            gid: "0000:0000:0000:0000:0000:ffff:0a4d:0001".into(),
            link: "RoCE v2".into(),
            active_mtu: 4096,
            from: "10.77.0.1:1".parse().unwrap(),
            to: "10.77.0.2:2".parse().unwrap(),
        };
        assert_eq!(
            path.to_string(),
            "RoCE v2 by mlx5_0 port 1 (GID 0000:0000:0000:0000:0000:ffff:0a4d:0001), MTU 4096, 10.77.0.1 to 10.77.0.2"
        );
    }
}
