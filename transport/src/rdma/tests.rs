//! The RDMA link against the contract and against bad luck, on a real device: in the lab machine
//! (`scripts/lab`), or on any host whose device has the address in `PAGEFERRY_RDMA_ADDRESS`.
//!
//! ```text
//!   scripts/lab -- target/debug/deps/pageferry_transport-... --ignored --test-threads 1 lab_
//! ```

// Parts of a region are ranges, and sometimes there is one.
#![allow(clippy::single_range_in_vec_init)]

use super::*;
use crate::contract::{Pair, Random, contents, fill, poll_until, post_all, regions, request, soon};
use crate::preamble::Token;
use crate::*;
use std::io::{BufRead, BufReader, Lines};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const TOKEN: Token = Token([7; 16]);

/// Where the lab machine's RDMA devices are, the two ends of one cable.
fn here() -> IpAddr {
    std::env::var("PAGEFERRY_RDMA_ADDRESS").map_or_else(
        |_| "10.77.0.1".parse().unwrap(),
        |address| address.parse().expect("an address in PAGEFERRY_RDMA_ADDRESS"),
    )
}

/// Whether there is a device to test with. Says so where `scripts/test` repeats it if not.
fn can_run(name: &str) -> bool {
    if std::env::var_os("PAGEFERRY_LAB").is_some()
        || std::env::var_os("PAGEFERRY_RDMA_ADDRESS").is_some()
    {
        return true;
    }
    let why = "it needs an RDMA device: scripts/lab";
    eprintln!("NOT RUN: {name}: {why}");
    if let Some(path) = std::env::var_os("PAGEFERRY_NOT_RUN") {
        use std::io::Write;
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        writeln!(file, "NOT RUN: {name}: {why}").unwrap();
    }
    false
}

fn ends(lanes: usize, options: &RdmaOptions) -> (RdmaInitiator, RdmaTarget) {
    let lanes = u8::try_from(lanes).unwrap();
    let listener = RdmaListener::bind(here(), TOKEN, lanes, options).unwrap();
    let to = SocketAddr::new(here(), listener.port());
    let initiator = RdmaInitiator::connect(to, None, TOKEN, lanes, options, soon()).unwrap();
    (initiator, listener.into_target(soon()).unwrap())
}

fn pair_with(lanes: usize, options: &RdmaOptions) -> Pair {
    let (initiator, target) = ends(lanes, options);
    Pair { initiator: Box::new(initiator), target: Box::new(target) }
}

mod lab_contract {
    use crate::contract::Pair;

    fn make(lanes: usize) -> Pair {
        super::pair_with(lanes, &super::RdmaOptions::default())
    }

    crate::contract::contract_tests!(ignore = "needs an RDMA device", if super::can_run, make);
}

mod lab_contract_in_small_pieces {
    use super::RdmaOptions;
    use crate::contract::Pair;

    /// One stripe a registration, and a window that a few writes fill.
    fn make(lanes: usize) -> Pair {
        let options = RdmaOptions {
            chunk_bytes: 1,
            window_bytes: 1 << 20,
            window_requests: 16,
            ..RdmaOptions::default()
        };
        super::pair_with(lanes, &options)
    }

    crate::contract::contract_tests!(ignore = "needs an RDMA device", if super::can_run, make);
}

const MIB: usize = 1 << 20;

