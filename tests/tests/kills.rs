//! Random kills and stops of real processes in a migration: victim, moment and signal by seed.
//!
//! Whatever is struck, two places never run the guest at once. In the end one runs it with its
//! memory intact; none only if the process that was killed had the guest. Where the supervisors
//! cannot know (exit status 3), it is settled as docs/operations.md has the operator do it.
//!
//! `scripts/kill-campaign FIRST LAST` runs more seeds; a seed that fails is printed and can be run
//! alone.

use pageferry::supervisor::api::State;
use pageferry_microvm::machine::open_kvm;
use pageferry_tests::console::Console;
use pageferry_tests::look::{self, alive, tracked_mappings, vcpu_time};
use pageferry_tests::random::Random;
use pageferry_tests::stage::{Running, Stage, Supervisor};
use pageferry_tests::{IN_THE_END, LOOK_EVERY, SOON, eventually, ledger, not_run};
use rustix::process::Signal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Seeds of the short form: `scripts/test`.
const SHORT: (u64, u64) = (1, 10);
/// Seeds that run at once: most of a seed's time is waiting.
const AT_ONCE: usize = 3;
/// From the start of `migrate` to the last moment for a strike; a move takes some 0.3 to 0.6 s.
const STRIKE_MAX: Duration = Duration::from_millis(500);
/// The same from the end of the first round, where the switchover is near; and if it is drawn out.
const STRIKE_NEAR_MAX: Duration = Duration::from_millis(100);
const STRIKE_DRAWN_OUT_MAX: Duration = Duration::from_millis(350);
/// Steps of the switchover that last some milliseconds at most, drawn out so that they are struck:
/// at the source and at the destination.
const DRAWN_OUT: (&str, &str) = ("switchover:60,committed:60", "loaded:60,owner:60");
/// Processor time that vCPUs of a microvm must have had to have checked their pages.
const CHECKED: Duration = Duration::from_millis(150);
/// Processor time within one look that only running the guest takes.
const RUNS: Duration = Duration::from_millis(3);
/// How long a look waits for it.
const ONE_LOOK: Duration = Duration::from_millis(150);

const PAYLOAD: &[&str] = &[
    "--payload",
    "--memory",
    "8M",
    "--cpus",
    "1",
    "--payload-working-set",
    "1M",
    "--payload-pattern",
    "sequential",
];
const WAITING: &[&str] = &["--listen", "127.0.0.1:0", "--memory", "8M", "--cpus", "1"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guest {
    Qemu,
    Microvm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Client,
    SourceSupervisor,
    SourceQemu,
    SourceGuardian,
    DestinationSupervisor,
    DestinationQemu,
    DestinationGuardian,
}
use Victim::*;

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strike {
    Kill,
    /// SIGSTOP, and SIGCONT after this time.
    Stop(Duration),
}

/// All that a seed decides.
#[derive(Debug, Clone, Copy)]
struct Plan {
    seed: u64,
    guest: Guest,
    victim: Victim,
    strike: Strike,
    /// After the start, or after the first round.
    after: Duration,
    near: bool,
    drawn_out: bool,
    slow: bool,
}

impl Plan {
    fn of(seed: u64) -> Self {
        let mut random = Random::of(seed);
        let guest = random.one_of(&[Guest::Qemu, Guest::Qemu, Guest::Microvm]);
        let victims: &[Victim] = match guest {
            Guest::Qemu => &[
                Client,
                SourceSupervisor,
                SourceSupervisor,
                SourceQemu,
                SourceGuardian,
                DestinationSupervisor,
                DestinationSupervisor,
                DestinationQemu,
                DestinationGuardian,
            ],
            Guest::Microvm => &[Client, SourceSupervisor, DestinationSupervisor],
        };
        let victim = random.one_of(victims);
        let strike = match random.below(3) {
            // Longer than what the other side waits for (10 s), or shorter.
            0 if random.below(4) == 0 => Strike::Stop(Duration::from_secs(13)),
            0 => Strike::Stop(random.within(Duration::from_secs(2))),
            _ => Strike::Kill,
        };
        let near = random.below(4) != 0;
        let drawn_out = near && random.below(3) != 0;
        let after = random.within(match (near, drawn_out) {
            (true, true) => STRIKE_DRAWN_OUT_MAX,
            (true, false) => STRIKE_NEAR_MAX,
            _ => STRIKE_MAX,
        });
        Self { seed, guest, victim, strike, after, near, drawn_out, slow: random.below(2) == 0 }
    }
}

/// Who has the guest in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Source,
    Destination,
    /// The process that was killed had it.
    Killed,
}

