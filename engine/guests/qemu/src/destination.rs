//! A QEMU that waits to be filled, as the destination of a migration.

use super::guardian::{Guardian, Side};
use super::platform::{Gatherer, Platform};
use super::process::Qemu;
use super::source::QemuSource;
use super::stream::{self, Incoming, STATE_MAX, Settings};
use crate::guardian::sentry::{Post, Sentry};
use crate::platform::admit;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{DestinationGuest, GuestDescription, Liveness};
use pageferry_engine::host::room;
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::opened::OpenWatch;
use pageferry_transport::MemoryRegion;
use rustix::fd::AsFd;
use serde_json::json;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// For QEMU to take over the disks and let the vCPUs run.
const CONT_MAX: Duration = Duration::from_secs(60);
/// Bytes copied out of the state region at once.
const PIECE_BYTES: usize = 256 << 10;

/// See the [module](self).
#[derive(Debug)]
pub struct QemuDestination {
    qemu: Qemu,
    stream: Option<UnixStream>,
    settings: Settings,
    guardian: Option<Guardian>,
    huge_pages_set_aside: bool,
    /// Asks what the guest would see of its machine here.
    gatherer: Gatherer,
    /// Names of differences from the source's that the operator allows.
    allowed: Vec<String>,
    /// Tells who else comes to its memory while it waits.
    opened: OpenWatch,
    /// Whether somebody did, and its memory has not been made zero since.
    used: bool,
    /// The number of the last event before it waited: no RESUME and no RESET may follow before
    /// Commit.
    waiting_since: u64,
    /// Has the monitor from the load to Commit.
    sentry: Option<Sentry>,
    /// Why the sentry ended the copy, if it did.
    struck: Arc<OnceLock<String>>,
}

impl QemuDestination {
    /// Makes a destination of a QEMU that was started with `-S -incoming defer`.
    ///
    /// # Errors
    /// [`Error::Refused`] if other processes map its memory. Nothing was written then.
    pub fn new(mut qemu: Qemu) -> Result<Self> {
        // The watch first: who comes after the look is told by it.
        let opened = OpenWatch::of(qemu.memory())?;
        qemu.refuse_shared_use()?;
        let huge_pages_set_aside = qemu.has_huge_pages_set_aside();
        room::check_huge_pages(qemu.memory(), huge_pages_set_aside)?;
        qemu.describe_images()?;
        let mut gatherer = Gatherer::default();
        gatherer.ask_ahead(&mut qemu.qmp)?;
        // Late activation: no lock on a disk image before the guest is ours.
        let settings = Settings::read(&mut qemu.qmp)?;
        settings.impose(&mut qemu.qmp, &["x-ignore-shared", "events", "late-block-activate"])?;
        let stream = Incoming::start(&mut qemu.qmp)?.into_stream();
        qemu.qmp.look()?;
        let waiting_since = qemu.qmp.events_heard();
        // Firmware and tables that QEMU laid into guest memory; the source's will come.
        qemu.memory().make_zero()?;
        let guardian =
            Guardian::start(Side::Destination, qemu.pid(), qemu.pidfd().as_fd(), qemu.qmp_path())?;
        guardian.entrust(&settings)?;
        let sentry = Sentry::ready(Post::Destination(qemu.pidfd()))?;
        let struck = sentry.struck();
        Ok(Self {
            qemu,
            stream: Some(stream),
            settings,
            guardian: Some(guardian),
            huge_pages_set_aside,
            gatherer,
            allowed: Vec::new(),
            opened,
            used: false,
            waiting_since,
            sentry: Some(sentry),
            struck,
        })
    }

    /// Takes a guest although what it sees differs in these
    /// ([`platform::Difference::name`](super::platform::Difference)).
    #[must_use]
    pub fn allowing(self, names: &[String]) -> Self {
        Self { allowed: names.to_vec(), ..self }
    }

    /// The source that the guest, which runs here now, can be moved on from.
    #[must_use]
    pub fn into_source(mut self) -> QemuSource {
        // From here on it is the new supervisor's guest, in doubt or not.
        if let Some(guardian) = self.guardian.take() {
            guardian.finish();
        }
        QemuSource::arrived(self.qemu, self.settings, self.gatherer)
    }

    /// The QEMU itself.
    #[must_use]
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }
}

impl DestinationGuest for QemuDestination {
    fn describe(&self) -> GuestDescription {
        self.qemu.description().clone()
    }

