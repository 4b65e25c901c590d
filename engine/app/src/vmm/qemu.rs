//! Guests in QEMU, as their supervisor holds them.

use super::launch::launch;
use crate::supervisor::claim::Claim;
use crate::supervisor::place::{Ended, IncomingVm, RunningVm, VmFactory, Vmm};
use crate::supervisor::record::Doubt;
use crate::supervisor::record::Record;
use crate::supervisor::{say, spawn};
use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{DestinationGuest, SourceGuest};
use pageferry_qemu::command::Role;
use pageferry_qemu::destination::QemuDestination;
use pageferry_qemu::source::QemuSource;
use pageferry_qemu::stream::Settings;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For QEMU to let a guest run that the operator has decided about.
const CONT_MAX: Duration = Duration::from_secs(10);

/// For a process to end by force.
const END_MAX: Duration = Duration::from_secs(5);

/// A QEMU with a guest.
pub struct QemuRunning {
    guest: QemuSource,
    /// The process, where this supervisor started it.
    child: Option<Child>,
}

impl QemuRunning {
    /// One that was attached, and started by this process if there is a child.
    #[must_use]
    pub fn new(guest: QemuSource, child: Option<Child>) -> Self {
        Self { guest, child }
    }

    fn let_run(&mut self) -> Result<()> {
        self.guest.resume()?;
        let qemu = self.guest.qemu_mut();
        if !qemu.is_running()? {
            qemu.qmp.execute("cont", json!({}), Instant::now() + CONT_MAX)?;
        }
        Ok(())
    }

    /// One that a supervisor before this one left in doubt. It stays stopped until that is settled.
    pub fn in_doubt(mut guest: QemuSource, doubt: &Doubt) -> Result<Self> {
        let settings =
            doubt.settings.clone().and_then(|settings| serde_json::from_value(settings).ok());
        guest.watch_sealed(doubt.question.was_running, settings)?;
        Ok(Self::new(guest, None))
    }
}

impl RunningVm for QemuRunning {
    fn guest(&mut self) -> &mut dyn SourceGuest {
        &mut self.guest
    }

    fn vmm(&self) -> Vmm {
        Vmm::Qemu
    }

    fn pid(&self) -> u32 {
        self.guest.qemu().pid()
    }

    fn record(&self) -> Option<Result<Record>> {
        let qemu = self.guest.qemu();
        Some(Record::of(qemu.pid(), qemu.qmp_path()))
    }

    fn settings(&mut self) -> Option<serde_json::Value> {
        if self.guest.is_watched() {
            return None;
        }
        self.guest.settle_in();
        let settings = Settings::read(&mut self.guest.qemu_mut().qmp).and_then(|settings| {
            serde_json::to_value(settings).map_err(|e| Error::Guest(e.to_string()))
        });
        settings
            .inspect_err(|e| tracing::warn!(error = %e.chain(), "QEMU's migration settings"))
            .ok()
    }

    fn ended(&self) -> Result<Receiver<()>> {
        watch_end(self.guest.qemu().pidfd())
    }

    fn is_sealed(&self) -> bool {
        self.guest.is_sealed()
    }

    fn is_new_here(&self) -> bool {
        self.guest.is_new_here()
    }

    fn look_after(&mut self) {
        if self.guest.is_watched() {
            return;
        }
        self.guest.settle_in();
        self.guest.ask_ahead();
        // So that they do not pile up in QEMU.
        if let Err(e) = self.guest.qemu_mut().qmp.drain_events() {
            // Its end, if it is that, comes through `ended`.
            tracing::debug!(error = %e.chain(), "QEMU's events");
        }
    }

    fn in_doubt(&mut self) -> bool {
        self.guest.is_watched()
            || matches!(
                self.guest.qemu_mut().status().as_deref(),
                Ok("postmigrate" | "finish-migrate")
            )
    }

    fn run_here(&mut self) -> Result<()> {
        let in_doubt = self.guest.is_sealed();
        let runs = self.let_run();
        // As where its disks are locked, by the guest at the destination: then it is in doubt as
        // before.
        if runs.is_err()
            && in_doubt
            && matches!(self.guest.qemu_mut().is_running(), Ok(false))
            && let Err(e) = self.guest.watch_in_doubt()
        {
            say(&format!("the guest is not watched for other monitors any more: {}", e.chain()));
        }
        runs
    }