/// What became of a seed.
#[derive(Debug)]
#[expect(dead_code, reason = "the status is printed with the rest")]
struct Outcome {
    owner: Owner,
    /// Whether there was a process to be struck at that moment.
    struck: bool,
    /// Whether the operator had to settle it.
    settled: bool,
    status: Option<i32>,
}

/// A source, a destination, and what is known of the guest.
struct World {
    plan: Plan,
    stage: Stage,
    source: Supervisor,
    destination: Supervisor,
    consoles: Option<(Console, Console)>,
    qemus: (u32, u32),
    written: u64,
}

impl World {
    fn new(plan: Plan) -> Self {
        let stage = Stage::new();
        let (at_source, at_destination) = if plan.drawn_out { DRAWN_OUT } else { ("", "") };
        match plan.guest {
            Guest::Qemu => {
                let source = stage.run("src", &ledger::qemu(&stage, "src"), at_source);
                let destination =
                    stage.receive("dst", &ledger::qemu(&stage, "dst"), at_destination);
                let consoles = (stage.console("src"), stage.console("dst"));
                let written = consoles.0.progress_since(0);
                let qemus = (source.qemu(), destination.qemu());
                Self { plan, stage, source, destination, consoles: Some(consoles), qemus, written }
            }
            Guest::Microvm => {
                let (source, _) = stage.microvm("src", PAYLOAD, at_source);
                let (destination, _) = stage.microvm("dst", WAITING, at_destination);
                let qemus = (source.pid(), destination.pid());
                let world =
                    Self { plan, stage, source, destination, consoles: None, qemus, written: 0 };
                eventually("the guest runs", SOON, || world.runs(&world.source).then_some(()));
                world
            }
        }
    }

    fn runs(&self, supervisor: &Supervisor) -> bool {
        if self.plan.guest == Guest::Qemu {
            return supervisor.guest_runs();
        }
        let Some(before) = vcpu_time(supervisor.pid()) else { return false };
        let until = Instant::now() + ONE_LOOK;
        while Instant::now() < until {
            match vcpu_time(supervisor.pid()) {
                None => return false,
                Some(now) if now.saturating_sub(before) >= RUNS => return true,
                Some(_) => std::thread::sleep(LOOK_EVERY),
            }
        }
        false
    }

    /// Where the guest runs. The destination is looked at first: once the guest runs there, it must
    /// not run at the source at any later time.
    fn look(&self) -> (bool, bool) {
        let destination = self.runs(&self.destination);
        let source = self.runs(&self.source);
        assert!(!(source && destination), "the guest runs at both places");
        (source, destination)
    }

    fn victims(&self, moving: &Running) -> Vec<u32> {
        match self.plan.victim {
            Client => vec![moving.pid()],
            SourceSupervisor => vec![self.source.pid()],
            SourceQemu => vec![self.qemus.0],
            SourceGuardian => self.source.guardians(),
            DestinationSupervisor => vec![self.destination.pid()],
            DestinationQemu => vec![self.qemus.1],
            DestinationGuardian => self.destination.guardians(),
        }
    }

