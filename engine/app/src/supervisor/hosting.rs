//! The loop of a supervisor whose guest is here: orders, signals, and the guest's end.

use super::api::{Answer, Order, Reply, State};
use super::asking::Asking;
use super::doubt::{Files, RecordKeeper};
use super::record::Doubt;
use super::{Inbox, Shared, say};
use crate::supervisor::claim::Claim;
use crate::supervisor::place::{Ended, RunningVm, Vmm};
use crate::supervisor::record::Record;
use crossbeam_channel::{Receiver, after, bounded, never, select};
use pageferry_engine::error::Result;
use pageferry_engine::inquiry;
use pageferry_engine::inquiry::{ASK_LATER_EVERY, Inquiry};
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::report::{MigrationReport, Outcome, hold};
use pageferry_engine::source::{MigrateOptions, migrate};
use std::sync::Arc;
use std::time::Duration;

/// How often a guest is looked after while nothing happens.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// In which a guest that has just come has its monitor and this host's processors to itself.
const ARRIVAL_GRACE: Duration = Duration::from_millis(500);
/// For a monitor in a process of its own to end by the Ctrl-C that we got too.
const CTRL_C_MAX: Duration = Duration::from_millis(300);
/// For the destination to answer before an operator lets a guest in doubt run here, who waits for
/// it.
const ASK_NOW_MAX: Duration = Duration::from_secs(3);
/// Between the guest's first moments elsewhere and the freeing of its memory here.
const END_GRACE: Duration = Duration::from_millis(300);

/// A guest that is here, and everything around it.
pub struct Hosting<H> {
    claim: Claim,
    shared: Shared,
    inbox: Inbox,
    hosted: H,
    ended: Receiver<()>,
    /// Whether the guest can go on without this process.
    outlives_us: bool,
    /// Whether the guest is stopped, may run here, and could not be let run yet.
    owes_resume: bool,
    /// The question to the destination whose Commit got no answer.
    asking: Option<Asking>,
    /// Whether the operator was told that to leave now may be the end of the only copy.
    warned: bool,
}

impl<H: RunningVm> Hosting<H> {
    /// Takes over a guest.
    pub fn new(claim: Claim, shared: Shared, inbox: Inbox, hosted: H) -> Result<Self> {
        Self::start(claim, shared, inbox, hosted, None)
    }

    /// Takes over a guest that an earlier supervisor has left in doubt, and asks on for it.
    pub fn in_doubt(
        claim: Claim,
        shared: Shared,
        inbox: Inbox,
        hosted: H,
        doubt: &Doubt,
    ) -> Result<Self> {
        let mut hosting = Self::start(claim, shared, inbox, hosted, Some(doubt))?;
        hosting.ask_on(Some(Inquiry::again(&doubt.question)));
        Ok(hosting)
    }

    fn start(
        mut claim: Claim,
        shared: Shared,
        inbox: Inbox,
        hosted: H,
        doubt: Option<&Doubt>,
    ) -> Result<Self> {
        let record = hosted.record();
        let outlives_us = record.is_some();
        match record {
            // A guest without a record is worse off after our death, but alive.
            Some(record) => {
                let kept = |record| Record { doubt: doubt.cloned(), ..record };
                if let Err(e) = record.and_then(|record| claim.remember(&kept(record))) {
                    say(&format!("{}: `pageferry attach` will need --pid and --qmp", e.chain()));
                }
            }
            None => claim.forget_guest(),
        }
        let ended = hosted.ended()?;
        // One that was found stopped in doubt is in doubt still.
        let state = if hosted.is_sealed() { State::Unknown } else { State::Hosting };
        shared.update(|s| {
            (s.state, s.listen) = (state, None);
            (s.vmm, s.pid) = (hosted.vmm(), Some(hosted.pid()));
        });
        Ok(Self {
            claim,
            shared,
            inbox,
            hosted,
            ended,
            outlives_us,
            owes_resume: false,
            asking: None,
            warned: false,
        })
    }

