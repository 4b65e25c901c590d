//! Whether a transfer of a disk may write guest memory behind QEMU's page tables, and how that is
//! found out.
//!
//! A plain `preadv` need not copy through the page tables. Some file systems pin the caller's pages
//! and fill them later, whatever flags the file was opened with: FUSE with `FOPEN_DIRECT_IO`, CIFS
//! and 9p without a cache. The tracking reports the pinning as the write; the data come afterwards
//! and are never reported. So what counts is the file that QEMU holds, not what QEMU was told about
//! it:
//!
//! ```text
//!   query-named-block-nodes   drivers that do not read through a file, and `cache.direct`
//!   /proc/PID/fd              what QEMU holds open: images, backing files, descriptors passed in (fdsets)
//!   /proc/PID/fdinfo/N        how it was opened (O_DIRECT), and on which mount it lies
//!   /proc/PID/mountinfo       which file system that mount is
//! ```
//!
//! The mount tells the same file system as `fstatfs(2)` of the descriptor, but asks the kernel
//! alone: a FUSE or network server that hangs cannot hold up who looks.
//!
//! What is not known to copy is drained ([`pageferry_engine::guest::SourceGuest::drain_io`]).
//! Buffers that QEMU has registered with an io_uring are pinned for good, and no drain helps:
//! [`registered_buffers`].

use pageferry_engine::error::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;

/// File systems whose plain reads copy through the page tables of the process that reads: the page
/// cache's (`generic_file_read_iter` without `IOCB_DIRECT`, also with DAX) and the kernel's own.
/// What may do otherwise is left out: FUSE and virtiofs, CIFS, 9p, Ceph, AFS, ZFS (its property
/// `direct=always`), and overlayfs, where what lies beneath is not known.
const COPYING: [&str; 36] = [
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "f2fs",
    "jfs",
    "nilfs2",
    "nfs",
    "nfs4",
    "iso9660",
    "udf",
    "squashfs",
    "erofs",
    "vfat",
    "msdos",
    "exfat",
    "ntfs3",
    "tmpfs",
    "ramfs",
    "rootfs",
    "hugetlbfs",
    "devtmpfs",
    "devpts",
    "proc",
    "sysfs",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
    "bpf",
    "mqueue",
    "pstore",
    "efivarfs",
];

/// Block drivers that move no data themselves (formats, filters), that read a socket or a buffer of
/// their own, or that read a file, which is looked at itself.
const COPYING_DRIVERS: [&str; 37] = [
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "file",
    "ftp",
    "ftps",
    "http",
    "https",
    "luks",
    "mirror_top",
    "nbd",
    "null-aio",
    "null-co",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "raw",
    "replication",
    "snapshot-access",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

/// Block drivers that work within QEMU's process but may pin: the drain waits for their transfers
/// as for all.
pub const DRAINED_DRIVERS: [&str; 6] =
    ["gluster", "host_cdrom", "host_device", "iscsi", "nfs", "rbd"];

/// Whether a block driver is known to copy, or to have no data of its own.
#[must_use]
pub fn copying_driver(driver: &str) -> bool {
    COPYING_DRIVERS.contains(&driver)
}

/// Why a transfer that is under way may write guest memory behind the page tables; nothing if every
/// one is known to copy. `nodes` is QEMU's answer to `query-named-block-nodes`.
///
/// # Errors
/// If what QEMU `pid` holds open cannot be looked at.
pub fn may_pin(nodes: &Value, pid: u32) -> Result<Option<String>> {
    if let Some(why) = nodes.as_array().into_iter().flatten().find_map(pinned_by_node) {
        return Ok(Some(why));
    }
    let mut mounts = None;
    for descriptor in descriptors(pid)? {
        if descriptor.is_no_file() || !descriptor.can_read() {
            continue;
        }
        if descriptor.flags & (libc::O_DIRECT as u32) != 0 {
            return Ok(Some(format!("{} is open for direct I/O", descriptor.link)));
        }
        let mounts = match &mounts {
            Some(mounts) => mounts,
            None => mounts.insert(mounted(pid)?),
        };
        match mounts.get(&descriptor.mount).map(String::as_str) {
            Some(kind) if COPYING.contains(&kind) => {}
            Some(kind) => {
                return Ok(Some(format!(
                    "{} lies on {kind}, which is not known to copy",
                    descriptor.link
                )));
            }
            // Outside of QEMU's root directory, or unmounted since.
            None => {
                return Ok(Some(format!("{} lies on a mount that is not known", descriptor.link)));
            }
        }
        // Only now: on another file system the question could wait for a server.
        let path = format!("/proc/{pid}/fd/{}", descriptor.number);
        if fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device()) {
            return Ok(Some(format!("{} is a block device", descriptor.link)));
        }
    }
    Ok(None)
}

