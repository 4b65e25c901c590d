//! From pause to commit, as types: a state that was not reached cannot be left.
//!
//! ```text
//!   Paused::enter -- drain --> Drained -- prepare --> Prepared -- commit --> Committed
//!      |                          |                      |
//!      +------ dropped: the guest runs on at the source -+
//! ```
//!
//! Whatever goes wrong before `commit`, an early return, a panic, drops the state, and dropping it
//! lets the guest run again. From `commit` on only an answer of the destination can do that.
//!
//! ```compile_fail
//! # use pageferry::switchover::Paused;
//! fn skips_the_drain(paused: Paused<'_>) {
//!     paused.prepare(); // there is no such step from here
//! }
//! ```

use crate::clock;
use crate::dirty::DirtySource;
use crate::error::{Error, Result};
use crate::guest::SourceGuest;
use crate::memory::bitmap::DirtyBitmap;
use crate::protocol::refusal::aborted;
use crate::protocol::{Control, Features, Message, Prepare, Ready, Running};
use crate::report::{Downtime, hold};
use crate::source::pump::Pump;
use crate::watch::Watch;
use pageferry_transport::{FenceTag, MemoryRegion};
use std::sync::Arc;
use std::time::Instant;

/// Lets the guest run again when it is dropped armed.
struct ResumeOnDrop<'g> {
    guest: Option<&'g mut dyn SourceGuest>,
}

impl<'g> ResumeOnDrop<'g> {
    fn guest(&mut self) -> &mut dyn SourceGuest {
        *self.guest.as_mut().expect("armed until commit disarms it")
    }

    fn disarm(mut self) {
        self.guest = None;
    }
}

impl Drop for ResumeOnDrop<'_> {
    fn drop(&mut self) {
        let Some(guest) = self.guest.take() else { return };
        match guest.resume() {
            Ok(()) => hold::point("resumed"),
            Err(e) => tracing::error!(error = %e.chain(), "the guest could not be resumed"),
        }
    }
}

/// Microseconds since `since`, and a new `since`.
fn lap(since: &mut Instant) -> u64 {
    let now = clock::now();
    now.duration_since(std::mem::replace(since, now)).as_micros() as u64
}

/// The vCPUs are stopped.
pub struct Paused<'g> {
    guest: ResumeOnDrop<'g>,
    started: Instant,
    since: Instant,
    downtime: Downtime,
    was_running: bool,
}

/// Everything that makes up the guest is on its way, with a fence behind it.
pub struct Drained<'g> {
    guest: ResumeOnDrop<'g>,
    started: Instant,
    since: Instant,
    downtime: Downtime,
    was_running: bool,
    fence: FenceTag,
    state_bytes: u64,
    staged: Vec<(u64, u32)>,
    registrations: u64,
    digest: Option<u128>,
}

/// The destination holds the whole guest and waits.
pub struct Prepared<'g> {
    guest: ResumeOnDrop<'g>,
    started: Instant,
    since: Instant,
    downtime: Downtime,
}

/// Commit may have reached the destination. The guest stays stopped here, but for the destination's
/// word.
pub struct Committed {
    started: Instant,
    since: Instant,
    downtime: Downtime,
}

impl<'g> Paused<'g> {
    /// Stops the vCPUs. The downtime begins. Before that, `ahead` is told whether they run.
    pub fn enter(guest: &'g mut dyn SourceGuest, ahead: impl FnOnce(bool)) -> Result<Self> {
        let was_running = guest.is_running()?;
        ahead(was_running);
        hold::point("pausing");
        let started = clock::now();
        let mut since = started;
        let mut guest = ResumeOnDrop { guest: Some(guest) };
        guest.guest().pause()?;
        let downtime = Downtime { pause: lap(&mut since), ..Downtime::default() };
        Ok(Self { guest, started, since, downtime, was_running })
    }

