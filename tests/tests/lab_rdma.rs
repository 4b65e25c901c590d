//! The engine over real verbs, in the lab machine: two soft-RoCE ports on one cable. The Linux
//! guest and the synthetic one are moved; paths break in every way that can be made; each time the
//! guest runs on at the source and the next attempt succeeds.
//!
//! Ignored everywhere else: scripts/test builds outside and runs them inside.

use pageferry::supervisor::api::State;
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::dirty::{DirtySource, Synced};
use pageferry_engine::guest::{DestinationGuest, Facts, SourceGuest};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::{PAGE_BYTES, PageRun};
use pageferry_engine::net::choice::{LinkChoice, Transport};
use pageferry_engine::policy::WhenStuck;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::report::{MigrationReport, Outcome};
use pageferry_engine::source::{MigrateOptions, migrate};
use pageferry_synthetic::wrapped::{Hooks, Wrapped};
use pageferry_synthetic::{SyntheticDestination, SyntheticOptions, SyntheticSource};
use pageferry_tests::console::BOOT_MAX;
use pageferry_tests::linux::Linux;
use pageferry_tests::stage::{BARE, Ended, Stage, Supervisor};
use pageferry_tests::{eventually, refuse_outside_the_lab};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// The two ends of the cable.
const HERE: &str = "10.77.0.1";
const THERE: &str = "10.77.0.2";
/// One attempt in the lab machine, deadlines of the engine and a second try included.
const ATTEMPT_MAX: Duration = Duration::from_secs(180);

/// 24 MiB, two thirds of it touched.
const SMALL: SyntheticOptions = SyntheticOptions {
    pages: 6144,
    touched_pages: 4096,
    threads: 2,
    pages_per_second: Some(500),
    seed: 20_261_122,
    discards: false,
};

fn run(program: &str, arguments: &[&str]) {
    let ended = Command::new(program).args(arguments).output().expect("it starts");
    assert!(
        ended.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&ended.stderr)
    );
}

fn script(name: &str, arguments: &[&str]) {
    run(&format!("{}/../scripts/{name}", env!("CARGO_MANIFEST_DIR")), arguments);
}

