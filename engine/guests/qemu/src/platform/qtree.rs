//! Reads the device tree that QEMU's monitor shows (`info qtree`). Pure.
//!
//! ```text
//!   bus: main-system-bus
//!     dev: q35-pcihost, id ""
//!       bypass-iommu = false
//!       bus: pcie.0
//!         dev: virtio-net-pci, id "net0"
//!           addr = 02.0
//!           bar 0: i/o at 0xc000 [0xc01f]        what the guest has programmed: passed over
//! ```

use super::{Device, Properties};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::xxh3_64;

/// Properties that are the host's business, or that change while the guest runs: not compared.
const NOT_THE_GUESTS: &[&str] = &[
    // Where data come from and go to.
    "drive",
    "netdev",
    "chardev",
    "audiodev",
    "tpmdev",
    "vhostfd",
    "evdev",
    "pcap",
    "iothread",
    "iothread-vq-mapping",
    "netdevs",
    "vlan",
    "filename",
    "path",
    "logfile",
    "display",
    "head",
    "hostbus",
    "hostaddr",
    "hostport",
    "hostdevice",
    "memdev",
    "rng",
    "cryptodev",
    "ebpf-rss-fds",
    "failover_pair_id",
    "romfile",
    // How the host serves it.
    "share-rw",
    "account-invalid",
    "account-failed",
    "rerror",
    "werror",
    "ioeventfd",
    "request-merging",
    "tx",
    "backend_defaults",
    "lost_tick_policy",
    // What the guest has programmed, or QEMU has guessed from what lies on a disk.
    "busnr",
    "MCFG",
    "smb_io_base",
    "cyls",
    "heads",
    "secs",
    "lcyls",
    "lheads",
    "lsecs",
    "bios-chs-trans",
];

/// Cards that show the guest's own address of the moment as theirs, by the beginnings of their
/// types.
const GUEST_SETS_MAC: [&str; 2] = ["vmxnet3", "i825"];

/// The name under which a digest stands for QEMU's experimental properties of a device.
pub(super) const EXPERIMENTAL: &str = "x-*";

/// A property whose values show where a device is, in the order in which they are looked for.
const PLACES: [&str; 8] = ["addr", "slot", "port", "scsi-id", "unit", "iobase", "address", "nr"];

struct Open {
    depth: usize,
    kind: String,
    id: String,
    bus: String,
    properties: Properties,
    own: Vec<(String, String)>,
}

/// All devices by their places.
pub fn parse(text: &str) -> BTreeMap<String, Device> {
    let mut devices = BTreeMap::new();
    // Buses and devices that the line is inside of.
    let mut buses: Vec<(usize, String)> = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    for line in text.lines() {
        let depth = line.len() - line.trim_start().len();
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        while open.last().is_some_and(|device| device.depth >= depth) {
            close(open.pop(), &mut devices);
        }
        if let Some(name) = line.strip_prefix("bus: ") {
            buses.retain(|(of, _)| *of < depth);
            buses.push((depth, name.to_owned()));
        } else if let Some((kind, id)) =
            line.strip_prefix("dev: ").and_then(|dev| dev.split_once(", id "))
        {
            buses.retain(|(of, _)| *of < depth);
            let bus = buses.last().map_or("", |(_, name)| name.as_str());
            // A bus below a device may have the same name below another one.
            let above = open.last().filter(|_| bus == "virtio-bus").map(place);
            let bus = above.map_or_else(|| bus.to_owned(), |above| format!("{above}/{bus}"));
            open.push(Open {
                depth,
                // Older QEMUs have a space in `ICH9 LPC` and others.
                kind: kind.replace(' ', "-"),
                id: id.trim_matches('"').to_owned(),
                bus,
                properties: Properties::new(),
                own: Vec::new(),
            });
        } else if let Some((name, value)) = line.split_once(" = ")
            && let Some(device) = open.last_mut()
            && !NOT_THE_GUESTS.contains(&name)
            && !(name == "mac" && GUEST_SETS_MAC.iter().any(|start| device.kind.starts_with(start)))
        {
            if name.starts_with("x-") {
                device.own.push((name.to_owned(), value.to_owned()));
            } else {
                device
                    .properties
                    .insert(name.to_owned(), whatever_the_version(name, value).to_owned());
            }
        }
    }
    while let Some(device) = open.pop() {
        close(Some(device), &mut devices);
    }
    devices
}

/// A value that versions of QEMU write differently. `rombar` is 1, -1 or `auto` where nobody has
/// set it.
fn whatever_the_version<'v>(name: &str, value: &'v str) -> &'v str {
    match (name, value.split(' ').next()) {
        ("rombar", Some("1" | "-1" | "auto" | "on")) => "on",
        ("rombar", Some("0" | "off")) => "off",
        _ => value,
    }
}