    /// Strikes when it is time. A guardian that is not there yet is waited for, as long as the move
    /// goes on. Returns whether anybody was struck.
    fn strike(&self, moving: &mut Running, mut begun: Instant) -> bool {
        while self.plan.near
            && !moving.stderr.text().contains("round 0")
            && moving.try_end().is_none()
        {
            std::thread::sleep(Duration::from_micros(500));
            begun = Instant::now();
        }
        // Time passes in short looks: a kill must come at its moment.
        while begun.elapsed() < self.plan.after {
            std::thread::sleep(Duration::from_micros(500));
        }
        let mut victims = self.victims(moving);
        while victims.is_empty() && moving.try_end().is_none() {
            std::thread::sleep(Duration::from_millis(1));
            victims = self.victims(moving);
        }
        let living: Vec<_> = victims.into_iter().filter(|pid| alive(*pid)).collect();
        let signal = if self.plan.strike == Strike::Kill { Signal::KILL } else { Signal::STOP };
        living.iter().for_each(|pid| look::signal(*pid, signal));
        if let Strike::Stop(time) = self.plan.strike {
            let until = Instant::now() + time;
            while Instant::now() < until {
                self.look();
                std::thread::sleep(LOOK_EVERY);
            }
            living.iter().for_each(|pid| look::signal(*pid, Signal::CONT));
        }
        !living.is_empty()
    }

    /// Whether nothing is going on any more at either side.
    fn is_quiet(&self) -> bool {
        let quiet = |supervisor: &Supervisor| {
            if !supervisor.alive() {
                // One that keeps a guest stopped that was given away does so until it is settled.
                let keeps = supervisor.words.text().contains("the guest stays stopped here");
                return keeps || supervisor.guardians().is_empty();
            }
            supervisor.status().is_some_and(|status| {
                matches!(status.state, State::Hosting | State::Waiting | State::Unknown)
            })
        };
        quiet(&self.source) && quiet(&self.destination)
    }