/// Memory of this process that devices have pinned, in bytes.
fn pinned() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() << 10
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_memory_in_huge_pages_is_registered_and_counted_once() {
    use rustix::fs::{MemfdFlags, memfd_create};
    let name = "lab_memory_in_huge_pages_is_registered_and_counted_once";
    if !can_run(name) {
        return;
    }
    let reserved = "/proc/sys/vm/nr_hugepages";
    std::fs::write(reserved, "24").unwrap();
    // Nine stripes, in registrations of four.
    let len = 18 * MIB;
    let huge = || {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap();
        rustix::fs::ftruncate(&file, len as u64).unwrap();
        MemoryRegion::map_shared(std::os::fd::AsFd::as_fd(&file), 0, len, Access::Write).unwrap()
    };
    let (source, destination) = (huge(), huge());
    let (mut initiator, mut target) =
        ends(2, &RdmaOptions { chunk_bytes: 8 * MIB, ..RdmaOptions::default() });
    let before = (pinned(), initiator.registrations());
    fill(&source, &mut Random(1));
    initiator.register(&source).unwrap();
    initiator.expect(&source, &[0..len]).unwrap();
    let remote = target.expose(&destination).unwrap();
    target.expect(&destination, &[0..len]).unwrap();
    let batch = stripes(&source, remote);
    let deadline = soon();
    while !initiator.make_ready(&batch).unwrap() {
        initiator.poll(&mut Vec::new(), deadline).unwrap();
        assert!(Instant::now() < deadline);
    }
    assert_eq!(
        initiator.registrations() - before.1,
        2 * 3,
        "four, four and one stripe at each end"
    );
    assert_eq!(pinned() - before.0, 2 * len);
    post_all(&mut initiator, &batch, &mut Vec::new()).unwrap();
    initiator.fence(FenceTag(1)).unwrap();
    target.wait_fence(FenceTag(1), soon()).unwrap();
    assert_eq!(initiator.registrations() - before.1, 2 * 3);
    assert_eq!(target.bytes_placed().unwrap(), len as u64);
    assert!(contents(&destination) == contents(&source));
    drop((initiator, target, batch, source, destination));
    std::fs::write(reserved, "0").unwrap();
}

/// Runs a command of the lab machine.
fn run(command: &str, arguments: &[&str]) {
    let status = Command::new(command).args(arguments).status().unwrap();
    assert!(status.success(), "{command} {arguments:?}: {status}");
}

/// The device of an address, its interface and port, from the link's own words.
fn device() -> (String, String) {
    let (initiator, _target) = ends(1, &RdmaOptions::default());
    let device = initiator.path().device.clone();
    let interface = std::fs::read_to_string(format!(
        "/sys/class/infiniband/{device}/ports/1/gid_attrs/ndevs/0"
    ));
    (device, interface.unwrap().trim().to_owned())
}

/// Whole stripes, one write each.
fn stripes(from: &Arc<MemoryRegion>, to: RemoteRegion) -> Vec<WorkRequest> {
    (0..from.len() / (2 * MIB))
        .map(|at| request(at as u64, from, at * 2 * MIB, 2 * MIB, to, at * 2 * MIB))
        .collect()
}

/// Posts until the link breaks, and says how.
fn push_until_it_breaks(initiator: &mut RdmaInitiator, batch: &[WorkRequest]) -> Error {
    let deadline = soon();
    loop {
        if let Err(e) = post_all(initiator, batch, &mut Vec::new()) {
            return e;
        }
        assert!(Instant::now() < deadline, "the link does not break");
    }
}

