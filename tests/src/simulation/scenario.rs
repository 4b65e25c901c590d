//! What a seed draws, the processes of one migration, and what must have come of it.

use super::chance::Chance;
use super::guest::{Orphan, Place, SimulatedDestination, SimulatedSource, Troubles, Truth};
use super::kept::{Hand, Kept};
use super::network::{Cut, Dialling, Wire};
use super::world::{Process, World};
use pageferry_engine::clock;
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::error::Error;
use pageferry_engine::guest::SourceGuest;
use pageferry_engine::inquiry::{ASK_LATER_EVERY, Answer, Inquiry, Keeper};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::net::choice::LinkChoice;
use pageferry_engine::net::{Listener, Network};
use pageferry_engine::policy::WhenStuck;
use pageferry_engine::protocol::{Cause, Control};
use pageferry_engine::report::Outcome;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::source::{MigrateOptions, migrate_over};
use pageferry_transport::loopback::{Delay, Faults, LaneFault, LateFence};
use pageferry_transport::preamble::{Preamble, Role, Token};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Until then everything that goes wrong has gone wrong, and what can be settled is settled: the
/// longest are outages and stops of 250 s each, then 10 s until it is asked again, and what that
/// takes.
const HORIZON: Duration = Duration::from_secs(1000);

/// Where something may go wrong. The end of a migration is named more often than its beginning.
const STEPS: &[&str] = &[
    "connect",
    "to send Hello",
    "sent Hello",
    "to send Welcome",
    "sent Welcome",
    "to send Offer",
    "sent Offer",
    "to send Accept",
    "sent Accept",
    "arm",
    "pause",
    "paused",
    "save",
    "to send Prepare",
    "sent Prepare",
    "load",
    "to send Ready",
    "sent Ready",
    "seal",
    "sealed",
    "to reveal",
    "revealed",
    "to send Commit",
    "sent Commit",
    "seal there",
    "sealed there",
    "run there",
    "runs there",
    "to send Running",
    "sent Running",
    "end",
    "to send Ready",
    "sent Ready",
    "sealed",
    "revealed",
    "to send Commit",
    "sent Commit",
    "sealed there",
    "run there",
    "runs there",
    "to send Running",
    "sent Running",
    "to send Abort",
    "sent Abort",
    "discard",
    "resume",
    "to forget",
    "forgot",
    "attached",
    "heard at the source",
    "heard at the destination",
];

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Cut(Cut),
    Away(Duration),
    /// The supervisor. With a time, another one takes the guest up after it.
    KillSource {
        back: Option<Duration>,
    },
    KillDestination {
        back: Back,
    },
    KillSourceMonitor,
    KillDestinationMonitor,
    StopSource(Duration),
    StopDestination(Duration),
    Cancel,
    TellDestinationToEnd,
}

/// What becomes of a destination's address after its process was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    Never,
    /// A new receiver, which knows nothing of the sessions before.
    After(Duration),
    /// Another program, or another version, which refuses whatever it is told.
    AnotherAfter(Duration),
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Step(&'static str),
    After(Duration),
}

/// What a seed draws.
#[derive(Debug)]
struct Plan {
    seed: u64,
    source: Troubles,
    destination: Troubles,
    wrong: Vec<(When, What)>,
    strangers: u64,
    second_attempt: bool,
    delay_max: Duration,
    lanes: u8,
    faults: Faults,
    verify: bool,
    when_stuck: WhenStuck,
}