    /// Follows it to its end, and never sees two guests.
    fn follow(&self, moving: &mut Running) -> Option<i32> {
        let deadline = Instant::now() + IN_THE_END + IN_THE_END;
        let mut ended = None;
        loop {
            self.look();
            ended = ended.or_else(|| moving.try_end());
            if let Some(ended) = &ended
                && self.is_quiet()
            {
                return ended.status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn owner(&mut self, status: Option<i32>) -> (Owner, bool) {
        // QEMU that was told to run does so at once, but a look may come in between.
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            match self.look() {
                (true, _) => return (Owner::Source, false),
                (_, true) => return (Owner::Destination, false),
                _ => std::thread::sleep(LOOK_EVERY),
            }
        }
        let Plan { victim, strike, guest, .. } = self.plan;
        let source_had_it =
            victim == SourceQemu || victim == SourceSupervisor && guest == Guest::Microvm;
        let other_had_it =
            victim == DestinationQemu || victim == DestinationSupervisor && guest == Guest::Microvm;
        if strike == Strike::Kill && source_had_it && !alive(self.qemus.0) {
            return (Owner::Killed, false);
        }
        // It was the destination's if the source has given it away, or cannot know.
        if strike == Strike::Kill && other_had_it && matches!(status, Some(0) | Some(3)) {
            return (Owner::Killed, false);
        }
        // Nobody can know but the operator, who looks at both hosts: here, and not there.
        let by_a_supervisor = matches!(victim, SourceSupervisor | DestinationSupervisor);
        assert!(by_a_supervisor && strike == Strike::Kill, "nobody has the guest");
        assert!(alive(self.qemus.0), "the source's QEMU is gone, and nobody has the guest");
        if !self.source.alive() {
            self.source = self.stage.attach_in_doubt("src");
            // Its supervisor asks, and whoever has thrown the copy away says so.
            if self.source.words.text().contains("stopped here in doubt")
                && self.destination.alive()
            {
                eventually("the guest runs on", SOON, || {
                    (self.look() == (true, false)).then_some(())
                });
                return (Owner::Source, false);
            }
        }
        let settled = self.stage.done(&["settle", "src", "--run"]);
        assert_eq!(settled.status, Some(0), "{}", settled.stderr);
        eventually("the settled guest runs", SOON, || (self.look() == (true, false)).then_some(()));
        (Owner::Source, true)
    }

    /// Its memory is whole, and nothing follows it any more.
    fn check(&mut self, owner: Owner) {
        let here = match owner {
            Owner::Killed => return,
            Owner::Source => &self.source,
            Owner::Destination => &self.destination,
        };
        let Some((source, destination)) = self.consoles.as_mut() else {
            let before = vcpu_time(here.pid()).expect("it lives");
            eventually("it checks its pages", SOON, || {
                (vcpu_time(here.pid())? >= before + CHECKED).then_some(())
            });
            assert!(!here.words.text().to_lowercase().contains("corrupt"), "{}", here.words.text());
            return;
        };
        let (console, qemu) = match owner {
            Owner::Source => (source, self.qemus.0),
            _ => (destination, self.qemus.1),
        };
        console.progress_since(self.written);
        console.verdict();
        eventually("the tracking ends", SOON, || (tracked_mappings(qemu) == 0).then_some(()));
        let status = std::fs::read_to_string(format!("/proc/{qemu}/status")).expect("it lives");
        assert!(status.contains("TracerPid:\t0"), "{status}");
        if !here.alive() {
            let _attached = self.stage.attach(&here.name, &[]);
        }
    }
}

fn run(plan: Plan) -> Outcome {
    let mut world = World::new(plan);
    let slow = if plan.slow { &["--bandwidth-max", "40MB"][..] } else { &[] };
    let begun = Instant::now();
    let mut moving = world.stage.migrate("src", world.destination.address(), slow);
    let struck = world.strike(&mut moving, begun);
    if plan.victim == Client {
        // Its last word may still be on its way to the supervisor, which keeps a client's
        // connection until it has answered, and says that it migrates before it begins.
        eventually("the supervisor has heard its client out", SOON, || {
            let heard = look::connections(&world.stage.path("src.sock")) == 0;
            (heard || world.source.status().is_none_or(|status| status.state != State::Hosting))
                .then_some(())
        });
    }
    let status = world.follow(&mut moving);
    let (owner, settled) = world.owner(status);
    world.check(owner);
    Outcome { owner, struck, settled, status }
}

/// The seeds that are asked for: `PAGEFERRY_SEEDS=FIRST-LAST`.
fn seeds() -> (u64, u64) {
    let Ok(text) = std::env::var("PAGEFERRY_SEEDS") else { return SHORT };
    let parse = |text: &str| text.trim().parse().expect("PAGEFERRY_SEEDS is FIRST-LAST");
    match text.split_once('-') {
        Some((first, last)) => (parse(first), parse(last)),
        None => (parse(&text), parse(&text)),
    }
}

#[test]
fn whoever_is_killed_or_stopped_at_any_moment_one_has_the_guest_and_it_is_whole() {
    const NAME: &str =
        "whoever_is_killed_or_stopped_at_any_moment_one_has_the_guest_and_it_is_whole";
    let kvm = open_kvm()
        .inspect_err(|e| not_run(NAME, &format!("microvm guests: {}", e.chain())))
        .is_ok();
    let (first, last) = seeds();
    let (next, results) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed > last {
                        return;
                    }
                    let mut plan = Plan::of(seed);
                    if plan.guest == Guest::Microvm && !kvm {
                        plan.guest = Guest::Qemu;
                    }
                    let begun = Instant::now();
                    let outcome =
                        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(plan))).ok();
                    println!("{plan:?} -> {outcome:?} in {:.1} s", begun.elapsed().as_secs_f64());
                    results.lock().expect("no panic holds it").push((plan, outcome));
                }
            });
        }
    });
    summary(&results.into_inner().expect("no panic holds it"));
}

fn summary(results: &[(Plan, Option<Outcome>)]) {
    let count = |which: &dyn Fn(&Outcome) -> bool| {
        results.iter().filter(|(_, outcome)| outcome.as_ref().is_some_and(which)).count()
    };
    println!(
        "{} seeds: {} struck; the guest is in the end at the source {}, at the destination {}, was killed {}; \
         settled by hand {}",
        results.len(),
        count(&|o| o.struck),
        count(&|o| o.owner == Owner::Source),
        count(&|o| o.owner == Owner::Destination),
        count(&|o| o.owner == Owner::Killed),
        count(&|o| o.settled)
    );
    let bad: Vec<_> =
        results.iter().filter(|(_, o)| o.is_none()).map(|(plan, _)| plan.seed).collect();
    assert!(bad.is_empty(), "bad outcomes; run one alone with scripts/kill-campaign SEED: {bad:?}");
}