/// What the target says when its link has broken.
fn wait_until_broken(target: &mut RdmaTarget) -> Error {
    target.wait_fence(FenceTag(u32::MAX), soon()).unwrap_err()
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_regions_larger_than_a_chunk_arrive_expected_or_not() {
    if !can_run("lab_regions_larger_than_a_chunk_arrive_expected_or_not") {
        return;
    }
    let options = RdmaOptions { chunk_bytes: 4 * MIB, ..RdmaOptions::default() };
    for lanes in [1, 2, 4] {
        let mut pair = pair_with(lanes, &options);
        let (source, destination, remote) = regions(&mut pair, 23 * MIB + 4096, &mut Random(1));
        // Parts of the first half here, of the second there, a bit of it twice, and some never.
        let (here, there) =
            ([0..5 * MIB, 5 * MIB..6 * MIB, 11 * MIB..12 * MIB], [9 * MIB..20 * MIB]);
        pair.initiator.expect(&source, &here).unwrap();
        pair.target.expect(&destination, &there).unwrap();
        pair.initiator.expect(&source, &here).unwrap();
        assert!(pair.initiator.expect(&source, &[0..24 * MIB]).is_err());
        assert!(pair.target.expect(&source, &[0..1]).is_err());
        let len = source.len();
        let mut batch: Vec<_> = (0..len.div_ceil(MIB))
            .map(|at| {
                request(at as u64, &source, at * MIB, MIB.min(len - at * MIB), remote, at * MIB)
            })
            .collect();
        // Lies across a boundary of chunks at this end and not at the other.
        batch.push(request(99, &source, 4 * MIB - 4096, 8192, remote, 8 * MIB));
        let mut out = Vec::new();
        post_all(&mut *pair.initiator, &batch, &mut out).unwrap();
        pair.initiator.fence(FenceTag(1)).unwrap();
        pair.target.wait_fence(FenceTag(1), soon()).unwrap();
        let mut expected = contents(&source);
        expected.copy_within(4 * MIB - 4096..4 * MIB + 4096, 8 * MIB);
        assert!(contents(&destination) == expected, "{lanes} lanes");
        poll_until(&mut *pair.initiator, &mut out, |out| out.len() == batch.len() + 1).unwrap();
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_local_memory_may_be_mapped_read_only() {
    if !can_run("lab_local_memory_may_be_mapped_read_only") {
        return;
    }
    let (mut initiator, mut target) = ends(2, &RdmaOptions::default());
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4 << 20).unwrap();
    let file = std::os::fd::AsFd::as_fd(&file);
    let guest = MemoryRegion::map_shared(file, 0, 4 * MIB, Access::Write).unwrap();
    let source = MemoryRegion::map_shared(file, 0, 4 * MIB, Access::Read).unwrap();
    fill(&guest, &mut Random(2));
    let destination = MemoryRegion::anonymous(4 * MIB).unwrap();
    initiator.register(&source).unwrap();
    initiator.expect(&source, &[0..4 * MIB]).unwrap();
    let remote = target.expose(&destination).unwrap();
    for tag in 1..4 {
        post_all(&mut initiator, &stripes(&source, remote), &mut Vec::new()).unwrap();
        initiator.fence(FenceTag(tag)).unwrap();
        target.wait_fence(FenceTag(tag), soon()).unwrap();
        assert!(contents(&destination) == contents(&guest));
        // The device sees what is written to pages that it has pinned.
        fill(&guest, &mut Random(3 + u64::from(tag)));
    }
    assert!(target.expose(&source).is_err());
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_thousands_of_fences_find_a_receive_each() {
    if !can_run("lab_thousands_of_fences_find_a_receive_each") {
        return;
    }
    let (mut initiator, mut target) = ends(2, &RdmaOptions::default());
    let (mut out, mut sent) = (Vec::new(), 0);
    while sent < 4000 {
        // As many as may be on their way, so that the queue is drawn on as fast as it can be.
        match initiator.fence(FenceTag(sent + 1)) {
            Ok(()) => sent += 1,
            Err(Error::State(_)) => assert!(initiator.poll(&mut out, soon()).unwrap() > 0),
            Err(e) => panic!("{e}"),
        }
    }
    target.wait_fence(FenceTag(4000), soon()).unwrap();
    poll_until(&mut initiator, &mut out, |out| out.len() == 4000).unwrap();
    assert!((1..=4000).eq(out.iter().map(|completion| match completion {
        Completion::Fence(tag) => tag.0,
        Completion::Write(_) => 0,
    })));
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_a_key_that_is_taken_back_under_a_write_is_named() {
    if !can_run("lab_a_key_that_is_taken_back_under_a_write_is_named") {
        return;
    }
    let (mut initiator, mut target) = ends(1, &RdmaOptions::default());
    let source = MemoryRegion::anonymous(8 * MIB).unwrap();
    let destination = MemoryRegion::anonymous(8 * MIB).unwrap();
    initiator.register(&source).unwrap();
    let remote = target.expose(&destination).unwrap();
    let batch = stripes(&source, remote);
    post_all(&mut initiator, &batch, &mut Vec::new()).unwrap();
    let error = std::thread::scope(|scope| {
        let pusher = scope.spawn(|| push_until_it_breaks(&mut initiator, &batch));
        target.deregister();
        pusher.join().unwrap()
    });
    match &error {
        Error::Work { lane: 0, operation: "a write", addr, len: 2_097_152, status, .. } => {
            assert!((remote.base..remote.base + remote.len).contains(addr), "{error}");
            assert!(status.contains("remote access error"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(initiator.post(&batch).is_err());
    drop(initiator);
    let error = wait_until_broken(&mut target);
    assert!(!matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_a_write_outside_what_is_exposed_breaks_the_link_and_touches_nothing() {
    if !can_run("lab_a_write_outside_what_is_exposed_breaks_the_link_and_touches_nothing") {
        return;
    }
    for (key, beyond) in [(0, 2u64 << 20), (1, 0), (0, 1 << 30)] {
        let (mut initiator, mut target) = ends(2, &RdmaOptions::default());
        let source = MemoryRegion::anonymous(2 * MIB).unwrap();
        initiator.register(&source).unwrap();
        let remote = target.expose(&MemoryRegion::anonymous(2 * MIB).unwrap()).unwrap();
        let mut wrong = request(0, &source, 0, 4096, remote, 0);
        wrong.remote = RemoteAddr { key: RemoteKey(key), addr: remote.base + beyond };
        let error = push_until_it_breaks(&mut initiator, &[wrong]);
        assert!(
            matches!(error, Error::Closed { .. } | Error::Work { .. } | Error::Lane { .. }),
            "{error:?}"
        );
        let error = wait_until_broken(&mut target);
        assert!(matches!(error, Error::Protocol { lane: 0, .. }), "{error:?}");
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_strangers_are_refused_with_a_reason_and_the_lanes_come_all_the_same() {
    if !can_run("lab_strangers_are_refused_with_a_reason_and_the_lanes_come_all_the_same") {
        return;
    }
    let options = RdmaOptions::default();
    let listener = RdmaListener::bind(here(), TOKEN, 2, &options).unwrap();
    let to = SocketAddr::new(here(), listener.port());
    let refused = |token, lanes, options: &RdmaOptions| match RdmaInitiator::connect(
        to,
        None,
        token,
        lanes,
        options,
        soon(),
    ) {
        Err(Error::NoPath { what }) => what,
        other => panic!("{other:?}"),
    };
    assert!(refused(Token([8; 16]), 2, &options).contains("the token is not this session's"));
    let first = RdmaInitiator::connect(to, None, TOKEN, 1, &options, soon()).unwrap();
    assert!(refused(TOKEN, 1, &options).contains("lane 0 is there already"));
    // It goes before the others come, and its place is free again.
    drop(first);
    let device = RdmaOptions { device: Some("mlx5_7".into()), ..options.clone() };
    let what = refused(TOKEN, 2, &device);
    assert!(what.contains("not by mlx5_7") && what.contains("no address of this host"), "{what}");
    let gid = RdmaOptions { gid_index: Some(200), ..options.clone() };
    assert!(refused(TOKEN, 2, &gid).contains("GID index"));
    let nobody = SocketAddr::new(here(), 1);
    match RdmaInitiator::connect(nobody, None, TOKEN, 1, &options, soon()) {
        Err(Error::NoPath { what }) => assert!(what.contains("nobody listens"), "{what}"),
        other => panic!("{other:?}"),
    }
    let stranger = RdmaListener::bind("192.0.2.1".parse().unwrap(), TOKEN, 1, &options);
    assert!(matches!(stranger, Err(Error::NoPath { .. })));

    let chosen = RdmaOptions { port: Some(1), traffic_class: Some(104), ..options };
    let initiator = RdmaInitiator::connect(to, Some(here()), TOKEN, 2, &chosen, soon()).unwrap();
    let target = listener.into_target(soon()).unwrap();
    for path in [initiator.path(), target.path()] {
        println!("{path}");
        assert_eq!((path.port, path.from.ip(), path.to.ip()), (1, here(), here()));
        assert!(
            path.active_mtu >= 256 && !path.gid.is_empty() && path.link.contains("RoCE"),
            "{path}"
        );
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_a_listener_that_waits_in_vain_says_so_and_goes() {
    if !can_run("lab_a_listener_that_waits_in_vain_says_so_and_goes") {
        return;
    }
    let listener = RdmaListener::bind(here(), TOKEN, 2, &RdmaOptions::default()).unwrap();
    let asked = Instant::now();
    let error = listener.into_target(asked + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_a_link_that_goes_down_is_named_at_both_ends_and_another_stands_later() {
    if !can_run("lab_a_link_that_goes_down_is_named_at_both_ends_and_another_stands_later") {
        return;
    }
    let (_, interface) = device();
    let (mut initiator, mut target) = ends(2, &RdmaOptions::default());
    let batch = pushing(&mut initiator, &mut target);
    let begun = Instant::now();
    let errors = std::thread::scope(|scope| {
        let pusher = scope.spawn(|| push_until_it_breaks(&mut initiator, &batch));
        run("ip", &["link", "set", &interface, "down"]);
        (pusher.join().unwrap(), wait_until_broken(&mut target))
    });
    run("ip", &["link", "set", &interface, "up"]);
    for error in [errors.0, errors.1] {
        match &error {
            Error::Device { event, .. } => assert!(event.contains("PORT_ERR"), "{error}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(10));
    drop((initiator, target));
    works_again();
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_a_device_that_vanishes_is_named_at_both_ends_and_another_stands_later() {
    let name = "lab_a_device_that_vanishes_is_named_at_both_ends_and_another_stands_later";
    if !can_run(name) {
        return;
    }
    if is_other_process() {
        let (mut initiator, mut target) = ends(2, &RdmaOptions::default());
        let batch = pushing(&mut initiator, &mut target);
        if std::env::var_os("STAYS").is_some() {
            println!("\nbroken not");
            return;
        }
        let errors = std::thread::scope(|scope| {
            let pusher = scope.spawn(|| push_until_it_breaks(&mut initiator, &batch));
            // It waits for the end of every process that has opened the device: this one.
            let mut command = Command::new("sh");
            command.args(["-c", "rdma link delete rxe_gone &"]).status().unwrap();
            (pusher.join().unwrap(), wait_until_broken(&mut target))
        });
        let begun = Instant::now();
        drop((initiator, target));
        assert!(begun.elapsed() < Duration::from_secs(5), "drop hangs");
        println!("\nbroken {} and {}", errors.0, errors.1);
        return;
    }
    // A device of its own, which no other test of this process has opened.
    run("ip", &["link", "add", "gone0", "type", "veth", "peer", "name", "gone1"]);
    run("ip", &["address", "add", "10.99.0.1/24", "dev", "gone0"]);
    run("ip", &["link", "set", "gone0", "up"]);
    run("ip", &["link", "set", "gone1", "up"]);
    let device = "rxe_gone";
    run("rdma", &["link", "add", device, "type", "rxe", "netdev", "gone0"]);
    let there = |command: &mut Command| {
        command.env("PAGEFERRY_RDMA_ADDRESS", "10.99.0.1");
    };
    let mut other = Other::start(name, there);
    let said = other.said("broken ");
    assert!(other.process.wait().unwrap().success());
    let deadline = soon();
    while std::path::Path::new("/sys/class/infiniband").join(device).exists() {
        assert!(Instant::now() < deadline, "{device} does not go");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Each end hears it from the device, or from the other that has hung up because of it.
    let named = said.matches("rxe_gone: the device was removed (DEVICE_REMOVAL)").count();
    assert!(named == 2 || named == 1 && said.contains("the peer closed"), "{said}");

    run("rdma", &["link", "add", device, "type", "rxe", "netdev", "gone0"]);
    let mut other = Other::start(name, |command| {
        there(command);
        command.env("STAYS", "1");
    });
    assert_eq!(other.said("broken "), "not");
    assert!(other.process.wait().unwrap().success());
    run("ip", &["link", "delete", "gone0"]);
}

/// A batch whose memory is ready at both ends.
fn pushing(initiator: &mut RdmaInitiator, target: &mut RdmaTarget) -> Vec<WorkRequest> {
    let source = MemoryRegion::anonymous(8 * MIB).unwrap();
    initiator.register(&source).unwrap();
    let remote = target.expose(&MemoryRegion::anonymous(8 * MIB).unwrap()).unwrap();
    let batch = stripes(&source, remote);
    post_all(initiator, &batch, &mut Vec::new()).unwrap();
    batch
}

/// A new link carries data; its address may take a moment to come back.
fn works_again() {
    let deadline = soon();
    let listener = loop {
        match RdmaListener::bind(here(), TOKEN, 1, &RdmaOptions::default()) {
            Ok(listener) => break listener,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let to = SocketAddr::new(here(), listener.port());
    let mut initiator = loop {
        match RdmaInitiator::connect(to, None, TOKEN, 1, &RdmaOptions::default(), deadline) {
            Ok(initiator) => break initiator,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut target = listener.into_target(deadline).unwrap();
    pushing(&mut initiator, &mut target);
    initiator.fence(FenceTag(1)).unwrap();
    target.wait_fence(FenceTag(1), soon()).unwrap();
}

/// The test of the same name in a process of its own, where it plays the other part.
struct Other {
    process: Child,
    words: Lines<BufReader<ChildStdout>>,
}

impl Other {
    fn start(test: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "--nocapture", &format!("rdma::tests::{test}")]);
        command.env(OTHER_PROCESS, "1").stdin(Stdio::null()).stdout(Stdio::piped());
        prepare(&mut command);
        let mut process = command.spawn().unwrap();
        let words = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, words }
    }

    /// What it says next behind this word.
    fn said(&mut self, word: &str) -> String {
        let rest = |line: String| line.split_once(word).map(|(_, rest)| rest.trim().to_owned());
        self.words.find_map(|line| rest(line.unwrap())).expect(word)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It has ended, if the test has passed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const OTHER_PROCESS: &str = "PAGEFERRY_TEST_OTHER_PROCESS";

fn is_other_process() -> bool {
    std::env::var_os(OTHER_PROCESS).is_some()
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_a_target_that_is_killed_is_noticed_at_once() {
    let name = "lab_a_target_that_is_killed_is_noticed_at_once";
    if !can_run(name) {
        return;
    }
    let options = RdmaOptions::default();
    if is_other_process() {
        let listener = RdmaListener::bind(here(), TOKEN, 2, &options).unwrap();
        println!("\nport {}", listener.port());
        let mut target = listener.into_target(soon()).unwrap();
        target.expose(&MemoryRegion::anonymous(8 * MIB).unwrap()).unwrap();
        println!("\nready");
        println!("\nbroken {:?}", target.wait_fence(FenceTag(1), soon()));
        return;
    }
    let mut other = Other::start(name, |_| {});
    let to = SocketAddr::new(here(), other.said("port ").parse().unwrap());
    let mut initiator = RdmaInitiator::connect(to, None, TOKEN, 2, &options, soon()).unwrap();
    let source = MemoryRegion::anonymous(8 * MIB).unwrap();
    initiator.register(&source).unwrap();
    other.said("ready");
    let remote = RemoteRegion { base: 1 << 32, len: 8 << 20, key: RemoteKey(0) };
    let batch = stripes(&source, remote);
    post_all(&mut initiator, &batch, &mut Vec::new()).unwrap();
    let killed = std::thread::scope(|scope| {
        let pusher = scope.spawn(|| push_until_it_breaks(&mut initiator, &batch));
        other.process.kill().unwrap();
        let killed = Instant::now();
        let error = pusher.join().unwrap();
        assert!(matches!(error, Error::Closed { .. } | Error::Work { .. }), "{error:?}");
        killed
    });
    assert!(killed.elapsed() < Duration::from_secs(10));
}

#[test]
#[ignore = "needs an RDMA device"]
fn lab_a_memory_lock_limit_that_is_too_small_is_named_with_the_mend() {
    let name = "lab_a_memory_lock_limit_that_is_too_small_is_named_with_the_mend";
    if !can_run(name) {
        return;
    }
    if is_other_process() {
        use rustix::process::{Resource, Rlimit, setrlimit};
        setrlimit(Resource::Memlock, Rlimit { current: Some(8 << 20), maximum: Some(8 << 20) })
            .unwrap();
        let (mut initiator, _target) = ends(1, &RdmaOptions::default());
        let source = MemoryRegion::anonymous(256 * MIB).unwrap();
        initiator.register(&source).unwrap();
        initiator.expect(&source, &[0..256 * MIB]).unwrap();
        println!("\nbroken {}", initiator.poll(&mut Vec::new(), soon()).unwrap_err());
        return;
    }
    let mut other = Other::start(name, |command| {
        // Not root, which no limit binds.
        command.uid(65534).gid(65534);
    });
    let said = other.said("broken ");
    for part in
        ["registering 67108864 bytes", "may lock 8192 KiB", "ulimit -l unlimited", "LimitMEMLOCK"]
    {
        assert!(said.contains(part), "{said}");
    }
}
