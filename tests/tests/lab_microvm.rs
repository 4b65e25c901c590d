//! Guests of `pageferry microvm` under the lab machine's KVM: a Linux with two vCPUs that checks
//! its memory, moved over both links, and the ways in which a guest and its supervisor end.

use pageferry::supervisor::api::State;
use pageferry::supervisor::place::Vmm;
use pageferry_tests::console::BOOT_MAX;
use pageferry_tests::linux::Linux;
use pageferry_tests::stage::Stage;
use pageferry_tests::{SOON, binary, refuse_outside_the_lab};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

const GUEST: Linux = Linux { memory_mib: 192, written_mib: 8, touched_mib: 16, rate: 4 };
/// One move, in a machine that is emulated.
const MOVE_MAX: Duration = Duration::from_secs(240);
/// One end of the cable, to have a path by RDMA.
const CABLE: &str = "10.77.0.2:0";

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// Nested KVM, which nothing else in the machine needs.
fn load_kvm() {
    refuse_outside_the_lab();
    let loaded = Command::new("modprobe").arg("kvm_amd").status().expect("modprobe runs");
    assert!(loaded.success(), "the lab machine has KVM");
}

fn moved_by(transport: &str, listen: &str) {
    load_kvm();
    let stage = Stage::new();
    let (mut here, console) = stage.microvm("src", &words(&GUEST.microvm(None)), "");
    console.wait_ready();
    let status = here.status().expect("it answers");
    assert_eq!(
        (status.state, status.vmm, status.pid),
        (State::Hosting, Vmm::Kvm, Some(here.pid()))
    );
    let mut written = console.progress_since(0);

    let (there, mut next) = stage.microvm("dst", &words(&GUEST.microvm(Some(listen))), "");
    let to: SocketAddr = there.address();
    let more = ["--transport", transport, "--verify", "--insecure", "--downtime-max", "10s"];
    let ended = stage
        .migrate("src", to, &[&more[..], &["--when-stuck", "switchover"]].concat())
        .end(MOVE_MAX);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("\"verified\": true"), "{}", ended.stdout);
    assert!(ended.stdout.contains(&format!("\"transport\": \"{transport}\"")), "{}", ended.stdout);
    assert_eq!(here.end(), Some(0));

    // A line a second: timers, interrupts and the port's output live. A verdict: its input, and all
    // of memory.
    for _ in 0..3 {
        written = next.progress_since(written);
    }
    next.verdict();
    drop(console);

    // The guest switches itself off, and its supervisor ends with it.
    next.type_line("quit");
    let mut there = there;
    assert_eq!(there.end(), Some(0));
    there.words.wait("the guest dst has ended: it ", SOON);
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_linux_with_two_vcpus_moves_by_tcp_and_goes_on() {
    moved_by("tcp", "127.0.0.1:0");
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_linux_with_two_vcpus_moves_by_rdma_and_goes_on() {
    moved_by("rdma", CABLE);
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_linux_finds_all_that_it_was_given() {
    load_kvm();
    let stage = Stage::new();
    let arguments: Vec<String> =
        GUEST.microvm(None).into_iter().map(|word| word.replace(" quiet", " loglevel=7")).collect();
    let (_here, console) = stage.microvm("vm", &words(&arguments), "");
    let _ = console.wait(0, "Brought up 1 node, 2 CPUs", BOOT_MAX);
    console.wait_ready();
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_signal_ends_a_guest_and_says_so() {
    load_kvm();
    let stage = Stage::new();
    let (mut here, _console) =
        stage.microvm("vm", &["--payload", "--memory", "16M", "--payload-rate", "100"], "");
    here.signal(Signal::TERM);
    assert_eq!(here.end(), Some(0));
    here.words.wait("lives in this process and ends with it", SOON);
    let list = stage.done(&["list"]);
    assert!(list.stderr.contains("no guests on this host"), "{}", list.stderr);
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn the_example_of_an_embedder_moves_its_guest_by_the_rings() {
    load_kvm();
    let example = binary().with_file_name("examples").join("embed");
    assert!(example.exists(), "build it first: cargo build -p pageferry-microvm --example embed");
    let ran = Command::new(example).output().expect("it starts");
    let (said, failed) =
        (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{said}{failed}");
    assert!(
        said.contains("dirty pages by the rings") && said.contains("outcome: Completed"),
        "{said}"
    );
}
