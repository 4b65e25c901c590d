//! A guest that runs in QEMU, as the source of a migration.

use super::guardian::{Guardian, Side};
use super::inject::userfaultfd_of;
use super::platform::Gatherer;
use super::process::{Qemu, ended};
use super::stream;
use super::stream::{Outgoing, QMP_MAX, Settings};
use crate::guardian::sentry::{Post, Sentry, TAKEN_OVER_MAX};
use crate::memory::mtree;
use crate::preflight::devices::Inventory;
use crate::preflight::nested::Exposed;
use crate::preflight::{block_jobs, devices, disks};
use pageferry_engine::dirty::DirtySource;
use pageferry_engine::dirty::pagemap::arming::background::after_disarm;
use pageferry_engine::dirty::pagemap::{PagemapSource, TrackedRange};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{
    Facts, FixedCosts, GuestDescription, Liveness, PLATFORM_BYTES_MAX, SourceGuest, Vouched,
};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::lost_page::LostPage;
use pageferry_engine::watch::Watch;
use rustix::fd::AsFd;
use serde_json::{Value, json};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Device state beside the RAM blocks in QEMU's stream: some 100 KiB a device at the very most.
const DEVICE_STATE_BYTES_MAX: u64 = 64 << 20;

/// An estimate of the downtime's fixed part, in microseconds, from moves of a small guest by QEMU
/// 10 on one two-core machine. What a migration really takes is known only at its end.
const FIXED_COSTS: FixedCosts =
    FixedCosts { pause_us: 400, sync_us: 0, save_us: 1500, load_us: 1800, resume_us: 400 };

/// For a QEMU that has hung up to be gone.
const EXIT_MAX: Duration = Duration::from_millis(500);
/// For a guest whose migration failed to run again. QEMU may be busy with its disks.
const RESUME_MAX: Duration = Duration::from_secs(30);
/// Pause between two attempts at it.
const RESUME_EVERY: Duration = Duration::from_millis(20);

/// QEMU's states in which a guest can be moved. One that does not run stays as it is at the
/// destination: QEMU's stream has the state. Those that stopped for an error of a disk, a panic, a
/// shutdown or the watchdog are among them: that is when an operator wants the guest away from a
/// host.
const MOVABLE: [&str; 8] = [
    "running",
    "paused",
    "suspended",
    "prelaunch",
    "io-error",
    "guest-panicked",
    "shutdown",
    "watchdog",
];

/// See the [module](self).
pub struct QemuSource {
    qemu: Qemu,
    /// On duty from the first moment in which we stop the guest.
    guardian: Option<Guardian>,
    armed: Option<Armed>,
    /// Can be upgraded while the guest's memory is armed.
    memory_armed: Weak<()>,
    /// Whether the vCPUs ran when that was asked last.
    was_running: bool,
    /// The number of the last event then: a STOP behind it that is not ours is the guest's own, or
    /// its operator's.
    asked: u64,
    /// Whether we stopped vCPUs that ran.
    stopped: bool,
    /// The number of the last event when the vCPUs had been stopped for the switchover: a RESUME
    /// behind it is another monitor's.
    halted: u64,
    /// Has the monitor while the guest is sealed or in doubt.
    sentry: Option<Sentry>,
    /// See [`Self::is_sealed`].
    sealed: bool,
    /// When the guardian of the supervisor before has gone, where there may be one.
    guardian_gone: Option<Instant>,
    /// See [`SourceGuest::retire`].
    retired: Option<Box<dyn DirtySource>>,
    /// Whether an aborted migration of ours left a paused guest in QEMU's state `postmigrate`.
    postmigrate_is_ours: bool,
    /// What the guest sees of its machine, packed, as preflight found it.
    platform: Vec<u8>,
    gatherer: Gatherer,
    /// Whether [`Self::ask_ahead`] has asked for what a migration will want to know.
    asked_ahead: bool,
    /// See [`Self::settle_in`].
    left_over: Option<Settings>,
    /// What the operator vouches for.
    vouched: Vouched,
    /// What the guest was made of at the preflight.
    inventory: Option<Inventory>,
    /// What the guest's vCPUs could run nested guests with.
    nested: Option<Exposed>,
}