    /// Until the guest is gone or a signal comes. Returns the exit status.
    pub fn run(mut self) -> Result<u8> {
        loop {
            let answers =
                self.asking.as_ref().map_or_else(never, |asking| asking.answers().clone());
            select! {
                recv(answers) -> answer => {
                    self.asking = None;
                    if let Ok(answer) = answer
                        && let Some(status) = self.answered(answer)
                    {
                        return Ok(status);
                    }
                }
                recv(self.ended) -> _ => return Ok(self.guest_ended()),
                recv(self.inbox.signals) -> _ => {
                    if let Some(status) = self.leave() {
                        return Ok(status);
                    }
                }
                recv(self.inbox.orders) -> order => match order {
                    Ok(Order::Migrate { options, monitor, reply }) => {
                        if let Some(status) = self.migrate(options, monitor, reply) {
                            return Ok(status);
                        }
                    }
                    Ok(Order::Settle { run, reply }) => {
                        if let Some(status) = self.settle(run, reply) {
                            return Ok(status);
                        }
                    }
                    Err(_) => return Ok(self.go()),
                },
                recv(after(if self.hosted.is_new_here() { ARRIVAL_GRACE } else { LOOK_EVERY })) -> _ => self.look_after(),
            }
        }
    }

    /// What is done while nothing happens.
    fn look_after(&mut self) {
        self.hosted.look_after();
        if self.owes_resume && self.hosted.guest().resume().is_ok() {
            (self.owes_resume, self.warned) = (false, false);
            self.forget_question();
            self.shared.update(|s| s.state = State::Hosting);
            say(&format!("{} runs again", self.claim.name()));
        }
    }

    /// Runs one migration on a thread of its own, so that signals and orders are heard meanwhile.
    /// Returns an exit status if this supervisor is to end.
    fn migrate(&mut self, options: MigrateOptions, monitor: Monitor, reply: Answer) -> Option<u8> {
        say(&format!("moving {} to {}", self.claim.name(), options.to));
        self.have_question_kept(&monitor);
        let (inbox, guest) = (&self.inbox, self.hosted.guest());
        let mut leaving = false;
        let report = std::thread::scope(|scope| {
            let (sender, done) = bounded(1);
            let (watched, monitor) = (monitor.clone(), monitor.clone());
            let migrating = scope.spawn(move || {
                let _ = sender.send(migrate(guest, &options, &monitor));
            });
            let report = loop {
                select! {
                    recv(done) -> report => break report.ok(),
                    recv(inbox.orders) -> order => {
                        if let Ok(order) = order {
                            order.refuse("a migration of this guest is under way already");
                        }
                    }
                    // Every wait of a migration has its deadline, so it ends; after Commit, when it
                    // is settled.
                    recv(inbox.signals) -> _ => {
                        say("told to end: cancelling the migration first");
                        watched.cancel();
                        leaving = true;
                    }
                }
            };
            // Joined here, so that a panic in it is a report that is missing and not one of ours.
            migrating.join().ok().and(report)
        });
        let report = report.unwrap_or_else(|| self.after_panic());
        let name = self.claim.name();
        match report.outcome {
            Outcome::Completed => say(&format!(
                "{name} has moved: downtime {:.1} ms, total {:.2} s",
                report.downtime_us.total as f64 / 1e3,
                report.total_us as f64 / 1e6
            )),
            Outcome::Aborted if self.hosted.guest().liveness()().is_err() => {
                let what = match self.hosted.vmm() {
                    Vmm::Qemu => "its QEMU has ended",
                    Vmm::Kvm => "has ended",
                };
                say(&format!("{name} was not moved, and {what}: {}", reason(&report)));
            }
            Outcome::Aborted => {
                say(&format!("{name} was not moved and runs on here: {}", reason(&report)))
            }
            Outcome::Unknown => say(&format!("{name} is STOPPED here: {}", reason(&report))),
        }
        // Stopped, but not for a Commit without an answer: it may run as soon as it can.
        self.owes_resume = report.outcome == Outcome::Unknown && !self.hosted.is_sealed();
        let state = match report.outcome {
            Outcome::Completed => State::Moved,
            Outcome::Aborted => State::Hosting,
            Outcome::Unknown => State::Unknown,
        };
        self.shared.update(|s| (s.state, s.last) = (state, Some(report.clone())));
        let completed = report.outcome == Outcome::Completed;
        if report.outcome == Outcome::Aborted && !self.hosted.is_sealed() {
            self.forget_question();
        }
        if report.outcome == Outcome::Unknown {
            self.ask_on(monitor.take_inquiry().or_else(|| self.question_after_panic()));
        }
        reply.deliver(Reply::Report(report));
        if completed {
            // Freeing gigabytes keeps a core busy. If the destination is this very host, the guest
            // that has just begun to run there needs it more.
            std::thread::sleep(END_GRACE);
            hold::point("moved");
            self.end_guest();
            return Some(0);
        }
        if leaving { self.leave() } else { None }
    }