/// What of a block node may pin memory, whatever file there is: opened with `cache.direct`, or a
/// driver that is not known to copy. Host devices are among these: SCSI commands are passed through
/// to them.
fn pinned_by_node(node: &Value) -> Option<String> {
    let driver = node["drv"].as_str().unwrap_or("of no name");
    if node["cache"]["direct"] == true {
        return Some("a disk has cache.direct".into());
    }
    (!copying_driver(driver))
        .then(|| format!("a disk's driver is {driver}, which is not known to copy"))
}

/// An open file of another process.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Descriptor {
    number: u32,
    /// What /proc calls it: a path, or `socket:[7]`.
    link: String,
    /// The flags that it was opened with.
    flags: u32,
    /// The id of its mount.
    mount: u64,
}

impl Descriptor {
    /// Whether it is something of the kernel's that lies in no file system that can be mounted. A
    /// file of such a name has a path that begins with a slash, and memfds lie in no mount.
    fn is_no_file(&self) -> bool {
        ["socket:[", "pipe:[", "anon_inode:", "/memfd:"]
            .iter()
            .any(|start| self.link.starts_with(start))
    }

    /// Whether data can be read from it into memory.
    fn can_read(&self) -> bool {
        let access = self.flags as i32 & libc::O_ACCMODE;
        access != libc::O_WRONLY && self.flags as i32 & (libc::O_PATH | libc::O_DIRECTORY) == 0
    }
}

/// Everything that a process holds open. What is closed meanwhile is left out.
fn descriptors(pid: u32) -> Result<Vec<Descriptor>> {
    let directory = format!("/proc/{pid}/fd");
    let failed = |e| Error::os(format!("looking at what QEMU holds open ({directory})"), e);
    let mut found = Vec::new();
    for entry in fs::read_dir(&directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let link = match fs::read_link(entry.path()) {
            Ok(link) => link.to_string_lossy().into_owned(),
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(e)),
        };
        let Some(info) = descriptor_info(pid, number)? else { continue };
        let (Some(flags), Some(mount)) = (
            field(&info, "flags:").and_then(|octal| u32::from_str_radix(octal, 8).ok()),
            field(&info, "mnt_id:").and_then(|id| id.parse().ok()),
        ) else {
            return Err(Error::Guest(format!(
                "the kernel's words on {directory}/{number} are not understood"
            )));
        };
        found.push(Descriptor { number, link, flags, mount });
    }
    Ok(found)
}

/// `/proc/PID/fdinfo/N`; nothing if it was closed meanwhile.
fn descriptor_info(pid: u32, number: u32) -> Result<Option<String>> {
    let path = format!("/proc/{pid}/fdinfo/{number}");
    match fs::read_to_string(&path) {
        Ok(info) => Ok(Some(info)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::os(format!("reading {path}"), e)),
    }
}

/// The rest of the line that begins so.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// The file systems that a process sees, by the ids of their mounts.
fn mounted(pid: u32) -> Result<HashMap<u64, String>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = fs::read_to_string(&path).map_err(|e| Error::os(format!("reading {path}"), e))?;
    Ok(text.lines().filter_map(parse_mount).collect())
}

