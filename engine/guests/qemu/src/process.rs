//! A running QEMU as the supervisor holds it: its process, its monitor, its memory.

use super::qmp::Qmp;
use super::stream::QMP_MAX;
use crate::memory::find;
use crate::memory::find::GuestBlocks;
use crate::memory::image::Image;
use crate::memory::ownership;
use crate::memory::ownership::Ownership;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{BlockDescription, GuestDescription, Liveness};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::memory::{GuestMemory, MemorySlot};
use pageferry_transport::Access;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For QEMU to end after it was told to.
const END_MAX: Duration = Duration::from_secs(5);

/// QEMU, attached.
#[derive(Debug)]
pub struct Qemu {
    /// Its monitor, ours alone.
    pub qmp: Qmp,
    qmp_path: PathBuf,
    pid: u32,
    pidfd: Arc<OwnedFd>,
    memory: Arc<GuestMemory>,
    description: GuestDescription,
    private_bytes: u64,
    images: Vec<Image>,
    ownership: Ownership,
}

impl Qemu {
    /// Takes up the QEMU with this pid and QMP socket, and the files of its memory, some of which
    /// may be owned already. Nothing about it changes.
    pub fn attach(
        pid: u32,
        qmp_path: &Path,
        access: Access,
        mut ownership: Ownership,
        deadline: Instant,
    ) -> Result<Self> {
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| Error::refused(format!("{pid} is not a process id")))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(|e| match e {
            Errno::SRCH => Error::refused(format!(
                "there is no process {pid}; give the pid of the running QEMU with --pid"
            )),
            e => Error::os(format!("opening process {pid}"), e),
        })?;
        let mut qmp = Qmp::connect(qmp_path, deadline)?;
        let GuestBlocks { shared, unshared, images } = find::find(&mut qmp, pid, access, deadline)?;
        let private_bytes = unshared.iter().map(|block| block.bytes).sum();
        let machine =
            qmp.execute("qom-get", json!({ "path": "/machine", "property": "type" }), deadline)?;
        let cpus = qmp.execute("query-cpus-fast", json!({}), deadline)?;
        let memory = GuestMemory::map_unreserved(shared, access)?;
        ownership.cover(&memory)?;
        // Files of /proc were opened by its number, which it has kept if it lives.
        if ended(&pidfd, Duration::ZERO)? {
            return Err(Error::Guest(format!("process {pid} died")));
        }
        let description = GuestDescription {
            monitor: "qemu".into(),
            machine: machine.as_str().unwrap_or("unknown").trim_end_matches("-machine").to_owned(),
            vcpus: u32::try_from(cpus.as_array().map_or(0, Vec::len)).unwrap_or(u32::MAX),
            blocks: described(&memory),
            images: Vec::new(),
            platform: Vec::new(),
        };
        Ok(Self {
            qmp,
            qmp_path: qmp_path.into(),
            pid,
            pidfd: Arc::new(pidfd),
            memory: Arc::new(memory),
            description,
            private_bytes,
            images,
            ownership,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its QMP socket.
    #[must_use]
    pub fn qmp_path(&self) -> &Path {
        &self.qmp_path
    }

    /// Its shared memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Whether what QEMU maps now is what this maps: the same files at the same addresses, and not
    /// the same names alone.
    pub fn memory_is_current(&mut self) -> Result<bool> {
        let now = find::find(&mut self.qmp, self.pid, Access::Read, Instant::now() + QMP_MAX)?;
        Ok(self.memory.maps(&now.shared)? && same_images(&self.images, &now.images))
    }

    /// Maps, to read, what QEMU maps now, if that has changed: memory was plugged in or out, or
    /// replaced. Says whether.
    pub fn follow_memory(&mut self) -> Result<bool> {
        let now = find::find(&mut self.qmp, self.pid, Access::Read, Instant::now() + QMP_MAX)?;
        if self.memory.maps(&now.shared)? && same_images(&self.images, &now.images) {
            return Ok(false);
        }
        let memory = GuestMemory::map_unreserved(now.shared, Access::Read)?;
        self.ownership.cover(&memory)?;
        self.description.blocks = described(&memory);
        self.private_bytes = now.unshared.iter().map(|block| block.bytes).sum();
        (self.memory, self.images) = (Arc::new(memory), now.images);
        Ok(true)
    }

    /// Reads the blocks that nobody writes, so that the description has what they hold.
    pub fn describe_images(&mut self) -> Result<()> {
        self.description.images =
            self.images.iter_mut().map(Image::describe).collect::<Result<_>>()?;
        Ok(())
    }

    /// Fails if the file of a block that nobody writes was changed since it was described.
    pub fn check_images(&self) -> Result<()> {
        self.images.iter().try_for_each(Image::check)
    }

    /// Whether QEMU has reserved the huge pages of its memory, as it does unless `reserve=off` is
    /// said (since 6.1).
    pub fn has_huge_pages_set_aside(&mut self) -> bool {
        let huge = self.memory.slots().iter().filter(|slot| slot.backing_page_bytes != PAGE_BYTES);
        let ids: Vec<&str> = huge.filter_map(|slot| slot.name.rsplit('/').next()).collect();
        ids.into_iter().all(|id| {
            let backend = json!({ "path": format!("/objects/{id}"), "property": "reserve" });
            !matches!(
                self.qmp.execute("qom-get", backend, Instant::now() + QMP_MAX),
                Ok(Value::Bool(false))
            )
        })
    }

    /// Fails, with their names, if other processes map this memory, which is about to be written.
    pub fn refuse_shared_use(&self) -> Result<()> {
        ownership::alone(&self.memory, self.pid)
    }

    /// What the other side must match.
    #[must_use]
    pub fn description(&self) -> &GuestDescription {
        &self.description
    }

    /// Bytes of RAM blocks that travel in QEMU's own stream: firmware, video memory.
    #[must_use]
    pub fn private_bytes(&self) -> u64 {
        self.private_bytes
    }

    /// Fails once the process has ended.
    #[must_use]
    pub fn liveness(&self) -> Liveness {
        let (pidfd, pid) = (Arc::clone(&self.pidfd), self.pid);
        Arc::new(move || {
            if ended(&pidfd, Duration::ZERO)? {
                Err(Error::Guest(format!("the guest's QEMU (pid {pid}) has ended")))
            } else {
                Ok(())
            }
        })
    }

    /// A handle of the process, to wait for its end.
    #[must_use]
    pub fn pidfd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.pidfd)
    }

