//! Whose a guest's memory is: locks on its files, and the look for others who map them.
//!
//! ```text
//!   ahead_of   before QEMU starts: files that its command names are locked, and nobody maps them
//!   cover      once it runs: every file that it maps is locked (some are made by QEMU itself)
//!   alone      before a receiver's memory is made zero: nobody but it and its QEMU maps them
//! ```
//!
//! The first is what spares a running guest: a second QEMU in its memory would write there as soon
//! as it starts. The last holds for files that QEMU has made meanwhile, and for who mapped one
//! between the two.

use crate::command;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::file::{FileId, FileLock};
use pageferry_engine::memory::users::User;
use pageferry_engine::memory::{GuestMemory, MemorySlot, users};
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For a process that is ending to let go of a file: the kernel may be busy with taking its memory
/// apart.
const LET_GO_MAX: Duration = Duration::from_secs(2);
/// Pause between two looks for that; nobody tells of it.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The memory files that one supervisor holds for its QEMU. Dropping it lets go of them.
#[derive(Debug, Default)]
pub struct Ownership {
    locks: Vec<FileLock>,
}

impl Ownership {
    /// Takes the files that a QEMU command names for memory that it will write, if they are there
    /// already.
    ///
    /// # Errors
    /// [`Error::Refused`] if one of them is in use.
    pub fn ahead_of(command: &[OsString]) -> Result<Self> {
        let mut locks: Vec<FileLock> = Vec::new();
        for path in command::rewrite::memory_paths(command)? {
            // A directory gets a new file from QEMU, and so does a path where nothing is yet.
            if !path.is_file()
                || FileId::at(&path).is_ok_and(|id| locks.iter().any(|l| l.id() == id))
            {
                continue;
            }
            locks.push(patiently(|| take_unused(&path))?);
        }
        Ok(Self { locks })
    }

    /// Locks every file of this memory that is not locked yet, and lets go of those that are not
    /// among them.
    ///
    /// # Errors
    /// [`Error::Refused`] if another process holds one.
    pub fn cover(&mut self, memory: &GuestMemory) -> Result<()> {
        for slot in memory.slots() {
            if !self.locks.iter().any(|lock| lock.id() == slot.file_id()) {
                self.locks.push(patiently(|| take(slot))?);
            }
        }
        self.locks.retain(|lock| memory.slots().iter().any(|slot| slot.file_id() == lock.id()));
        Ok(())
    }
}

/// Makes sure that no process but this one, QEMU, and what QEMU has started maps this memory.
///
/// # Errors
/// [`Error::Refused`] with the names of those that do.
pub fn alone(memory: &GuestMemory, qemu: u32) -> Result<()> {
    let files: Vec<FileId> = memory.slots().iter().map(MemorySlot::file_id).collect();
    let me = std::process::id();
    patiently(|| {
        let users = users::of(&files, |pid| pid == me || users::descends(pid, qemu));
        let Some(first) = users.first() else { return Ok(()) };
        let slot = memory.slots().iter().find(|slot| slot.file_id() == first.file);
        Err(in_use(&slot.map(path_of).transpose()?.unwrap_or_default(), &users))
    })
}

/// Locks a file that no other process maps. This one may have it still: a link by RDMA lets go of
/// the memory of a guest that was not taken in by and by. No guest of ours is in it, or its lock
/// would be held.
fn take_unused(path: &Path) -> Result<FileLock> {
    let me = std::process::id();
    let unused = |id: FileId| match users::of(&[id], |pid| pid == me) {
        users if users.is_empty() => Ok(()),
        users => Err(in_use(path, &users)),
    };
    // Once without opening it: a receiver that waits in it takes whoever opens it for somebody who
    // writes there.
    unused(FileId::at(path)?)?;
    let Some(lock) = FileLock::take(path)? else { return Err(in_use(path, &[])) };
    let id = lock.id();
    unused(id)?;
    let ours = !users::of(&[id], |pid| pid != me).is_empty();
    // Others' processes are not shown to everybody, and those of other containers to nobody.
    if !ours && lock.is_open_elsewhere() == Some(true) && !users::has_visible_opener(id) {
        return Err(Error::refused(format!(
            "the memory file {} is open in a process that cannot be seen from here (another user's, or in another \
             container): give this guest a mem-path of its own, or end that process first",
            path.display()
        )));
    }
    Ok(lock)
}

/// Locks the file of a slot.
fn take(slot: &MemorySlot) -> Result<FileLock> {
    let file = slot.file()?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match FileLock::take(&path)? {
        Some(lock) => Ok(lock),
        None => Err(in_use(
            &path_of(slot)?,
            &users::of(&[slot.file_id()], |pid| pid == std::process::id()),
        )),
    }
}