    fn admit(&mut self, theirs: &GuestDescription) -> Result<()> {
        let theirs = Platform::unpack(&theirs.platform)?;
        // Asked now: what was plugged in or out while this waited is part of the machine. What
        // takes long is known.
        let pid = self.qemu.pid();
        admit(&theirs, &self.gatherer.gather(&mut self.qemu.qmp, pid)?, &self.allowed)?;
        // While this waited, somebody may have used its memory, or changed its images.
        self.used |= self.opened.was_opened();
        self.qemu.refuse_shared_use()?;
        if self.used {
            self.qemu.memory().make_zero()?;
            self.used = false;
        }
        self.qemu
            .check_images()
            .map_err(|e| Error::Refused(format!("{}; start the receiver again", e.chain())))
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.qemu.memory()
    }

    fn liveness(&self) -> Liveness {
        let (alive, struck) = (self.qemu.liveness(), Arc::clone(&self.struck));
        Arc::new(move || match struck.get() {
            Some(why) => Err(Error::Guest(why.clone())),
            None => alive(),
        })
    }

    fn has_huge_pages_set_aside(&self) -> bool {
        self.huge_pages_set_aside
    }

    fn load(&mut self, state: &MemoryRegion, len: usize) -> Result<()> {
        let deadline = Instant::now() + STATE_MAX;
        let what = "handing the device state to QEMU";
        self.refuse_interference()?;
        self.qemu.check_images()?;
        if self.opened.was_opened() {
            return Err(Error::Guest(
                "another process opened the guest's memory file while the guest came, and may have written there".into(),
            ));
        }
        self.qemu.qmp.type_ahead("cont", deadline)?;
        let mut stream = self
            .stream
            .take()
            .ok_or_else(|| Error::Guest("the device state was loaded already".into()))?;
        let mut piece = vec![0; PIECE_BYTES.min(len)];
        let mut at = 0;
        while at < len {
            let part = PIECE_BYTES.min(len - at);
            state.read(at, &mut piece[..part])?;
            let left =
                deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            stream.set_write_timeout(Some(left)).map_err(|e| Error::os(what, e))?;
            stream.write_all(&piece[..part]).map_err(|e| refused(&Error::os(what, e)))?;
            at += part;
        }
        drop(stream);
        let loaded = self
            .qemu
            .qmp
            .wait_event(deadline, |e| stream::is_migration(e, &["completed", "failed"]));
        match loaded {
            Ok(event) if stream::is_migration(&event, &["completed"]) => {
                let sentry = self.sentry.as_ref();
                sentry.map_or(Ok(()), |sentry| sentry.post(&mut self.qemu.qmp, self.waiting_since))
            }
            Ok(_) => Err(refused(&Error::Guest("its migration failed".into()))),
            Err(e) => Err(refused(&e)),
        }
    }

    fn seal(&mut self, was_running: bool) -> Result<()> {
        // From here on a `cont` is nobody's mistake.
        if let Some(sentry) = self.sentry.take() {
            sentry.relieve(&mut self.qemu.qmp);
        }
        let Some(guardian) = &self.guardian else { return Ok(()) };
        guardian.was_running(was_running)?;
        guardian.seal()
    }

    fn run(&mut self, was_running: bool) -> Result<()> {
        // A QEMU that has ended before has not run the guest, and has not got it either.
        self.liveness()()?;
        if was_running {
            self.cont()?;
        }
        if let Some(guardian) = self.guardian.take() {
            guardian.finish();
        }
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        self.qemu.kill()?;
        if let Some(guardian) = self.guardian.take() {
            guardian.finish();
        }
        Ok(())
    }
}

impl QemuDestination {
    /// Fails if another monitor has let the copy run, or reset it: a reset writes memory.
    fn refuse_interference(&mut self) -> Result<()> {
        self.qemu.qmp.look()?;
        let turns = self.qemu.qmp.turns();
        if turns.resume.max(turns.reset) <= self.waiting_since {
            return Ok(());
        }
        Err(Error::Guest(
            "another monitor at the destination let the waiting QEMU run, or reset it, so its memory is not the guest's"
                .into(),
        ))
    }

    /// Lets the vCPUs run. Only QEMU's own refusal means that they do not: `cont` may wait for a
    /// disk's lock and then succeed.
    fn cont(&mut self) -> Result<()> {
        let deadline = Instant::now() + CONT_MAX;
        match self.qemu.qmp.execute("cont", json!({}), deadline) {
            Ok(_) => Ok(()),
            Err(e @ Error::VmmRefused { .. }) => match self.qemu.is_running() {
                Ok(false) => Err(e),
                Ok(true) => Ok(()),
                Err(doubt) => Err(Error::Unknown(doubt.chain())),
            },
            Err(doubt) => Err(Error::Unknown(format!(
                "the guest is this host's, but QEMU did not say that it runs: {}",
                doubt.chain()
            ))),
        }
    }
}

pub(crate) fn refused(cause: &Error) -> Error {
    Error::Guest(format!(
        "QEMU at the destination did not take the device state ({}); its own message is on its stderr. Were both QEMUs started \
         with the same machine type, devices and CPU model?",
        cause.chain()
    ))
}