/// What `arm` set up and `resume` takes down.
#[derive(Debug)]
struct Armed {
    settings: Settings,
    outgoing: Option<Outgoing>,
    /// Ready, and not yet posted.
    sentry: Option<Sentry>,
}

impl QemuSource {
    /// Makes a source of a QEMU that was attached.
    #[must_use]
    pub fn new(qemu: Qemu) -> Self {
        Self {
            qemu,
            guardian: None,
            armed: None,
            memory_armed: Weak::new(),
            was_running: false,
            asked: 0,
            stopped: false,
            halted: 0,
            sentry: None,
            sealed: false,
            guardian_gone: None,
            retired: None,
            postmigrate_is_ours: false,
            platform: Vec::new(),
            gatherer: Gatherer::default(),
            asked_ahead: false,
            left_over: None,
            vouched: Vouched::default(),
            inventory: None,
            nested: None,
        }
    }

    /// Makes a source of a QEMU whose guest has just come; the settings are QEMU's before that, and
    /// the gatherer has asked it already.
    #[must_use]
    pub fn arrived(qemu: Qemu, before: Settings, gatherer: Gatherer) -> Self {
        Self { left_over: Some(before), gatherer, ..Self::new(qemu) }
    }

    /// Whether [`Self::settle_in`] or [`Self::ask_ahead`] has something to do.
    #[must_use]
    pub fn is_new_here(&self) -> bool {
        !self.is_watched() && (self.left_over.is_some() || !self.asked_ahead)
    }

    /// Asks QEMU for what a migration will want to know, as far as it cannot change: some hundred
    /// questions, while nobody waits.
    pub fn ask_ahead(&mut self) {
        if !std::mem::replace(&mut self.asked_ahead, true)
            && let Err(e) = self.gatherer.ask_ahead(&mut self.qemu.qmp)
        {
            tracing::debug!(error = %e.chain(), "the vCPUs' properties are asked for when the guest is moved");
        }
    }

    /// Puts back what QEMU's settings were before a guest came. Not in the guest's first moments
    /// here: QEMU takes ten milliseconds to read these commands, in the loop that the devices need
    /// too.
    pub fn settle_in(&mut self) {
        if let Some(before) = self.left_over.take()
            && let Err(e) = before.restore(&mut self.qemu.qmp)
        {
            tracing::warn!(error = %e.chain(), "QEMU keeps pageferry's migration settings");
        }
    }

    /// The QEMU itself.
    #[must_use]
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// The same, to give it orders.
    pub fn qemu_mut(&mut self) -> &mut Qemu {
        &mut self.qemu
    }

    /// Whether Commit may have been sent, so that only its answer, or the operator, may let the
    /// guest run.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Keeps a guest stopped that an earlier supervisor has left in doubt: [`SourceGuest::resume`]
    /// lets it run.
    pub fn take_up_in_doubt(&mut self) -> Result<()> {
        (self.was_running, self.stopped) = (true, true);
        self.watch_in_doubt()
    }

    /// Keeps a guest stopped that was found stopped in doubt, or could not be let run in doubt,
    /// until the operator has decided about it. When this supervisor leaves or dies before that,
    /// its guardian does.
    pub fn watch_in_doubt(&mut self) -> Result<()> {
        // One that has died keeps nothing stopped.
        if let Some(dead) = self.guardian.take_if(|guardian| guardian.check().is_err()) {
            dead.finish();
        }
        let after_us = self.guardian_on_duty().and_then(|guardian| guardian.seal());
        let sentry = Sentry::ready(Post::Source)?;
        let heard = self.qemu.qmp.events_heard();
        sentry.post(&mut self.qemu.qmp, heard)?;
        self.sentry = Some(sentry);
        self.sealed = true;
        self.guardian_gone = Some(Instant::now() + TAKEN_OVER_MAX);
        after_us
    }

    /// Waits until the guardian of the supervisor before has noticed that the monitor was taken: it
    /// would stop a guest that the operator has let run since, were the monitor free again before
    /// that.
    pub fn outlast_guardian(&self) {
        if let Some(gone) = self.guardian_gone.filter(|_| !self.is_watched()) {
            std::thread::sleep(gone.saturating_duration_since(Instant::now()));
        }
    }