    /// The migration's thread died of a bug of ours: the guest is put right as after any failure,
    /// unless Commit may be out.
    fn after_panic(&mut self) -> MigrationReport {
        let mut report = MigrationReport::new(self.hosted.guest().memory().bytes());
        report.reason = Some("pageferry failed (a panic, see its output)".into());
        if self.hosted.is_sealed() || self.hosted.guest().resume().is_err() {
            report.outcome = Outcome::Unknown;
        }
        report
    }

    /// What Commit was, if the migration's thread has died after it.
    fn question_after_panic(&self) -> Option<Inquiry> {
        let found = self.hosted.is_sealed().then(|| Files::of(&self.claim).question());
        found.flatten().map(|question| Inquiry::again(&question))
    }

    /// Has the question of a migration kept for the next supervisor, if the guest can come to have
    /// one.
    fn have_question_kept(&mut self, monitor: &Monitor) {
        match self.hosted.record() {
            Some(Ok(record)) => {
                let (files, settings) = (Files::of(&self.claim), self.hosted.settings());
                monitor.keep_question_with(Arc::new(RecordKeeper::new(files, record, settings)));
            }
            Some(Err(e)) => tracing::debug!(error = %e.chain(), "nothing is kept about this guest"),
            None => {}
        }
    }

    /// The guest runs here: nobody may ask for it any more. A question that stays all the same is
    /// answered as before by the destination that has thrown its copy away, and keeps the next
    /// migration from beginning.
    fn forget_question(&self) {
        if let Err(e) = Files::of(&self.claim).forget() {
            say(&format!(
                "what was to be asked about {} is not forgotten: {}",
                self.claim.name(),
                e.chain()
            ));
        }
    }

    /// Goes on with the question that a migration has left open.
    fn ask_on(&mut self, inquiry: Option<Inquiry>) {
        let Some(inquiry) = inquiry else { return };
        let name = self.claim.name();
        say(&format!(
            "asking {} on about {name}, every {} s",
            inquiry.to(),
            ASK_LATER_EVERY.as_secs()
        ));
        match Asking::start(inquiry) {
            Ok(asking) => self.asking = Some(asking),
            Err(e) => {
                say(&format!("{}: the destination is not asked again about {name}", e.chain()))
            }
        }
    }

    /// The destination has settled what became of a guest in doubt. Returns an exit status if this
    /// supervisor is to end.
    fn answered(&mut self, answer: inquiry::Answer) -> Option<u8> {
        let name = self.claim.name().to_owned();
        match answer {
            inquiry::Answer::Running(_) => {
                say(&format!("settled: {name} has moved, the destination says that it runs there"));
                self.settled(State::Hosting, Outcome::Completed, None);
                self.end_guest();
                Some(0)
            }
            inquiry::Answer::Discarded(why) => {
                let why = why.chain();
                match self.hosted.guest().resume() {
                    Ok(()) => {
                        self.forget_question();
                        say(&format!("settled: {name} was not moved and runs on here: {why}"));
                        self.settled(State::Hosting, Outcome::Aborted, Some(why));
                    }
                    Err(e) => {
                        let e = e.chain();
                        say(&format!(
                            "settled: {name} was not moved ({why}), but cannot run here yet: {e}"
                        ));
                        self.owes_resume = true;
                    }
                }
                None
            }
        }
    }

    /// A doubt is over: what `status` shows from now on.
    fn settled(&mut self, state: State, outcome: Outcome, reason: Option<String>) {
        self.warned = false;
        self.shared.update(|s| {
            s.state = state;
            if let Some(last) = &mut s.last {
                (last.outcome, last.reason) = (outcome, reason);
            }
        });
    }

    /// Takes away what is left of a guest that runs elsewhere.
    fn end_guest(&mut self) {
        match self.hosted.end_here() {
            Ok(()) => {
                self.claim.forget_guest();
                self.hosted.reap();
            }
            Err(e) => {
                say(&format!("what is left of the guest here could not be ended: {}", e.chain()))
            }
        }
    }

