//! A bound on the speed of a disk for everything that a test starts. The kernel holds a direct
//! transfer back after it has pinned the memory for it, so transfers are under way for long.

use rustix::fs::{major, minor, stat};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// A control group with that bound, removed in the end; the processes in it must have ended by
/// then.
#[derive(Debug)]
pub struct Throttle {
    group: PathBuf,
}

impl Throttle {
    /// Bounds reads and writes of the disk on which `file` lies, each to so many bytes a second.
    /// Needs root, and a mounted controller: blkio, or io where it is switched on.
    ///
    /// # Errors
    /// If this host cannot do that, with the reason.
    pub fn of(file: &Path, bytes_per_second: u64) -> Result<Self, String> {
        let disk = disk_of(file).map_err(|e| format!("the disk of {}: {e}", file.display()))?;
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pageferry-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let root = Path::new("/sys/fs/cgroup");
        let unified = fs::read_to_string(root.join("cgroup.subtree_control")).unwrap_or_default();
        let (group, bounds) = if root.join("blkio/blkio.throttle.read_bps_device").exists() {
            let line = format!("{disk} {bytes_per_second}");
            let of = |what: &str| (format!("blkio.throttle.{what}_bps_device"), line.clone());
            (root.join("blkio").join(name), vec![of("read"), of("write")])
        } else if unified.split_whitespace().any(|controller| controller == "io") {
            let line = format!("{disk} rbps={bytes_per_second} wbps={bytes_per_second}");
            (root.join(name), vec![("io.max".into(), line)])
        } else {
            return Err(
                "no control group for block I/O (blkio, or io in the root's subtree_control)"
                    .into(),
            );
        };
        fs::create_dir_all(&group).map_err(|e| format!("making {}: {e}", group.display()))?;
        // From here on it is removed again.
        let throttle = Self { group };
        for (file, line) in bounds {
            let path = throttle.group.join(file);
            fs::write(&path, &line)
                .map_err(|e| format!("writing {line:?} into {}: {e}", path.display()))?;
        }
        Ok(throttle)
    }

    /// For a shell: puts itself under the bound.
    #[must_use]
    pub fn enter(&self) -> String {
        format!("echo $$ > {}/cgroup.procs", self.group.display())
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // Processes that were killed may need a moment to leave it.
        let gone = || fs::remove_dir(&self.group).is_ok().then_some(());
        let deadline = std::time::Instant::now() + crate::SOON;
        while gone().is_none() && std::time::Instant::now() < deadline {
            std::thread::sleep(crate::LOOK_EVERY);
        }
    }
}

/// MAJOR:MINOR of the whole disk: a partition has no bound of its own.
fn disk_of(file: &Path) -> io::Result<String> {
    let device = stat(file)?.st_dev;
    let here = PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
    let disk = if here.join("partition").exists() { here.join("../dev") } else { here.join("dev") };
    Ok(fs::read_to_string(disk)?.trim().to_owned())
}
