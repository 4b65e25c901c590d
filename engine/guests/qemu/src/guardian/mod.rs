//! A process that outlives its supervisor by a moment, to put the guest right if the supervisor
//! dies.
//!
//! In the downtime the guest is stopped and only the supervisor knows why. If it is killed there,
//! nobody would ever let the guest run again. So before it stops the guest the first time the
//! supervisor starts a guardian: this same program, in a process group of its own, which waits for
//! the end of a pipe that only the supervisor holds open, and then acts on what they share.
//!
//! | the byte says | source: the supervisor died   | destination: the supervisor died |
//! | ---           | ---                           | ---                              |
//! | open          | cancel, let the guest run     | end the copy                     |
//! | sealed        | keep it stopped: Commit may be out  | let the guest run: it is ours |
//! | moved         | end QEMU: the guest runs at the destination | |
//! | watching      | nothing                       |                                  |
//! | finished      | nothing                       | nothing                          |
//!
//! At the source it is started before memory is armed ([`pageferry_engine::dirty::pagemap`]) and
//! holds one more descriptor of the userfaultfd: when the supervisor is killed the kernel does not
//! disarm all of memory in one long call; the guardian does it in short ones, after everything
//! else. Until the supervisor is about to stop the guest the byte says "watching": then that is all
//! that there is to do.
//!
//! "Let the guest run" means: if it ran before, says a second byte. QEMU's migration settings, as
//! they were, lie behind the two. All of it is shared memory, so sealing costs nothing in the
//! downtime.

pub mod sentry;

use super::qmp::Qmp;
use super::stream::Settings;
use pageferry_engine::dirty::pagemap::TrackedRange;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::notice::say;
use pageferry_transport::{Access, MemoryRegion, sealed_memfd};
use rustix::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::io::retry_on_intr;
use rustix::process::{Signal, pidfd_send_signal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
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
/// For QEMU to take a connection over which it is told to end, before it is ended by force.
const QUIT_MAX: Duration = Duration::from_secs(2);
/// Pause between two attempts at it.
const RESCUE_EVERY: Duration = Duration::from_millis(5);

/// Size of the shared memory, and where in it what lies.
const SHARED_BYTES: usize = 128 << 10;
const FLAG_AT: usize = 0;
const WAS_RUNNING_AT: usize = 1;
/// Length (u32, little endian) and JSON of [`Settings`].
const SETTINGS_AT: usize = 4;
/// The same of the tracked ranges: some hundred bytes each, and QEMU has 256 memory devices at
/// most.
const RANGES_AT: usize = 64 << 10;

/// Which side it guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The guest runs here, or is paused for the switchover.
    Source,
    /// A copy is being filled here.
    Destination,
}

/// What the first shared byte says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Flag {
    Open = 0,
    Sealed = 1,
    Finished = 2,
    Watching = 3,
    Moved = 4,
}

/// The supervisor's handle. Dropping it without [`Guardian::finish`] has the guardian act.
#[derive(Debug)]
pub struct Guardian {
    shared: Arc<MemoryRegion>,
    lifeline: Option<ChildStdin>,
    child: Child,
}

impl Guardian {
    /// Starts one for the QEMU with this pid and QMP socket, and waits until it is on duty. It
    /// inherits the process' handle, so that it never takes another process for it that was given
    /// the number anew.
    pub fn start(side: Side, pid: u32, pidfd: BorrowedFd<'_>, qmp: &Path) -> Result<Self> {
        Self::start_with(side, pid, pidfd, qmp, None)
    }

    /// The same at the source for memory that is about to be armed.
    pub fn start_watching(
        pid: u32,
        pidfd: BorrowedFd<'_>,
        qmp: &Path,
        uffd: BorrowedFd<'_>,
        ranges: &[TrackedRange],
    ) -> Result<Self> {
        Self::start_with(Side::Source, pid, pidfd, qmp, Some((uffd, ranges)))
    }