/// Runs the test of this name again in a process of its own, which `set` may change: a process that
/// has used a device holds it open until it ends, and would keep the tests from taking it away.
/// True in that process.
fn alone(name: &str, set: impl FnOnce(&mut Command)) -> bool {
    refuse_outside_the_lab();
    const INNER: &str = "PAGEFERRY_LAB_INNER";
    if std::env::var_os(INNER).is_some_and(|inner| inner == name) {
        return true;
    }
    let mut command = Command::new("prlimit");
    set(&mut command);
    command.arg(std::env::current_exe().expect("the test has a path"));
    let ended = command
        .args(["--ignored", "--exact", name])
        .env(INNER, name)
        .output()
        .expect("prlimit runs");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr)
    );
    assert!(ended.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// One attempt to move `guest` to the other end of the cable. A path that breaks is tried again by
/// the engine itself where it chooses: the receiver serves until the guest is there or the source
/// gives up.
fn attempt(
    guest: &mut dyn SourceGuest,
    to: &str,
    transport: Transport,
    lanes: u8,
    change: impl FnOnce(&mut MigrateOptions),
) -> (MigrationReport, Option<SyntheticDestination>) {
    let listener = SessionListener::open(format!("{to}:0").parse().unwrap()).unwrap();
    let mut options = MigrateOptions::to(listener.address.to_string());
    (options.lanes, options.downtime_us_max, options.insecure) = (lanes, 5_000_000, true);
    options.when_stuck = WhenStuck::Switchover;
    options.rounds_max = 3;
    options.link.transport = transport;
    change(&mut options);
    let monitor = Monitor::default();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut receiver = Receiver::new(listener, LinkChoice::default());
            let received = loop {
                let Some(incoming) =
                    receiver.listener().next(Instant::now() + Duration::from_millis(100))
                else {
                    if over.load(std::sync::atomic::Ordering::SeqCst) {
                        break None;
                    }
                    continue;
                };
                let mut destination = SyntheticDestination::new(SMALL.pages).unwrap();
                if let Served::Received(_) =
                    receiver.serve(incoming, &mut destination, &mut || Ok(()))
                {
                    break Some(destination);
                }
            };
            receiver.answer_afterwards();
            received
        });
        let report = migrate(guest, &options, &monitor);
        over.store(true, std::sync::atomic::Ordering::SeqCst);
        let received = receiving.join().unwrap();
        assert_eq!(received.is_some(), report.outcome == Outcome::Completed, "{:?}", report.reason);
        (report, received)
    })
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn twenty_moves_by_rdma_back_and_forth_lose_nothing_in_eight_messages() {
    if !alone("twenty_moves_by_rdma_back_and_forth_lose_nothing_in_eight_messages", |_| {}) {
        return;
    }
    let mut guest = SyntheticSource::start(SMALL).unwrap();
    for index in 0..20usize {
        let to = if index % 2 == 0 { THERE } else { HERE };
        let lanes = [1, 2, 4, 8][index % 4];
        let transport = if index < 10 { Transport::Rdma } else { Transport::Auto };
        let (report, destination) = attempt(&mut guest, to, transport, lanes, |options| {
            options.verify = index % 5 == 0;
        });
        assert_eq!(report.outcome, Outcome::Completed, "move {index}: {:?}", report.reason);
        assert_eq!(
            (report.transport.as_str(), report.lanes),
            ("rdma", u32::from(lanes)),
            "{}",
            report.link
        );
        assert_eq!((report.control_messages, &report.fell_back), (8, &None));
        assert_eq!(report.registrations_in_downtime, 0);
        // By hand these tests also run over soft-iWARP.
        let link = &report.link;
        assert!(link.contains("RoCE v2 by rxe_v") || link.contains("iWARP by siw_v"), "{link}");
        guest = destination.unwrap().into_source().unwrap();
        guest.check().unwrap_or_else(|e| panic!("move {index}: {e}"));
    }
}

