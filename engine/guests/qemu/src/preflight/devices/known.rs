//! The types that a guest may be made of, and what is known of each.
//!
//! Made from what QEMU 10.0 knows, by how each family gets at guest memory. Another QEMU may know
//! more: a test names every type of the QEMU at hand that nobody has decided about.

/// Of what kind a part of a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// A device, with or without a bus.
    Device,
    /// The host's end of a network.
    Netdev,
    /// A user-created object.
    Object,
    /// The driver of a block node.
    BlockDriver,
}

/// What is known of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It writes guest memory through QEMU's page tables, or not at all.
    Seen,
    /// It does not, for this reason.
    Unseen(&'static str),
    /// Nobody has looked.
    Unknown,
}

/// Decides about a type. Pure.
#[must_use]
pub fn judge(family: Family, kind: &str) -> Verdict {
    let found = match family {
        Family::Device => UNSEEN.iter().find(|(start, _)| kind.starts_with(start)),
        Family::Object => UNSEEN_OBJECTS.iter().find(|(start, _)| kind.starts_with(start)),
        Family::Netdev => UNSEEN_NETDEVS.iter().find(|(start, _)| kind.starts_with(start)),
        Family::BlockDriver => UNSEEN_DRIVERS.iter().find(|(name, _)| kind == *name),
    };
    if let Some((_, why)) = found {
        return Verdict::Unseen(why);
    }
    let seen = match family {
        Family::Device => is_seen_device(kind),
        Family::Object => SEEN_OBJECTS.contains(&kind),
        Family::Netdev => SEEN_NETDEVS.contains(&kind),
        Family::BlockDriver => {
            crate::preflight::disks::copying_driver(kind)
                || crate::preflight::disks::DRAINED_DRIVERS.contains(&kind)
        }
    };
    if seen { Verdict::Seen } else { Verdict::Unknown }
}

fn is_seen_device(kind: &str) -> bool {
    if kind.ends_with("-cpu") || SEEN.contains(&kind) {
        return true;
    }
    if SEEN_FAMILIES.iter().any(|start| kind.starts_with(start)) {
        return true;
    }
    let transports = ["-pci-non-transitional", "-pci-transitional", "-pci", "-device", "-ccw"];
    let base = transports.iter().find_map(|end| kind.strip_suffix(end)).unwrap_or(kind);
    SEEN_VIRTIO.contains(&base)
}

const OTHER_PROCESS: &str = "another process writes guest memory through a mapping of its own";
const HARDWARE: &str = "hardware writes guest memory by DMA";
const RENDERER: &str = "its renderer may hand guest memory to the graphics card";
const ENCRYPTED: &str = "its memory is encrypted, and cannot be read from outside";
const NOT_EXAMINED: &str =
    "what the kernel and Xen's back ends write into shared pages was not examined";

/// Devices whose writes are not seen, by the beginning of their type.
const UNSEEN: [(&str, &str); 20] = [
    ("cxl-vfio", HARDWARE),
    ("ivshmem", OTHER_PROCESS),
    ("pvrdma", HARDWARE),
    ("remote-pcihost", OTHER_PROCESS),
    ("sgx-epc", ENCRYPTED),
    ("tdx-", ENCRYPTED),
    ("vfio-user", OTHER_PROCESS),
    ("vfio-", HARDWARE),
    ("vhost-scsi", "the kernel's target writes guest memory through pages that it pins"),
    ("vhost-user", OTHER_PROCESS),
    ("vhost-vdpa", HARDWARE),
    // Files are read in worker threads, whose end `stop` does not wait for: QEMU refuses to migrate
    // while a share is mounted, but the guest may mount and unmount it while it is moved.
    ("virtio-9p", "QEMU does not wait for its reads of the host's files when the guest is stopped"),
    ("virtio-gpu-gl", RENDERER),
    ("virtio-gpu-rutabaga", RENDERER),
    ("virtio-vga-gl", RENDERER),
    ("virtio-vga-rutabaga", RENDERER),
    ("x-pci-proxy", OTHER_PROCESS),
    ("x-vfio-", HARDWARE),
    ("xen-", NOT_EXAMINED),
    ("igd-passthrough", HARDWARE),
];