    /// The same for a guest that an earlier supervisor has sealed: [`SourceGuest::resume`] lets it
    /// run if it ran then, and restores QEMU's settings.
    pub fn watch_sealed(&mut self, was_running: bool, settings: Option<Settings>) -> Result<()> {
        self.watch_in_doubt()?;
        (self.was_running, self.stopped) = (was_running, was_running);
        if let Some(guardian) = &self.guardian {
            guardian.was_running(was_running)?;
            settings.as_ref().map_or(Ok(()), |settings| guardian.entrust(settings))?;
        }
        self.armed = settings.map(|settings| Armed { settings, outgoing: None, sentry: None });
        Ok(())
    }

    /// Whether the guest is watched because it must not run.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.sentry.is_some()
    }

    /// The monitor is this supervisor's again.
    fn relieve(&mut self) {
        if let Some(sentry) = self.sentry.take() {
            sentry.relieve(&mut self.qemu.qmp);
        }
    }

    /// Fails if another monitor has let the guest run, or reset it, since it was stopped for the
    /// switchover. QEMU says so before a vCPU runs: what is not here yet has not happened.
    fn refuse_interference(&mut self) -> Result<()> {
        if let Err(e) = self.qemu.qmp.look() {
            // A QEMU that has died lets nothing run, and its guest may live on at the destination.
            return if ended(&self.qemu.pidfd(), EXIT_MAX)? { Ok(()) } else { Err(e) };
        }
        let turns = self.qemu.qmp.turns();
        let what = if turns.resume > self.halted {
            "another monitor let the guest run (`cont`)"
        } else if turns.reset > self.halted {
            "another monitor (`system_reset`), or the guest itself at that moment, reset the guest"
        } else {
            return Ok(());
        };
        Err(Error::Guest(format!(
            "{what} while it was stopped for the switchover. Keep libvirt, scripts and people from that until the move is \
             over, then try again"
        )))
    }

    fn armed(&mut self) -> Result<&mut Armed> {
        self.armed.as_mut().ok_or_else(|| Error::Guest("the switchover was not armed".into()))
    }

    /// The guardian, which may have nothing to put right yet.
    fn guardian_on_duty(&mut self) -> Result<&mut Guardian> {
        let guardian = match self.guardian.take() {
            Some(guardian) => guardian,
            None => {
                let (pid, pidfd) = (self.qemu.pid(), self.qemu.pidfd());
                Guardian::start(Side::Source, pid, pidfd.as_fd(), self.qemu.qmp_path())?
            }
        };
        Ok(self.guardian.insert(guardian))
    }

    /// A guardian that is ready to put right what comes.
    fn guardian(&mut self) -> Result<&mut Guardian> {
        let watching = self.guardian_on_duty()?.is_watching();
        let was_running = if watching? { Some(self.is_running()?) } else { None };
        let guardian =
            self.guardian.as_mut().ok_or_else(|| Error::Guest("no guardian is on duty".into()))?;
        if let Some(was_running) = was_running {
            guardian.engage(was_running)?;
        }
        Ok(guardian)
    }

    /// Stops the vCPUs, with a guardian that knows of it. A guest that has stopped by itself, or
    /// was paused, since it was asked whether it runs counts as one that did not: QEMU forgets why
    /// it stopped once its state is saved.
    fn stop(&mut self) -> Result<()> {
        // It may have asked anew whether the guest runs.
        self.guardian()?;
        self.qemu.qmp.look()?;
        if self.qemu.qmp.turns().stop > self.asked {
            self.is_running()?;
        }
        let was_running = self.was_running;
        let guardian = self.guardian()?;
        guardian.check()?;
        guardian.was_running(was_running)?;
        self.stopped = was_running;
        self.qemu.qmp.execute("stop", json!({}), Instant::now() + QMP_MAX)?;
        self.halted = self.qemu.qmp.events_heard();
        // Between the look and QEMU's stop. Asked only where something was said: it takes time in
        // the downtime.
        if was_running
            && self.qemu.qmp.turns().ceased > self.asked
            && self.qemu.status()? != "paused"
        {
            (self.was_running, self.stopped) = (false, false);
            self.guardian()?.was_running(false)?;
        }
        Ok(())
    }

    fn cont(&mut self) -> Result<()> {
        self.qemu.qmp.execute("cont", json!({}), Instant::now() + QMP_MAX)?;
        self.stopped = false;
        Ok(())
    }

    /// The guest runs elsewhere, or nowhere any more: should this process die, the guardian ends
    /// its QEMU.
    fn give_away(&self) {
        if let Some(Err(e)) = self.guardian.as_ref().map(Guardian::give_away) {
            tracing::warn!(error = %e.chain(), "should this process die now, nobody ends the guest's QEMU");
        }
    }

    /// Whether it has a balloon or virtio-mem.
    fn may_discard(&mut self) -> Result<bool> {
        let deadline = Instant::now() + QMP_MAX;
        match self.qemu.qmp.execute("query-balloon", json!({}), deadline) {
            Ok(_) => return Ok(true),
            // No balloon; its free page reporting goes with it.
            Err(Error::VmmRefused { .. }) => {}
            Err(e) => return Err(e),
        }
        let devices = self.qemu.qmp.execute("query-memory-devices", json!({}), deadline)?;
        Ok(devices
            .as_array()
            .is_some_and(|list| list.iter().any(|device| device["type"] == "virtio-mem")))
    }

    /// Ends the guest here: it runs at the destination, or the operator says that it shall not run.
    pub fn end(&mut self) -> Result<()> {
        self.give_away();
        self.relieve();
        let ended = self.qemu.quit();
        self.retired = None;
        // One that does not end is ended by its guardian, once this supervisor is gone.
        if ended.is_ok() {
            self.stand_down();
        }
        ended
    }

    /// Nothing is to be put right any more.
    fn stand_down(&mut self) {
        self.armed = None;
        if let Some(guardian) = self.guardian.take() {
            // It holds the other descriptor, in case that this process dies before all is disarmed.
            if let Err(e) = guardian.stand_back() {
                tracing::debug!(error = %e.chain(), "the guardian cannot be told to stand back");
                return guardian.finish();
            }
            after_disarm(self.qemu.pid(), move || guardian.finish());
        }
    }

    /// Nothing of the guest is to be put right any more. While its memory is armed the guardian
    /// stays, to disarm it in short calls should this process die first. The next
    /// [`SourceGuest::resume`] ends it.
    fn stand_by(&mut self) -> Result<()> {
        match &self.guardian {
            Some(guardian) if self.memory_armed.strong_count() > 0 => {
                guardian.stand_back()?;
                self.armed = None;
            }
            _ => self.stand_down(),
        }
        Ok(())
    }

    /// One attempt at [`SourceGuest::resume`].
    fn try_resume(&mut self) -> Result<()> {
        stream::cancel(&mut self.qemu.qmp)?;
        if self.stopped && !stream::let_run(&mut self.qemu.qmp, Instant::now() + QMP_MAX)? {
            (self.stopped, self.was_running) = (false, false);
            tracing::warn!(
                "the guest has stopped by itself just before it was to be moved, and stays so"
            );
        } else if self.stopped {
            // Under QEMU's word and not by the absence of an error: a guest is never said to run
            // that does not.
            if let state @ ("postmigrate" | "finish-migrate") = self.qemu.status()?.as_str() {
                return Err(Error::Guest(format!(
                    "QEMU let the guest run and says {state:?} all the same"
                )));
            }
            self.stopped = false;
        } else if self.armed.is_some() && !self.was_running {
            self.postmigrate_is_ours = true;
        }
        if let Some(armed) = &self.armed {
            armed.settings.restore(&mut self.qemu.qmp)?;
        }
        Ok(())
    }

    /// What the guest is made of; refused if the tracking would not see all that it may write.
    fn refuse_what_escapes_tracking(&mut self, deadline: Instant) -> Result<Inventory> {
        let nodes = devices::block_nodes(&mut self.qemu.qmp, deadline)?;
        let inventory = Inventory::read(&mut self.qemu.qmp, &nodes, deadline)?;
        inventory.check(&self.vouched)?;
        self.refuse_registered_memory()?;
        block_jobs::check(&mut self.qemu.qmp, deadline)?;
        self.refuse_nested_guest(deadline)?;
        Ok(inventory)
    }

    /// The look at what may have changed since the last one; returns the block nodes.
    fn look_in_the_rounds(&mut self) -> Result<Value> {
        let deadline = Instant::now() + QMP_MAX;
        let nodes = devices::block_nodes(&mut self.qemu.qmp, deadline)?;
        devices::check_block_drivers(&nodes, &self.vouched)?;
        devices::check_none_unplugged(&mut self.qemu.qmp)?;
        self.refuse_registered_memory()?;
        self.refuse_nested_guest(deadline)?;
        Ok(nodes)
    }

    fn refuse_nested_guest(&mut self, deadline: Instant) -> Result<()> {
        match &self.nested {
            Some(exposed) => exposed.check(&mut self.qemu.qmp, &self.vouched, deadline),
            None => Ok(()),
        }
    }

    fn refuse_registered_memory(&self) -> Result<()> {
        let slots = self.qemu.memory().slots().iter();
        let memory: Vec<_> =
            slots.map(|s| s.process_address..s.process_address + s.region().len() as u64).collect();
        if disks::registered_buffers(self.qemu.pid(), &memory)?.is_empty() {
            return Ok(());
        }
        Err(Error::refused(
            "QEMU has registered guest memory as buffers of an io_uring, which the kernel writes by an address of its own, \
             where no tracking sees it: give the disk another driver or another aio= (threads, native)",
        ))
    }
}