impl Plan {
    fn draw(seed: u64) -> Self {
        let mut chance = Chance::new(seed, 2);
        let outlives = chance.one_in(2);
        let mut source = Troubles { outlives, ..Troubles::default() };
        let mut destination = source;
        if chance.one_in(8) {
            source.source_fails = Some(chance.of(&["arm", "pause", "save", "seal"]));
        }
        if chance.one_in(8) {
            source.resumes_fail = 1 + chance.below(3) as u32;
        }
        if chance.one_in(8) {
            destination.destination_fails = Some(chance.of(&[
                "load",
                "seal there",
                "run there",
                "doubt, runs",
                "doubt, stopped",
                "discard",
            ]));
        }
        let mut wrong: Vec<_> = (0..chance.below(4))
            .map(|_| (Self::when(&mut chance), Self::what(&mut chance)))
            .collect();
        if outlives && chance.one_in(8) {
            // Killed in doubt, as a random moment rarely is; the next one comes before the copy is
            // discarded, or after.
            let step =
                chance.of(&["revealed", "to send Commit", "sent Commit", "heard at the source"]);
            let back = chance.of(&[1, 10, 40, 100]);
            wrong.push((
                When::Step(step),
                What::KillSource { back: Some(Duration::from_secs(back)) },
            ));
        }
        let delay_max = chance.of(&[1, 1, 5, 50, 2000]);
        Self {
            seed,
            source,
            destination,
            wrong,
            strangers: if chance.one_in(3) { 1 + chance.below(8) } else { 0 },
            second_attempt: chance.one_in(3),
            delay_max: Duration::from_millis(delay_max),
            lanes: 1 + chance.below(3) as u8,
            faults: Self::faults(&mut chance),
            verify: chance.one_in(3),
            when_stuck: chance.of(&[WhenStuck::Abort, WhenStuck::Switchover]),
        }
    }

    fn when(chance: &mut Chance) -> When {
        if chance.one_in(4) {
            When::After(chance.time(Duration::from_millis(1), Duration::from_secs(60)))
        } else {
            When::Step(chance.of(STEPS))
        }
    }

    fn what(chance: &mut Chance) -> What {
        let long = chance.time(Duration::from_millis(100), Duration::from_secs(250));
        match chance.below(16) {
            0..3 => What::Cut(Cut::Reset),
            3..5 => What::Cut(Cut::Closed),
            5..8 => What::Away(long),
            8 => What::KillSource {
                back: if chance.one_in(3) {
                    None
                } else {
                    Some(chance.time(Duration::from_millis(1), long))
                },
            },
            9 => What::KillDestination { back: Back::Never },
            10 => What::KillDestination {
                back: if chance.one_in(2) { Back::After(long) } else { Back::AnotherAfter(long) },
            },
            11 => chance.of(&[What::KillSourceMonitor, What::KillDestinationMonitor]),
            12 => What::StopSource(long),
            13 => What::StopDestination(long),
            14 => What::Cancel,
            _ => What::TellDestinationToEnd,
        }
    }

    fn faults(chance: &mut Chance) -> Faults {
        let lane = LaneFault { lane: chance.below(3) as usize, after_bytes: chance.below(1 << 20) };
        Faults {
            seed: chance.below(u64::MAX),
            death: chance.one_in(10).then_some(lane),
            stall: chance.one_in(15).then_some(lane),
            delay: chance.one_in(2).then_some(Delay { one_in: 3, turns_max: 8 }),
            speeds: vec![1 + chance.below(4), 1, 1 + chance.below(4)],
            late_fence: chance
                .one_in(3)
                .then_some(LateFence { lane: lane.lane, turns: chance.below(20) }),
            relaxed: chance.one_in(2),
        }
    }

    fn options(&self) -> MigrateOptions {
        let mut options = MigrateOptions::to(Wire::address().to_string());
        (options.lanes, options.verify, options.when_stuck) =
            (self.lanes, self.verify, self.when_stuck);
        options.rounds_max = 8;
        options
    }
}

/// What the processes of one run share with their fate.
struct Stage {
    world: Arc<World>,
    wire: Arc<Wire>,
    truth: Arc<Truth>,
    plan: Plan,
    memory: Arc<GuestMemory>,
    kept: Arc<Mutex<Kept>>,
    known: Mutex<Known>,
    told_to_end: AtomicBool,
    monitor: Monitor,
}

