//! What the kernel says of RDMA in files: rates, GID tables, modules. Every function takes the
//! directory that stands for `/`, and an absent or strange file is no answer, never an error.

use super::{Gid, GidKind, Protocol};
use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

/// Modules that lend a device's memory to NICs, by their name in `/proc/modules`.
const PEER_MODULES: [&str; 2] = ["nvidia_peermem", "nv_peer_mem"];

const DEVICES: &str = "sys/class/infiniband";

/// Names of the devices that the kernel has, in order.
pub(super) fn devices(root: &Path) -> Vec<String> {
    let Ok(entries) = root.join(DEVICES).read_dir() else { return Vec::new() };
    let names: BTreeSet<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.into_iter().collect()
}

/// The directory of a port.
pub(super) fn port(root: &Path, device: &str, number: u8) -> PathBuf {
    root.join(DEVICES).join(device).join("ports").join(number.to_string())
}

/// What a port speaks.
pub(super) fn protocol(root: &Path, device: &str, number: u8) -> Protocol {
    let node = line(&root.join(DEVICES).join(device).join("node_type"));
    match line(&port(root, device, number).join("link_layer")).as_deref() {
        // `4: RNIC`
        _ if node.is_some_and(|node| node.ends_with("RNIC")) => Protocol::Iwarp,
        Some("InfiniBand") => Protocol::InfiniBand,
        Some("Ethernet") => Protocol::Roce,
        _ => Protocol::Other,
    }
}

/// The one line of a file.
pub(super) fn line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// The entries of a port's GID table that are in use, in order. Those that are not read as zeros,
/// and their types cannot be read.
pub(super) fn gids(port: &Path) -> Vec<Gid> {
    let Ok(entries) = port.join("gids").read_dir() else { return Vec::new() };
    let indices: BTreeSet<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    indices.into_iter().filter_map(|index| gid(port, index)).collect()
}

fn gid(port: &Path, index: u32) -> Option<Gid> {
    let file = |directory: &str| line(&port.join(directory).join(index.to_string()));
    // Eight groups of four digits: an IPv6 address in full.
    let value: Ipv6Addr = file("gids")?.parse().ok()?;
    if value.is_unspecified() {
        return None;
    }
    let kind = match file("gid_attrs/types").as_deref() {
        Some("IB/RoCE v1") => GidKind::InfiniBandOrRoceV1,
        Some("RoCE v2") => GidKind::RoceV2,
        _ => GidKind::Other,
    };
    Some(Gid { index, value: value.octets(), kind, netdev: file("gid_attrs/ndevs") })
}

/// See [`super::peer_memory`]. The directory is where NVIDIA's (Mellanox's) own kernel drivers list
/// their clients.
pub(super) fn peer_memory(root: &Path) -> Vec<String> {
    let modules = fs::read_to_string(root.join("proc/modules")).unwrap_or_default();
    let mut found: BTreeSet<String> = modules
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|module| PEER_MODULES.contains(module))
        .map(str::to_owned)
        .collect();
    if let Ok(clients) = root.join("sys/kernel/mm/memory_peers").read_dir() {
        found.extend(
            clients.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()),
        );
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A root directory with these files.
    fn root(files: &[(&str, &str)]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_gid_table_is_read_in_order_without_its_empty_and_broken_entries() {
        const PORT: &str = "sys/class/infiniband/rxe0/ports/1";
        let table = [
            ("gids/0", "fe80:0000:0000:0000:5054:00ff:fe12:3456\n"),
            ("gid_attrs/types/0", "IB/RoCE v1\n"),
            ("gid_attrs/ndevs/0", "v0\n"),
            ("gids/10", "0000:0000:0000:0000:0000:ffff:0a00:0001\n"),
            ("gid_attrs/types/10", "RoCE v2\n"),
            ("gid_attrs/ndevs/10", "v0\n"),
            ("gids/2", "0000:0000:0000:0000:0000:ffff:0a00:0002\n"),
            ("gid_attrs/types/2", "RoCE v3\n"),
            ("gids/3", "0000:0000:0000:0000:0000:0000:0000:0000\n"),
            ("gids/4", "not a gid\n"),
            ("gids/notes", "fe80:0000:0000:0000:5054:00ff:fe12:3456\n"),
        ];
        let files: Vec<(String, &str)> =
            table.iter().map(|(path, text)| (format!("{PORT}/{path}"), *text)).collect();
        let files: Vec<(&str, &str)> =
            files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        let root = root(&files);
        let gids = gids(&port(root.path(), "rxe0", 1));
        let seen: Vec<_> =
            gids.iter().map(|gid| (gid.index, gid.kind, gid.netdev.as_deref())).collect();
        assert_eq!(
            seen,
            [
                (0, GidKind::InfiniBandOrRoceV1, Some("v0")),
                (2, GidKind::Other, None),
                (10, GidKind::RoceV2, Some("v0")),
            ]
        );
        assert_eq!(gids[2].value, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]);
    }

    #[test]
    fn a_port_without_files_has_no_gids_and_no_rate() {
        let root = root(&[("sys/class/infiniband/rxe0/ports/1/rate", "\n")]);
        let port = port(root.path(), "rxe0", 1);
        assert_eq!(gids(&port), []);
        assert_eq!(line(&port.join("rate")), None);
        assert_eq!(line(&port.join("absent")), None);
    }

    #[test]
    fn devices_are_named_and_a_rate_is_one_line() {
        assert!(devices(root(&[]).path()).is_empty());
        let root = root(&[("sys/class/infiniband/mlx5_0/ports/2/rate", "100 Gb/sec (4X EDR)\n")]);
        assert_eq!(devices(root.path()), ["mlx5_0"]);
        let rate = line(&port(root.path(), "mlx5_0", 2).join("rate"));
        assert_eq!(rate.as_deref(), Some("100 Gb/sec (4X EDR)"));
    }

    #[test]
    fn peer_memory_is_found_by_whole_module_names_and_by_clients() {
        let root = root(&[
            (
                "proc/modules",
                "nvidia_peermem 16384 0 - Live 0x0\nnvidia 1 2 nvidia_peermem, Live 0x0\n",
            ),
            ("sys/kernel/mm/memory_peers/nv_mem/version", "1.1\n"),
        ]);
        assert_eq!(peer_memory(root.path()), ["nv_mem", "nvidia_peermem"]);
        let none = self::root(&[("proc/modules", "nvidia 1 2 nvidia_peermem, Live 0x0\n")]);
        assert!(peer_memory(none.path()).is_empty());
    }
}