/// The same of objects.
const UNSEEN_OBJECTS: [(&str, &str); 8] = [
    ("cryptodev-vhost-user", OTHER_PROCESS),
    ("iommufd", HARDWARE),
    ("memory-backend-epc", ENCRYPTED),
    ("sev-", ENCRYPTED),
    ("tdx-", ENCRYPTED),
    ("vfio-user", OTHER_PROCESS),
    ("x-remote-object", OTHER_PROCESS),
    ("x-vfio-user", OTHER_PROCESS),
];

/// The same of the network's back ends. [`netdevs_in`] makes `passt+vhost-user` of a `passt` that
/// is one.
const UNSEEN_NETDEVS: [(&str, &str); 3] =
    [("vhost-user", OTHER_PROCESS), ("vhost-vdpa", HARDWARE), ("passt+vhost-user", OTHER_PROCESS)];

const REGISTERED: &str =
    "it registers guest memory, which the kernel or a device then writes by addresses of its own";

/// Block drivers whose writes are not seen, by name.
const UNSEEN_DRIVERS: [(&str, &str); 6] = [
    ("nvme", HARDWARE),
    ("io_uring", REGISTERED),
    ("nvme-io_uring", REGISTERED),
    ("virtio-blk-vfio-pci", HARDWARE),
    ("virtio-blk-vhost-user", OTHER_PROCESS),
    ("virtio-blk-vhost-vdpa", HARDWARE),
];

/// Virtio devices without the names of their transports. vhost-net and vhost-vsock are here because
/// vhost in the kernel writes in QEMU's address space.
#[rustfmt::skip]
const SEEN_VIRTIO: [&str; 23] = [
    "vhost-vsock", "virtconsole", "virtio-balloon", "virtio-blk", "virtio-crypto", "virtio-gpu",
    "virtio-input-host", "virtio-iommu", "virtio-keyboard", "virtio-mem", "virtio-mmio",
    "virtio-mouse", "virtio-multitouch", "virtio-net", "virtio-pmem", "virtio-rng", "virtio-scsi",
    "virtio-serial", "virtio-sound", "virtio-tablet", "virtio-vga", "virtserialport", "vmclock",
];

/// Families of devices that QEMU emulates in its own process.
#[rustfmt::skip]
const SEEN_FAMILIES: [&str; 10] = [
    "cfi.pflash", "e1000", "hda-", "i825", "ich9-", "ipmi-bmc-", "isa-", "lsi53c", "sysbus-",
    "usb-",
];