struct Known {
    /// The source's process that has the guest now.
    source: Process,
    /// Supervisors that are still to come.
    to_come: u32,
    at_source: Orphan,
    /// The destination's process that listens now.
    destination: Process,
    /// Each place that a destination has made, and whose it is.
    copies: Vec<(Process, Orphan)>,
    /// What was killed, or has ended by itself. A source is not any more if another has come, who
    /// asks.
    source_killed: bool,
    source_monitor_killed: bool,
    destination_killed: bool,
    destination_monitor_killed: bool,
    /// How `migrate` ended, and what has become of a doubt.
    outcome: Option<Outcome>,
    doubted: bool,
    /// Whether a supervisor that came after a dead one has heard an answer.
    taken_up: bool,
    done: bool,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// How it ended.
    pub end: End,
    /// A digest of all that happened, in its order.
    pub trace: u64,
    /// What must not have happened. Empty if all is well.
    pub wrong: Vec<String>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// The guest runs at the destination, and the source has known so at once.
    Moved,
    /// The same, but `migrate` had said "unknown" before.
    MovedAfterDoubt,
    /// The guest runs at the source.
    Stayed,
    /// The same, but `migrate` had said "unknown" before.
    StayedAfterDoubt,
    /// The source's supervisor was killed in doubt, and the next one has heard that the guest runs
    /// at the destination.
    MovedAfterDeath,
    /// The same, and has heard that it does not.
    StayedAfterDeath,
    /// It went with its own process.
    Lost,
    /// It is stopped at the source, and nobody is left who could say more: for the operator.
    Doubt,
}

/// Runs the migration of this seed. With `tells`, prints what happens.
#[must_use]
pub fn run(seed: u64, tells: bool) -> Verdict {
    let plan = Plan::draw(seed);
    if tells {
        println!("{plan:#?}");
    }
    let ((end, mut wrong), failures, trace) =
        World::run(seed, tells, |world| Stage::play(world, plan));
    wrong.extend(failures);
    Verdict { end, trace, wrong }
}

impl Stage {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn play(world: &Arc<World>, plan: Plan) -> (End, Vec<String>) {
        let chance = |matter| Chance::new(plan.seed, matter);
        let wire = Wire::new(world, chance(3), plan.delay_max, plan.faults.clone());
        let truth = Truth::new(world);
        let (source, destination) = (world.process(), world.process());
        let guest = SimulatedSource::start(world, &truth, chance(4), source, plan.source);
        let memory = Arc::clone(guest.memory());
        let known = Known {
            source,
            to_come: 0,
            at_source: guest.orphan(),
            destination,
            copies: Vec::new(),
            source_killed: false,
            source_monitor_killed: false,
            destination_killed: false,
            destination_monitor_killed: false,
            outcome: None,
            doubted: false,
            taken_up: false,
            done: false,
        };
        let stage = Arc::new(Self {
            world: Arc::clone(world),
            wire,
            truth,
            plan,
            memory,
            kept: Arc::default(),
            known: Mutex::new(known),
            told_to_end: AtomicBool::new(false),
            monitor: Monitor::default(),
        });
        stage.start_destination(destination);
        stage.start_source(guest);
        stage.start_strangers();
        for (when, what) in stage.plan.wrong.clone() {
            let struck = Arc::clone(&stage);
            match when {
                When::Step(step) => world.on(step, move || struck.strike(what)),
                When::After(time) => world.start(Process(0), move || {
                    clock::sleep(time);
                    struck.strike(what);
                }),
            }
        }
        let until = clock::now() + HORIZON;
        while clock::now() < until && !stage.is_over() {
            clock::sleep(Duration::from_secs(10));
        }
        // What is under way at the destination ends within its deadlines.
        clock::sleep(Duration::from_secs(60));
        let verdict = stage.verdict();
        stage.known().copies.clear();
        stage.wire.end();
        verdict
    }

    /// Whether the source has nothing more to do.
    fn is_over(&self) -> bool {
        let known = self.known();
        known.done || (known.source_killed && known.to_come == 0)
    }

