//! The loop of a supervisor whose guest is here: orders, signals, and the guest's end.

use super::api::{Answer, Order, Reply, State};
use super::runtime::{Claim, Record};
use super::{Inbox, Shared, say, watch_end};
use crate::error::Result;
use crate::guest::SourceGuest;
use crate::guest::qemu::source::QemuSource;
use crate::progress::Monitor;
use crate::report::{MigrationReport, Outcome};
use crate::source::{MigrateOptions, migrate};
use crossbeam_channel::{Receiver, after, bounded, select};
use serde_json::json;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::{Duration, Instant};

/// How often QEMU's events are read away while nothing happens, so that they do not pile up in it.
const EVENTS_EVERY: Duration = Duration::from_secs(10);
/// In which a guest that has just come has its QEMU and this host's processors to itself.
const ARRIVAL_GRACE: Duration = Duration::from_millis(500);
/// For QEMU to let a guest run that the operator has decided about.
const CONT_MAX: Duration = Duration::from_secs(10);
/// For QEMU to end by the Ctrl-C that we got too.
const CTRL_C_MAX: Duration = Duration::from_millis(300);
/// Between the guest's first moments elsewhere and the freeing of its memory here.
const END_GRACE: Duration = Duration::from_millis(300);

/// A guest that is here, and everything around it.
pub struct Hosting {
    claim: Claim,
    shared: Shared,
    inbox: Inbox,
    guest: QemuSource,
    /// The process, where this supervisor started it.
    child: Option<Child>,
    ended: Receiver<()>,
    /// Whether the guest is stopped, may run here, and could not be let run yet.
    owes_resume: bool,
}

impl Hosting {
    /// Takes over a QEMU.
    pub fn new(
        claim: Claim,
        shared: Shared,
        inbox: Inbox,
        mut guest: QemuSource,
        child: Option<Child>,
    ) -> Result<Self> {
        let qemu = guest.qemu();
        // A guest without a record is worse off after our death, but alive.
        if let Err(e) = Record::of(qemu.pid(), qemu.qmp_path()).and_then(|record| claim.remember(&record)) {
            say(&format!("{}: `pageferry attach` will need --pid and --qmp", e.chain()));
        }
        let ended = watch_end(qemu.pidfd())?;
        shared.update(|s| (s.state, s.pid, s.listen) = (State::Hosting, Some(qemu.pid()), None));
        Ok(Self { claim, shared, inbox, guest, child, ended, owes_resume: false })
    }