/// A device's place: its bus, and where on it.
fn place(device: &Open) -> String {
    let on_bus = PLACES.iter().find_map(|name| {
        let value = device.properties.get(*name)?;
        let value = value.split(' ').next().unwrap_or(value).trim_matches('"');
        Some(match *name {
            "addr" if value.contains('.') => value.to_owned(),
            "scsi-id" => {
                let lun = device
                    .properties
                    .get("lun")
                    .map_or("0", |lun| lun.split(' ').next().unwrap_or("0"));
                format!("{value}:{lun}")
            }
            name => format!("{}-{name}-{value}", device.kind),
        })
    });
    let bus = if device.bus.is_empty() { "system" } else { &device.bus };
    format!("{bus}/{}", on_bus.unwrap_or_else(|| device.kind.clone()))
}

fn close(device: Option<Open>, devices: &mut BTreeMap<String, Device>) {
    let Some(mut device) = device else { return };
    let place = place(&device);
    if !device.own.is_empty() {
        // QEMU's experimental ones, of which there are many and which nobody sets: one digest for
        // all.
        let digest = format!("{:016x}", xxh3_64(format!("{:?}", device.own).as_bytes()));
        device.properties.insert(EXPERIMENTAL.into(), digest);
    }
    let mut at = place.clone();
    let mut more = 1;
    while devices.contains_key(&at) {
        more += 1;
        at = format!("{place}#{more}");
    }
    devices.insert(at, Device { kind: device.kind, id: device.id, properties: device.properties });
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = "bus: main-system-bus\n  type System\n  dev: hpet, id \"\"\n    gpio-in \"\" 2\n    timers = 3 (0x3)\n    \
        mmio 00000000fed00000/0000000000000400\n  dev: q35-pcihost, id \"\"\n    MCFG = -1 (0xffffffffffffffff)\n    \
        bypass-iommu = false\n    bus: pcie.0\n      type PCIE\n      dev: virtio-net-pci, id \"net0\"\n        \
        vectors = 4 (0x4)\n        addr = 02.0\n        busnr = 0 (0x0)\n        x-pcie-pm-init = true\n        \
        bar 0: i/o at 0xc000 [0xc01f]\n        bus: virtio-bus\n          type virtio-pci-bus\n          \
        dev: virtio-net-device, id \"\"\n            mac = \"52:54:00:12:34:56\"\n            netdev = \"n\"\n      \
        dev: ich9-ahci, id \"\"\n        addr = 1f.2\n        bus: ide.1\n          type IDE\n          \
        dev: ide-hd, id \"disk\"\n            drive = \"d\"\n            unit = 0 (0x0)\n            serial = \"a = b\"\n      \
        dev: i2c-thing, id \"\"\n      dev: i2c-thing, id \"\"\n";

    #[test]
    fn devices_are_found_by_their_places_without_what_is_the_hosts() {
        let devices = parse(TREE);
        let places: Vec<_> = devices.keys().map(String::as_str).collect();
        assert_eq!(
            places,
            [
                "ide.1/ide-hd-unit-0",
                "main-system-bus/hpet",
                "main-system-bus/q35-pcihost",
                "pcie.0/02.0",
                "pcie.0/02.0/virtio-bus/virtio-net-device",
                "pcie.0/1f.2",
                "pcie.0/i2c-thing",
                "pcie.0/i2c-thing#2",
            ]
        );
        let net = &devices["pcie.0/02.0"];
        assert_eq!((net.kind.as_str(), net.id.as_str()), ("virtio-net-pci", "net0"));
        assert_eq!(net.properties.keys().collect::<Vec<_>>(), ["addr", "vectors", "x-*"]);
        let inner = &devices["pcie.0/02.0/virtio-bus/virtio-net-device"];
        assert_eq!(inner.properties, [("mac".into(), "\"52:54:00:12:34:56\"".into())].into());
        assert_eq!(devices["ide.1/ide-hd-unit-0"].properties["serial"], "\"a = b\"");
        assert!(parse("").is_empty());
        // What the host's side is called, and what the guest has made of an address.
        let vsock = "bus: b\n  dev: vhost-vsock-device, id \"\"\n    guest-cid = 3 (0x3)\n    vhostfd = \"27\"\n  \
            dev: i82559c, id \"\"\n    mac = \"52:54:00:12:34:56\"\n  dev: ICH9 LPC, id \"\"\n";
        let devices = parse(vsock);
        assert_eq!(
            devices["b/vhost-vsock-device"].properties.keys().collect::<Vec<_>>(),
            ["guest-cid"]
        );
        assert!(devices["b/i82559c"].properties.is_empty());
        assert_eq!(devices["b/ICH9-LPC"].kind, "ICH9-LPC");
        for (value, is) in
            [("1 (0x1)", "on"), ("-1 (0xffffffffffffffff)", "on"), ("0 (0x0)", "off")]
        {
            assert_eq!(whatever_the_version("rombar", value), is);
        }
    }
}
