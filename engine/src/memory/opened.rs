//! Whether somebody has opened a memory file since: who maps a file must open it first, and
//! inotify(7) tells of that also when the file is closed again.

use super::GuestMemory;
use crate::error::{Error, Result};
use rustix::fd::OwnedFd;
use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use rustix::io::{Errno, read};
use std::os::fd::AsRawFd;

/// Room for some hundred events, which are as long as their header.
const EVENTS_BYTES: usize = 4096;

/// Watches the files of a guest's memory. This process must not open one of them by name itself
/// meanwhile.
#[derive(Debug)]
pub struct OpenWatch(OwnedFd);

impl OpenWatch {
    /// From now on.
    pub fn of(memory: &GuestMemory) -> Result<Self> {
        let watching =
            |e: Errno| Error::os("watching the memory files (fs.inotify.max_user_instances?)", e);
        let inotify = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(watching)?;
        for slot in memory.slots() {
            let file = slot.file()?;
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            add_watch(&inotify, path, WatchFlags::OPEN).map_err(watching)?;
        }
        Ok(Self(inotify))
    }

    /// Whether a file was opened since this was asked last. What cannot be told counts as yes.
    #[must_use]
    pub fn was_opened(&self) -> bool {
        let mut opened = false;
        let mut events = [0; EVENTS_BYTES];
        loop {
            match read(&self.0, &mut events) {
                Err(Errno::AGAIN) => return opened,
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => return true,
                Ok(_) => opened = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SlotSource;
    use pageferry_transport::Access;
    use std::fs::File;

    #[test]
    fn an_opening_is_told_once_also_when_the_file_is_closed_again() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("ram");
        std::fs::write(&path, [0; 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let source = SlotSource {
            name: "m".into(),
            file,
            file_offset: 0,
            bytes: 4096,
            backing_page_bytes: 4096,
            process_address: 0,
        };
        let memory = GuestMemory::map(vec![source], Access::Write).unwrap();
        let watch = OpenWatch::of(&memory).unwrap();
        memory.slots()[0].region().write(0, &[1]).unwrap();
        memory.make_zero().unwrap();
        assert!(!watch.was_opened(), "what is done through the mapping is not an opening");
        let link = directory.path().join("link");
        std::fs::hard_link(&path, &link).unwrap();
        drop(File::open(&link).unwrap());
        assert!(watch.was_opened());
        assert!(!watch.was_opened());
    }
}