    fn start_with(
        side: Side,
        pid: u32,
        pidfd: BorrowedFd<'_>,
        qmp: &Path,
        tracked: Option<(BorrowedFd<'_>, &[TrackedRange])>,
    ) -> Result<Self> {
        let starting = |e| Error::os("starting the guardian process", e);
        let memfd = sealed_memfd("pageferry-guardian", MemfdFlags::empty(), SHARED_BYTES as u64)
            .map_err(|e| Error::os("making a memfd", e))?;
        let shared = MemoryRegion::map_shared(memfd.as_fd(), 0, SHARED_BYTES, Access::Write)?;
        // Until somebody says otherwise: a guest that runs by mistake can be paused again, one that
        // stands still by mistake is an outage.
        shared.write(WAS_RUNNING_AT, &[1])?;
        let mut command = Command::new("/proc/self/exe");
        inherit(&mut command, pidfd);
        if side == Side::Source {
            shared.write(FLAG_AT, &[Flag::Watching as u8])?;
        }
        if let Some((uffd, ranges)) = tracked {
            write_json(&shared, RANGES_AT..SHARED_BYTES, ranges)?;
            inherit(&mut command, uffd);
        }
        let mut child = command
            .arg0("pageferry")
            .args([
                "guardian",
                "--side",
                if side == Side::Source { "source" } else { "destination" },
            ])
            .args(["--pid", &pid.to_string(), "--pidfd", &pidfd.as_raw_fd().to_string(), "--qmp"])
            .arg(qmp)
            .arg("--flag")
            .arg(format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd()))
            .args(tracked.map(|(uffd, _)| format!("--uffd={}", uffd.as_raw_fd())))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(starting)?;
        let lifeline = child.stdin.take();
        let Some(stdout) = child.stdout.take() else {
            return Err(starting(std::io::ErrorKind::BrokenPipe.into()));
        };
        let guardian = Self { shared, lifeline, child };
        let mut fds = [rustix::event::PollFd::new(&stdout, rustix::event::PollFlags::IN)];
        let wait = rustix::event::Timespec { tv_sec: READY_MAX.as_secs() as i64, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&wait))
            .map_err(|e| Error::os("waiting for the guardian process", e))?;
        let ready = !fds[0].revents().is_empty();
        let mut line = String::new();
        if !ready || BufReader::new(stdout).read_line(&mut line).is_err() || line.trim() != "ready"
        {
            guardian.finish();
            return Err(Error::Guest(
                "the guardian process did not report for duty; its message is on stderr".into(),
            ));
        }
        Ok(guardian)
    }

    /// QEMU's settings, to be restored by whoever puts the guest right.
    pub fn entrust(&self, settings: &Settings) -> Result<()> {
        write_json(&self.shared, SETTINGS_AT..RANGES_AT, settings)
    }

    /// Whether the guest ran before, and so is to run again.
    pub fn was_running(&self, ran: bool) -> Result<()> {
        Ok(self.shared.write(WAS_RUNNING_AT, &[u8::from(ran)])?)
    }

    /// Fails if it is not on duty any more.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(Error::Guest(format!(
                "the guardian process ended ({status}); without it the guest would be lost if this process died in the downtime"
            ))),
            Err(e) => Err(Error::os("looking after the guardian process", e)),
        }
    }

    /// From here on the source's guest never runs again by itself, the destination's always will.
    pub fn seal(&self) -> Result<()> {
        self.set(Flag::Sealed)
    }

    /// The guest is another host's, by its own word or the operator's: what is left of it here is
    /// to be ended.
    pub fn give_away(&self) -> Result<()> {
        self.set(Flag::Moved)
    }

    /// Takes the seal back, if there is one, and what came after it: a QEMU that could not be ended
    /// may yet run its guest.
    pub fn unseal(&self) -> Result<()> {
        let flag = self.flag()?;
        let sealed = [Flag::Sealed, Flag::Moved].iter().any(|sealed| flag == *sealed as u8);
        if sealed { self.set(Flag::Open) } else { Ok(()) }
    }

    /// Whether nothing has been done yet that it would have to put right: at the source until
    /// [`Self::engage`].
    pub fn is_watching(&self) -> Result<bool> {
        Ok(self.flag()? == Flag::Watching as u8)
    }

    /// Called before anything is done that it might have to put right.
    pub fn engage(&self, was_running: bool) -> Result<()> {
        self.was_running(was_running)?;
        self.set(Flag::Open)
    }

    /// The opposite: what was done since is undone, and nothing has to be put right again.
    pub fn stand_back(&self) -> Result<()> {
        self.set(Flag::Watching)
    }

    fn flag(&self) -> Result<u8> {
        let mut flag = [0];
        self.shared.read(FLAG_AT, &mut flag)?;
        Ok(flag[0])
    }

    /// Sends it home; nothing is left to guard.
    pub fn finish(mut self) {
        if let Err(e) = self.set(Flag::Finished) {
            tracing::error!(error = %e, "the guardian cannot be told to end");
            let _ = self.child.kill();
        }
        drop(self.lifeline.take());
        // Its end frees its entry in the process table; nothing else waits for it.
        let mut child = self.child;
        let waiting =
            std::thread::Builder::new().name("guardian-end".into()).spawn(move || child.wait());
        if let Err(e) = waiting {
            tracing::debug!(error = %e, "no thread to wait for the guardian's end");
        }
    }

    fn set(&self, flag: Flag) -> Result<()> {
        Ok(self.shared.write(FLAG_AT, &[flag as u8])?)
    }
}

