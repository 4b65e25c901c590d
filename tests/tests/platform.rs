//! What a guest can see of its machine is compared at both ends before it is touched: a table of
//! pairs of QEMU commands, and whole moves of some of them.
//!
//! A pair is compared as a migration compares it, with two QEMUs that have not begun to run. What
//! is not named in a row must be equal: a row without a name is a pair whose guest moves.

use pageferry_qemu::platform::{Gatherer, Platform, Weight, compare};
use pageferry_qemu::qmp::Qmp;
use pageferry_tests::stage::{Stage, Supervisor};
use pageferry_tests::{SOON, eventually, look};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A QEMU that waits at its first instruction.
struct Machine {
    child: Child,
    qmp: Qmp,
    _directory: tempfile::TempDir,
}

impl Machine {
    fn start(options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-S"]);
        command.args(options.split(' ').filter(|word| !word.is_empty()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("QEMU starts");
        let qmp = eventually(&format!("QEMU opens its monitor: {options}"), SOON, || {
            assert!(child.try_wait().unwrap().is_none(), "QEMU ended: {options}");
            Qmp::connect(&path, Instant::now() + Duration::from_secs(20)).ok()
        });
        Self { child, qmp, _directory: directory }
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments, Instant::now() + SOON).unwrap()
    }

    fn platform(&mut self) -> Platform {
        let platform = Gatherer::default().gather(&mut self.qmp, self.child.id()).unwrap();
        // As it travels.
        let packed = platform.pack();
        assert!(packed.len() <= 40 << 10, "{} bytes", packed.len());
        Platform::unpack(&packed).unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Source, destination, and the differences that are to be found: each name must be among those
/// found, and each that is found must begin with one of them. A name behind `~` only warns.
type Pair = (&'static str, &'static str, &'static [&'static str]);

fn check(base: &str, pairs: &[Pair]) {
    let mut known: HashMap<String, Platform> = HashMap::new();
    let mut platform = |options: &str| {
        let command = format!("{base} {options}");
        known.entry(command.clone()).or_insert_with(|| Machine::start(&command).platform()).clone()
    };
    let mut wrong = Vec::new();
    for (source, destination, names) in pairs {
        let found = compare(&platform(source), &platform(destination));
        let told: Vec<_> = found.iter().map(ToString::to_string).collect();
        let is = |name: &str, found: &pageferry_qemu::platform::Difference| {
            let (name, weight) = match name.strip_prefix('~') {
                Some(name) => (name, Weight::Warn),
                None => (name, Weight::Refuse),
            };
            found.weight == weight && found.name.starts_with(name)
        };
        let each_found = names.iter().all(|name| found.iter().any(|found| is(name, found)));
        let no_other = found.iter().all(|found| names.iter().any(|name| is(name, found)));
        if !each_found || !no_other {
            wrong.push(format!("{source:?} -> {destination:?}: wanted {names:?}, found {told:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const Q35: &str = "-machine q35 -m 64";

#[test]
fn another_cpu_is_named_feature_by_feature() {
    check(
        Q35,
        &[
            ("-cpu max", "-cpu max", &[]),
            ("", "-cpu qemu64", &[]),
            ("-cpu max", "-cpu qemu64", &["cpu"]),
            ("-cpu max", "-cpu Nehalem", &["cpu", "~cpu.ucode-rev"]),
            ("-cpu max", "-cpu max,-smap", &["cpu.smap"]),
            ("-cpu qemu64", "-cpu qemu64,+smep", &["cpu.smep"]),
            ("-cpu qemu64", "-cpu qemu64,family=6", &["cpu.family"]),
            ("-cpu max", "-cpu max,model-id=Other", &["cpu.model-id"]),
        ],
    );
}

#[test]
fn another_topology_is_named() {
    check(
        Q35,
        &[
            ("-smp 2", "-smp 2", &[]),
            (
                "-smp 2,sockets=2",
                "-smp 2,cores=2",
                &["smp.sockets", "smp.cores", "vcpus", "cpu.ht", "cpu.cmp-legacy"],
            ),
            ("-smp 2,cores=2", "-smp 2,threads=2", &["smp.cores", "smp.threads", "vcpus"]),
            // With maxcpus come more sockets or cores.
            ("-smp 2,maxcpus=4", "-smp 2,maxcpus=8", &["smp.maxcpus", "smp.cores"]),
            ("-smp 2,maxcpus=4", "-smp 2,maxcpus=4", &[]),
            (
                "-object memory-backend-ram,id=n,size=64M -numa node,memdev=n",
                "",
                &["numa", "vcpus", "block."],
            ),
        ],
    );
}

#[test]
fn another_machine_is_named_property_by_property() {
    check(
        "-m 64",
        &[
            (
                "-machine q35,hpet=off",
                "-machine q35,hpet=on",
                &["machine.hpet", "device.main-system-bus/hpet"],
            ),
            (
                "-machine q35",
                "-machine q35,hpet=off",
                &["machine.hpet", "device.main-system-bus/hpet"],
            ),
            ("-machine q35", "-machine q35,smm=off", &["machine.smm", "device."]),
            ("-machine q35", "-machine q35,vmport=off", &["machine.vmport", "device.isa.0/vm"]),
            (
                "-machine q35",
                "-machine q35,acpi=off",
                &["machine.acpi", "block./rom@etc/acpi", "block./rom@etc/table"],
            ),
            ("-machine q35", "-machine q35,sata=off", &["machine.sata", "device.pcie.0/1f.2"]),
            (
                "-machine q35",
                "-machine q35,i8042=off",
                &["machine.i8042", "machine.vmport", "device."],
            ),
            ("-machine q35", "-machine q35,usb=on", &["machine.usb", "device."]),
            ("-machine q35", "-machine q35,nvdimm=on", &["machine.nvdimm"]),
            ("-machine q35", "-machine q35,x-oem-id=OTHER", &["machine.x-oem-id"]),
            ("-machine q35,mem-merge=off", "-machine q35,dump-guest-core=off", &[]),
            ("-machine q35", "-machine q35 -boot order=n", &["~machine.boot.order"]),
            ("-machine q35,acpi=on,smm=on", "-machine q35", &[]),
            ("-machine pc", "-machine pc", &[]),
            (
                "-machine pc",
                "-machine pc,hpet=off",
                &["machine.hpet", "device.main-system-bus/hpet"],
            ),
        ],
    );
}

#[test]
fn other_tables_and_firmware_are_named() {
    check(
        "-machine q35",
        &[
            (
                "-m 64",
                "-m 64,slots=2,maxmem=1G",
                &["machine.memory.slots", "machine.memory.max-size", "numa", "vcpus"],
            ),
            ("-m 64 -uuid 1b4e28ba-2fa1-11d2-883f-0016d3cca427", "-m 64", &["uuid"]),
            (
                "-m 64 -smbios type=1,serial=a",
                "-m 64 -smbios type=1,serial=b",
                &["table.smbios.type=1"],
            ),
            ("-m 64 -smbios type=1,serial=a", "-m 64", &["table.smbios.type=1"]),
            ("-m 64 -smbios type=1,serial=a,sku=b", "-m 64 -smbios type=1,sku=b,serial=a", &[]),
            ("-m 64", "-m 64 -bios bios.bin", &["~machine.firmware", "block.pc.bios"]),
        ],
    );
}

#[test]
fn another_device_is_named_by_its_place() {
    const NET: &str = "-netdev user,id=n -device virtio-net-pci,netdev=n,id=net0,addr=5";
    check(
        Q35,
        &[
            ("-device virtio-rng-pci,addr=5", "", &["device.pcie.0/05.0"]),
            ("", "-device virtio-rng-pci,addr=5", &["device.pcie.0/05.0"]),
            (
                "-device virtio-rng-pci,addr=5",
                "-device virtio-rng-pci,addr=6",
                &["device.pcie.0/05.0", "device.pcie.0/06.0"],
            ),
            (
                "-device virtio-rng-pci,id=a,addr=5",
                "-device virtio-rng-pci,id=b,addr=5",
                &["device.pcie.0/05.0"],
            ),
            (
                "-device e1000,addr=5",
                "-device e1000e,addr=5",
                &["device.pcie.0/05.0", "block.0000:00:05.0/"],
            ),
            (NET, NET, &[]),
            // What is behind a device is the host's.
            (NET, "-netdev user,id=other -device virtio-net-pci,netdev=other,id=net0,addr=5", &[]),
            (
                NET,
                "-netdev user,id=n -device virtio-net-pci,netdev=n,id=net0,addr=5,mac=52:54:00:12:34:99",
                &["device.pcie.0/05.0/virtio-bus/virtio-net-device.mac"],
            ),
            (
                NET,
                "-netdev user,id=n -device virtio-net-pci,netdev=n,id=net0,addr=5,romfile=",
                &["device.pcie.0/05.0.romsize", "block.0000:00:05.0/"],
            ),
            (
                NET,
                "-netdev user,id=n -device virtio-net-pci,netdev=n,id=net0,addr=5,vectors=8",
                &["device.pcie.0/05.0.vectors"],
            ),
            ("-device VGA,addr=2", "", &["device.pcie.0/02.0", "block.0000:00:02.0/"]),
            (
                "-device VGA,addr=2",
                "-device VGA,addr=2,vgamem_mb=32",
                &["device.pcie.0/02.0.vgamem_mb", "block.0000:00:02.0/vga.vram"],
            ),
            ("", "-serial null", &["device.isa.0/isa-serial"]),
            // In another order, but each in its place.
            (
                "-device virtio-rng-pci,addr=5 -device virtio-balloon-pci,addr=6",
                "-device virtio-balloon-pci,addr=6 -device virtio-rng-pci,addr=5",
                &[],
            ),
        ],
    );
}

#[test]
fn another_disk_or_usb_device_is_named() {
    const BLK: &str = "-blockdev driver=null-co,node-name=d -device virtio-blk-pci,drive=d,addr=5";
    check(
        Q35,
        &[
            (
                BLK,
                "-blockdev driver=null-co,node-name=other,read-zeroes=on -object iothread,id=io \
                 -device virtio-blk-pci,drive=other,addr=5,iothread=io",
                &[],
            ),
            (
                BLK,
                "-blockdev driver=null-co,node-name=d -device virtio-blk-pci,drive=d,addr=5,serial=x",
                &["device.pcie.0/05.0/virtio-bus/virtio-blk-device.serial"],
            ),
            (
                BLK,
                "-blockdev driver=null-co,node-name=d -device virtio-blk-pci,drive=d,addr=5,queue-size=128",
                &["device.pcie.0/05.0/virtio-bus/virtio-blk-device.queue-size"],
            ),
            (
                BLK,
                "-blockdev driver=null-co,node-name=d -device virtio-blk-pci,drive=d,addr=5,logical_block_size=4096,\
                 physical_block_size=4096",
                &[
                    "device.pcie.0/05.0/virtio-bus/virtio-blk-device.logical_block_size",
                    "device.pcie.0/05.0/virtio-bus/virtio-blk-device.physical_block_size",
                ],
            ),
            (
                "-device virtio-scsi-pci,id=s,addr=5 -blockdev driver=null-co,node-name=d -device scsi-hd,drive=d,lun=1",
                "-device virtio-scsi-pci,id=s,addr=5 -blockdev driver=null-co,node-name=d -device scsi-hd,drive=d,lun=2",
                &["device.s.0/0:1", "device.s.0/0:2"],
            ),
            (
                "-device qemu-xhci,id=x,addr=5 -device usb-tablet",
                "-device qemu-xhci,id=x,addr=5 -device usb-kbd",
                &["device.x.0/"],
            ),
            (
                "-device qemu-xhci,id=x,addr=5 -device usb-tablet,port=1",
                "-device qemu-xhci,id=x,addr=5 -device usb-tablet,port=2",
                &["device.x.0/"],
            ),
        ],
    );
}

/// What was plugged in since the start belongs to what the destination must have.
#[test]
fn a_device_that_was_plugged_in_is_compared() {
    let base = format!("{Q35} -device pcie-root-port,id=rp,chassis=1,addr=4");
    let mut source = Machine::start(&base);
    source.ask("device_add", json!({ "driver": "virtio-rng-pci", "bus": "rp", "id": "r" }));
    let now = source.platform();
    let without = Machine::start(&base).platform();
    let with = Machine::start(&format!("{base} -device virtio-rng-pci,bus=rp,id=r")).platform();
    assert_eq!(compare(&now, &with), []);
    let found = compare(&now, &without);
    assert!(
        found.iter().any(|d| d.to_string().contains("virtio-rng-pci,id=r at the source")),
        "{found:?}"
    );
}

/// A guest that has run is compared with one that waits: what its firmware has programmed is no
/// difference.
#[test]
fn what_the_guest_has_programmed_is_not_compared() {
    const DEVICES: &str = "-netdev user,id=n -device virtio-net-pci,netdev=n -device VGA -device qemu-xhci,id=x \
        -device usb-tablet -device usb-kbd -device virtio-serial-pci -device virtconsole,chardev=c -chardev null,id=c \
        -device virtio-balloon-pci -device virtio-rng-pci -device e1000 -device virtio-scsi-pci -device scsi-hd,drive=d \
        -blockdev driver=null-co,node-name=d,read-zeroes=on -device virtio-gpu-pci -serial null \
        -device intel-hda -device virtio-blk-pci,drive=e -blockdev driver=null-co,node-name=e,read-zeroes=on";
    for machine in [
        "-machine q35 -device pcie-root-port,id=rp,chassis=1 -device pcie-root-port,id=rp2,chassis=2 \
         -device virtio-rng-pci,bus=rp -device pcie-pci-bridge,bus=rp2,id=br",
        "-machine pc -device pci-bridge,id=br,chassis_nr=1 -device virtio-rng-pci,bus=br,addr=1 -device piix3-usb-uhci",
    ] {
        let mut qemu = Machine::start(&format!("{machine} -m 64 {DEVICES}"));
        let before = qemu.platform();
        let tree = |qemu: &mut Machine| {
            qemu.ask("human-monitor-command", json!({ "command-line": "info qtree" }))
        };
        let fresh = tree(&mut qemu);
        qemu.ask("cont", json!({}));
        eventually("the firmware programs the devices", SOON, || {
            let now = tree(&mut qemu).as_str()?.to_owned();
            // The last thing that it does to a bus, and one of the first that it does to devices.
            (now != fresh.as_str()?
                && !now.contains("busnr = 0 (0x0)\n        class PCI bridge")
                && now.contains("bar 0: mem at 0xf"))
            .then_some(())
        });
        let found = compare(&before, &qemu.platform());
        assert!(found.is_empty(), "{machine}: {found:#?}");
    }
}

/// More devices than Hello holds: found all the same, by digests.
#[test]
fn a_guest_with_very_many_devices_is_still_compared() {
    let many = |serial: &str| {
        let ports =
            (0..28).map(|n| format!(" -device virtio-blk-pci,drive=d{n},addr={n:x}.0", n = n + 2));
        let disks = (0..28).map(|n| format!(" -blockdev driver=null-co,node-name=d{}", n + 2));
        format!("{Q35}{}{},serial={serial}", disks.collect::<String>(), ports.collect::<String>())
    };
    let (a, b) = (Machine::start(&many("a")).platform(), Machine::start(&many("b")).platform());
    assert_eq!(compare(&a, &a), []);
    let found = compare(&a, &b);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].name.starts_with("device.pcie.0/1d.0"), "{found:?}");
}

/// From QEMU's command to the operator's exit status.
#[test]
fn a_guest_that_would_be_another_one_is_refused_and_not_touched_and_may_be_overruled() {
    const QEMU: &str = "qemu-system-x86_64 -accel tcg -machine q35 -nodefaults -display none -m 64";
    let stage = Stage::new();
    let mut source = stage.run("src", &format!("{QEMU} -cpu max"), "");
    source.wait_guest_runs();
    let events = |destination: &str| {
        let receiver = stage.receive("dst", &format!("{QEMU} {destination}"), "");
        let ended = stage.migrate("src", receiver.address(), &[]).end(SOON);
        assert_eq!(ended.status, Some(2), "{destination}: {}", ended.stderr);
        assert!(source.guest_runs(), "{destination}");
        ended.stderr
    };
    let said = events("-cpu max,-smap");
    assert!(said.contains("cpu.smap") && said.contains("--allow-difference"), "{said}");
    assert_eq!(look::tracked_mappings(source.qemu()), 0);
    let said = events("-cpu qemu64");
    assert!(said.contains("-cpu qemu64"), "{said}");
    let said = events("-cpu max -device VGA");
    assert!(said.contains("VGA"), "{said}");

    let receiver = stage.receive_at(
        "127.0.0.1:0",
        "dst",
        &format!("{QEMU} -cpu max,model-id=Other"),
        "",
        &["--allow-difference", "cpu.model-id"],
    );
    let ended = stage.migrate("src", receiver.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0));
    receiver.wait_guest_runs();
    assert!(receiver.words.text().contains("cpu.model-id"), "{}", receiver.words.text());
}

/// What is plugged into a waiting QEMU counts, as it does at the source.
#[test]
fn a_device_that_was_plugged_in_at_both_ends_since_they_started_is_no_difference() {
    const QEMU: &str = "qemu-system-x86_64 -accel tcg -machine q35 -nodefaults -display none -m 64 \
        -device pcie-root-port,id=rp,chassis=1,addr=4";
    let stage = Stage::new();
    let mut source = stage.run("src", QEMU, "");
    let receiver = stage.receive("dst", QEMU, "");
    source.wait_guest_runs();
    let plug = |at: &Supervisor| {
        let rng = json!({ "driver": "virtio-rng-pci", "bus": "rp", "id": "r" });
        look::ask(&at.monitor, "device_add", rng).expect("QEMU plugs it in");
    };
    plug(&source);
    let refused = stage.migrate("src", receiver.address(), &[]).end(SOON);
    assert_eq!(refused.status, Some(2), "{}", refused.stderr);
    assert!(refused.stderr.contains("virtio-rng-pci,id=r at the source"), "{}", refused.stderr);
    plug(&receiver);
    let ended = stage.migrate("src", receiver.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0));
    receiver.wait_guest_runs();
}