    fn strike(self: &Arc<Self>, what: What) {
        self.world.tell(&format!("{what:?}"));
        match what {
            What::Cut(how) => self.wire.cut(how),
            What::Away(time) => self.wire.away(time),
            What::KillSource { back } => self.kill_source(back),
            What::KillDestination { back } => {
                let destination = self.known().destination;
                self.destination_ends(destination);
                if let Back::After(time) | Back::AnotherAfter(time) = back {
                    let stage = Arc::clone(self);
                    self.world.start(Process(0), move || {
                        clock::sleep(time);
                        let anew = stage.world.process();
                        stage.known().destination = anew;
                        if matches!(back, Back::After(_)) {
                            stage.start_destination(anew);
                        } else {
                            let stage = Arc::clone(&stage);
                            let world = Arc::clone(&stage.world);
                            world.start(anew, move || stage.refuse_all(anew));
                        }
                    });
                }
            }
            What::KillSourceMonitor => {
                let mut known = self.known();
                // One that lives in its supervisor has no monitor that could be killed alone.
                if self.plan.source.outlives {
                    known.source_monitor_killed = true;
                    known.at_source.die();
                }
            }
            What::KillDestinationMonitor => {
                let mut known = self.known();
                if self.plan.destination.outlives {
                    known.destination_monitor_killed = true;
                    if let Some((_, copy)) = known.copies.last() {
                        copy.die();
                    }
                }
            }
            What::StopSource(time) => {
                let source = self.known().source;
                self.world.stop(source, time);
            }
            What::StopDestination(time) => {
                let destination = self.known().destination;
                self.world.stop(destination, time);
            }
            What::Cancel => self.monitor.cancel(),
            What::TellDestinationToEnd => self.told_to_end.store(true, Ordering::Relaxed),
        }
    }

    fn kill_source(self: &Arc<Self>, back: Option<Duration>) {
        let (orphan, source) = {
            let mut known = self.known();
            known.source_killed = true;
            known.to_come += u32::from(back.is_some());
            (known.at_source.clone(), known.source)
        };
        self.world.kill(source);
        orphan.bereave();
        self.wire.process_died(source);
        if let Some(time) = back {
            let stage = Arc::clone(self);
            self.world.start(Process(0), move || {
                clock::sleep(time);
                let anew = stage.world.process();
                stage.known().source = anew;
                let taking_up = Arc::clone(&stage);
                stage.world.start(anew, move || taking_up.take_up(anew));
            });
        }
    }

    /// As `attach` does: a guest that was left in doubt is asked about, if there is something to
    /// ask.
    fn take_up(self: Arc<Self>, process: Process) {
        let hand = Hand::of(&self.world, process, &self.kept);
        let guest = {
            let mut known = self.known();
            known.to_come -= 1;
            SimulatedSource::take_up(&known.at_source, &self.memory, process)
        };
        let (Some(mut guest), Some(question)) = (guest, hand.found()) else { return };
        self.known().source_killed = false;
        self.world.step("attached");
        self.in_doubt(process, &mut guest, Some(Inquiry::again(&question)));
        if !self.world.is_dead(process) {
            let mut known = self.known();
            (known.taken_up, known.done) = (true, true);
        }
    }

    /// A destination's process ends, by force or by itself.
    fn destination_ends(&self, process: Process) {
        let mut known = self.known();
        known.destination_killed = true;
        let copies: Vec<_> =
            known.copies.iter().filter(|(of, _)| *of == process).cloned().collect();
        drop(known);
        self.world.kill(process);
        copies.iter().for_each(|(_, copy)| copy.bereave());
        self.wire.process_died(process);
    }

    fn start_destination(self: &Arc<Self>, process: Process) {
        let stage = Arc::clone(self);
        self.world.start(process, move || stage.receive(process));
    }