    /// What the operator decided about a guest in doubt.
    fn settle(&mut self, run: bool, reply: Answer) -> Option<u8> {
        let in_doubt = self.shared.status().state == State::Unknown || self.hosted.in_doubt();
        if !in_doubt {
            reply.deliver(Reply::Refused {
                text: "nothing is to be settled: no migration of this guest ended in doubt".into(),
            });
            return None;
        }
        // The destination's own word may be here already, or be had, and counts for more than what
        // the operator could know.
        let answer = self.asking.as_ref().and_then(|asking| match asking.answers().try_recv() {
            Ok(answer) => Some(answer),
            Err(_) if run => asking.ask_before_running(ASK_NOW_MAX),
            Err(_) => None,
        });
        if let Some(answer) = answer {
            self.asking = None;
            let runs_there = matches!(answer, inquiry::Answer::Running(_));
            let status = self.answered(answer);
            let text = if runs_there {
                "the destination has said meanwhile that the guest runs there, so it ends here"
            } else {
                "the destination has said meanwhile that it does not have the guest, so it stays here"
            };
            let text = text.into();
            reply.deliver(if run == runs_there {
                Reply::Refused { text }
            } else {
                Reply::Done { text }
            });
            return status;
        }
        let settled = if run { self.forget_and_run() } else { self.hosted.end_here() };
        match settled {
            Ok(()) => {
                let text = if run { "the guest runs here" } else { "the guest has ended here" };
                say(text);
                self.shared.update(|s| s.state = State::Hosting);
                (self.owes_resume, self.asking, self.warned) = (false, None, false);
                reply.deliver(Reply::Done { text: text.into() });
                (!run).then(|| {
                    self.claim.forget_guest();
                    self.hosted.reap();
                    0
                })
            }
            Err(e) => {
                reply.deliver(Reply::Refused { text: e.chain() });
                None
            }
        }
    }

    /// First nobody asks for the guest any more, then it runs.
    fn forget_and_run(&mut self) -> Result<()> {
        let files = Files::of(&self.claim);
        let record = files.record()?;
        files.forget()?;
        let runs = self.hosted.run_here();
        // It does not run, and is in doubt as before.
        if runs.is_err()
            && self.hosted.is_sealed()
            && let Some(Err(e)) = record.map(|record| self.claim.remember(&record))
        {
            say(&format!("{}: nobody asks on for the guest after this supervisor", e.chain()));
        }
        runs
    }

    /// The guest ended by itself.
    fn guest_ended(&mut self) -> u8 {
        self.claim.forget_guest();
        let Ended { status, how } = self.hosted.reap();
        let how = how.map(|how| format!(": {how}")).unwrap_or_default();
        say(&format!("the guest {} has ended{how}", self.claim.name()));
        status
    }

    /// A signal: ends, unless that would throw away what may be the only copy of a guest. Returns
    /// the exit status.
    fn leave(&mut self) -> Option<u8> {
        let in_doubt = self.shared.status().state == State::Unknown;
        if in_doubt && !self.outlives_us && !self.warned {
            self.warned = true;
            let name = self.claim.name();
            say(&format!(
                "{name} is stopped here after a migration in doubt, and would end with this process, which may be its only copy. \
                 Look whether it runs at the destination, then `pageferry settle {name} --run` or `--end`; a second signal ends it here"
            ));
            return None;
        }
        Some(self.go())
    }

    /// Ends, and leaves the guest as it is if it can go on by itself.
    fn go(&mut self) -> u8 {
        let name = self.claim.name().to_owned();
        if !self.outlives_us {
            say(&format!("leaving; the guest {name} lives in this process and ends with it"));
            return 0;
        }
        // A Ctrl-C in a terminal reaches QEMU as well, and then the guest is not left but gone.
        if self.ended.recv_timeout(CTRL_C_MAX).is_ok() {
            return self.guest_ended();
        }
        self.hosted.let_go();
        let how =
            if self.shared.status().state == State::Unknown { "stays stopped" } else { "goes on" };
        say(&format!(
            "leaving; the guest {how} without a supervisor. Take it up again with `pageferry attach {name}`"
        ));
        0
    }
}

fn reason(report: &MigrationReport) -> &str {
    report.reason.as_deref().unwrap_or("no reason given")
}
