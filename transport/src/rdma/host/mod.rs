//! What this host has of RDMA: devices, their limits, ports and addresses; and what the host itself
//! limits.
//!
//! ```text
//!   devices()            libibverbs: limits, state of ports; sysfs: rate, GIDs
//!   kernel_devices()     sysfs: names, also of those that libibverbs cannot drive
//!   connection_manager() the device file that rdma_cm needs
//!   memory_lock_limit()  how much this process may register
//!   peer_memory()        modules that let a NIC reach the memory of other devices
//! ```
//!
//! It only looks, and registers one page of its own for a moment, to see whether the device takes
//! relaxed ordering.

mod ask;
mod sysfs;

use crate::rdma::host::ask::DeviceList;
use rdma_sys::{IBV_MTU_256, IBV_MTU_4096, Libraries, OpenError};
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::{fmt, fs, io};

/// Bit of `CAP_IPC_LOCK` in the capability sets of `/proc/PID/status` (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;

/// The device file of rdma_cm.
const CM_DEVICE: &str = "/dev/infiniband/rdma_cm";

/// Why this host has no devices to speak of.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// rdma-core is not installed, or is not one that can be used.
    #[error(transparent)]
    Libraries(#[from] OpenError),
    /// The kernel has no RDMA, or its modules are not loaded.
    #[error("this kernel offers no RDMA; load its modules: modprobe -a ib_uverbs rdma_ucm")]
    Kernel,
    /// libibverbs could not list the devices.
    #[error("the RDMA devices cannot be listed")]
    List(#[source] io::Error),
}

/// A device that is there and cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {what} failed; this user needs read and write permission on {file}")]
pub struct Unusable {
    /// Name of the device.
    pub device: String,
    /// What was asked.
    pub what: &'static str,
    /// The device file that it is asked through.
    pub file: String,
    source: io::Error,
}

/// A NIC, as the kernel names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Such as `mlx5_0` or `rxe0`.
    pub name: String,
    /// Globally unique identifier of the node, most significant byte first.
    pub guid: u64,
    /// How much it can do at once.
    pub limits: Limits,
    /// Whether memory that is the source of an RDMA write on a reliable connection can be
    /// registered without being pinned.
    pub on_demand_paging: bool,
    /// Whether memory can be registered with relaxed ordering. `None` if no memory could be
    /// registered at all.
    pub relaxed_ordering: Option<bool>,
    /// Its ports, in order.
    pub ports: Vec<Port>,
}

/// What a device can do at once, by its own word; soft-RoCE and some others promise more than they
/// keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Queue pairs.
    pub queue_pairs: u32,
    /// Work requests in one queue of a queue pair.
    pub work_requests: u32,
    /// Local slices of one work request.
    pub slices: u32,
    /// Completion queues.
    pub completion_queues: u32,
    /// Entries of a completion queue.
    pub completions: u32,
    /// Regions that are registered.
    pub regions: u32,
    /// Bytes of a region.
    pub region_bytes: u64,
}

/// A port of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// From one.
    pub number: u8,
    /// Only [`PortState::Active`] carries data.
    pub state: PortState,
    /// What it speaks.
    pub protocol: Protocol,
    /// Payload of a packet now, if it is a size that verbs knows.
    pub mtu_bytes: Option<u32>,
    /// The longest message, and so the longest single write.
    pub message_bytes_max: u32,
    /// As the kernel writes it, such as `100 Gb/sec (4X EDR)`.
    pub rate: Option<String>,
    /// Local identifier on an InfiniBand subnet; zero elsewhere.
    pub lid: u16,
    /// Entries of its GID table that are in use.
    pub gids: Vec<Gid>,
}

/// State of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// No link.
    Down,
    /// A link that no subnet manager has configured yet.
    Initializing,
    /// Configured, not yet active.
    Armed,
    /// Carries data.
    Active,
    /// Was active, and lost its link a moment ago.
    ActiveDefer,
    /// A number that is not known here.
    Other(u32),
}

/// What a port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// InfiniBand.
    InfiniBand,
    /// RDMA over Converged Ethernet.
    Roce,
    /// RDMA over TCP.
    Iwarp,
    /// None of these.
    Other,
}

/// An entry of a port's GID table: an address that connections can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gid {
    /// Its place in the table.
    pub index: u32,
    /// Its sixteen bytes.
    pub value: [u8; 16],
    /// How packets with it look.
    pub kind: GidKind,
    /// The network device that it belongs to, such as `eth0`; InfiniBand has none.
    pub netdev: Option<String>,
}

/// How packets with a GID look on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand, or RoCE version 1, for which the kernel has one name: Ethernet frames that are
    /// not routed.
    InfiniBandOrRoceV1,
    /// RoCE version 2: in UDP.
    RoceV2,
    /// Something newer.
    Other,
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("down"),
            Self::Initializing => f.write_str("initializing"),
            Self::Armed => f.write_str("armed"),
            Self::Active => f.write_str("active"),
            Self::ActiveDefer => f.write_str("active, link lost"),
            Self::Other(number) => write!(f, "in state {number}"),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::Roce => "RoCE",
            Self::Iwarp => "iWARP",
            Self::Other => "unknown protocol",
        })
    }
}

impl Gid {
    /// The IP address that the entry stands for. On InfiniBand a GID is no IP address, although it
    /// looks like one.
    #[must_use]
    pub fn address(&self, protocol: Protocol) -> Option<IpAddr> {
        let address = Ipv6Addr::from(self.value);
        (protocol == Protocol::Roce).then(|| address.to_canonical())
    }
}

