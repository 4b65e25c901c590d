//! Starting the user's QEMU: its command line as it is, with what pageferry needs added.

use pageferry_engine::error::{Error, Result};
use pageferry_qemu::command::{GuestCommand, Role};
use pageferry_qemu::memory::ownership::Ownership;
use pageferry_qemu::process::{Qemu, ended};
use pageferry_transport::Access;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// For QEMU to open its monitor. Preallocating a terabyte takes minutes, and the user asked for it.
const START_MAX: Duration = Duration::from_secs(600);
/// For a QEMU that has hung up to be gone.
const EXIT_MAX: Duration = Duration::from_secs(2);

/// Starts QEMU and takes it up, with the memory files that the command names. On failure no process
/// is left, and where a file is in use none was started.
pub fn launch(user: &[OsString], role: Role, qmp: &Path) -> Result<(Child, Qemu)> {
    let ownership = Ownership::ahead_of(user)?;
    // The name is ours by its lock, so a socket that is still there is a dead QEMU's.
    let _ = std::fs::remove_file(qmp);
    let prepared = GuestCommand::prepare(user, role, qmp)?;
    let program = Path::new(&prepared.words[0]).display().to_string();
    tracing::info!(command = ?prepared.words, "starting");
    let spawned = prepared.command().spawn();
    // QEMU has inherited what it needs; with our copy of its socket gone, its death is heard at
    // once.
    drop(prepared);
    let mut child = spawned.map_err(|e| {
        Error::refused(format!("cannot start {program}: {e}; is QEMU installed and in PATH?"))
    })?;
    let access = if role == Role::Source { Access::Read } else { Access::Write };
    Qemu::attach(child.id(), qmp, access, ownership, Instant::now() + START_MAX)
        .map_err(|e| {
            // It hangs up a moment before it has ended, and why it did so is on its stderr.
            if matches!(e, Error::Guest(_))
                && let Ok(pidfd) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            {
                let _ = ended(&pidfd, EXIT_MAX);
            }
            let ended = child.try_wait().ok().flatten();
            let _ = child.kill();
            let _ = child.wait();
            match ended {
                Some(status) => Error::refused(format!(
                    "{program} ended while it started ({status}); its message is above"
                )),
                None => e,
            }
        })
        .map(|qemu| (child, qemu))
}