/// What is found in the rounds ends a migration that is under way: nothing is refused any more.
fn no_refusal(error: Error) -> Error {
    match error {
        Error::Refused(text) => Error::Guest(text),
        other => other,
    }
}

impl SourceGuest for QemuSource {
    fn vouch(&mut self, vouched: &Vouched) {
        self.vouched.clone_from(vouched);
    }

    fn preflight(&mut self) -> Result<()> {
        if self.is_watched() {
            return Err(Error::refused(
                "the guest is stopped after a migration in doubt: look whether it runs at the destination, then \
                 `pageferry settle NAME --run` or `--end`",
            ));
        }
        self.settle_in();
        let deadline = Instant::now() + QMP_MAX;
        self.nested = Exposed::find(&mut self.qemu.qmp, deadline)?;
        devices::forget_unplugged(&mut self.qemu.qmp)?;
        if let Some(exposed) = &self.nested {
            tracing::warn!(
                "the guest's vCPUs have {}: let it start no guest of its own while it is moved",
                exposed.words()
            );
        }
        self.inventory = Some(self.refuse_what_escapes_tracking(deadline)?);
        if self.qemu.follow_memory()? {
            tracing::info!(
                "the guest's memory has changed since it was attached, and is mapped anew"
            );
        }
        self.qemu.describe_images()?;
        let status = self.qemu.status()?;
        if status == "postmigrate" && self.postmigrate_is_ours {
            return Err(Error::refused(
                "the guest was not running when an earlier migration was aborted, after its state had been saved, and QEMU moves \
                 such a guest only when it has run again: let it run with `cont` (and `stop` it again) first",
            ));
        }
        if !MOVABLE.contains(&status.as_str()) {
            return Err(Error::refused(format!(
                "the guest is in QEMU's state {status:?}; it can be moved in one of these: {}",
                MOVABLE.join(", ")
            )));
        }
        let migration = self.qemu.qmp.execute("query-migrate", json!({}), deadline)?;
        let migration = migration.get("status").and_then(Value::as_str).unwrap_or("none");
        if stream::under_way(migration) {
            return Err(Error::refused(format!(
                "QEMU is busy with a migration of its own ({migration}); let it end, or `migrate_cancel` it"
            )));
        }
        pageferry_engine::dirty::pagemap::probe()?;
        // With what was plugged in and out until now.
        let pid = self.qemu.pid();
        self.platform = self.gatherer.gather(&mut self.qemu.qmp, pid)?.pack();
        if self.platform.len() > PLATFORM_BYTES_MAX {
            return Err(Error::refused(format!(
                "the guest has more devices than can be described to the destination: {} bytes, of which {PLATFORM_BYTES_MAX} \
                 are possible; unplug some",
                self.platform.len()
            )));
        }
        Ok(())
    }

