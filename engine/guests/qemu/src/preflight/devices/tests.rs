use super::*;
use crate::testing::TestQemu;
use std::process::Command;

fn device(kind: &str) -> Verdict {
    judge(Family::Device, kind)
}

fn unseen(family: Family, kind: &str) -> bool {
    matches!(judge(family, kind), Verdict::Unseen(_))
}

fn tree(text: &str, types: &[&str]) -> Vec<String> {
    devices_in(text, &types.iter().copied().collect()).iter().map(ToString::to_string).collect()
}

#[test]
fn families_that_write_past_the_page_tables_are_not_let_through() {
    for kind in [
        "vfio-pci",
        "vfio-ap",
        "vfio-user-pci",
        "x-vfio-of-tomorrow",
        "vhost-user-fs-pci",
        "vhost-user-blk-pci-non-transitional",
        "vhost-vdpa-device-pci",
        "vhost-scsi-pci",
        "pvrdma",
        "ivshmem-plain",
        "ivshmem-flat",
        "x-pci-proxy-dev",
        "virtio-9p-pci",
        "virtio-gpu-gl-pci",
        "virtio-vga-gl",
        "sgx-epc",
        "xen-disk",
    ] {
        assert!(unseen(Family::Device, kind), "{kind}");
    }
    for kind in [
        "cryptodev-vhost-user",
        "sev-snp-guest",
        "tdx-guest",
        "x-vfio-user-server",
        "x-remote-object",
    ] {
        assert!(unseen(Family::Object, kind), "{kind}");
    }
    for kind in
        ["nvme", "io_uring", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-vdpa"]
    {
        assert!(unseen(Family::BlockDriver, kind), "{kind}");
    }
    for kind in [
        "virtio-net-pci",
        "virtio-blk-pci-non-transitional",
        "max-x86_64-cpu",
        "e1000e",
        "vhost-vsock-pci",
    ] {
        assert_eq!(device(kind), Verdict::Seen, "{kind}");
    }
    for kind in ["of-tomorrow", "virtio-of-tomorrow-pci", ""] {
        assert_eq!(device(kind), Verdict::Unknown, "{kind}");
        assert_eq!(judge(Family::Object, kind), Verdict::Unknown, "{kind}");
        assert_eq!(judge(Family::Netdev, kind), Verdict::Unknown, "{kind}");
        assert_eq!(judge(Family::BlockDriver, kind), Verdict::Unknown, "{kind}");
    }
    // Known to be drained, and known to copy.
    assert_eq!(judge(Family::BlockDriver, "rbd"), Verdict::Seen);
    assert_eq!(judge(Family::BlockDriver, "qcow2"), Verdict::Seen);
}

#[test]
fn devices_are_found_at_any_depth_and_the_inner_half_of_a_named_one_is_left_out() {
    let types =
        ["vhost-user-fs-pci", "vhost-user-fs-device", "vfio-pci", "q35-pcihost", "tomorrow"];
    let text = "/machine (pc-q35-10.0-machine)\n  /peripheral (container)\n    /fs (vhost-user-fs-pci)\n      \
        /virtio-backend (vhost-user-fs-device)\n      /x[0] (memory-region)\n  /peripheral-anon (container)\n    \
        /device[0] (vfio-pci)\n  /q35 (q35-pcihost)\n    /a (b) (tomorrow)\n";
    assert_eq!(
        tree(text, &types),
        ["vhost-user-fs-pci (fs)", "vfio-pci", "q35-pcihost", "tomorrow"]
    );
    assert_eq!(tree("", &types), Vec::<String>::new());
    assert_eq!(tree("nonsense\n(\n/ ()\n", &types), Vec::<String>::new());
}

#[test]
fn a_passt_that_speaks_vhost_user_is_told_from_one_that_does_not() {
    let text = "hub 0\n \\ hub0port1: #net1: index=0,type=user,net=10.0.2.0\n \\ lone\n\
        nn: index=0,type=nic,model=virtio-net-pci\n \\ u0: index=0,type=vhost-user,queues=1\n\
        t: index=0,type=tap\np: index=0,type=passt,vhost-user,connected to pid 7\n\
        q: index=0,type=passt,stream,connected to pid 8\nr: index=0,type=passt,launching passt\n\
        filters:\n  - f0: type=filter-buffer,interval=1000\n";
    let found: Vec<_> = netdevs_in(text).into_iter().map(|part| (part.kind, part.name)).collect();
    let found: Vec<_> = found.iter().map(|(kind, name)| (kind.as_str(), name.as_str())).collect();
    assert_eq!(
        found,
        [
            ("user", "hub0port1: #net1"),
            ("nic", "nn"),
            ("vhost-user", "u0"),
            ("tap", "t"),
            ("passt+vhost-user", "p"),
            ("passt+stream", "q"),
            ("passt", "r"),
        ]
    );
    assert!(unseen(Family::Netdev, "passt+vhost-user"));
    assert_eq!(judge(Family::Netdev, "passt+stream"), Verdict::Seen);
    assert_eq!(judge(Family::Netdev, "passt"), Verdict::Unknown, "it has not said yet which it is");
}

#[test]
fn the_operator_may_vouch_for_each_by_its_name() {
    let part = |kind: &str| Part { family: Family::Device, kind: kind.into(), name: "d".into() };
    let parts = [part("vfio-pci"), part("of-tomorrow"), part("e1000")];
    let vouched = |kinds: &[&str]| Vouched {
        devices: kinds.iter().map(|&kind| kind.to_owned()).collect(),
        ..Vouched::default()
    };
    let text = check(&parts, &vouched(&[])).unwrap_err().to_string();
    for words in [
        "vfio-pci (d)",
        "DMA",
        "of-tomorrow (d) is not known",
        "--allow-device vfio-pci --allow-device of-tomorrow",
    ] {
        assert!(text.contains(words), "{text}");
    }
    let text = check(&parts, &vouched(&["vfio-pci"])).unwrap_err().to_string();
    assert!(!text.contains("vfio") && text.contains("of-tomorrow"), "{text}");
    assert!(check(&parts, &vouched(&["of-tomorrow", "vfio-pci"])).is_ok());
    assert!(check(&parts, &vouched(&["vfio", "tomorrow"])).is_err(), "the whole name");
}

#[test]
fn a_device_that_came_or_went_is_a_change_and_a_disk_is_not() {
    let part = |family, kind: &str| Part { family, kind: kind.into(), name: "x".into() };
    let of = |parts: &[Part]| Inventory { parts: parts.to_vec() };
    let before = of(&[part(Family::Device, "e1000"), part(Family::BlockDriver, "file")]);
    assert!(of(&[part(Family::Device, "e1000")]).check_unchanged_since(&before).is_ok());
    for after in
        [of(&[]), of(&[part(Family::Device, "e1000e")]), of(&[part(Family::Netdev, "e1000")])]
    {
        let text = after.check_unchanged_since(&before).unwrap_err().to_string();
        assert!(text.contains("e1000 (x) went"), "{text}");
    }
}

/// The words of a QEMU's list that it prints for `-WHAT help`.
fn listed(what: &str) -> Vec<String> {
    let out = Command::new("qemu-system-x86_64")
        .args([what, "help"])
        .output()
        .expect("run scripts/setup");
    let text = String::from_utf8(out.stdout).unwrap();
    let words = text.lines().filter(|line| !line.ends_with(':')).map(|line| line.trim().to_owned());
    words.filter(|word| !word.is_empty()).collect()
}

#[test]
fn every_type_that_this_qemu_knows_has_been_decided_about() {
    let mut qemu = TestQemu::start(&["-m", "16"]);
    let types = json!({ "implements": "device", "abstract": false });
    let types = qemu.qmp.execute("qom-list-types", types, TestQemu::soon()).unwrap();
    let devices: Vec<_> =
        types.as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert!(devices.len() > 200, "{devices:?}");
    let undecided: Vec<_> =
        devices.iter().filter(|kind| device(kind) == Verdict::Unknown).collect();
    assert!(undecided.is_empty(), "devices that nobody has decided about: {undecided:?}");
    for (family, what, least) in [(Family::Netdev, "-netdev", 5), (Family::Object, "-object", 20)] {
        let kinds = listed(what);
        assert!(kinds.len() >= least, "{kinds:?}");
        // A passt is told apart by what it says later.
        let undecided: Vec<_> = kinds
            .iter()
            .filter(|k| judge(family, k) == Verdict::Unknown && *k != "passt")
            .collect();
        assert!(undecided.is_empty(), "{what}: nobody has decided about {undecided:?}");
    }
}

#[test]
fn every_block_driver_that_this_qemu_knows_has_been_decided_about() {
    let mut qemu = TestQemu::start(&["-m", "16"]);
    let schema = qemu.qmp.execute("query-qmp-schema", Value::Null, TestQemu::soon()).unwrap();
    let drivers = block_drivers_of(&schema);
    assert!(drivers.len() > 20, "{drivers:?}");
    let undecided: Vec<_> = drivers
        .iter()
        .filter(|kind| judge(Family::BlockDriver, kind) == Verdict::Unknown)
        .collect();
    assert!(undecided.is_empty(), "block drivers that nobody has decided about: {undecided:?}");
}

/// The values of `driver` in the arguments of `blockdev-add`. The schema hides names of types
/// behind numbers.
fn block_drivers_of(schema: &Value) -> Vec<String> {
    let entry = |name: &str| schema.as_array().unwrap().iter().find(|e| e["name"] == name).unwrap();
    let member = |of: &Value, name: &str| {
        let members = of["members"].as_array().unwrap();
        members.iter().find(|m| m["name"] == name).unwrap()["type"].as_str().unwrap().to_owned()
    };
    let arguments = entry(entry("blockdev-add")["arg-type"].as_str().unwrap());
    let drivers = entry(&member(arguments, "driver"));
    drivers["values"].as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_real_guest_has_an_inventory_that_is_seen_and_changes_when_something_is_plugged() {
    let mut qemu = TestQemu::start(&[
        "-m",
        "64",
        "-machine",
        "q35",
        "-vga",
        "std",
        "-device",
        "pcie-root-port,id=rp0",
    ]);
    let deadline = TestQemu::soon();
    let read = |qmp: &mut Qmp| {
        let nodes = block_nodes(qmp, deadline).unwrap();
        Inventory::read(qmp, &nodes, deadline).unwrap()
    };
    let before = read(&mut qemu.qmp);
    before.check(&Vouched::default()).unwrap();
    assert!(before.parts.iter().any(|part| part.kind == "VGA"), "{before:?}");
    assert!(before.parts.iter().any(|part| part.kind.ends_with("-cpu")), "{before:?}");
    read(&mut qemu.qmp).check_unchanged_since(&before).unwrap();
    check_none_unplugged(&mut qemu.qmp).unwrap();

    let usb = json!({ "driver": "qemu-xhci", "id": "usb", "bus": "rp0" });
    qemu.qmp.execute("device_add", usb, deadline).unwrap();
    let text = read(&mut qemu.qmp).check_unchanged_since(&before).unwrap_err().to_string();
    assert!(text.contains("qemu-xhci (usb) came"), "{text}");

    // The monitor's own disks do not count, but what drives them does.
    let disk = json!({ "driver": "null-co", "node-name": "disk" });
    qemu.qmp.execute("blockdev-add", disk, deadline).unwrap();
    let nodes = block_nodes(&mut qemu.qmp, deadline).unwrap();
    check_block_drivers(&nodes, &Vouched::default()).unwrap();
}