/// Touches memory for the first time when it is being paused, and has more device state than a
/// registration of 2 MiB.
struct Late {
    memory: std::sync::Arc<GuestMemory>,
    touched: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

/// Pages that nobody touches before, in stripes of their own; the last stripe stays untouched.
const LATE: [u64; 4] = [4608, 4609, 5200, 5600];
/// Zeros behind the state that the guest really has.
const PADDING_BYTES: usize = 11 << 20;

struct LateTracking {
    inner: Box<dyn DirtySource>,
    touched: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl DirtySource for LateTracking {
    fn sync(&mut self, into: &mut DirtyBitmap) -> pageferry_engine::Result<Synced> {
        if self.touched.load(std::sync::atomic::Ordering::SeqCst) {
            LATE.iter().for_each(|&page| into.insert(PageRun::between(page, page + 1)));
        }
        self.inner.sync(into)
    }
}

impl Hooks for Late {
    fn facts(&mut self, facts: Facts) -> Facts {
        Facts {
            state_bytes_max: facts.state_bytes_max + 64 * PADDING_BYTES as u64,
            state_bytes_expected: facts.state_bytes_expected + PADDING_BYTES as u64 / 2,
            ..facts
        }
    }
    fn tracking(&mut self, inner: Box<dyn DirtySource>) -> Box<dyn DirtySource> {
        Box::new(LateTracking { inner, touched: std::sync::Arc::clone(&self.touched) })
    }
    fn before_pause(&mut self) -> pageferry_engine::Result<()> {
        for page in LATE {
            let region = self.memory.slots()[0].region();
            region.write((page * PAGE_BYTES) as usize, &page.to_le_bytes())?;
        }
        self.touched.store(true, std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }
    fn after_save(
        &mut self,
        sink: &mut dyn FnMut(&[u8]) -> pageferry_engine::Result<()>,
    ) -> pageferry_engine::Result<()> {
        vec![0; PADDING_BYTES].chunks(256 << 10).try_for_each(sink)
    }
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn nothing_is_registered_in_the_downtime_whatever_the_guest_touches_last() {
    if !alone("nothing_is_registered_in_the_downtime_whatever_the_guest_touches_last", |_| {}) {
        return;
    }
    for lanes in [1, 4] {
        let guest = SyntheticSource::start(SMALL).unwrap();
        let memory = std::sync::Arc::clone(guest.memory());
        let mut guest = Wrapped { guest, hooks: Late { memory, touched: Default::default() } };
        let (report, destination) =
            attempt(&mut guest, THERE, Transport::Rdma, lanes, |options| options.verify = true);
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        assert!(report.state_bytes > PADDING_BYTES as u64);
        assert_eq!((report.registrations_in_downtime, report.staged_pages), (0, LATE.len() as u64));
        let destination = destination.unwrap();
        for page in LATE {
            let mut word = [0; 8];
            let region = destination.memory().slots()[0].region();
            region.read((page * PAGE_BYTES) as usize, &mut word).unwrap();
            assert_eq!(u64::from_le_bytes(word), page);
        }
        destination.into_source().unwrap().check().unwrap();
    }
}

/// Soft-RoCE of Linux 6.12 often does not come back from a link that was down under a connection:
/// the queue pair for connection requests stays in the error state (`rdma resource show qp type
/// GSI`). So processes of their own have the devices open here, and the devices are made anew after
/// them.
#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_link_that_is_set_down_leaves_the_guest_here_and_the_next_attempt_moves_it() {
    refuse_outside_the_lab();
    let stage = Stage::new();
    let mut source = stage.run("src", BARE, "rounds");
    let mut receiver = stage.receive_at(&format!("{THERE}:0"), "dst", BARE, "", &["--insecure"]);
    let more = ["--insecure", "--transport", "rdma", "--downtime-max", "20s"];
    let moving = stage.migrate("src", receiver.address(), &more);
    source.wait_held("rounds");
    run("ip", &["link", "set", "v1", "down"]);
    stage.release();
    let ended = moving.end(ATTEMPT_MAX);
    run("ip", &["link", "set", "v1", "up"]);
    ["v0", "v1"].iter().for_each(|end| script("rxe", &["up", end]));
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("rxe_v0: port 1: the port went down"), "{}", ended.stderr);
    source.wait_guest_runs();
    receiver.wait_state(State::Waiting);
    let again = stage.migrate("src", receiver.address(), &["--insecure", "--downtime-max", "20s"]);
    let again = again.end(ATTEMPT_MAX);
    assert_eq!(again.status, Some(0), "{}", again.stderr);
    receiver.wait_guest_runs();
    source.kill();
    receiver.kill();
    for interface in ["v0", "v1"] {
        run("rdma", &["link", "delete", &format!("rxe_{interface}")]);
        script("rxe", &["up", interface]);
    }
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn without_a_path_rdma_is_refused_and_the_choice_falls_on_tcp_with_the_reason() {
    if !alone("without_a_path_rdma_is_refused_and_the_choice_falls_on_tcp_with_the_reason", |_| {})
    {
        return;
    }
    // An address of this machine to which no RDMA device belongs.
    let elsewhere = "10.88.0.1";
    run("ip", &["link", "add", "plain0", "type", "dummy"]);
    run("ip", &["address", "add", &format!("{elsewhere}/24"), "dev", "plain0"]);
    run("ip", &["link", "set", "plain0", "up"]);
    let mut guest = SyntheticSource::start(SMALL).unwrap();
    let refused = attempt(&mut guest, elsewhere, Transport::Rdma, 2, |_| {}).0;
    let (report, destination) = attempt(&mut guest, elsewhere, Transport::Auto, 2, |_| {});
    run("ip", &["link", "delete", "plain0"]);
    let reason = refused.reason.unwrap_or_default();
    assert!(refused.refused && reason.contains("--transport auto"), "{reason}");
    assert_eq!(
        (report.outcome, report.transport.as_str()),
        (Outcome::Completed, "tcp"),
        "{:?}",
        report.reason
    );
    assert!(
        report.link.contains("not RDMA: the destination says: the address 10.88.0.1"),
        "{}",
        report.link
    );
    destination.unwrap().into_source().unwrap().check().unwrap();
}

/// Takes the source's device away while its guest is moved with `transport`. Returns how `migrate`
/// ended. The device goes when the last process that has opened it ends: the source's supervisor.
fn moved_while_the_device_vanishes(transport: &str, then: impl FnOnce(&Stage, Ended, &Supervisor)) {
    let stage = Stage::new();
    let mut source = stage.run("src", BARE, "rounds");
    let receiver = stage.receive_at(&format!("{THERE}:0"), "dst", BARE, "", &["--insecure"]);
    let more = ["--insecure", "--transport", transport, "--downtime-max", "20s"];
    let moving = stage.migrate("src", receiver.address(), &more);
    source.wait_held("rounds");
    let mut deleting =
        Command::new("rdma").args(["link", "delete", "rxe_v0"]).spawn().expect("rdma runs");
    // The device says so before it waits for us; nothing else shows that it has.
    std::thread::sleep(Duration::from_secs(1));
    stage.release();
    then(&stage, moving.end(ATTEMPT_MAX), &source);
    source.kill();
    eventually("the device goes", ATTEMPT_MAX, || deleting.try_wait().expect("our child"));
    script("rxe", &["up", "v0"]);
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_device_that_vanishes_leaves_the_guest_here_and_the_next_attempt_moves_it() {
    refuse_outside_the_lab();
    moved_while_the_device_vanishes("rdma", |stage, ended, source| {
        assert_eq!(ended.status, Some(1), "{}", ended.stderr);
        assert!(ended.stderr.contains("rxe_v0: the device was removed"), "{}", ended.stderr);
        source.wait_guest_runs();
        let receiver = stage.receive_at(&format!("{THERE}:0"), "dst2", BARE, "", &["--insecure"]);
        let again =
            stage.migrate("src", receiver.address(), &["--insecure", "--downtime-max", "20s"]);
        let again = again.end(ATTEMPT_MAX);
        assert_eq!(again.status, Some(0), "{}", again.stderr);
        assert!(again.stderr.contains("going by TCP, not RDMA"), "{}", again.stderr);
        receiver.wait_guest_runs();
    });
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn with_the_choice_left_to_us_a_broken_rdma_path_is_left_for_tcp_in_the_same_command() {
    refuse_outside_the_lab();
    moved_while_the_device_vanishes("auto", |_, ended, _| {
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let report: MigrationReport = serde_json::from_str(&ended.stdout).expect("the report");
        assert_eq!(report.transport, "tcp");
        assert!(report.link.starts_with("TCP, RDMA broke: "), "{}", report.link);
        assert!(report.fell_back.is_some_and(|why| why.contains("rxe_v0: the device was removed")));
    });
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_guest_whose_memory_may_be_taken_away_goes_by_tcp() {
    if !alone("a_guest_whose_memory_may_be_taken_away_goes_by_tcp", |_| {}) {
        return;
    }
    let mut guest = SyntheticSource::start(SyntheticOptions { discards: true, ..SMALL }).unwrap();
    let refused = attempt(&mut guest, THERE, Transport::Rdma, 2, |_| {}).0;
    assert!(refused.refused && refused.reason.as_deref().unwrap_or_default().contains("balloon"));
    let (report, destination) = attempt(&mut guest, THERE, Transport::Auto, 2, |_| {});
    assert_eq!(
        (report.outcome, report.transport.as_str()),
        (Outcome::Completed, "tcp"),
        "{:?}",
        report.reason
    );
    destination.unwrap().into_source().unwrap().check().unwrap();
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn too_small_a_memory_lock_is_named_and_the_guest_goes_by_tcp() {
    let name = "too_small_a_memory_lock_is_named_and_the_guest_goes_by_tcp";
    let not_root = |command: &mut Command| {
        command.arg("--memlock=8388608:8388608").uid(65534).gid(65534);
    };
    if !alone(name, not_root) {
        return;
    }
    let mut guest = SyntheticSource::start(SMALL).unwrap();
    let (report, _) = attempt(&mut guest, THERE, Transport::Rdma, 1, |_| {});
    let reason = report.reason.unwrap_or_default();
    assert_eq!(report.outcome, Outcome::Aborted);
    assert!(reason.contains("memlock") || reason.contains("ulimit -l"), "{reason}");
    let (report, destination) = attempt(&mut guest, THERE, Transport::Auto, 1, |_| {});
    assert_eq!(
        (report.outcome, report.transport.as_str()),
        (Outcome::Completed, "tcp"),
        "{:?}",
        report.reason
    );
    assert!(report.fell_back.is_some());
    destination.unwrap().into_source().unwrap().check().unwrap();
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_killed_receiver_leaves_the_guest_here_and_another_takes_it() {
    refuse_outside_the_lab();
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    let at = format!("{THERE}:0");
    for point in ["filling", "loaded"] {
        let mut receiver = stage.receive_at(&at, "dst", BARE, point, &["--insecure"]);
        let rdma = ["--insecure", "--transport", "rdma", "--downtime-max", "20s"];
        let moving = stage.migrate("src", receiver.address(), &rdma);
        receiver.wait_held(point);
        receiver.kill();
        let ended = moving.end(ATTEMPT_MAX);
        assert_eq!(ended.status, Some(1), "killed at {point}: {}", ended.stderr);
        source.wait_guest_runs();
        source.wait_state(State::Hosting);
    }
    let receiver = stage.receive_at(&at, "dst2", BARE, "", &["--insecure"]);
    let more = ["--insecure", "--transport", "rdma", "--downtime-max", "20s"];
    let ended = stage.migrate("src", receiver.address(), &more).end(ATTEMPT_MAX);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    receiver.wait_guest_runs();
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn linux_under_kvm_moves_by_rdma_and_every_page_is_right() {
    refuse_outside_the_lab();
    let guest = Linux { memory_mib: 256, written_mib: 8, touched_mib: 16, rate: 1 };
    let stage = Stage::new();
    let mut source = stage.run("src", &guest.qemu(&stage, "src"), "");
    let console = stage.console("src");
    console.wait_ready();
    let written = console.progress_since(0);
    let receiver = stage.receive_at(
        &format!("{THERE}:0"),
        "dst",
        &guest.qemu(&stage, "dst"),
        "",
        &["--insecure"],
    );
    let mut next = stage.console("dst");
    let more = [
        "--insecure",
        "--transport",
        "rdma",
        "--verify",
        "--downtime-max",
        "5s",
        "--when-stuck",
        "switchover",
    ];
    let ended = stage.migrate("src", receiver.address(), &more).end(BOOT_MAX);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(
        ended.stdout.contains("\"verified\": true")
            && ended.stdout.contains("\"transport\": \"rdma\"")
    );
    assert_eq!(source.end(), Some(0));
    next.progress_since(written);
    next.verdict();
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn tcp_never_touches_verbs() {
    refuse_outside_the_lab();
    let stage = Stage::new();
    let mapped = |pid: u32| {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("a live supervisor");
        maps.contains("libibverbs") || maps.contains("librdmacm")
    };
    for (transport, expected) in [("tcp", false), ("rdma", true)] {
        let name = format!("src-{transport}");
        let source = stage.run(&name, BARE, "switchover");
        let at = format!("{THERE}:0");
        let receiver =
            stage.receive_at(&at, &format!("dst-{transport}"), BARE, "", &["--insecure"]);
        let more = ["--insecure", "--transport", transport, "--downtime-max", "20s"];
        let moving = stage.migrate(&name, receiver.address(), &more);
        source.wait_held("switchover");
        assert_eq!(
            (mapped(source.pid()), mapped(receiver.pid())),
            (expected, expected),
            "{transport}"
        );
        stage.release();
        assert_eq!(moving.end(ATTEMPT_MAX).status, Some(0));
        stage.hold_again();
    }
}
