//! The memory cgroups above this process, and what they still take (Linux,
//! Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst). What the receiver's threads
//! touch first is charged to them.

use super::Bound;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// The names of a version's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    /// The first is refused beyond; beyond the second, whoever allocates is held up until memory is
    /// given back, which a guest's is not.
    limits: &'static [&'static str],
    used: &'static str,
    /// Lines of `memory.stat`: file pages, which the kernel takes back before it refuses anything.
    files: [&'static str; 2],
}

const V1: Version = Version {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    files: ["total_inactive_file", "total_active_file"],
};
const V2: Version = Version {
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    files: ["inactive_file", "active_file"],
};

/// Every memory cgroup above this process that has a limit and can be seen from here.
pub(super) fn bounds() -> Vec<Bound> {
    let read = |path| read_to_string(path).unwrap_or_default();
    let directories = directories(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
    directories.iter().filter_map(|(directory, version)| bound(directory, *version)).collect()
}

/// The directories of the cgroups, from the innermost one outwards: from `/proc/self/cgroup` and
/// `/proc/self/mountinfo` (cgroups(7), proc(5)).
fn directories(cgroups: &str, mounts: &str) -> Vec<(PathBuf, Version)> {
    let mut found = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let version = match controllers {
            "" => V2,
            v1 if v1.split(',').any(|controller| controller == "memory") => V1,
            _ => continue,
        };
        let Some((root, point)) = mounts.lines().find_map(|line| mount(line, version)) else {
            continue;
        };
        // A path outside of what is mounted cannot be looked at.
        let Ok(inner) = Path::new(path).strip_prefix(root) else { continue };
        let inner = point.join(inner);
        found.extend(
            inner
                .ancestors()
                .take_while(|at| at.starts_with(&point))
                .map(|at| (at.to_owned(), version)),
        );
    }
    found
}

/// Root and mount point of a line of mountinfo that is the hierarchy of this version.
fn mount(line: &str, version: Version) -> Option<(&str, PathBuf)> {
    let (mount, kind) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, point) = (mount.next()?, mount.next()?);
    let mut kind = kind.split(' ');
    let name = kind.next()?;
    let memory = kind.nth(1)?.split(',').any(|option| option == "memory");
    let fits = if version == V2 { name == "cgroup2" } else { name == "cgroup" && memory };
    fits.then(|| (root, PathBuf::from(point.replace("\\040", " "))))
}

/// What a cgroup still takes, if it has a limit.
fn bound(directory: &Path, version: Version) -> Option<Bound> {
    let read = |file: &str| read_to_string(directory.join(file)).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    // `max` is no number, and no limit.
    let limits = version.limits.iter().filter_map(|file| Some((number(file)?, *file)));
    let ((limit, file), used) = (limits.min()?, number(version.used)?);
    let stat = read("memory.stat").unwrap_or_default();
    let of = |name: &str| -> Option<u64> {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    };
    let files: u64 = version.files.iter().filter_map(|name| of(name)).sum();
    Some(Bound {
        what: format!("the memory cgroup {} (limit {} MiB)", directory.display(), limit >> 20),
        fix: format!("raise its {file}"),
        available: limit.saturating_sub(used.saturating_sub(files)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cgroup_above_is_found_in_either_version() {
        let v1 = "4:cpu,memory:/a/b\n3:cpuset:/x\n";
        let mounts = "30 1 0:25 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 1 0:26 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
                      32 1 0:27 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 none rw,nsdelegate\n";
        let paths = |cgroups, mounts| -> Vec<String> {
            directories(cgroups, mounts)
                .iter()
                .map(|(path, _)| path.display().to_string())
                .collect()
        };
        assert_eq!(
            paths(v1, mounts),
            ["/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory"]
        );
        assert_eq!(
            paths("0::/vm\n", mounts),
            ["/sys/fs/cgroup/unified/vm", "/sys/fs/cgroup/unified"]
        );
        // In a container, whose mount begins at its own cgroup.
        let inside = "30 1 0:25 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(
            paths("4:memory:/docker/1/x\n", inside),
            ["/sys/fs/cgroup/memory/x", "/sys/fs/cgroup/memory"]
        );
        assert!(paths("4:memory:/elsewhere\n", inside).is_empty());
        assert!(paths("", "").is_empty());
    }

    #[test]
    fn file_pages_count_as_room_and_no_limit_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let write =
            |file: &str, text: &str| std::fs::write(directory.path().join(file), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "1000\n");
        write("memory.stat", "anon 10\ninactive_file 300\nactive_file 200\nactive_file_x 9\n");
        assert_eq!(bound(directory.path(), V2), None);
        write("memory.max", "1200\n");
        assert_eq!(bound(directory.path(), V2).unwrap().available, 700);
        write("memory.high", "1100\n");
        let high = bound(directory.path(), V2).unwrap();
        assert_eq!((high.available, high.fix.as_str()), (600, "raise its memory.high"));
        write("memory.limit_in_bytes", "900\n");
        write("memory.usage_in_bytes", "1000\n");
        assert_eq!(bound(directory.path(), V1).unwrap().available, 0, "it is over its limit");
    }
}