/// A line of mountinfo: `36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda rw`. Spaces in
/// paths are escaped, and before the dash there is any number of fields.
fn parse_mount(line: &str) -> Option<(u64, String)> {
    let id = line.split(' ').next()?.parse().ok()?;
    let mut words = line.split(' ').skip_while(|word| *word != "-").skip(1);
    Some((id, words.next()?.to_owned()))
}

/// Parts of guest memory that QEMU `pid` has registered as buffers of an io_uring. The kernel
/// writes them through an address of its own for as long as they are registered. `memory` is where
/// guest memory lies in QEMU's address space.
///
/// # Errors
/// If what QEMU holds open cannot be looked at.
pub fn registered_buffers(pid: u32, memory: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
    /// The kernel leaves the list out while the ring is in use; it is asked again.
    const LOOKS_MAX: u32 = 200;
    let mut found = Vec::new();
    for ring in descriptors(pid)?.iter().filter(|d| d.link == "anon_inode:[io_uring]") {
        let mut looks = 0;
        let buffers = loop {
            let Some(info) = descriptor_info(pid, ring.number)? else { break Vec::new() };
            if let Some(buffers) = parse_buffers(&info) {
                break buffers;
            }
            looks += 1;
            if looks == LOOKS_MAX {
                return Err(Error::refused(format!(
                    "QEMU has registered buffers with an io_uring (descriptor {}), and the kernel does not say which; \
                     memory that is registered is written without a trace",
                    ring.number
                )));
            }
            std::thread::yield_now();
        };
        let in_memory = |buffer: &Range<u64>| {
            memory.iter().any(|part| part.start < buffer.end && buffer.start < part.end)
        };
        found.extend(buffers.into_iter().filter(in_memory));
    }
    Ok(found)
}