/// What the guardian process is started with.
#[derive(Debug, Clone)]
pub struct GuardianArgs {
    /// Which side it guards.
    pub side: Side,
    /// The QEMU process, for whoever looks at the command line.
    pub pid: u32,
    /// Its handle, inherited.
    pub pidfd: i32,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// The shared memory, as a path under the supervisor's /proc entry.
    pub flag: PathBuf,
    /// The userfaultfd with which the guest's memory is armed, inherited.
    pub uffd: Option<i32>,
}

/// The guardian's whole life. `ready` tells the supervisor, on this process' stdout, that it is
/// watched.
pub fn main(args: &GuardianArgs, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let file = File::options()
        .read(true)
        .open(&args.flag)
        .map_err(|e| Error::os("opening the shared memory", e))?;
    let shared = MemoryRegion::map_shared(file.as_fd(), 0, SHARED_BYTES, Access::Read)?;
    let pidfd = inherited_pidfd(args)?;
    // The kernel sends SIGHUP to a process group that becomes orphaned while a member is stopped:
    // a guardian that was stopped when its supervisor died would end without acting.
    signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::default())
        .map_err(|e| Error::os("handling SIGHUP", e))?;
    ready()?;

    // Nothing is ever written: this returns when the supervisor is gone.
    let _ = retry_on_intr(|| rustix::io::read(std::io::stdin(), &mut [0; 1]));

    let mut bytes = [0; 2];
    shared.read(FLAG_AT, &mut bytes)?;
    let says = |flag: Flag| bytes[0] == flag as u8;
    let (open, sealed) = (says(Flag::Open), says(Flag::Sealed));
    let settings: Option<Settings> = read_json(&shared, SETTINGS_AT..RANGES_AT);
    let rescue = || put_right(&args.qmp, bytes[1] == 1, settings.as_ref());
    let disarm = || disarm(args, &shared, bytes[0]);
    // The guest first, then the word about it.
    let done = match args.side {
        Side::Source if open => {
            rescue().map(|()| say("the supervisor died during a migration; the guest goes on here"))
        }
        Side::Source if sealed => {
            say(
                "the supervisor died after the destination was told to run the guest; the guest stays stopped here. \
                 `pageferry attach` asks the destination what became of it",
            );
            // It is watched from the first moment on.
            std::thread::scope(|scope| {
                scope.spawn(disarm);
                crate::guardian::sentry::keep_stopped(&args.qmp, &pidfd)
            })
        }
        Side::Source if says(Flag::Moved) => {
            say("the supervisor died after the guest had moved; its QEMU is ended here");
            end_qemu(&args.qmp, &pidfd, args.pid)
        }
        Side::Destination if open => pidfd_send_signal(&pidfd, Signal::KILL)
            .map_err(|e| Error::os("ending the unfinished copy of the guest", e)),
        Side::Destination if sealed => rescue().map(|()| {
            say("the supervisor died while it took over the guest; the guest is let go on here");
        }),
        _ => Ok(()),
    };
    if !sealed {
        disarm();
    }
    done
}

/// Disarms the guest's memory, unless the supervisor has done it and ended in order.
fn disarm(args: &GuardianArgs, shared: &MemoryRegion, flag: u8) {
    let Some(uffd) = args.uffd.filter(|_| flag != Flag::Finished as u8) else { return };
    let ranges: Vec<TrackedRange> = read_json(shared, RANGES_AT..SHARED_BYTES).unwrap_or_default();
    // SAFETY: inherited, and used for nothing else; it stays open until this process ends.
    pageferry_engine::dirty::pagemap::disarm(unsafe { BorrowedFd::borrow_raw(uffd) }, &ranges);
}