/// Devices that QEMU emulates in its own process, by their types.
#[rustfmt::skip]
const SEEN: [&str; 167] = [
    "AC97", "AMDVI-PCI", "ES1370", "ICH9 LPC", "ICH9 SMB", "ICH9-LPC", "ICH9-SMB", "PIIX3",
    "PIIX4_PM", "VGA", "acpi-erst", "acpi-ged", "adlib", "am53c974", "amd-iommu", "apic", "ati-vga",
    "base-xhci", "bochs-display", "ccid-card-emulated", "ccid-card-passthru", "cirrus-vga",
    "cs4231a", "ctucan_pci", "cxl-downstream", "cxl-rp", "cxl-switch-mailbox-cci", "cxl-type3",
    "cxl-upstream", "dc390", "edu", "emmc", "esp", "floppy", "fw_cfg_io", "fw_cfg_mem",
    "generic-sdhci", "gpex-pcihost", "gpex-root", "gpio_i2c", "guest-loader", "gus", "hpet",
    "hv-balloon", "hv-syndbg", "hyperv-synic", "hyperv-testdev", "i2c-ddc", "i2c-echo", "i440FX",
    "i440FX-pcihost", "i6300esb", "i8042", "i8042-mmio", "i82801", "i82801b11-bridge", "ib700",
    "ide-cd", "ide-cf", "ide-hd", "igb", "igbvf", "imx-usdhc", "imx.usbphy", "intel-hda",
    "intel-iommu", "ioapic", "ioh3420", "ipoctal232", "isabus-bridge", "kvaser_pci", "kvm-apic",
    "kvm-i8259", "kvm-ioapic", "kvm-pit", "kvmclock", "kvmvapic", "loader", "mc146818rtc", "mch",
    "megasas", "megasas-gen2", "migration", "mioe3680_pci", "mptsas1068", "ne2k_isa", "ne2k_pci",
    "nec-usb-xhci", "nvdimm", "nvme", "nvme-ns", "nvme-subsys", "or-irq", "pc-dimm", "pc-testdev",
    "pci-bridge", "pci-bridge-seat", "pci-ipmi-bt", "pci-ipmi-kcs", "pci-ohci", "pci-serial",
    "pci-serial-2x", "pci-serial-4x", "pci-testdev", "pcie-pci-bridge", "pcie-root-port",
    "pcm3680_pci", "pcnet", "piix3-ide", "piix3-usb-uhci", "piix4-ide", "piix4-isa",
    "piix4-usb-uhci", "port92", "ps2-kbd", "ps2-mouse", "pvpanic", "pvpanic-mmio", "pvpanic-pci",
    "pvscsi", "pxb", "pxb-cxl", "pxb-cxl-host", "pxb-host", "pxb-pcie", "q35-pcihost", "qemu-xhci",
    "qxl", "qxl-vga", "ramfb", "rocker", "rtl8139", "s3c-sdhci", "sb16", "scsi-block", "scsi-cd",
    "scsi-generic", "scsi-hd", "sd-card", "sd-card-spi", "sdhci-pci", "secondary-vga", "serial",
    "sga", "smbus-eeprom", "smbus-ipmi", "split-irq", "tpci200", "tpm-crb", "tpm-tis",
    "tpm-tis-device", "tulip", "u2f-emulated", "u2f-passthru", "uefi-vars-sysbus", "uefi-vars-x64",
    "ufs", "ufs-lu", "vmbus-bridge", "vmcoreinfo", "vmgenid", "vmmouse", "vmport", "vmware-svga",
    "vmxnet3", "x3130-upstream", "xio3130-downstream",
];

/// Objects that write no guest memory, or through QEMU's page tables.
#[rustfmt::skip]
const SEEN_OBJECTS: [&str; 40] = [
    "acpi-generic-initiator", "acpi-generic-port", "authz-list", "authz-list-file", "authz-pam",
    "authz-simple", "can-bus", "can-host-socketcan", "colo-compare", "cryptodev-backend",
    "cryptodev-backend-builtin", "cryptodev-backend-lkcf", "dbus-vmstate", "filter-buffer",
    "filter-dump", "filter-mirror", "filter-redirector", "filter-replay", "filter-rewriter",
    "input-barrier", "input-linux", "iothread", "main-loop", "memory-backend-file",
    "memory-backend-memfd", "memory-backend-ram", "memory-backend-shm", "pr-manager-helper",
    "qtest", "rng-builtin", "rng-egd", "rng-random", "secret", "secret_keyring", "thread-context",
    "throttle-group", "tls-cipher-suites", "tls-creds-anon", "tls-creds-psk", "tls-creds-x509",
];

/// The network's back ends that read packets into memory by system calls or copies. `passt+stream`
/// is a `passt` without vhost-user.
#[rustfmt::skip]
const SEEN_NETDEVS: [&str; 13] = [
    "af-xdp", "bridge", "dgram", "hubport", "l2tpv3", "netmap", "nic", "passt+stream", "socket",
    "stream", "tap", "user", "vde",
];
