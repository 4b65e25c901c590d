//! A process that outlives its supervisor by a moment, to put the guest right if the supervisor dies.
//!
//! In the blackout the guest is stopped and only the supervisor knows why. If it is killed there, nobody
//! would ever let the guest run again. So ahead of the blackout the supervisor starts a guardian: this
//! same program, in a process group of its own, which waits for the end of a pipe that only the
//! supervisor holds open, and then acts on a byte that they share.
//!
//! | the byte says | source: the supervisor died   | destination: the supervisor died |
//! | ---           | ---                           | ---                              |
//! | open          | cancel, let the guest run     | end the copy                     |
//! | sealed        | leave it stopped: Commit may be out | let the guest run: it is ours |
//! | finished      | nothing                       | nothing                          |
//!
//! The byte lies in shared memory, so sealing it costs nothing in the blackout and cannot fail.

use super::qmp::Qmp;
use crate::error::{Error, Result};
use pageferry_transport::{Access, MemoryRegion};
use rustix::fd::AsFd;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the guardian to report for duty.
const READY_MAX: Duration = Duration::from_secs(5);
/// For the guardian to reach QEMU and put the guest right.
const RESCUE_MAX: Duration = Duration::from_secs(30);
/// Pause between two attempts at it.
const RESCUE_EVERY: Duration = Duration::from_millis(5);

/// Size of the shared memory; one byte of it is used.
const FLAG_BYTES: usize = 4096;

/// Which side it guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Side {
    /// The guest runs here, or is paused for the switchover.
    Source,
    /// A copy is being filled here.
    Destination,
}

/// What the shared byte says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Flag {
    Open = 0,
    Sealed = 1,
    Finished = 2,
}

/// The supervisor's handle. Dropping it without [`Guardian::finish`] has the guardian act.
#[derive(Debug)]
pub struct Guardian {
    flag: Arc<MemoryRegion>,
    lifeline: Option<ChildStdin>,
    child: Child,
}

impl Guardian {
    /// Starts one for the QEMU with this pid and QMP socket, and waits until it is on duty.
    pub fn start(side: Side, pid: u32, qmp: &Path) -> Result<Self> {
        let starting = |e| Error::os("starting the guardian process", e);
        let memfd = memfd_create("pageferry-guardian", MemfdFlags::CLOEXEC)
            .map_err(|e| Error::os("creating a memfd", e))?;
        ftruncate(&memfd, FLAG_BYTES as u64).map_err(|e| Error::os("sizing a memfd", e))?;
        let flag = MemoryRegion::map_shared(memfd.as_fd(), 0, FLAG_BYTES, Access::Write)?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("pageferry")
            .args(["guardian", "--side", if side == Side::Source { "source" } else { "destination" }])
            .args(["--pid", &pid.to_string(), "--qmp"])
            .arg(qmp)
            .arg("--flag")
            .arg(format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(starting)?;
        let lifeline = child.stdin.take();
        let Some(stdout) = child.stdout.take() else {
            return Err(starting(std::io::ErrorKind::BrokenPipe.into()));
        };
        let guardian = Self { flag, lifeline, child };
        let mut fds = [rustix::event::PollFd::new(&stdout, rustix::event::PollFlags::IN)];
        let wait = rustix::event::Timespec { tv_sec: READY_MAX.as_secs() as i64, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&wait))
            .map_err(|e| Error::os("waiting for the guardian process", e))?;
        let ready = !fds[0].revents().is_empty();
        let mut line = String::new();
        if !ready || BufReader::new(stdout).read_line(&mut line).is_err() || line.trim() != "ready" {
            guardian.finish();
            return Err(Error::Guest(
                "the guardian process did not report for duty; its message is on stderr".into(),
            ));
        }
        Ok(guardian)
    }

    /// From here on the source's guest never runs again by itself, the destination's always will.
    pub fn seal(&self) -> Result<()> {
        self.set(Flag::Sealed)
    }

    /// Takes the seal back.
    pub fn unseal(&self) -> Result<()> {
        self.set(Flag::Open)
    }

