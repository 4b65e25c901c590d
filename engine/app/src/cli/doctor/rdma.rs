//! What this host can do with RDMA. Nothing here is bad: without RDMA a guest moves by TCP.

use super::{Finding, good, note, units};
use pageferry_engine::error::chain;
use pageferry_transport::rdma::host;
use pageferry_transport::rdma::host::{
    Device, Gid, GidKind, Port, PortState, Protocol, Unavailable, Unusable,
};
use std::io;
use std::net::IpAddr;

const RDMA: &str = "RDMA";
const PORT: &str = "RDMA port";
const BY_TCP: &str = "guests move by TCP";
/// GIDs that are shown of one port; a host with many VLANs or containers has hundreds.
const GIDS_SHOWN: usize = 6;
/// What is registered beside a guest's memory: its state, the staging region, buffers of the
/// queues.
const BESIDE_THE_GUEST_BYTES: u64 = 20 << 20;

pub(super) fn findings(guest_bytes: Option<u64>) -> Vec<Finding> {
    let found = match host::devices() {
        Ok(found) => found,
        Err(why) => return vec![unavailable(why, &host::kernel_devices())],
    };
    if found.is_empty() {
        return vec![no_device(&host::kernel_devices())];
    }
    let mut findings = Vec::new();
    for device in &found {
        match device {
            Ok(device) => {
                findings.push(one_device(device));
                findings.extend(device.ports.iter().map(|port| one_port(device, port)));
            }
            Err(why) => findings.push(unusable(why)),
        }
    }
    findings.push(connection_manager(host::connection_manager()));
    findings.push(memory_lock(host::memory_lock_limit(), guest_bytes));
    findings.push(peer_memory(&host::peer_memory()));
    findings
}

fn unavailable(why: Unavailable, in_kernel: &[String]) -> Finding {
    let text = chain(&why);
    match in_kernel {
        // Nobody needs RDMA's libraries on a host that has no NIC for them.
        [] => good(RDMA, format!("no device, {BY_TCP}; with an RDMA NIC: {text}")),
        names => note(RDMA, format!("{} not used, {BY_TCP}: {text}", names.join(", "))),
    }
}

fn no_device(in_kernel: &[String]) -> Finding {
    match in_kernel {
        [] => good(
            RDMA,
            format!(
                "no device, {BY_TCP}; soft-RoCE would be: modprobe rdma_rxe; rdma link add rxe0 type rxe netdev INTERFACE"
            ),
        ),
        names => note(
            RDMA,
            format!(
                "libibverbs has no provider for {}, {BY_TCP}: apt install ibverbs-providers, or dnf install libibverbs",
                names.join(", ")
            ),
        ),
    }
}

fn unusable(why: &Unusable) -> Finding {
    note(RDMA, chain(why))
}

fn one_device(device: &Device) -> Finding {
    let limits = &device.limits;
    let paging = if device.on_demand_paging {
        "registers memory without pinning it if asked to (ODP)"
    } else {
        "pins what it registers (no ODP for writes), so all of a guest's memory must fit in RAM while it moves"
    };
    let ordering = match device.relaxed_ordering {
        Some(true) => "registers with relaxed ordering",
        Some(false) => "registers without relaxed ordering, which it refuses",
        None => "could not register a page just now",
    };
    good(
        RDMA,
        format!(
            "{}: {} queue pairs of {} work requests, {} completions a queue, regions up to {}; {ordering}; {paging}",
            device.name,
            limits.queue_pairs,
            limits.work_requests,
            limits.completions,
            size(limits.region_bytes),
        ),
    )
}

