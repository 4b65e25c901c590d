//! The engine over real TCP in one process, with a guest that is threads and a ledger: a hundred
//! moves back and forth, with attempts that fail in between, and the number of control messages.

use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::dirty::{DirtySource, Synced};
use pageferry_engine::guest::{DestinationGuest, SourceGuest};
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::PageRun;
use pageferry_engine::net::choice::{LinkChoice, Transport};
use pageferry_engine::policy::WhenStuck;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::report::stage::Stage;
use pageferry_engine::report::{MigrationReport, Outcome};
use pageferry_engine::source::{MigrateOptions, migrate};
use pageferry_synthetic::wrapped::{Hooks, Wrapped};
use pageferry_synthetic::{SyntheticDestination, SyntheticOptions, SyntheticSource};
use pageferry_tests::proxy::{Proxy, Which};
use pageferry_tests::{SOON, eventually};
use std::net::SocketAddr;
use std::process::Command;
use std::time::Instant;

/// 16 MiB, half of it touched; two threads write some 80 MB/s together.
const SMALL: SyntheticOptions = SyntheticOptions {
    pages: 4096,
    touched_pages: 2048,
    threads: 2,
    pages_per_second: Some(10_000),
    seed: 20_260_101,
    discards: false,
};

/// What disturbs an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Nothing,
    Cancel,
    Cut(Which),
}

/// One attempt to move `guest` to `destination` over loopback. `trouble` strikes once the rounds
/// have begun.
fn attempt(
    guest: &mut dyn SourceGuest,
    mut destination: SyntheticDestination,
    lanes: u8,
    trouble: Trouble,
    change: impl FnOnce(&mut MigrateOptions),
) -> (MigrationReport, SyntheticDestination) {
    let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
    let listening = listener.address.tcp().expect("it listens by TCP");
    let proxy = Proxy::to(listening);
    let to: SocketAddr = if matches!(trouble, Trouble::Cut(_)) { proxy.address } else { listening };
    let mut options = MigrateOptions::to(to.to_string());
    (options.lanes, options.downtime_us_max) = (lanes, 200_000);
    change(&mut options);
    let monitor = Monitor::default();
    let report = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut receiver = Receiver::new(listener, LinkChoice::default());
            let incoming =
                receiver.listener().next(Instant::now() + SOON).expect("the source connects");
            let served = receiver.serve(incoming, &mut destination, &mut || Ok(()));
            // A source that lost the answer to Commit asks again for as long as this process lives.
            receiver.answer_afterwards();
            matches!(served, Served::Received(_))
        });
        let watched = monitor.clone();
        let troubling = scope.spawn(move || {
            if trouble == Trouble::Nothing {
                return;
            }
            eventually("the rounds begin", SOON, || {
                (!matches!(watched.progress().stage, Stage::Idle | Stage::Setup)).then_some(())
            });
            match trouble {
                Trouble::Cancel => watched.cancel(),
                Trouble::Cut(which) => drop(proxy.cut(which)),
                Trouble::Nothing => {}
            }
        });
        let report = migrate(guest, &options, &monitor);
        troubling.join().unwrap();
        let received = receiving.join().unwrap();
        assert_eq!(
            received,
            report.outcome == Outcome::Completed,
            "both sides agree: {:?}",
            report.reason
        );
        report
    });
    (report, destination)
}

/// In a process that finds /dev/null where the libraries of RDMA are. (Not with QEMU: it needs them
/// itself.)
#[test]
fn without_rdma_core_a_guest_moves_by_tcp_and_rdma_is_refused_by_name() {
    const NAME: &str = "without_rdma_core_a_guest_moves_by_tcp_and_rdma_is_refused_by_name";
    const INNER: &str = "PAGEFERRY_TEST_WITHOUT_RDMA_CORE";
    if std::env::var_os(INNER).is_none() {
        let hide = "for library in $(find /lib/ /usr/lib -name 'libibverbs.so.1*' -o -name 'librdmacm.so.1*'); do \
                    mount --bind /dev/null $library || exit; done; exec \"$0\" \"$@\"";
        let ended = Command::new("unshare")
            .args(["--mount", "sh", "-c", hide])
            .arg(std::env::current_exe().expect("the test has a path"))
            .args(["--exact", NAME])
            .env(INNER, "1")
            .output()
            .expect("unshare runs");
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&ended.stdout),
            String::from_utf8_lossy(&ended.stderr)
        );
        assert!(ended.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let mut guest = SyntheticSource::start(SMALL).unwrap();
    let destination = || SyntheticDestination::new(SMALL.pages).unwrap();
    let by = |transport| move |options: &mut MigrateOptions| options.link.transport = transport;
    let (report, _) = attempt(&mut guest, destination(), 2, Trouble::Nothing, by(Transport::Rdma));
    let reason = report.reason.unwrap_or_default();
    assert!(report.refused && reason.contains("libibverbs.so.1 cannot be used"), "{reason}");
    for transport in [Transport::Tcp, Transport::Auto] {
        let (report, moved) =
            attempt(&mut guest, destination(), 2, Trouble::Nothing, by(transport));
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        assert_eq!(report.transport, "tcp");
        guest = moved.into_source().unwrap();
        guest.check().unwrap();
    }
}