    /// Sends it home; nothing is left to guard.
    pub fn finish(mut self) {
        if let Err(e) = self.set(Flag::Finished) {
            tracing::error!(error = %e, "the guardian cannot be told to end");
            let _ = self.child.kill();
        }
        drop(self.lifeline.take());
        if let Err(e) = self.child.wait() {
            tracing::debug!(error = %e, "guardian");
        }
    }

    fn set(&self, flag: Flag) -> Result<()> {
        Ok(self.flag.write(0, &[flag as u8])?)
    }
}

/// What the guardian process is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct GuardianArgs {
    /// Which side it guards.
    #[arg(long)]
    side: Side,
    /// The QEMU process.
    #[arg(long)]
    pid: u32,
    /// Its QMP socket.
    #[arg(long)]
    qmp: PathBuf,
    /// The shared byte, as a path under the supervisor's /proc entry.
    #[arg(long)]
    flag: PathBuf,
}

/// The guardian's whole life.
pub fn main(args: &GuardianArgs) -> Result<()> {
    let file =
        File::options().read(true).open(&args.flag).map_err(|e| Error::os("opening the shared byte", e))?;
    let flag = MemoryRegion::map_shared(file.as_fd(), 0, FLAG_BYTES, Access::Read)?;
    let pid = i32::try_from(args.pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| Error::refused("not a process id"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())
        .map_err(|e| Error::os(format!("opening process {}", args.pid), e))?;
    let mut stdout = std::io::stdout();
    stdout
        .write_all(b"ready\n")
        .and_then(|()| stdout.flush())
        .map_err(|e| Error::os("reporting for duty", e))?;

    // Nothing is ever written: this returns when the supervisor is gone.
    let mut end = [0; 1];
    let _ = std::io::stdin().read(&mut end);

    let mut byte = [0; 1];
    flag.read(0, &mut byte)?;
    let (open, sealed) = (byte[0] == Flag::Open as u8, byte[0] == Flag::Sealed as u8);
    match args.side {
        Side::Source if open => {
            eprintln!("pageferry: the supervisor died during a migration; letting the guest run on here");
            let_run(&args.qmp)
        }
        Side::Source if sealed => {
            eprintln!(
                "pageferry: the supervisor died after the destination was told to run the guest; the guest stays stopped here. \
                 Look at the destination, then use `pageferry settle`"
            );
            Ok(())
        }
        Side::Destination if open => pidfd_send_signal(&pidfd, Signal::KILL)
            .map_err(|e| Error::os("ending the unfinished copy of the guest", e)),
        Side::Destination if sealed => {
            eprintln!(
                "pageferry: the supervisor died while it took over the guest; letting the guest run here"
            );
            let_run(&args.qmp)
        }
        _ => Ok(()),
    }
}

/// Cancels what is left of a migration and lets the vCPUs run, trying again until it is so: QEMU may
/// still be busy with the end of the migration.
pub fn let_run(qmp: &Path) -> Result<()> {
    let deadline = Instant::now() + RESCUE_MAX;
    loop {
        let attempt = Qmp::connect(qmp, deadline).and_then(|mut qmp| {
            // Refused where no migration is under way, which is fine.
            let _ = qmp.execute("migrate_cancel", json!({}), deadline);
            loop {
                let status = qmp.execute("query-migrate", json!({}), deadline)?;
                let status = status.get("status").and_then(|s| s.as_str()).unwrap_or("none");
                if !super::stream::under_way(status) {
                    break;
                }
                std::thread::sleep(RESCUE_EVERY);
                if Instant::now() >= deadline {
                    return Err(Error::Timeout { what: "waiting for QEMU to end its migration".into() });
                }
            }
            qmp.execute("cont", json!({}), deadline)?;
            let status = qmp.execute("query-status", json!({}), deadline)?;
            match status.get("running").and_then(serde_json::Value::as_bool) {
                Some(true) => Ok(()),
                _ => Err(Error::Guest("QEMU does not let the guest run yet".into())),
            }
        });
        match attempt {
            Ok(()) => return Ok(()),
            Err(e) if Instant::now() >= deadline => return Err(e),
            Err(_) => std::thread::sleep(RESCUE_EVERY),
        }
    }
}