fn one_port(device: &Device, port: &Port) -> Finding {
    let name = format!("{}/{}", device.name, port.number);
    let interface = port.gids.iter().find_map(|gid| gid.netdev.as_deref()).unwrap_or("INTERFACE");
    let fix = match (port.state, port.protocol) {
        (PortState::Active, _) => None,
        (PortState::Initializing | PortState::Armed, Protocol::InfiniBand) => {
            Some("start a subnet manager on this fabric: opensm, or the switch's own".to_owned())
        }
        (_, Protocol::InfiniBand) => {
            Some("look at cable and switch port, and at what ibstat says".to_owned())
        }
        (_, _) => Some(format!("ip link set {interface} up, and look at cable and switch port")),
    };
    if let Some(fix) = fix {
        return note(PORT, format!("{name}: {}, {}: {fix}", port.protocol, port.state));
    }
    let rate = port.rate.as_deref().unwrap_or("unknown rate");
    let mtu =
        port.mtu_bytes.map_or_else(|| "MTU unknown".to_owned(), |bytes| format!("MTU {bytes}"));
    let line = format!("{name}: {}, {}, {rate}, {mtu}", port.protocol, port.state);
    match port.protocol {
        Protocol::InfiniBand => good(
            PORT,
            format!(
                "{line}, LID {}; it is reached by the IP address of its IPoIB interface",
                port.lid
            ),
        ),
        Protocol::Roce if port.gids.iter().any(is_routable) => {
            good(PORT, format!("{line}; {}", gids(&port.gids)))
        }
        Protocol::Roce => note(
            PORT,
            format!("{line}; no IP address to reach it by: ip address add ADDRESS dev {interface}"),
        ),
        Protocol::Iwarp | Protocol::Other => good(PORT, line),
    }
}

/// The addresses of a RoCE port, with the place in its table and the version that each has.
fn gids(gids: &[Gid]) -> String {
    let mut texts: Vec<String> = gids
        .iter()
        .filter_map(|gid| {
            let kind = match gid.kind {
                GidKind::RoceV2 => "v2",
                GidKind::InfiniBandOrRoceV1 => "v1",
                GidKind::Other => "of unknown version",
            };
            let netdev =
                gid.netdev.as_deref().map(|netdev| format!(" on {netdev}")).unwrap_or_default();
            Some(format!("GID {} {}{netdev} ({kind})", gid.index, gid.address(Protocol::Roce)?))
        })
        .collect();
    let left_out = texts.len().saturating_sub(GIDS_SHOWN);
    texts.truncate(GIDS_SHOWN);
    if left_out > 0 {
        texts.push(format!("and {left_out} more"));
    }
    texts.join(", ")
}

/// A peer that is told this address alone can reach it; a link-local one needs an interface's name
/// besides.
fn is_routable(gid: &Gid) -> bool {
    gid.address(Protocol::Roce).is_some_and(|address| match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    })
}