    /// Whether the vCPUs run, or sleep by the guest's own wish (ACPI S3) and must wake up by
    /// themselves.
    pub fn is_running(&mut self) -> Result<bool> {
        let status = self.qmp.execute("query-status", json!({}), Instant::now() + QMP_MAX)?;
        Ok(status["running"] == true || status["status"] == "suspended")
    }

    /// QEMU's own word for its state: `running`, `paused`, `postmigrate`.
    pub fn status(&mut self) -> Result<String> {
        let status = self.qmp.execute("query-status", json!({}), Instant::now() + QMP_MAX)?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or("unknown").to_owned())
    }

    /// Ends the process: by QMP, and if that does not help within five seconds, by force.
    pub fn quit(&mut self) -> Result<()> {
        quit(&mut self.qmp, &self.pidfd, self.pid)
    }

    /// Ends the process by force and waits for it.
    pub fn kill(&self) -> Result<()> {
        kill(&self.pidfd, self.pid)
    }
}

fn same_images(ours: &[Image], now: &[Image]) -> bool {
    ours.len() == now.len() && ours.iter().zip(now).all(|(a, b)| a.is_same(b))
}

fn described(memory: &GuestMemory) -> Vec<BlockDescription> {
    let describe = |slot: &MemorySlot| BlockDescription {
        name: slot.name.clone(),
        bytes: slot.region().len() as u64,
    };
    memory.slots().iter().map(describe).collect()
}

/// Ends a QEMU by its monitor, and if that does not help within five seconds, by force.
pub fn quit(qmp: &mut Qmp, pidfd: &OwnedFd, pid: u32) -> Result<()> {
    // An error here is most often QEMU being quicker than its answer.
    let _ = qmp.execute("quit", json!({}), Instant::now() + END_MAX);
    if ended(pidfd, END_MAX)? { Ok(()) } else { kill(pidfd, pid) }
}

/// Ends a process by force and waits for it.
pub fn kill(pidfd: &OwnedFd, pid: u32) -> Result<()> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(e) => return Err(Error::os(format!("ending process {pid}"), e)),
    }
    if ended(pidfd, END_MAX)? {
        Ok(())
    } else {
        Err(Error::Timeout { what: format!("waiting for process {pid} to end") })
    }
}

/// Waits for the end of a process; says whether it came.
pub fn ended(pidfd: &OwnedFd, wait: Duration) -> Result<bool> {
    let deadline = Instant::now() + wait;
    loop {
        let wait = deadline.saturating_duration_since(Instant::now());
        let wait =
            Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&wait)) {
            Ok(ready) => return Ok(ready > 0),
            // A signal to this process says nothing about that one.
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::os("waiting for a process", e)),
        }
    }
}