    /// As the loop of `receive` does.
    fn receive(self: Arc<Self>, process: Process) {
        let listener = SessionListener::behind(self.wire.listen(process)).expect("it listens");
        let mut receiver = Receiver::new(listener, LinkChoice::default());
        loop {
            let (index, mut guest) = {
                let mut known = self.known();
                let index = known.copies.len();
                let chance = Chance::new(self.plan.seed, 100 + index as u64);
                // What fails, fails once.
                let troubles = if index == 0 {
                    self.plan.destination
                } else {
                    Troubles { outlives: self.plan.destination.outlives, ..Troubles::default() }
                };
                let guest = SimulatedDestination::new(
                    &self.world,
                    &self.truth,
                    chance,
                    process,
                    index,
                    troubles,
                );
                known.copies.push((process, guest.orphan()));
                (index, guest)
            };
            self.world.tell(&format!("copy {index} waits"));
            let served = loop {
                let Some(incoming) = receiver.listener().wait() else { return };
                if guest.orphan().is_gone() {
                    // A receiver without its monitor ends.
                    return self.destination_ends(process);
                }
                let told_to_end = || self.told_to_end.load(Ordering::Relaxed);
                let mut watch = || if told_to_end() { Err(Error::Cancelled) } else { Ok(()) };
                let served = receiver.serve(incoming, &mut guest, &mut watch);
                if !matches!(served, Served::Nothing) {
                    break served;
                }
            };
            match served {
                Served::Received(_) | Served::Doubtful(_) => return receiver.answer_afterwards(),
                Served::Discarded(_) | Served::Nothing => guest.orphan().die(),
            }
            if self.told_to_end.load(Ordering::Relaxed) {
                return self.destination_ends(process);
            }
        }
    }

    /// Answers everybody with a refusal.
    fn refuse_all(self: Arc<Self>, process: Process) {
        let listening = self.wire.listen(process);
        while let Ok((connection, _)) = listening.accept() {
            self.world.start(process, move || {
                let mut control = Control::new(connection);
                let deadline = clock::now() + Duration::from_secs(5);
                control.abort("another version", Cause::Refused, deadline);
                // Open until whoever it is has read it.
                clock::sleep(Duration::from_secs(60));
            });
        }
    }

    fn start_source(self: &Arc<Self>, guest: SimulatedSource) {
        let stage = Arc::clone(self);
        let source = self.known().source;
        self.world.start(source, move || stage.send(guest, source));
    }

    /// As the supervisor of a source does.
    fn send(self: Arc<Self>, mut guest: SimulatedSource, process: Process) {
        let network = Dialling { wire: Arc::clone(&self.wire), process };
        self.monitor.keep_question_with(Arc::new(Hand::of(&self.world, process, &self.kept)));
        let mut attempts = if self.plan.second_attempt { 2 } else { 1 };
        loop {
            let report = migrate_over(&network, &mut guest, &self.plan.options(), &self.monitor);
            self.world.tell(&format!("{:?}: {:?}", report.outcome, report.reason));
            self.known().outcome = Some(report.outcome);
            attempts -= 1;
            match report.outcome {
                Outcome::Completed => self.end(&mut guest),
                Outcome::Aborted if attempts > 0 => {
                    clock::sleep(Duration::from_secs(2));
                    continue;
                }
                Outcome::Aborted => drop(Hand::of(&self.world, process, &self.kept).forget()),
                Outcome::Unknown => self.in_doubt(process, &mut guest, self.monitor.take_inquiry()),
            }
            self.known().done = true;
            return;
        }
    }

    fn in_doubt(&self, process: Process, guest: &mut SimulatedSource, inquiry: Option<Inquiry>) {
        self.known().doubted = true;
        if let Some(inquiry) = inquiry {
            let network = Dialling { wire: Arc::clone(&self.wire), process };
            let (_keep, stop) = crossbeam_channel::bounded(0);
            match inquiry.ask_on(&network, &stop) {
                Some(Answer::Running(_)) => {
                    self.known().outcome = Some(Outcome::Completed);
                    return self.end(guest);
                }
                Some(Answer::Discarded(_)) | None => {}
            }
        }
        while guest.resume().is_err() && guest.liveness()().is_ok() {
            clock::sleep(ASK_LATER_EVERY);
        }
        let _ = Hand::of(&self.world, process, &self.kept).forget();
        self.known().outcome = Some(Outcome::Aborted);
    }

    fn end(&self, guest: &mut SimulatedSource) {
        if let Err(e) = guest.end()
            && guest.liveness()().is_ok()
        {
            self.world.fail(format!("the guest at the source does not end: {}", e.chain()));
        }
    }

