//! A QEMU command that has been rewritten, to be started.

use crate::command::memory_file::make_memory;
use crate::command::rewrite::{MONITOR_ID, rewrite};
use crate::command::role::Role;
use pageferry_engine::error::{Error, Result};
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// A command that is ready to be started, with the descriptors that it inherits.
#[derive(Debug)]
pub struct GuestCommand {
    /// The program and its arguments.
    pub words: Vec<OsString>,
    inherited: Vec<OwnedFd>,
}

impl GuestCommand {
    /// Rewrites `words` (the program first), makes its memory files, and binds the monitor's socket
    /// at `qmp_socket`, which must not exist. Close it (drop it) once QEMU runs: only then does a
    /// connection to the monitor of a QEMU that died fail instead of waiting.
    pub fn prepare(words: &[OsString], role: Role, qmp_socket: &Path) -> Result<Self> {
        let mut inherited = Vec::new();
        let rewritten = rewrite(words, role, &mut |file| {
            let fd = make_memory(file)?;
            let number = fd.as_raw_fd();
            inherited.push(fd);
            Ok(number)
        });
        let mut words = rewritten?;
        let listener = pageferry_engine::host::private::listen(qmp_socket).map_err(|e| {
            Error::os(format!("making the monitor's socket {}", qmp_socket.display()), e)
        })?;
        words.extend([
            "-chardev".into(),
            format!("socket,id={MONITOR_ID},fd={},server=on,wait=off", listener.as_raw_fd()).into(),
            "-mon".into(),
            format!("chardev={MONITOR_ID},mode=control").into(),
        ]);
        inherited.push(listener.into());
        Ok(Self { words, inherited })
    }

    /// The command for `std::process`. The descriptors become inheritable in the child alone, so
    /// processes that other threads start meanwhile get none of them.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        let fds: Vec<i32> = self.inherited.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: between fork and exec it makes fcntl calls alone, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                for fd in &fds {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command
    }
}