    fn facts(&mut self) -> Result<Facts> {
        let private_bytes = self.qemu.private_bytes();
        Ok(Facts {
            may_discard: self.may_discard()?,
            description: GuestDescription {
                platform: self.platform.clone(),
                ..self.qemu.description().clone()
            },
            // Video memory may be written twice: once ahead of the pause, once after it.
            state_bytes_max: DEVICE_STATE_BYTES_MAX + 2 * private_bytes,
            state_bytes_expected: private_bytes,
            fixed_costs: FIXED_COSTS,
        })
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.qemu.memory()
    }

    fn liveness(&self) -> Liveness {
        self.qemu.liveness()
    }

    fn name_guest_physical(&mut self, pages: &mut [LostPage]) {
        let arguments = json!({ "command-line": "info mtree -f" });
        match self.qemu.qmp.execute("human-monitor-command", arguments, Instant::now() + QMP_MAX) {
            Ok(text) => pages.iter_mut().for_each(|page| {
                page.guest_physical =
                    mtree::guest_physical(text.as_str().unwrap_or(""), &page.block, page.offset);
            }),
            Err(e) => tracing::debug!(error = %e.chain(), "guest-physical addresses are not known"),
        }
    }

    fn is_running(&mut self) -> Result<bool> {
        self.was_running = self.qemu.is_running()?;
        self.asked = self.qemu.qmp.events_heard();
        Ok(self.was_running)
    }

