//! A guest that runs in QEMU, as the source of a migration.

use super::blocks;
use super::guardian::{Guardian, Side};
use super::inject::userfaultfd_of;
use super::process::Qemu;
use super::stream::{self, Outgoing, QMP_MAX, Settings};
use crate::dirty::DirtySource;
use crate::dirty::pagemap::{PagemapSource, TrackedRange};
use crate::error::{Error, Result};
use crate::guest::{GuestDescription, Liveness, SourceGuest};
use crate::memory::GuestMemory;
use crate::policy::FixedCosts;
use pageferry_transport::Access;
use serde_json::json;
use std::sync::Arc;
use std::time::Instant;

/// Device state beside the RAM blocks in QEMU's stream: some 100 KiB a device at the very most.
const DEVICE_STATE_BYTES_MAX: u64 = 64 << 20;

/// The blackout's fixed part as QEMU 10 shows it on an ordinary host, in microseconds; each migration
/// measures its own, but only at its end.
const FIXED_COSTS: FixedCosts =
    FixedCosts { pause_us: 400, harvest_us: 0, save_us: 1500, load_us: 1800, resume_us: 400 };

/// See the [module](self).
#[derive(Debug)]
pub struct QemuSource {
    qemu: Qemu,
    armed: Option<Armed>,
    /// Whether the vCPUs ran when that was asked last.
    was_running: bool,
    /// Whether we stopped vCPUs that ran.
    stopped: bool,
}

/// What `arm` set up and `resume` takes down.
#[derive(Debug)]
struct Armed {
    guardian: Guardian,
    settings: Settings,
    outgoing: Option<Outgoing>,
}

impl QemuSource {
    /// Makes a source of a QEMU that was taken up.
    #[must_use]
    pub fn new(qemu: Qemu) -> Self {
        Self { qemu, armed: None, was_running: false, stopped: false }
    }

    /// The QEMU itself.
    pub fn qemu(&mut self) -> &mut Qemu {
        &mut self.qemu
    }

    fn armed(&mut self) -> Result<&mut Armed> {
        self.armed.as_mut().ok_or_else(|| Error::Guest("the switchover was not armed".into()))
    }
}

impl SourceGuest for QemuSource {
    fn describe(&self) -> GuestDescription {
        self.qemu.description().clone()
    }

    fn preflight(&mut self) -> Result<()> {
        let deadline = Instant::now() + QMP_MAX;
        let writers = blocks::outside_writers(&mut self.qemu.qmp, deadline)?;
        if !writers.is_empty() {
            return Err(Error::refused(format!(
                "the guest has devices that write its memory from outside QEMU's process, where no tracking sees it: {}; \
                 unplug them (vhost-net in the kernel, virtio and emulated devices are fine)",
                writers.join(", ")
            )));
        }
        let pid = self.qemu.pid();
        let now = blocks::find(&mut self.qemu.qmp, pid, Access::Read, deadline)?;
        let described = |name: &str, bytes: u64| {
            self.qemu.description().blocks.iter().any(|b| b.name == name && b.bytes == bytes)
        };
        if now.shared.len() != self.qemu.description().blocks.len()
            || !now.shared.iter().all(|b| described(&b.name, b.bytes))
        {
            return Err(Error::refused(
                "the guest's memory was changed since it was taken up (hot-plug): end this supervisor and `pageferry attach` again",
            ));
        }
        let status = self.qemu.status()?;
        if !matches!(status.as_str(), "running" | "paused" | "suspended") {
            return Err(Error::refused(format!(
                "the guest is in QEMU's state {status:?}; only one that runs or is paused can be moved"
            )));
        }
        let migration = self.qemu.qmp.execute("query-migrate", json!({}), Instant::now() + QMP_MAX)?;
        let migration = migration.get("status").and_then(serde_json::Value::as_str).unwrap_or("none");
        if stream::under_way(migration) {
            return Err(Error::refused(format!(
                "QEMU is busy with a migration of its own ({migration}); let it end, or `migrate_cancel` it"
            )));
        }
        crate::dirty::pagemap::probe()
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.qemu.memory()
    }

    fn state_bytes_max(&self) -> u64 {
        // Video memory may be written twice: once ahead of the pause, once after it.
        DEVICE_STATE_BYTES_MAX + 2 * self.qemu.private_bytes()
    }

    fn state_bytes_expected(&self) -> u64 {
        self.qemu.private_bytes()
    }

    fn fixed_costs(&self) -> FixedCosts {
        FIXED_COSTS
    }

    fn liveness(&self) -> Liveness {
        self.qemu.liveness()
    }

    fn may_discard(&mut self) -> Result<bool> {
        let deadline = Instant::now() + QMP_MAX;
        match self.qemu.qmp.execute("query-balloon", json!({}), deadline) {
            Ok(_) => return Ok(true),
            // No balloon; its free page reporting goes with it.
            Err(Error::Qmp { .. }) => {}
            Err(e) => return Err(e),
        }
        let devices = self.qemu.qmp.execute("query-memory-devices", json!({}), deadline)?;
        Ok(devices.as_array().is_some_and(|list| list.iter().any(|device| device["type"] == "virtio-mem")))
    }

    fn is_running(&mut self) -> Result<bool> {
        self.was_running = self.qemu.is_running()?;
        Ok(self.was_running)
    }

    fn start_tracking(&mut self) -> Result<Box<dyn DirtySource>> {
        let uffd = userfaultfd_of(self.qemu.pid())?;
        let ranges = self.qemu.memory().slots().iter().map(|slot| TrackedRange {
            process_address: slot.process_address,
            bytes: slot.region().len() as u64,
            first_page: slot.first_page,
        });
        Ok(Box::new(PagemapSource::new(uffd, self.qemu.pid(), ranges.collect())?))
    }

    fn arm(&mut self) -> Result<()> {
        let guardian = Guardian::start(Side::Source, self.qemu.pid(), self.qemu.qmp_path())?;
        let settings = match Settings::impose(&mut self.qemu.qmp, &["x-ignore-shared", "events"]) {
            Ok(settings) => settings,
            Err(e) => {
                guardian.finish();
                return Err(e);
            }
        };
        let armed = self.armed.insert(Armed { guardian, settings, outgoing: None });
        armed.outgoing = Some(Outgoing::start(&mut self.qemu.qmp)?);
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.stopped = self.was_running;
        self.qemu.qmp.execute("stop", json!({}), Instant::now() + QMP_MAX)?;
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
        outgoing.drain(&mut self.qemu.qmp, sink)
    }

    fn seal(&mut self) -> Result<()> {
        self.armed()?.guardian.seal()
    }

    fn resume(&mut self) -> Result<()> {
        let Some(armed) = self.armed.take() else { return Ok(()) };
        // Closing our end of the stream has QEMU's migration fail; until it has, `cont` is refused.
        drop(armed.outgoing);
        armed.guardian.unseal()?;
        let resumed = stream::cancel(&mut self.qemu.qmp).and_then(|()| {
            if std::mem::take(&mut self.stopped) {
                self.qemu.qmp.execute("cont", json!({}), Instant::now() + QMP_MAX)?;
            }
            Ok(())
        });
        match resumed {
            Ok(()) => {
                armed.guardian.finish();
                armed.settings.restore(&mut self.qemu.qmp)
            }
            // Left on duty, and let go of: it tries by its own means once this process lets go of QMP.
            Err(e) => {
                drop(armed.guardian);
                Err(e)
            }
        }
    }

    fn end(&mut self) -> Result<()> {
        if let Some(armed) = self.armed.take() {
            armed.guardian.finish();
        }
        self.qemu.quit()
    }
}
