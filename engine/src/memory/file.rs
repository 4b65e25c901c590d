//! Which file a piece of memory lies in, and the lock that says whose it is.
//!
//! A memory file has a name that anybody may give to a second QEMU. So whoever holds a guest's
//! memory locks its file: with a lock of the open file description (`F_OFD_SETLK`, fcntl(2)), which
//! the kernel lifts when its holder dies, and which no other process inherits, as the descriptor
//! closes on exec.

use crate::error::{Error, Result};
use rustix::fs::fstat;
use rustix::io::Errno;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

/// `F_SETSIG` of the kernel's `asm-generic/fcntl.h`, which the libc crate does not have.
const F_SETSIG: i32 = 10;

/// A file, whatever its name: its device and its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// `st_dev` of stat(2).
    pub device: u64,
    /// `st_ino` of stat(2).
    pub inode: u64,
}

impl FileId {
    /// That of an open file.
    pub fn of(file: impl AsFd) -> Result<Self> {
        let stat = fstat(file).map_err(|e| Error::os("looking at a memory file", e))?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }

    /// That of the file at a path.
    pub fn at(path: &Path) -> Result<Self> {
        let what = || format!("looking at the memory file {}", path.display());
        let stat = rustix::fs::stat(path).map_err(|e| Error::os(what(), e))?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }

    /// Whether a line of `/proc/PID/maps` with this device (major, minor) and inode is a mapping of
    /// it.
    #[must_use]
    pub fn is_mapped_as(&self, device: (u64, u64), inode: u64) -> bool {
        let (major, minor) = (rustix::fs::major(self.device), rustix::fs::minor(self.device));
        self.inode == inode && device == (u64::from(major), u64::from(minor))
    }
}

/// A lock on a whole file, held until it is dropped or its process ends.
#[derive(Debug)]
pub struct FileLock {
    id: FileId,
    file: File,
}

impl FileLock {
    /// Locks the file at this path (`/proc/PID/fd/N` will do), through an open file description of
    /// its own. `None` if another process holds it.
    ///
    /// A file that this process may read and not write gets a lock that others may share. It keeps
    /// everybody from the exclusive one, which a receiver asks for before it writes.
    pub fn take(path: &Path) -> Result<Option<Self>> {
        let failed =
            |e: std::io::Error| Error::os(format!("locking the memory file {}", path.display()), e);
        let (file, kind) = match File::options().read(true).write(true).open(path) {
            Ok(file) => (file, libc::F_WRLCK),
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                (File::open(path).map_err(failed)?, libc::F_RDLCK)
            }
            Err(e) => return Err(failed(e)),
        };
        let id = FileId::of(&file)?;
        match lock(&file, kind) {
            Ok(()) => Ok(Some(Self { id, file })),
            Err(Errno::AGAIN | Errno::ACCESS) => Ok(None),
            Err(e) => Err(failed(e.into())),
        }
    }

    /// Which file it is.
    #[must_use]
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Whether anybody else has the file open, in whatever process, container or user's name: the
    /// kernel grants a write lease (`F_SETLEASE`, fcntl(2)) only to who has it open alone. `None`
    /// where it grants none to us.
    #[must_use]
    pub fn is_open_elsewhere(&self) -> Option<bool> {
        // Who opens the file in these microseconds waits for the lease's end, and we are sent a
        // signal for it: not SIGIO, which would end this process, but one that is ignored.
        fcntl(&self.file, F_SETSIG, libc::SIGURG).ok()?;
        match fcntl(&self.file, libc::F_SETLEASE, libc::F_WRLCK) {
            Ok(()) => {
                fcntl(&self.file, libc::F_SETLEASE, libc::F_UNLCK).ok()?;
                Some(false)
            }
            Err(Errno::AGAIN) => Some(true),
            Err(_) => None,
        }
    }
}

/// Sets a lock of this kind on a whole file, without waiting.
fn lock(file: &File, kind: i32) -> std::result::Result<(), Errno> {
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the kernel reads the structure, which outlives the call, and the descriptor is open.
    errno(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) })
}

/// One of fcntl's commands whose argument is a number.
fn fcntl(file: &File, command: i32, argument: i32) -> std::result::Result<(), Errno> {
    // SAFETY: these commands take a number and touch no memory; the descriptor is open.
    errno(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) })
}

fn errno(returned: i32) -> std::result::Result<(), Errno> {
    match returned {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    fn file() -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("ram");
        std::fs::write(&path, [0; 4096]).unwrap();
        (directory, path)
    }

    /// Tests beside this one start processes, which have our descriptors until they are another
    /// program.
    fn soon(path: &Path) -> Option<FileLock> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match FileLock::take(path).unwrap() {
                None if Instant::now() < deadline => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_file_is_locked_by_one_and_free_again_after_whatever_its_name() {
        let (directory, path) = file();
        let other = directory.path().join("other name");
        std::fs::hard_link(&path, &other).unwrap();
        let held = FileLock::take(&path).unwrap().unwrap();
        assert_eq!(held.id(), FileId::of(File::open(&other).unwrap()).unwrap());
        assert!(FileLock::take(&other).unwrap().is_none());
        drop(held);
        assert!(soon(&other).is_some());
    }

    #[test]
    fn a_child_does_not_keep_the_lock_of_a_holder_that_let_go() {
        let (_directory, path) = file();
        let held = FileLock::take(&path).unwrap().unwrap();
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        drop(held);
        let again = soon(&path);
        end(child);
        assert!(again.is_some());
    }

    #[test]
    fn a_file_that_another_process_has_open_is_told_from_one_that_is_ours_alone() {
        let (_directory, path) = file();
        let held = FileLock::take(&path).unwrap().unwrap();
        assert_eq!(held.is_open_elsewhere(), Some(false));
        let theirs = File::options().write(true).open(&path).unwrap();
        let child = Command::new("sleep").arg("60").stdout(theirs).spawn().unwrap();
        assert_eq!(held.is_open_elsewhere(), Some(true));
        end(child);
        assert_eq!(held.is_open_elsewhere(), Some(false));
    }
}