    fn start_tracking(&mut self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
        let uffd = userfaultfd_of(self.qemu.pid(), &self.qemu.pidfd())?;
        let ranges = self.qemu.memory().slots().iter().map(|slot| TrackedRange {
            process_address: slot.process_address,
            bytes: slot.region().len() as u64,
            first_page: slot.first_page,
            backing_page_bytes: slot.backing_page_bytes,
        });
        let ranges: Vec<_> = ranges.collect();
        if let Some(idle) = self.guardian.take() {
            idle.finish();
        }
        let (pid, pidfd, qmp) = (self.qemu.pid(), self.qemu.pidfd(), self.qemu.qmp_path());
        let guardian = Guardian::start_watching(pid, pidfd.as_fd(), qmp, uffd.as_fd(), &ranges)?;
        self.guardian = Some(guardian);
        let source = PagemapSource::watched(uffd, pid, ranges, watch)?;
        self.memory_armed = source.while_armed();
        // Its pagemap was opened by the number of the process, which it has kept if it lives.
        self.qemu.liveness()()?;
        Ok(Box::new(source))
    }

    fn drain_io(&mut self) -> Result<()> {
        // Asked each time: disks are plugged in. Stopping the vCPUs is the one thing by which QEMU
        // waits for every transfer of every device.
        let nodes = self.look_in_the_rounds().map_err(no_refusal)?;
        let pinning = disks::may_pin(&nodes, self.qemu.pid())?;
        if let Some(why) = pinning
            && self.is_running()?
        {
            tracing::debug!(why, "transfers are drained");
            self.stop()?;
            if self.stopped {
                self.cont()?;
            }
            // Whoever pauses the guest from now on finds it paused, also if this process dies.
            if let Some(guardian) = self.guardian.as_ref().filter(|_| self.armed.is_none()) {
                guardian.stand_back()?;
            }
        }
        Ok(())
    }