fn connection_manager(opened: io::Result<()>) -> Finding {
    const TOPIC: &str = "RDMA connections";
    match opened {
        Ok(()) => good(TOPIC, "can be made (rdma_cm)"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => note(
            TOPIC,
            format!(
                "cannot be made by this user, {BY_TCP}: allow reading and writing /dev/infiniband/rdma_cm"
            ),
        ),
        Err(e) => note(
            TOPIC,
            format!("cannot be made, {BY_TCP}: modprobe rdma_ucm (/dev/infiniband/rdma_cm: {e})"),
        ),
    }
}

/// `guest` is what a guest that is asked about has. RDMA registers that and a few buffers.
fn memory_lock(limit_bytes: Option<u64>, guest: Option<u64>) -> Finding {
    const TOPIC: &str = "memory lock";
    const MEND: &str = "ulimit -l unlimited, LimitMEMLOCK=infinity (systemd), memlock in limits.conf, or CAP_IPC_LOCK";
    let needed = guest.map(|bytes| bytes.saturating_add(BESIDE_THE_GUEST_BYTES));
    match (limit_bytes, needed) {
        (None, _) => good(TOPIC, "no limit: RDMA can register a guest of any size"),
        (Some(limit), Some(needed)) if needed <= limit => good(
            TOPIC,
            format!(
                "{} at most; a guest of this size takes {} to be registered",
                size(limit),
                units::bytes(needed)
            ),
        ),
        (Some(limit), Some(needed)) => note(
            TOPIC,
            format!(
                "{} at most, and a guest of this size takes {} to be registered, so it moves by TCP: {MEND}",
                size(limit),
                units::bytes(needed)
            ),
        ),
        (Some(limit), None) => note(
            TOPIC,
            format!(
                "{} at most, but RDMA registers all memory that a guest has touched, and larger guests move by TCP: {MEND}",
                size(limit)
            ),
        ),
    }
}

fn peer_memory(modules: &[String]) -> Finding {
    const TOPIC: &str = "peer memory";
    match modules {
        [] => good(TOPIC, "no module for it is loaded; a guest's own memory needs none"),
        modules => {
            good(TOPIC, format!("{} loaded; a guest's own memory needs none", modules.join(", ")))
        }
    }
}

/// In the largest unit that leaves a whole number of at least one.
fn size(bytes: u64) -> String {
    match bytes {
        // What devices say that have no limit.
        u64::MAX => "any size".into(),
        _ if bytes >= 1 << 40 => format!("{} TiB", bytes >> 40),
        _ if bytes >= 1 << 30 => format!("{} GiB", bytes >> 30),
        _ if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
        _ => format!("{} KiB", bytes >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Grade;
    use pageferry_transport::rdma::host::Limits;
    use std::net::Ipv6Addr;

    fn gid(index: u32, address: &str, kind: GidKind) -> Gid {
        let value = match address.parse().unwrap() {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        Gid { index, value: Ipv6Addr::octets(&value), kind, netdev: Some("eth4".into()) }
    }

    fn device(state: PortState, protocol: Protocol, gids: Vec<Gid>) -> Device {
        let limits = Limits {
            queue_pairs: 131_072,
            work_requests: 32_768,
            slices: 30,
            completion_queues: 1 << 24,
            completions: 4_194_303,
            regions: 1 << 24,
            region_bytes: u64::MAX,
        };
        let port = Port {
            number: 1,
            state,
            protocol,
            mtu_bytes: Some(4096),
            message_bytes_max: 1 << 30,
            rate: Some("100 Gb/sec (4X EDR)".into()),
            lid: 17,
            gids,
        };
        Device {
            name: "mlx5_0".into(),
            guid: 1,
            limits,
            on_demand_paging: true,
            relaxed_ordering: Some(true),
            ports: vec![port],
        }
    }

    fn port_text(state: PortState, protocol: Protocol, gids: Vec<Gid>) -> (Grade, String) {
        let device = device(state, protocol, gids);
        let finding = one_port(&device, &device.ports[0]);
        (finding.grade, finding.text)
    }

    #[test]
    fn this_host_gets_an_answer_and_is_not_unfit_for_want_of_rdma() {
        let findings = findings(None);
        assert!(!findings.is_empty());
        assert!(findings.iter().all(|finding| finding.grade != Grade::Bad), "{findings:?}");
    }

    #[test]
    fn a_host_without_a_device_moves_guests_by_tcp_and_that_is_good() {
        for finding in [unavailable(Unavailable::Kernel, &[]), no_device(&[])] {
            assert_eq!(finding.grade, Grade::Good);
            assert!(finding.text.starts_with("no device, guests move by TCP"), "{}", finding.text);
            assert!(finding.text.contains("modprobe"), "{}", finding.text);
        }
    }

    #[test]
    fn a_device_that_is_not_used_is_named_with_what_to_install() {
        let names = ["mlx5_0".to_owned(), "mlx5_1".to_owned()];
        let finding = no_device(&names);
        assert_eq!(finding.grade, Grade::Note);
        assert!(finding.text.contains("mlx5_0, mlx5_1"), "{}", finding.text);
        assert!(finding.text.contains("apt install ibverbs-providers"), "{}", finding.text);
        assert_eq!(unavailable(Unavailable::Kernel, &names).grade, Grade::Note);
    }

    #[test]
    fn a_device_tells_what_it_can_do_at_once() {
        assert_eq!(
            one_device(&device(PortState::Active, Protocol::Roce, vec![])).text,
            "mlx5_0: 131072 queue pairs of 32768 work requests, 4194303 completions a queue, regions up to any size; \
             registers with relaxed ordering; registers memory without pinning it if asked to (ODP)"
        );
    }

    #[test]
    fn an_active_roce_port_shows_its_addresses() {
        let gids = vec![
            gid(0, "fe80::1", GidKind::InfiniBandOrRoceV1),
            gid(3, "192.0.2.7", GidKind::RoceV2),
        ];
        let (grade, text) = port_text(PortState::Active, Protocol::Roce, gids);
        assert_eq!(grade, Grade::Good);
        assert_eq!(
            text,
            "mlx5_0/1: RoCE, active, 100 Gb/sec (4X EDR), MTU 4096; GID 0 fe80::1 on eth4 (v1), GID 3 192.0.2.7 on \
             eth4 (v2)"
        );
    }

    #[test]
    fn many_addresses_are_counted() {
        let gids = (0..20).map(|index| gid(index, "192.0.2.7", GidKind::RoceV2)).collect();
        let (_, text) = port_text(PortState::Active, Protocol::Roce, gids);
        assert!(text.contains("GID 5 ") && !text.contains("GID 6 "), "{text}");
        assert!(text.ends_with(", and 14 more"), "{text}");
    }

    #[test]
    fn a_port_that_carries_nothing_is_noted_with_its_mend() {
        for (state, protocol, gids, fix) in [
            (
                PortState::Down,
                Protocol::Roce,
                vec![gid(0, "192.0.2.7", GidKind::RoceV2)],
                "ip link set eth4 up",
            ),
            (PortState::Active, Protocol::Roce, vec![], "ip address add ADDRESS dev INTERFACE"),
            (
                PortState::Active,
                Protocol::Roce,
                vec![gid(0, "fe80::1", GidKind::RoceV2)],
                "dev eth4",
            ),
            (PortState::Initializing, Protocol::InfiniBand, vec![], "subnet manager"),
            (PortState::Down, Protocol::InfiniBand, vec![], "cable"),
            (PortState::Other(9), Protocol::Iwarp, vec![], "in state 9"),
        ] {
            let (grade, text) = port_text(state, protocol, gids);
            assert_eq!(grade, Grade::Note, "{text}");
            assert!(text.contains(fix), "{text}");
        }
    }

    #[test]
    fn a_limit_on_locked_memory_is_noted_with_its_size() {
        assert_eq!(memory_lock(None, Some(1 << 40)).grade, Grade::Good);
        let finding = memory_lock(Some(8 << 20), None);
        assert_eq!(finding.grade, Grade::Note);
        assert!(
            finding.text.starts_with("8 MiB at most") && finding.text.contains("ulimit -l"),
            "{}",
            finding.text
        );
        let fits = memory_lock(Some(1 << 30), Some(512 << 20));
        assert_eq!(fits.grade, Grade::Good);
        // The guest's memory is not all that is registered.
        let not = memory_lock(Some(1 << 30), Some(1 << 30));
        assert!(not.grade == Grade::Note && not.text.contains("takes 1.02 GiB"), "{}", not.text);
    }

    #[test]
    fn the_connection_manager_is_mended_by_permission_or_by_its_module() {
        assert_eq!(connection_manager(Ok(())).grade, Grade::Good);
        let absent = connection_manager(Err(io::ErrorKind::NotFound.into())).text;
        assert!(absent.contains("modprobe rdma_ucm"), "{absent}");
        let denied = connection_manager(Err(io::ErrorKind::PermissionDenied.into())).text;
        assert!(denied.contains("allow") && !denied.contains("modprobe"), "{denied}");
    }
}