    /// Until the guest is gone or a signal comes. Returns the exit status.
    pub fn run(mut self) -> Result<u8> {
        loop {
            select! {
                recv(self.ended) -> _ => return Ok(self.guest_ended()),
                recv(self.inbox.signals) -> _ => return Ok(self.leave()),
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
                    Err(_) => return Ok(self.leave()),
                },
                recv(after(if self.guest.is_new_here() { ARRIVAL_GRACE } else { EVENTS_EVERY })) -> _ => self.look_after(),
            }
        }
    }

    /// What is done while nothing happens.
    fn look_after(&mut self) {
        self.guest.settle_in();
        if let Err(e) = self.guest.qemu().qmp.drain_events() {
            // Its end, if it is that, comes through `ended`.
            tracing::debug!(error = %e.chain(), "QEMU's events");
        }
        if self.owes_resume && self.guest.resume().is_ok() {
            self.owes_resume = false;
            self.shared.update(|s| s.state = State::Hosting);
            say(&format!("{} runs again", self.claim.name()));
        }
    }

    /// Runs one migration on a thread of its own, so that signals and orders are heard meanwhile. Returns
    /// an exit status if this supervisor is to end.
    fn migrate(&mut self, options: MigrateOptions, monitor: Monitor, reply: Answer) -> Option<u8> {
        say(&format!("moving {} to {}", self.claim.name(), options.to));
        let (inbox, guest) = (&self.inbox, &mut self.guest);
        let mut leaving = false;
        let report = std::thread::scope(|scope| {
            let (sender, done) = bounded(1);
            let watched = monitor.clone();
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
                    // Every wait of a migration has its deadline, so it ends; after Commit, when it is settled.
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
                report.blackout_us.total as f64 / 1e3,
                report.total_us as f64 / 1e6
            )),
            Outcome::Aborted if self.guest.liveness()().is_err() => {
                say(&format!("{name} was not moved, and its QEMU has ended: {}", reason(&report)));
            }
            Outcome::Aborted => say(&format!("{name} was not moved and runs on here: {}", reason(&report))),
            Outcome::Unknown => say(&format!("{name} is STOPPED here: {}", reason(&report))),
        }
        // Stopped, but not for a Commit without an answer: it may run as soon as it can.
        self.owes_resume = report.outcome == Outcome::Unknown && !self.guest.is_sealed();
        let state = if report.outcome == Outcome::Unknown { State::Unknown } else { State::Hosting };
        self.shared.update(|s| (s.state, s.last) = (state, Some(report.clone())));
        let completed = report.outcome == Outcome::Completed;
        reply.deliver(Reply::Report(report));
        if completed {
            // Freeing gigabytes keeps a core busy. If the destination is this very host, the guest that has
            // just begun to run there needs it more.
            std::thread::sleep(END_GRACE);
            self.end_guest();
            return Some(0);
        }
        leaving.then(|| self.leave())
    }

    /// The migration's thread died of a bug of ours: the guest is put right as after any failure, unless
    /// Commit may be out.
    fn after_panic(&mut self) -> MigrationReport {
        let mut report = MigrationReport::new(self.guest.memory().bytes());
        report.reason = Some("pageferry failed (a panic, see its output)".into());
        if self.guest.is_sealed() || self.guest.resume().is_err() {
            report.outcome = Outcome::Unknown;
        }
        report
    }

    /// Takes away what is left of a guest that runs elsewhere.
    fn end_guest(&mut self) {
        match self.guest.end() {
            Ok(()) => {
                self.claim.forget_guest();
                self.reap();
            }
            Err(e) => say(&format!("what is left of the guest here could not be ended: {}", e.chain())),
        }
    }

    /// What the operator decided about a guest in doubt.
    fn settle(&mut self, run: bool, reply: Answer) -> Option<u8> {
        let in_doubt = self.shared.status().state == State::Unknown
            || matches!(self.guest.qemu().status().as_deref(), Ok("postmigrate" | "finish-migrate"));
        if !in_doubt {
            reply.deliver(Reply::Refused {
                text: "nothing is to be settled: no migration of this guest ended in doubt".into(),
            });
            return None;
        }
        let settled = if run { self.run_here() } else { self.guest.end() };
        match settled {
            Ok(()) => {
                let text = if run { "the guest runs here" } else { "the guest has ended here" };
                say(text);
                self.shared.update(|s| s.state = State::Hosting);
                self.owes_resume = false;
                reply.deliver(Reply::Done { text: text.into() });
                (!run).then(|| {
                    self.claim.forget_guest();
                    self.reap();
                    0
                })
            }
            Err(e) => {
                reply.deliver(Reply::Refused { text: e.chain() });
                None
            }
        }
    }

    fn run_here(&mut self) -> Result<()> {
        self.guest.resume()?;
        let qemu = self.guest.qemu();
        if !qemu.is_running()? {
            qemu.qmp.execute("cont", json!({}), Instant::now() + CONT_MAX)?;
        }
        Ok(())
    }

    /// The guest's QEMU ended by itself.
    fn guest_ended(&mut self) -> u8 {
        self.claim.forget_guest();
        let status = self.reap();
        say(&format!("the guest {} has ended", self.claim.name()));
        status
    }

    /// Ends, and leaves the guest as it is.
    fn leave(&mut self) -> u8 {
        // A Ctrl-C in a terminal reaches QEMU as well, and then the guest is not left but gone.
        if self.ended.recv_timeout(CTRL_C_MAX).is_ok() {
            return self.guest_ended();
        }
        self.guest.settle_in();
        let name = self.claim.name();
        let how = if self.shared.status().state == State::Unknown { "stays stopped" } else { "goes on" };
        say(&format!(
            "leaving; the guest {how} without a supervisor. Take it up again with `pageferry attach {name}`"
        ));
        0
    }

    /// QEMU's exit status, if it was our child; that of a shell where a signal ended it.
    fn reap(&mut self) -> u8 {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        let code = status.and_then(|s| s.code().or_else(|| s.signal().map(|signal| 128 + signal)));
        code.and_then(|code| u8::try_from(code).ok()).unwrap_or(0)
    }
}

fn reason(report: &MigrationReport) -> &str {
    report.reason.as_deref().unwrap_or("no reason given")
}