/// Every device of this host, in the library's order, with those that cannot be asked.
pub fn devices() -> Result<Vec<Result<Device, Unusable>>, Unavailable> {
    let verbs = &Libraries::open()?.verbs;
    let list = DeviceList::get(verbs)?;
    Ok(list.devices().map(|device| ask::ask(verbs, device)).collect())
}

/// Names of the devices that the kernel has. Those that [`devices`] lacks have no provider in
/// libibverbs.
#[must_use]
pub fn kernel_devices() -> Vec<String> {
    sysfs::devices(Path::new("/"))
}

/// What a port speaks and the GIDs that it has, as far as the kernel tells in files.
pub(crate) fn port_of_kernel(device: &str, port: u8) -> (Protocol, Vec<Gid>) {
    let root = Path::new("/");
    (sysfs::protocol(root, device, port), sysfs::gids(&sysfs::port(root, device, port)))
}

/// Whether connections can be made: rdma_cm's device file can be opened.
pub fn connection_manager() -> io::Result<()> {
    open_both_ways(CM_DEVICE)
}

fn open_both_ways(file: &str) -> io::Result<()> {
    fs::File::options().read(true).write(true).open(file).map(drop)
}

/// Bytes of memory that this process may register in all, or `None` for as much as there is.
#[must_use]
pub fn memory_lock_limit() -> Option<u64> {
    // Registration asks for CAP_IPC_LOCK, and where that is missing counts against the limit.
    if fs::read_to_string("/proc/self/status").is_ok_and(|status| may_lock_memory(&status)) {
        return None;
    }
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

/// Modules that are loaded and let a NIC reach the memory of another device, a GPU's for one. That
/// such a module is there does not prove that the NIC's driver uses it.
#[must_use]
pub fn peer_memory() -> Vec<String> {
    sysfs::peer_memory(Path::new("/"))
}

/// Reads the effective capabilities out of `/proc/PID/status`.
fn may_lock_memory(status: &str) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    bits & (1 << CAP_IPC_LOCK) != 0
}

/// The enum counts powers of two: 1 is 256 bytes, 5 is 4096.
fn mtu_bytes(number: u32) -> Option<u32> {
    (IBV_MTU_256..=IBV_MTU_4096).contains(&number).then(|| 128 << number)
}

#[cfg(test)]
mod tests {
    use super::ask::{on_demand_paging, state};
    use super::*;
    use rdma_sys::{IBV_ODP_SUPPORT_WRITE, ibv_device_attr_ex};

    #[test]
    fn the_numbers_of_verbs_are_named_and_unknown_ones_kept() {
        assert_eq!(state(4), PortState::Active);
        assert_eq!(state(77), PortState::Other(77));
        assert_eq!(PortState::Other(77).to_string(), "in state 77");
        assert_eq!(
            (0..7).map(mtu_bytes).collect::<Vec<_>>(),
            [None, Some(256), Some(512), Some(1024), Some(2048), Some(4096), None]
        );
    }

    #[test]
    fn a_port_speaks_what_its_node_and_its_link_layer_say() {
        assert_eq!(ask::protocol(1, 1), Protocol::InfiniBand);
        assert_eq!(ask::protocol(1, 2), Protocol::Roce);
        assert_eq!(ask::protocol(4, 2), Protocol::Iwarp);
        assert_eq!(ask::protocol(1, 9), Protocol::Other);
    }

    #[test]
    fn a_roce_gid_is_an_address_and_an_infiniband_gid_is_none() {
        let value = Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, 0xc000, 0x0201]).octets();
        let gid = Gid { index: 1, value, kind: GidKind::RoceV2, netdev: None };
        assert_eq!(gid.address(Protocol::Roce), Some("192.0.2.1".parse().unwrap()));
        assert_eq!(gid.address(Protocol::InfiniBand), None);
        let value = Ipv6Addr::from([0xfe80, 0, 0, 0, 0, 0, 0, 1]).octets();
        let gid = Gid { index: 0, value, kind: GidKind::InfiniBandOrRoceV1, netdev: None };
        assert_eq!(gid.address(Protocol::Roce), Some("fe80::1".parse().unwrap()));
    }

    #[test]
    fn the_capability_to_lock_memory_is_read_from_the_effective_set() {
        assert!(may_lock_memory("Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\n"));
        assert!(may_lock_memory("CapEff:\t0000000000004000\n"));
        assert!(!may_lock_memory("CapEff:\t000001ffffffbfff\n"));
        assert!(!may_lock_memory("CapPrm:\t000001ffffffffff\nCapEff:\t0000000000000000\n"));
        assert!(!may_lock_memory("CapEff:\tgarbage\n"));
        assert!(!may_lock_memory(""));
    }

    #[test]
    fn paging_on_demand_counts_only_if_it_covers_writes_on_reliable_connections() {
        let mut attr = ibv_device_attr_ex::default();
        assert!(!on_demand_paging(&attr));
        attr.odp_caps.general_caps = 1;
        attr.odp_caps.per_transport_caps.uc_odp_caps = IBV_ODP_SUPPORT_WRITE;
        assert!(!on_demand_paging(&attr));
        attr.odp_caps.per_transport_caps.rc_odp_caps = IBV_ODP_SUPPORT_WRITE;
        assert!(on_demand_paging(&attr));
    }

    #[test]
    fn asking_this_host_gives_devices_or_says_why_not() {
        match devices() {
            Ok(devices) => {
                for device in devices.into_iter().flatten() {
                    assert!(!device.name.is_empty() && !device.ports.is_empty(), "{device:?}");
                }
            }
            Err(why) => assert!(
                Path::new("/sys/class/infiniband")
                    .read_dir()
                    .map_or(true, |mut found| found.next().is_none())
                    || matches!(why, Unavailable::Libraries(_)),
                "there are devices, and yet: {why}"
            ),
        }
    }
}
