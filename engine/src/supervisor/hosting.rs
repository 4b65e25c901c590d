//! The loop of a supervisor whose guest is here: orders, signals, and the guest's end.

use super::api::{Answer, Order, Reply, State};
use super::runtime::{Claim, Record};
use super::{Inbox, Shared, say, watch_end};
use crate::error::Result;
use crate::guest::SourceGuest;
use crate::guest::qemu::process::Qemu;
use crate::guest::qemu::source::QemuSource;
use crate::progress::Monitor;
use crate::report::{MigrationReport, Outcome};
use crate::source::{MigrateOptions, migrate};
use crossbeam_channel::{Receiver, after, bounded, select};
use serde_json::json;
use std::process::Child;
use std::time::{Duration, Instant};

/// How often QEMU's events are read away while nothing happens, so that they do not pile up in it.
const EVENTS_EVERY: Duration = Duration::from_secs(10);
/// For a migration under way to end after a signal.
const CANCEL_MAX: Duration = Duration::from_secs(30);

/// A guest that is here, and everything around it.
#[derive(Debug)]
pub struct Hosting {
    claim: Claim,
    shared: Shared,
    inbox: Inbox,
    guest: QemuSource,
    /// The process, where this supervisor started it.
    child: Option<Child>,
    ended: Receiver<()>,
}

impl Hosting {
    /// Takes over a QEMU.
    pub fn new(claim: Claim, shared: Shared, inbox: Inbox, qemu: Qemu, child: Option<Child>) -> Result<Self> {
        claim.remember(&Record::of(qemu.pid(), qemu.qmp_path())?)?;
        let ended = watch_end(qemu.pidfd())?;
        shared.update(|s| (s.state, s.pid, s.listen) = (State::Hosting, Some(qemu.pid()), None));
        Ok(Self { claim, shared, inbox, guest: QemuSource::new(qemu), child, ended })
    }

    /// Until the guest is gone or a signal comes. Returns the exit status.
    pub fn run(mut self) -> Result<u8> {
        loop {
            select! {
                recv(self.ended) -> _ => return Ok(self.guest_ended()),
                recv(self.inbox.signals) -> _ => return Ok(self.leave()),
                recv(self.inbox.orders) -> order => match order {
                    Ok(Order::Migrate { options, monitor, reply }) => {
                        if let Some(status) = self.migrate(options, monitor, reply)? {
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
                recv(after(EVENTS_EVERY)) -> _ => {
                    if let Err(e) = self.guest.qemu().qmp.drain_events() {
                        // Its end, if it is that, comes through `ended`.
                        tracing::debug!(error = %e.chain(), "QEMU's events");
                    }
                }
            }
        }
    }

    /// Runs one migration on a thread of its own, so that signals and orders are heard meanwhile. Returns
    /// an exit status if the guest is gone from here.
    fn migrate(&mut self, options: MigrateOptions, monitor: Monitor, reply: Answer) -> Result<Option<u8>> {
        say(&format!("moving {} to {}", self.claim.name(), options.to));
        let (inbox, guest) = (&self.inbox, &mut self.guest);
        let (mut status, mut leaving) = (None, false);
        let report = std::thread::scope(|scope| {
            let (sender, done) = bounded(1);
            let watched = monitor.clone();
            scope.spawn(move || {
                let _ = sender.send(migrate(guest, &options, &monitor));
            });
            loop {
                select! {
                    recv(done) -> report => return report.ok(),
                    recv(inbox.orders) -> order => {
                        if let Ok(order) = order {
                            order.refuse("a migration of this guest is under way already");
                        }
                    }
                    recv(inbox.signals) -> _ => {
                        say("told to end: cancelling the migration first");
                        watched.cancel();
                        leaving = true;
                        return done.recv_timeout(CANCEL_MAX).ok().or_else(|| done.recv().ok());
                    }
                }
            }
        });
        let Some(report) = report else {
            reply.deliver(Reply::Refused {
                text: "the migration ended without a word; see the supervisor's output".into(),
            });
            self.shared.update(|s| s.state = State::Hosting);
            return Ok(None);
        };
        match report.outcome {
            Outcome::Completed => {
                say(&format!(
                    "{} has moved: downtime {:.1} ms, total {:.2} s",
                    self.claim.name(),
                    report.blackout_us.total as f64 / 1e3,
                    report.total_us as f64 / 1e6
                ));
                status = Some(0);
            }
            Outcome::Aborted => {
                say(&format!("{} was not moved and runs on here: {}", self.claim.name(), reason(&report)));
                self.shared.update(|s| s.state = State::Hosting);
            }
            Outcome::Unknown => {
                say(&format!("{} is STOPPED here: {}", self.claim.name(), reason(&report)));
                self.shared.update(|s| s.state = State::Unknown);
            }
        }
        self.shared.update(|s| s.last = Some(report.clone()));
        reply.deliver(Reply::Report(report));
        if status.is_some() {
            self.reap();
        }
        if leaving && status.is_none() {
            return Ok(Some(self.leave()));
        }
        Ok(status)
    }

    /// What the operator decided about a guest in doubt.
    fn settle(&mut self, run: bool, reply: Answer) -> Option<u8> {
        if self.shared.status().state != State::Unknown
            && !matches!(self.guest.qemu().status().as_deref(), Ok("postmigrate" | "paused"))
        {
            reply.deliver(Reply::Refused { text: "nothing is to be settled: the guest runs here".into() });
            return None;
        }
        let settled = if run {
            self.guest.resume().and_then(|()| {
                let qemu = self.guest.qemu();
                if !qemu.is_running()? {
                    qemu.qmp.execute("cont", json!({}), Instant::now() + Duration::from_secs(10))?;
                }
                Ok(())
            })
        } else {
            self.guest.end()
        };
        match settled {
            Ok(()) => {
                let text = if run { "the guest runs here" } else { "the guest has ended here" };
                say(text);
                reply.deliver(Reply::Done { text: text.into() });
                self.shared.update(|s| s.state = State::Hosting);
                (!run).then(|| {
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

    /// The guest's QEMU ended by itself.
    fn guest_ended(&mut self) -> u8 {
        let status = self.reap();
        say(&format!("the guest {} has ended", self.claim.name()));
        status
    }

    /// Ends, and leaves the guest running.
    fn leave(&mut self) -> u8 {
        // A Ctrl-C in a terminal reaches QEMU as well, and then the guest is not left but gone.
        if self.ended.recv_timeout(Duration::from_millis(300)).is_ok() {
            return self.guest_ended();
        }
        self.claim.leave_guest();
        say(&format!(
            "leaving; the guest goes on without a supervisor. Take it up again with `pageferry attach {}`",
            self.claim.name()
        ));
        0
    }

    /// QEMU's exit status, if it was our child.
    fn reap(&mut self) -> u8 {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        status.and_then(|s| s.code()).and_then(|code| u8::try_from(code).ok()).unwrap_or(0)
    }
}

fn reason(report: &MigrationReport) -> &str {
    report.reason.as_deref().unwrap_or("no reason given")
}
