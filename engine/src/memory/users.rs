//! Which processes map a file: found in `/proc/PID/maps` of every process that this one may look
//! at.

use super::file::FileId;
use crate::host::maps::Mapping;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// Length at which a process' name is cut. The kernel's own limit is 15 bytes.
const NAME_CHARS_MAX: usize = 32;
/// Longest chain of parents that is followed; a longer one is not taken for a descent.
const PARENTS_MAX: u32 = 64;

/// A process that maps a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its process id.
    pub pid: u32,
    /// The kernel's name of it, with everything odd replaced.
    pub name: String,
    /// The file.
    pub file: FileId,
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// The processes that map one of these files, but for those that `ours` knows. Processes that this
/// one may not look at (another user's, or of another pid namespace) are not among them.
#[must_use]
pub fn of(files: &[FileId], ours: impl Fn(u32) -> bool) -> Vec<User> {
    let mut users = Vec::new();
    for pid in processes() {
        // Most processes map none of them, so whose they are is asked last.
        let Some(file) = mapped(pid, files) else { continue };
        if !ours(pid) {
            users.push(User { pid, name: name(pid), file });
        }
    }
    users
}

/// Whether a process is `ancestor`, or was started by it or by one of its descendants.
#[must_use]
pub fn descends(pid: u32, ancestor: u32) -> bool {
    let mut at = pid;
    for _ in 0..PARENTS_MAX {
        if at == ancestor {
            return true;
        }
        match parent(at) {
            Some(parent) if parent > 0 => at = parent,
            _ => return false,
        }
    }
    false
}

/// Whether a process that can be seen from here, and is not this one, has a file open.
#[must_use]
pub fn has_visible_opener(file: FileId) -> bool {
    let me = std::process::id();
    processes().filter(|pid| *pid != me).any(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut stats = descriptors.filter_map(|entry| fs::metadata(entry.path()).ok());
        stats.any(|stat| (stat.dev(), stat.ino()) == (file.device, file.inode))
    })
}

/// Every process that `/proc` shows.
fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The first of these files that a process maps.
fn mapped(pid: u32, files: &[FileId]) -> Option<FileId> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    maps.lines().filter_map(Mapping::parse).find_map(|mapping| {
        files.iter().copied().find(|file| file.is_mapped_as(mapping.device, mapping.inode))
    })
}

fn name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let harmless = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    name.trim_end().chars().take(NAME_CHARS_MAX).map(harmless).collect()
}

/// Field 4 of /proc/PID/stat, counted after the command's closing parenthesis.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_transport::{Access, MemoryRegion};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::AsFd;

    #[test]
    fn a_process_that_maps_a_file_is_found_for_as_long_as_it_does() {
        let file = memfd_create("mapped", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 4096).unwrap();
        let id = FileId::of(&file).unwrap();
        let me = std::process::id();
        // Tests beside this one start processes, which share this one's memory until they are
        // another program.
        let found = || of(&[id], |pid| pid != me && descends(pid, me));
        assert!(found().is_empty(), "open is not mapped");
        let region = MemoryRegion::map_shared(file.as_fd(), 0, 4096, Access::Read).unwrap();
        assert_eq!(
            found().iter().map(|user| (user.pid, user.file)).collect::<Vec<_>>(),
            [(me, id)]
        );
        assert!(of(&[id], |pid| descends(pid, me)).is_empty());
        drop(region);
        assert!(found().is_empty());
    }

    #[test]
    fn a_child_descends_from_its_parent_and_not_the_other_way_round() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (me, it) = (std::process::id(), child.id());
        assert!(descends(it, me) && descends(me, me));
        assert!(!descends(me, it));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!descends(it, me), "it is gone");
    }
}