    /// Sends the last dirty pages and the device state: sync and post while the state is being
    /// saved, sync once more after the save (saving may write guest memory), and a fence behind it
    /// all. Before a page that went with the first push goes again, the pump has that push
    /// received. `zeros` is given where memory may have been taken away from the guest meanwhile.
    pub fn drain(
        mut self,
        pump: &mut Pump<'_>,
        dirty: &mut DirtyBitmap,
        source: &mut dyn DirtySource,
        state: &Arc<MemoryRegion>,
        zeros: Option<&Arc<MemoryRegion>>,
        watch: &mut Watch<'_>,
    ) -> Result<Drained<'g>> {
        let since = &mut self.since;
        self.guest.guest().begin_save()?;
        source.sync(dirty)?;
        self.downtime.sync = lap(since);
        pump.push(dirty, watch, &mut |_| {})?;
        self.downtime.push = lap(since);
        let mut saved = 0;
        self.guest.guest().save(&mut |piece| {
            if piece.is_empty() {
                return watch();
            }
            if piece.len() > state.len() - saved {
                return Err(Error::Guest(format!(
                    "the device state is larger than the {} bytes announced",
                    state.len()
                )));
            }
            state.write(saved, piece)?;
            pump.push_state(saved, piece.len(), watch)?;
            saved += piece.len();
            Ok(())
        })?;
        self.downtime.save = lap(since);
        source.sync(dirty)?;
        self.downtime.sync += lap(since);
        if let Some(zeros) = zeros {
            pump.push_freed(dirty, zeros, watch)?;
        }
        pump.push(dirty, watch, &mut |_| {})?;
        let fence = pump.last_fence()?;
        let (staged, registrations) = (pump.staged(), pump.registrations_since());
        self.downtime.push += lap(since);
        Ok(Drained {
            guest: self.guest,
            started: self.started,
            since: self.since,
            downtime: self.downtime,
            was_running: self.was_running,
            fence,
            state_bytes: saved as u64,
            staged,
            registrations,
            digest: None,
        })
    }
}

impl<'g> Drained<'g> {
    /// Length of the device state.
    #[must_use]
    pub fn state_bytes(&self) -> u64 {
        self.state_bytes
    }

    /// Pages that went to the staging region.
    #[must_use]
    pub fn staged_pages(&self) -> u64 {
        self.staged.len() as u64
    }

    /// Registrations of memory that were made in the downtime.
    #[must_use]
    pub fn registrations(&self) -> u64 {
        self.registrations
    }

    /// Digests all memory that the guest has now, to be compared at the destination.
    pub fn digest(&mut self) -> Result<()> {
        self.guest.guest().check_memory()?;
        self.digest = Some(crate::memory::digest::digest(self.guest.guest().memory())?);
        self.downtime.verify = lap(&mut self.since);
        Ok(())
    }

    /// Tells the destination, and waits until it holds the whole guest.
    pub fn prepare(
        mut self,
        control: &mut Control,
        deadline: Instant,
        watch: &mut Watch<'_>,
    ) -> Result<Prepared<'g>> {
        let prepare = Prepare {
            fence: self.fence.0,
            state_bytes: self.state_bytes,
            was_running: self.was_running,
            staged: self.staged,
            digest: self.digest,
            features: Features::default(),
        };
        control.send(&Message::Prepare(prepare), deadline)?;
        let Ready { load_us, fence_us, verify_us, .. } = match control
            .receive_watched("Ready", deadline, watch)?
        {
            Message::Ready(ready) => ready,
            Message::Abort(abort) => return Err(aborted(abort)),
            other => return Err(Error::Protocol(format!("{} in answer to Prepare", other.name()))),
        };
        let elapsed = lap(&mut self.since);
        self.downtime.load = load_us.min(elapsed);
        self.downtime.push += fence_us.min(elapsed);
        self.downtime.verify += verify_us.min(elapsed);
        self.downtime.commit =
            elapsed.saturating_sub(load_us.saturating_add(fence_us).saturating_add(verify_us));
        Ok(Prepared {
            guest: self.guest,
            started: self.started,
            since: self.since,
            downtime: self.downtime,
        })
    }
}

impl<'g> Prepared<'g> {
    /// The point of no return: seals the guest, then sends Commit. Failing to seal is the last
    /// chance to resume; failing to send is not, for bytes may have left. In between `sealed` is
    /// called: from there on Commit may be sent by others, too.
    pub fn commit(
        mut self,
        control: &mut Control,
        deadline: Instant,
        sealed: impl FnOnce(),
    ) -> Result<(Committed, Result<()>)> {
        self.guest.guest().seal()?;
        self.guest.disarm();
        sealed();
        let sent = control.send(&Message::Commit, deadline);
        Ok((Committed { started: self.started, since: self.since, downtime: self.downtime }, sent))
    }
}

impl Committed {
    /// The downtime, at the destination's word that it runs the guest. It ends when that word was
    /// sent, less the time that the guest had been running by then; the word's way here is in it.
    #[must_use]
    pub fn downtime(&self, running: &Running) -> Downtime {
        let since_then = |begin: Instant| {
            (clock::elapsed(begin).as_micros() as u64).saturating_sub(running.running_us)
        };
        let elapsed = since_then(self.since);
        let mut downtime = self.downtime;
        downtime.resume = running.resume_us.min(elapsed);
        downtime.commit += elapsed - downtime.resume;
        downtime.total = since_then(self.started);
        downtime
    }
}