/// The buffers in an io_uring's fdinfo: `UserBufs:\t2`, then lines such as `    0: 0x7f00/4096` or, where a
/// slot is empty, `    1: <none>`. Nothing if the lines are missing.
fn parse_buffers(info: &str) -> Option<Vec<Range<u64>>> {
    let mut lines = info.lines().skip_while(|line| !line.starts_with("UserBufs:"));
    let Some(count) = lines.next() else { return Some(Vec::new()) };
    let count: usize = count.strip_prefix("UserBufs:")?.trim().parse().ok()?;
    let mut buffers = Vec::new();
    for index in 0..count {
        let slot = lines.next()?.trim().strip_prefix(&format!("{index}: "))?;
        if slot != "<none>" {
            let (start, bytes) = slot.strip_prefix("0x")?.split_once('/')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            buffers.push(start..start.checked_add(bytes.parse().ok()?)?);
        }
    }
    Some(buffers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;

    fn node(text: &str) -> bool {
        pinned_by_node(&serde_json::from_str(text).unwrap()).is_some()
    }

    #[test]
    fn a_driver_that_is_not_known_to_copy_pins() {
        assert!(node(r#"{"drv": "file", "cache": {"direct": true, "writeback": true}}"#));
        for driver in ["host_device", "host_cdrom", "iscsi", "rbd", "gluster", "nfs", "of-tomorrow"]
        {
            assert!(
                node(&format!(r#"{{"drv": "{driver}", "cache": {{"direct": false}}}}"#)),
                "{driver}"
            );
        }
        for driver in ["file", "qcow2", "raw", "nbd", "https", "copy-before-write"] {
            assert!(
                !node(&format!(r#"{{"drv": "{driver}", "cache": {{"direct": false}}}}"#)),
                "{driver}"
            );
        }
        assert!(node("{}") && node("null"));
    }

    #[test]
    fn mounts_are_read_whatever_their_options() {
        let of = |line| parse_mount(line).map(|(id, kind)| (id, kind.to_owned()));
        assert_eq!(of("36 35 98:0 / /mnt rw - ext4 /dev/sda rw"), Some((36, "ext4".into())));
        assert_eq!(
            of("7 1 0:5 / /a\\040b rw,x shared:1 master:2 - fuse.sshfs x:/ rw"),
            Some((7, "fuse.sshfs".into()))
        );
        assert_eq!(of(""), None);
        assert_eq!(of("36 35 98:0 / /mnt rw"), None);
        let copies = |kind: &str| COPYING.contains(&kind);
        assert!(copies("ext4") && !copies("fuse") && !copies("fuse.sshfs") && !copies("overlay"));
        assert!(
            !copies("cifs")
                && !copies("9p")
                && !copies("virtiofs")
                && !copies("zfs")
                && !copies("ceph")
        );
    }

    #[test]
    fn what_this_process_holds_open_is_seen_as_it_was_opened() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let of = |file: &File| {
            let number = std::os::fd::AsRawFd::as_raw_fd(file) as u32;
            descriptors(std::process::id())
                .unwrap()
                .into_iter()
                .find(|d| d.number == number)
                .unwrap()
        };
        let plain = File::open(&path).unwrap();
        assert!(of(&plain).can_read() && of(&plain).flags & libc::O_DIRECT as u32 == 0);
        assert_eq!(of(&plain).link, path.to_str().unwrap());
        let written = File::options().append(true).open(&path).unwrap();
        assert!(!of(&written).can_read(), "what can only be written puts nothing into memory");
        let mounts = mounted(std::process::id()).unwrap();
        assert!(mounts.contains_key(&of(&plain).mount), "{:?}", of(&plain));
        if let Ok(direct) = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path) {
            assert_ne!(of(&direct).flags & libc::O_DIRECT as u32, 0);
            let why = may_pin(&json!([]), std::process::id()).unwrap().unwrap();
            assert!(why.contains("open for direct I/O"), "{why}");
        }
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(of(&File::from(std::os::fd::OwnedFd::from(reader))).is_no_file());
    }

    #[test]
    fn registered_buffers_are_read_and_a_list_that_is_left_out_is_noticed() {
        let info = |tail: &str| format!("pos:\t0\nflags:\t02000002\nUserFiles:\t0\n{tail}");
        assert_eq!(parse_buffers(&info("")), Some(vec![]));
        assert_eq!(parse_buffers(&info("UserBufs:\t0\nPollList:\n")), Some(vec![]));
        assert_eq!(
            parse_buffers(&info(
                "UserBufs:\t3\n    0: 0x1000/4096\n    1: <none>\n    2: 0x3000/1\nPollList:\n"
            )),
            Some(Vec::from([0x1000..0x2000, 0x3000..0x3001]))
        );
        for left_out in
            ["UserBufs:\t1\nPollList:\n", "UserBufs:\t1\n", "UserBufs:\t2\n    0: 0x1000/4096\n"]
        {
            assert_eq!(parse_buffers(&info(left_out)), None, "{left_out}");
        }
    }

    #[test]
    fn buffers_that_are_registered_with_the_kernel_are_found_where_they_are_guest_memory() {
        let Ok(ring) = io_uring::IoUring::new(2) else {
            eprintln!("NOT RUN: registered buffers: this kernel has no io_uring for us");
            return;
        };
        let mut buffer = vec![0u8; 8192];
        let iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: the buffer outlives the ring, and nobody else uses it.
        unsafe { ring.submitter().register_buffers(&[iovec]) }.unwrap();
        let at = buffer.as_ptr() as u64;
        let pid = std::process::id();
        let inside = at + 4096..at + 4097;
        let found = registered_buffers(pid, std::slice::from_ref(&inside)).unwrap();
        assert_eq!(found, std::slice::from_ref(&(at..at + 8192)));
        let elsewhere = at + 8192..at + 16384;
        assert_eq!(registered_buffers(pid, std::slice::from_ref(&elsewhere)).unwrap(), []);
    }
}
