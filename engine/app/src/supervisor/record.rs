//! The record of a guest: where its process is, and what is to be asked about it, for the
//! supervisor after this one. It is one file of the runtime directory (`claim.rs`).

use pageferry_engine::error::{Error, Result};
use pageferry_engine::inquiry::Question;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Overrides where the directory is.
pub const RUNTIME_DIR_VARIABLE: &str = "PAGEFERRY_RUNTIME_DIR";

/// Where a guest can be found after its supervisor's death.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// QEMU's process id.
    pub pid: u32,
    /// Start time of that process in clock ticks since boot, which tells it from a later process of
    /// the same id.
    pub started: u64,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// What is to be asked about it, if it was sealed for a Commit that nobody has answered yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<Doubt>,
}

/// What a later supervisor needs to ask on, and to put the guest right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doubt {
    /// What is to be asked.
    pub question: Question,
    /// The monitor's settings as they were before the migration, in a form of its own.
    pub settings: Option<serde_json::Value>,
}

impl Record {
    /// A record of a live process.
    pub fn of(pid: u32, qmp: &Path) -> Result<Self> {
        let started =
            start_time(pid).ok_or_else(|| Error::Guest(format!("process {pid} has ended")))?;
        Ok(Self { pid, started, qmp: qmp.into(), doubt: None })
    }

    /// Whether that very process still lives.
    #[must_use]
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Puts it in the place of an earlier one.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|e| Error::os("writing the guest's record", std::io::Error::other(e)))?;
        pageferry_engine::host::private::write(path, &text).map_err(|e| cannot_write(path, &e))
    }

    /// What is to be asked about the guest of this process, which is in hand and so lives.
    #[must_use]
    pub fn doubt_about(self, pid: u32) -> Option<Doubt> {
        if self.pid == pid && self.alive() { self.doubt } else { None }
    }
}

/// Field 22 of /proc/PID/stat, unless field 3 says that the process has ended: nobody may ever reap
/// a QEMU whose supervisor died, as in a container without an init. Fields are counted after the
/// command's closing parenthesis.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    fields.nth(18)?.parse().ok().filter(|_| !ended)
}

/// What to say when the runtime directory takes no file.
pub(super) fn cannot_write(path: &Path, e: &std::io::Error) -> Error {
    let fix = match e.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT) => {
            format!(
                "its file system is full: free some room, or set {RUNTIME_DIR_VARIABLE} to another directory"
            )
        }
        Some(Errno::ROFS | Errno::ACCESS | Errno::PERM) => {
            format!("set {RUNTIME_DIR_VARIABLE} to a directory that you can write")
        }
        _ => format!(
            "see whether the runtime directory is as it should be, or set {RUNTIME_DIR_VARIABLE}"
        ),
    };
    Error::refused(format!("cannot write {}: {e}; {fix}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_nobody_reaps_is_not_alive() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let record = Record::of(child.id(), Path::new("/x")).unwrap();
        assert!(record.alive());
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while record.alive() {
            assert!(std::time::Instant::now() < deadline, "a zombie counts as alive");
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_record_tells_a_process_from_a_later_one() {
        let mut record = Record::of(std::process::id(), Path::new("/x")).unwrap();
        assert!(record.alive());
        record.started += 1;
        assert!(!record.alive());
    }
}