    fn arm(&mut self) -> Result<()> {
        let settings = Settings::read(&mut self.qemu.qmp)?;
        devices::check_none_unplugged(&mut self.qemu.qmp)?;
        self.guardian()?.entrust(&settings)?;
        let sentry = Some(Sentry::ready(Post::Source)?);
        let armed = self.armed.insert(Armed { settings, outgoing: None, sentry });
        armed.settings.impose(&mut self.qemu.qmp, &["x-ignore-shared", "events"])?;
        // Once more: the start of the stream throws away what QEMU has said until then.
        devices::check_none_unplugged(&mut self.qemu.qmp)?;
        armed.outgoing = Some(Outgoing::start(&mut self.qemu.qmp)?);
        // What was plugged in during the rounds. From here on QEMU plugs nothing.
        let deadline = Instant::now() + QMP_MAX;
        let inventory = self.refuse_what_escapes_tracking(deadline).map_err(no_refusal)?;
        if let Some(before) = &self.inventory {
            inventory.check_unchanged_since(before)?;
        }
        self.check_memory()
    }

    fn check_memory(&mut self) -> Result<()> {
        self.qemu.check_images()?;
        if self.qemu.memory_is_current()? {
            return Ok(());
        }
        Err(Error::Guest(
            "the guest's memory was changed while it was being moved (plugged in, out, or replaced), so what was sent is \
             not what it has; move it again"
                .into(),
        ))
    }

    fn pause(&mut self) -> Result<()> {
        let (asked, ran) = (self.qemu.qmp.events_heard(), self.was_running);
        self.stop()?;
        // The destination would be told that it ran, and let it run.
        if ran && !self.was_running {
            return Err(Error::Guest(
                "the guest stopped by itself, or was paused, at the moment of the switchover, and stays \
                 so; move it again"
                    .into(),
            ));
        }
        let turns = self.qemu.qmp.turns();
        // After it was asked whether the guest runs, and before it was stopped.
        if !self.was_running && turns.resume > asked {
            self.stopped = true;
            return Err(Error::Guest(
                "another monitor let the guest run at the moment of the switchover".into(),
            ));
        }
        Ok(())
    }

    fn begin_save(&mut self) -> Result<()> {
        self.armed()?.outgoing.as_mut().map_or(Ok(()), Outgoing::open)
    }

    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let outgoing = self
            .armed()?
            .outgoing
            .take()
            .ok_or_else(|| Error::Guest("the device state was saved already".into()))?;
        outgoing.drain(&mut self.qemu.qmp, sink)?;
        // A nested guest that began after the last look has written by now.
        if let Some(exposed) = &self.nested {
            let deadline = Instant::now() + QMP_MAX;
            exposed
                .check_stopped(&mut self.qemu.qmp, &self.vouched, deadline)
                .map_err(no_refusal)?;
        }
        // Before the destination compares digests: memory that the guest has written since would be
        // its excuse.
        self.refuse_interference()
    }

    fn seal(&mut self) -> Result<()> {
        self.refuse_interference()?;
        self.guardian()?.seal()?;
        self.sealed = true;
        if let Some(sentry) = self.armed()?.sentry.take() {
            sentry.post(&mut self.qemu.qmp, self.halted)?;
            self.sentry = Some(sentry);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.relieve();
        match &self.guardian {
            // Nothing was done to the guest or to QEMU: there is nothing that QEMU, which may be
            // busy, would have to answer, and a migration that it is busy with is somebody else's.
            Some(guardian) if guardian.is_watching()? => return self.stand_by(),
            Some(guardian) => guardian.unseal()?,
            None => {
                self.sealed = false;
                return Ok(());
            }
        }
        // QEMU is busy with no migration of ours: what it refuses now it refuses in half a minute
        // too.
        let patience =
            if self.sealed && self.armed.is_none() { Duration::ZERO } else { RESUME_MAX };
        self.sealed = false;
        if let Some(armed) = &mut self.armed {
            // Closing our end of the stream has QEMU's migration fail; until it has, `cont` is
            // refused.
            armed.outgoing = None;
        }
        let alive = self.qemu.liveness();
        let deadline = Instant::now() + patience;
        while let Err(e) = self.try_resume() {
            if let Err(gone) = alive() {
                self.stand_down();
                return Err(gone);
            }
            if Instant::now() >= deadline {
                return Err(e);
            }
            std::thread::sleep(RESUME_EVERY);
        }
        self.stand_by()
    }

    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        self.retired = Some(tracking);
        self.give_away();
    }
}