/// The name under which a slot's file was opened.
fn path_of(slot: &MemorySlot) -> Result<PathBuf> {
    let file = slot.file()?;
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::read_link(&link).map_err(|e| Error::os(format!("reading {link}"), e))
}

fn in_use(path: &Path, users: &[User]) -> Error {
    let who = match users {
        [] => "locked by another pageferry".to_owned(),
        users => {
            let names: Vec<String> = users.iter().map(User::to_string).collect();
            format!("in use by {}", names.join(" and "))
        }
    };
    Error::refused(format!(
        "the memory file {} is {who}: a second guest in it would destroy the first one's memory. Give this guest a \
         mem-path of its own, or end those processes first",
        path.display()
    ))
}

/// Tries for a while: who holds a file may be about to end. Only a refusal is tried again.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + LET_GO_MAX;
    loop {
        match attempt() {
            Err(Error::Refused(_)) if Instant::now() < deadline => std::thread::sleep(LOOK_EVERY),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::find;
    use crate::testing::TestQemu;
    use pageferry_transport::Access;

    fn backend(path: &Path) -> String {
        format!("memory-backend-file,id=m,size=64M,mem-path={},share=on", path.display())
    }

    fn command(path: &Path) -> Vec<OsString> {
        ["qemu", "-machine", "q35,memory-backend=m", "-object", &backend(path)]
            .map(OsString::from)
            .into()
    }

    #[test]
    fn a_file_in_which_a_qemu_runs_is_refused_by_its_name_and_free_once_it_has_ended() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("ram");
        assert!(
            Ownership::ahead_of(&command(&path)).unwrap().locks.is_empty(),
            "it is not there yet"
        );
        let qemu = TestQemu::start(&[
            "-machine",
            "q35,memory-backend=m",
            "-m",
            "64",
            "-object",
            &backend(&path),
        ]);
        let text = Ownership::ahead_of(&command(&path)).unwrap_err().to_string();
        for word in [path.to_str().unwrap(), &format!("(process {})", qemu.pid()), "mem-path"] {
            assert!(text.contains(word), "{text}");
        }
        drop(qemu);
        assert_eq!(Ownership::ahead_of(&command(&path)).unwrap().locks.len(), 1);
    }

    #[test]
    fn memory_that_two_qemus_map_is_nobodys_alone() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let backend = backend(&directory.path().join("ram"));
        let start = || {
            TestQemu::start(&[
                "-S",
                "-machine",
                "q35,memory-backend=m",
                "-m",
                "64",
                "-object",
                &backend,
            ])
        };
        let mut one = start();
        let pid = one.pid();
        let found = find::find(&mut one.qmp, pid, Access::Write, TestQemu::soon()).unwrap();
        let memory = GuestMemory::map(found.shared, Access::Write).unwrap();
        alone(&memory, pid).unwrap();
        let two = start();
        let text = alone(&memory, pid).unwrap_err().to_string();
        assert!(text.contains(&format!("(process {})", two.pid())), "{text}");
        assert!(!text.contains(&format!("(process {pid})")), "{text}");
    }

    #[test]
    fn locks_follow_the_memory() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("ram");
        let other = directory.path().join("other");
        std::fs::write(&other, [0; 4096]).unwrap();
        let mut qemu = TestQemu::start(&[
            "-S",
            "-machine",
            "q35,memory-backend=m",
            "-m",
            "64",
            "-object",
            &backend(&path),
        ]);
        let pid = qemu.pid();
        let mut ownership = Ownership::ahead_of(&command(&other)).unwrap();
        let found = find::find(&mut qemu.qmp, pid, Access::Write, TestQemu::soon()).unwrap();
        let memory = GuestMemory::map(found.shared, Access::Write).unwrap();
        ownership.cover(&memory).unwrap();
        assert!(FileLock::take(&path).unwrap().is_none(), "it is held");
        // As patient as with a process that ends: tests beside this one start some.
        patiently(|| take_unused(&other)).expect("it is let go of");
        // Before QEMU starts anew, this process may still map what the last one had.
        drop(std::mem::take(&mut ownership));
        drop(qemu);
        let again = patiently(|| take_unused(&path)).expect("our own mapping is nobody else's");
        drop(again);
        ownership.cover(&memory).unwrap();
        let refused = Ownership::default().cover(&memory).unwrap_err().to_string();
        assert!(refused.contains(path.to_str().unwrap()), "{refused}");
        ownership.cover(&memory).unwrap();
    }
}