    /// Connections that have no business here.
    fn start_strangers(self: &Arc<Self>) {
        if self.plan.strangers == 0 {
            return;
        }
        let stage = Arc::clone(self);
        let mut chance = Chance::new(self.plan.seed, 5);
        self.world.start(Process(0), move || {
            let network = Dialling { wire: Arc::clone(&stage.wire), process: Process(0) };
            let mut kept = Vec::new();
            for _ in 0..stage.plan.strangers {
                clock::sleep(chance.time(Duration::from_millis(1), Duration::from_secs(10)));
                let Ok(mut connection) = network.connect(&Wire::address(), Duration::from_secs(1))
                else {
                    continue;
                };
                let token = if chance.one_in(2) { Token::default() } else { Token([9; 16]) };
                let role = if chance.one_in(3) {
                    Role::Lane(chance.below(3) as u8)
                } else {
                    Role::Control
                };
                let mut bytes = match chance.below(4) {
                    0 => Vec::new(),
                    1 => vec![0x47; 100],
                    _ => Preamble { role, token }.encode().to_vec(),
                };
                if chance.one_in(2) {
                    let commit = pageferry_engine::protocol::control::encode(
                        &pageferry_engine::protocol::Message::Commit,
                    );
                    bytes.extend(commit.expect("it is small"));
                }
                let _ = connection.write(&bytes, clock::now() + Duration::from_secs(1));
                if chance.one_in(2) {
                    kept.push(connection);
                }
            }
            clock::sleep(Duration::from_secs(60));
        });
    }

    fn verdict(&self) -> (End, Vec<String>) {
        let known = self.known();
        let mut wrong = Vec::new();
        let runs_at = self.truth.runs_at();
        let live: Option<&Orphan> = match runs_at {
            Some(Place::Source) => Some(&known.at_source),
            Some(Place::Copy(index)) => known.copies.get(index).map(|(_, copy)| copy),
            None => None,
        };
        if let Some(machine) = live {
            machine.check();
        }
        let doubtful = self
            .plan
            .destination
            .destination_fails
            .is_some_and(|step| step.starts_with("doubt") || step == "discard");
        let source_gone = known.source_killed || known.source_monitor_killed;
        let no_answer = known.destination_killed || doubtful;
        let end = match runs_at {
            Some(Place::Copy(_)) if known.taken_up => End::MovedAfterDeath,
            Some(Place::Source) if known.taken_up => End::StayedAfterDeath,
            Some(Place::Copy(_)) if known.doubted => End::MovedAfterDoubt,
            Some(Place::Copy(_)) => End::Moved,
            Some(Place::Source) if known.doubted => End::StayedAfterDoubt,
            Some(Place::Source) => End::Stayed,
            None if self.truth.moved() || known.at_source.is_gone() => End::Lost,
            None => End::Doubt,
        };
        let right = match end {
            // It has run there: what took it away was its own process' end.
            End::Lost if self.truth.moved() => {
                known.destination_killed || known.destination_monitor_killed
            }
            End::Lost => source_gone,
            // Only one that asks no more, or whom nobody can answer any more.
            End::Doubt => no_answer || known.source_killed,
            _ => true,
        };
        if !right {
            wrong.push(format!("no reason for {end:?}"));
        }
        if !known.done && !known.source_killed && !no_answer {
            wrong.push(
                "the source has not come to an end, although it could have been answered".into(),
            );
        }
        let believes = match (known.outcome.filter(|_| known.done && !source_gone), runs_at) {
            (Some(Outcome::Completed), Some(Place::Source)) => Some("the guest has moved"),
            (Some(Outcome::Aborted), Some(Place::Copy(_)) | None) => Some("the guest runs here"),
            _ => None,
        };
        if let Some(believes) = believes {
            wrong.push(format!("the source believes that {believes}, but it runs at {runs_at:?}"));
        }
        (end, wrong)
    }
}

/// So long that it is worth a word: a run that takes more real time than this.
pub const SLOW: Duration = Duration::from_secs(2);

/// Runs seeds from `first` on, on so many threads, and calls `each` for every one.
///
/// # Panics
/// As the runs do.
pub fn run_all(
    first: u64,
    count: u64,
    threads: usize,
    each: &(dyn Fn(u64, Verdict, Duration) + Sync),
) {
    let next = std::sync::atomic::AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let begun = Instant::now();
                    let verdict = run(seed, false);
                    each(seed, verdict, begun.elapsed());
                }
            });
        }
    });
}