/// Has the child alone inherit a descriptor.
fn inherit(command: &mut Command, fd: BorrowedFd<'_>) {
    let fd = fd.as_raw_fd();
    // SAFETY: between fork and exec it makes one fcntl call, and allocates nothing. The caller
    // spawns before the descriptor goes.
    unsafe {
        command.pre_exec(move || {
            let fd = BorrowedFd::borrow_raw(fd);
            Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?)
        });
    }
}

/// The handle of QEMU that the supervisor left open for us.
fn inherited_pidfd(args: &GuardianArgs) -> Result<OwnedFd> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", args.pidfd));
    // Of a process that has ended meanwhile it says -1.
    if !info.is_ok_and(|info| info.lines().any(|line| line.starts_with("Pid:"))) {
        return Err(Error::refused(format!("descriptor {} is no handle of a process", args.pidfd)));
    }
    // SAFETY: it is open, and nothing else of this process knows it: it was inherited for this.
    Ok(unsafe { OwnedFd::from_raw_fd(args.pidfd) })
}

/// Writes a length and JSON to a part of the shared memory.
fn write_json<T: Serialize + ?Sized>(
    shared: &MemoryRegion,
    part: Range<usize>,
    value: &T,
) -> Result<()> {
    let json = serde_json::to_vec(value)
        .map_err(|e| Error::os("telling the guardian", std::io::Error::from(e)))?;
    if 4 + json.len() > part.len() {
        return Err(Error::Guest(
            "QEMU has more settings or memory than the guardian can be told".into(),
        ));
    }
    shared.write(part.start + 4, &json)?;
    Ok(shared.write(part.start, &(json.len() as u32).to_le_bytes())?)
}

/// What was written so, if it came to that.
fn read_json<T: DeserializeOwned>(shared: &MemoryRegion, part: Range<usize>) -> Option<T> {
    let mut length = [0; 4];
    shared.read(part.start, &mut length).ok()?;
    let length = u32::from_le_bytes(length) as usize;
    if length == 0 || length > part.len() - 4 {
        return None;
    }
    let mut json = vec![0; length];
    shared.read(part.start + 4, &mut json).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Cancels what is left of a migration, lets the vCPUs run if they ran before, and restores QEMU's
/// settings; tries again until it is so: QEMU may still be busy with the end of the migration.
fn put_right(qmp: &Path, was_running: bool, settings: Option<&Settings>) -> Result<()> {
    let deadline = Instant::now() + RESCUE_MAX;
    loop {
        let attempt = Qmp::connect(qmp, deadline).and_then(|mut qmp| {
            super::stream::cancel(&mut qmp)?;
            if was_running {
                super::stream::let_run(&mut qmp, deadline)?;
            }
            settings.map_or(Ok(()), |settings| settings.restore(&mut qmp))
        });
        match attempt {
            Ok(()) => return Ok(()),
            Err(e) if Instant::now() >= deadline => return Err(e),
            Err(_) => std::thread::sleep(RESCUE_EVERY),
        }
    }
}

/// Ends a QEMU whose guest is another host's, by force if somebody else holds its monitor.
fn end_qemu(qmp: &Path, pidfd: &OwnedFd, pid: u32) -> Result<()> {
    // At its path another QEMU may listen by now, if this process was stopped for a while.
    if super::process::ended(pidfd, Duration::ZERO)? {
        return Ok(());
    }
    match Qmp::connect(qmp, Instant::now() + QUIT_MAX) {
        Ok(mut qmp) => super::process::quit(&mut qmp, pidfd, pid),
        Err(_) => super::process::kill(pidfd, pid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{PidfdFlags, getpid, pidfd_open};
    use std::os::fd::IntoRawFd;

    #[test]
    fn only_a_handle_of_a_process_is_taken_for_one() {
        let args = |pidfd| GuardianArgs {
            side: Side::Source,
            pid: 1,
            pidfd,
            qmp: PathBuf::new(),
            flag: PathBuf::new(),
            uffd: None,
        };
        let file = File::open("/dev/null").unwrap();
        let error = inherited_pidfd(&args(file.as_raw_fd())).unwrap_err().to_string();
        assert!(error.contains("no handle of a process"), "{error}");
        assert!(inherited_pidfd(&args(-1)).is_err());
        let ours = pidfd_open(getpid(), PidfdFlags::empty()).unwrap().into_raw_fd();
        let inherited = inherited_pidfd(&args(ours)).unwrap();
        assert!(!super::super::process::ended(&inherited, Duration::ZERO).unwrap());
    }
}