    fn end_here(&mut self) -> Result<()> {
        self.guest.end()
    }

    fn let_go(&mut self) {
        self.guest.settle_in();
        self.guest.outlast_guardian();
    }

    /// QEMU's exit status, if it was our child; that of a shell where a signal ended it.
    fn reap(&mut self) -> Ended {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        let code = status.and_then(|s| s.code().or_else(|| s.signal().map(|signal| 128 + signal)));
        Ended { status: code.and_then(|code| u8::try_from(code).ok()).unwrap_or(0), how: None }
    }
}

/// A QEMU that waits to be filled.
pub struct QemuIncoming {
    guest: QemuDestination,
    child: Child,
}

impl IncomingVm for QemuIncoming {
    type RunningVm = QemuRunning;

    fn guest(&mut self) -> &mut dyn DestinationGuest {
        &mut self.guest
    }

    fn vmm(&self) -> Vmm {
        Vmm::Qemu
    }

    fn pid(&self) -> u32 {
        self.guest.qemu().pid()
    }

    fn ended(&self) -> Result<Receiver<()>> {
        watch_end(self.guest.qemu().pidfd())
    }

    fn why_ended(&self) -> Error {
        Error::refused("QEMU ended while it waited for a guest; its message is above")
    }

    fn end(self) {
        let Self { guest, mut child } = self;
        // Its guardian first, which has nothing to guard any more.
        drop(guest);
        end(&mut child);
    }

    fn into_hosted(self) -> Result<QemuRunning> {
        Ok(QemuRunning::new(self.guest.into_source(), Some(self.child)))
    }
}

/// Starts QEMUs that wait, with the user's command.
#[derive(Debug)]
pub struct QemuFactory<'c> {
    command: &'c [OsString],
    allowed: &'c [String],
}

impl<'c> QemuFactory<'c> {
    /// One for this command.
    #[must_use]
    pub fn new(command: &'c [OsString]) -> Self {
        Self { command, allowed: &[] }
    }

    /// Takes guests although what they see differs in these.
    #[must_use]
    pub fn allowing(self, allowed: &'c [String]) -> Self {
        Self { allowed, ..self }
    }
}

impl VmFactory for QemuFactory<'_> {
    type IncomingVm = QemuIncoming;

    fn prepare(&mut self, claim: &Claim) -> Result<QemuIncoming> {
        let (mut child, qemu) = launch(self.command, Role::Destination, &claim.path("qmp"))?;
        // From Commit on the guest may outlive this supervisor, and must be found then.
        let prepared = Record::of(qemu.pid(), qemu.qmp_path())
            .and_then(|record| claim.remember(&record))
            .and_then(|()| QemuDestination::new(qemu))
            .map(|guest| guest.allowing(self.allowed));
        match prepared {
            Ok(guest) => Ok(QemuIncoming { guest, child }),
            Err(e) => {
                end(&mut child);
                Err(e)
            }
        }
    }
}

/// Ends a child by force and takes away what is left of it, unless the kernel cannot end it.
fn end(child: &mut Child) {
    let _ = child.kill();
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let ended = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    if ended.is_some_and(|pidfd| pageferry_qemu::process::ended(&pidfd, END_MAX).unwrap_or(true)) {
        let _ = child.wait();
    } else {
        say(&format!(
            "QEMU (pid {}) does not end; the kernel holds it (see /proc/{}/stack)",
            child.id(),
            child.id()
        ));
    }
}

/// A channel that hears when the process behind `pidfd` has ended.
pub fn watch_end(pidfd: Arc<OwnedFd>) -> Result<Receiver<()>> {
    let (sender, receiver) = bounded(1);
    spawn("guest-end", move || watch(&pidfd, &sender))?;
    Ok(receiver)
}

fn watch(pidfd: &OwnedFd, sender: &Sender<()>) {
    // Bounded looks: poll(2) has no deadline of its own that would outlive a suspended host.
    while !pageferry_qemu::process::ended(pidfd, Duration::from_secs(60)).unwrap_or(true) {}
    let _ = sender.send(());
}