#[test]
fn a_hundred_moves_back_and_forth_with_failed_attempts_between_them_lose_nothing() {
    eprintln!("seed {}", SMALL.seed);
    let mut guest = SyntheticSource::start(SMALL).unwrap();
    let (mut moves, mut failures, mut written) = (0, 0, 0);
    let troubles = [
        Trouble::Nothing,
        Trouble::Nothing,
        Trouble::Cancel,
        Trouble::Nothing,
        Trouble::Cut(Which::Lanes),
        Trouble::Nothing,
        Trouble::Nothing,
        Trouble::Cut(Which::Control),
    ];
    for (attempts, trouble) in troubles.into_iter().cycle().enumerate() {
        if moves == 100 {
            break;
        }
        assert!(attempts < 400, "{failures} of {attempts} attempts failed");
        let lanes = [1, 2, 4][attempts % 3];
        let destination = SyntheticDestination::new(SMALL.pages).unwrap();
        let (report, destination) = attempt(&mut guest, destination, lanes, trouble, |options| {
            options.verify = attempts % 10 == 0;
            if trouble != Trouble::Nothing {
                // Slow, so that it is still under way when it is struck.
                options.bytes_per_second_max = Some(30_000_000);
            }
        });
        match report.outcome {
            Outcome::Completed => {
                assert_eq!(report.lanes, u32::from(lanes));
                assert!(report.control_messages <= 10, "{}", report.control_messages);
                guest = destination.into_source().expect("it runs there");
                moves += 1;
            }
            Outcome::Aborted => {
                assert_ne!(trouble, Trouble::Nothing, "{:?}", report.reason);
                assert!(destination.into_source().is_none(), "it runs here alone");
                failures += 1;
            }
            Outcome::Unknown => panic!("{:?}", report.reason),
        }
        assert!(guest.is_running().unwrap());
        guest
            .check()
            .unwrap_or_else(|e| panic!("after attempt {attempts} ({trouble:?}): {}", e.chain()));
        let now = guest.generations().unwrap();
        assert!(now > written, "the guest writes");
        written = now;
    }
    assert!(failures >= 30, "only {failures} attempts were struck in time");
}

#[test]
fn a_destination_that_refuses_to_run_gives_the_guest_back() {
    let mut guest = SyntheticSource::start(SMALL).unwrap();
    let mut destination = SyntheticDestination::new(SMALL.pages).unwrap();
    destination.refuses_to_run = true;
    let (report, destination) = attempt(&mut guest, destination, 1, Trouble::Nothing, |_| {});
    assert_eq!(report.outcome, Outcome::Aborted);
    assert!(
        report.reason.as_ref().is_some_and(|r| r.contains("told not to run")),
        "{:?}",
        report.reason
    );
    assert!(destination.into_source().is_none());
    assert!(guest.is_running().unwrap());
    guest.check().unwrap();
    let destination = SyntheticDestination::new(SMALL.pages).unwrap();
    let (report, destination) = attempt(&mut guest, destination, 1, Trouble::Nothing, |_| {});
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    destination.into_source().expect("it runs there").check().unwrap();
}

/// The tracking also reports pages that were not written, fewer each round: so
/// many rounds, whatever the machine's speed. A page reported without need is sent once more, and
/// that is all.
struct ManyRounds;

/// See [`ManyRounds`].
struct Shrinking {
    inner: Box<dyn DirtySource>,
    pages: f64,
}

impl DirtySource for Shrinking {
    fn sync(&mut self, into: &mut DirtyBitmap) -> pageferry_engine::Result<Synced> {
        let sync = self.inner.sync(into)?;
        into.insert(PageRun::between(0, self.pages as u64 + 1));
        // More than the tenth that counts as progress.
        self.pages *= 0.87;
        Ok(sync)
    }
}

impl Hooks for ManyRounds {
    fn tracking(&mut self, inner: Box<dyn DirtySource>) -> Box<dyn DirtySource> {
        Box::new(Shrinking { inner, pages: 4000.0 })
    }
}

/// Control messages of one move of a guest of this size in this many rounds.
fn control_messages(mib: u64, rounds: u32) -> u64 {
    let options = SyntheticOptions {
        pages: mib << 8,
        touched_pages: 4096,
        threads: 1,
        pages_per_second: Some(100),
        ..SMALL
    };
    let guest = SyntheticSource::start(options).unwrap();
    let mut guest = Wrapped { guest, hooks: ManyRounds };
    let destination = SyntheticDestination::new(options.pages).unwrap();
    assert_eq!(destination.memory().bytes(), mib << 20);
    let (report, destination) = attempt(&mut guest, destination, 2, Trouble::Nothing, |options| {
        (options.rounds_max, options.when_stuck, options.downtime_us_max) =
            (rounds, WhenStuck::Switchover, 1);
    });
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert_eq!(report.rounds.len(), rounds as usize);
    destination.into_source().expect("it runs there").check().unwrap();
    report.control_messages
}

#[test]
fn control_messages_are_as_many_for_a_large_guest_and_for_many_rounds() {
    let counts: Vec<u64> = [(256, 3), (256, 30), (4096, 3), (4096, 30)]
        .map(|(mib, rounds)| control_messages(mib, rounds))
        .into();
    assert!(counts.iter().all(|count| *count == counts[0] && *count <= 10), "{counts:?}");
}
