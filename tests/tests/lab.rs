//! The lab machine (scripts/lab) has what the tests in it stand on: two connected soft-RoCE ports,
//! KVM, and a kernel that tracks dirty pages.
//!
//! Ignored everywhere else: scripts/test builds outside and runs them inside.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use pageferry_tests::{SOON, binary, eventually, refuse_outside_the_lab};

/// Each end of the cable: interface, its address, and that address as the kernel writes a GID.
const ENDS: [(&str, &str, &str); 2] = [
    ("v0", "10.77.0.1", "0000:0000:0000:0000:0000:ffff:0a4d:0001"),
    ("v1", "10.77.0.2", "0000:0000:0000:0000:0000:ffff:0a4d:0002"),
];

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn an_rdma_port_is_active_at_each_end_of_the_cable() {
    refuse_outside_the_lab();
    for (interface, _, wanted) in ENDS {
        let port = format!("/sys/class/infiniband/rxe_{interface}/ports/1");
        let state = read(&format!("{port}/state"));
        assert!(state.ends_with("ACTIVE"), "rxe_{interface} is {state}");
        let gids: Vec<String> = (0..4).map(|index| read(&format!("{port}/gids/{index}"))).collect();
        assert!(gids.iter().any(|gid| gid == wanted), "{wanted} is not among {gids:?}");
    }
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn rdma_between_the_ends_takes_the_cable() {
    refuse_outside_the_lab();
    for (interface, address, _) in ENDS {
        let received = || -> u64 {
            let counters = format!("/sys/class/infiniband/rxe_{interface}/ports/1/hw_counters");
            read(&format!("{counters}/rcvd_pkts")).parse().expect("a number of packets")
        };
        let before = received();
        let mut server = rping(&["-s", "-a", address, "-C", "5"]);
        // rping says nothing when it listens; the connection manager's own table does.
        eventually("rping listens", SOON, || {
            let ids = Command::new("rdma")
                .args(["resource", "show", "cm_id"])
                .output()
                .expect("rdma runs");
            String::from_utf8_lossy(&ids.stdout)
                .contains(&format!("src-addr {address}:"))
                .then_some(())
        });
        let mut client = rping(&["-c", "-a", address, "-C", "5"]);
        let ended = |child: &mut Child| {
            eventually("rping ends", SOON, || child.try_wait().expect("our own child"))
        };
        assert!(ended(&mut client).success(), "the client to {address}");
        assert!(ended(&mut server).success(), "the server at {address}");
        // A ping is two transfers, and none of it may stay inside one device.
        assert!(received() >= before + 10, "{} packets, then {}", before, received());
    }
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn qemu_runs_a_guest_under_kvm() {
    refuse_outside_the_lab();
    let said = Command::new("sh")
        .arg("-c")
        .arg("echo info kvm; echo quit")
        .stdout(Stdio::piped())
        .spawn()
        .and_then(|mut lines| {
            Command::new("qemu-system-x86_64")
                .args(["-accel", "kvm", "-cpu", "host", "-m", "64M", "-S"])
                .args(["-nodefaults", "-display", "none", "-monitor", "stdio"])
                .stdin(lines.stdout.take().expect("piped"))
                .output()
                .inspect(|_| drop(lines.wait()))
        })
        .expect("QEMU runs");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr)
    );
    assert!(said.status.success() && text.contains("kvm support: enabled"), "{text}");
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn doctor_finds_the_kernel_able_to_track_dirty_pages() {
    refuse_outside_the_lab();
    let said = Command::new(binary()).arg("doctor").output().expect("pageferry runs");
    let text = String::from_utf8_lossy(&said.stdout);
    let finding = text.lines().find(|line| line.contains("dirty tracking")).unwrap_or_default();
    assert!(finding.starts_with("ok") && finding.contains("PAGEMAP_SCAN"), "{text}");
}

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(path))
        .unwrap_or_else(|error| panic!("{path}: {error}"))
        .trim()
        .to_owned()
}

fn rping(arguments: &[&str]) -> Child {
    // Its few lines fit into the pipe.
    Command::new("rping")
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("rping runs")
}
