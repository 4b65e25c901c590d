//! A real QEMU for tests. Missing, it fails the test: nothing passes silently.

use super::qmp::Qmp;
use super::qmp::client::within;
use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A QEMU with a QMP connection, killed on drop.
pub struct TestQemu {
    child: Child,
    /// The connection, negotiated.
    pub qmp: Qmp,
    _directory: tempfile::TempDir,
}

impl TestQemu {
    /// Starts QEMU under TCG with these options beside the usual ones.
    pub fn start<S: AsRef<OsStr>>(options: &[S]) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-display", "none", "-accel", "tcg"]).args(options);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let fd = listener.as_raw_fd();
        command.arg("-chardev").arg(format!("socket,id=test-qmp,fd={fd},server=on,wait=off"));
        command.args(["-mon", "chardev=test-qmp,mode=control"]);
        // SAFETY: fcntl on a descriptor that the child has inherited is all it does.
        unsafe { command.pre_exec(move || inherit(fd)) };
        let child = spawn(&mut command);
        drop(listener);
        let qmp = Qmp::connect(&path, Self::soon()).unwrap();
        Self { child, qmp, _directory: directory }
    }

    /// Starts a ready-made command whose monitor listens at `qmp_path`.
    pub fn of(command: &mut Command, qmp_path: &Path, directory: tempfile::TempDir) -> Self {
        let child = spawn(command);
        let qmp = Qmp::connect(qmp_path, Self::soon()).unwrap();
        Self { child, qmp, _directory: directory }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A deadline that only a hanging QEMU misses.
    pub fn soon() -> Instant {
        within(Duration::from_secs(30))
    }
}

impl Drop for TestQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    match command.spawn() {
        Ok(child) => child,
        Err(e) => {
            panic!("qemu-system-x86_64 does not start ({e}): run scripts/setup, which installs it")
        }
    }
}

fn inherit(fd: i32) -> std::io::Result<()> {
    // SAFETY: clears close-on-exec of a descriptor.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
