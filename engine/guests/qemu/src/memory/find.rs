//! Where the guest's memory lies in a running QEMU, and whether it can be moved.
//!
//! ```text
//!   x-query-ramblock    which blocks there are, and at which address in QEMU's process
//!   /proc/PID/maps      which file lies there, shared or private
//!   /proc/PID/fd/N      the same file (device and inode), opened anew as our own
//!   qom-list /objects   what kind of backend it is
//! ```
//!
//! A block that is shared **and** made by `memory-backend-file` is moved by the engine: QEMU leaves
//! exactly those out of its own stream (capability `x-ignore-shared`). Until 8.0 shared was enough;
//! since 8.1 (its flag `RAM_NAMED_FILE`) shared memory without a name, such as that of
//! `memory-backend-memfd`, travels in QEMU's stream, in the downtime, and so is refused here.
//! Everything small that is private (firmware, video memory) travels in that stream too. A shared
//! file that QEMU maps read-only is left where it is ([`super::image`]).

use super::image::Image;
use crate::memory::file::{open, shared_file};
use crate::memory::table::{RamBlock, human_text, parse_ramblocks};
use crate::qmp::{Qmp, Version};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::host::maps::Mapping;
use pageferry_engine::memory::SlotSource;
use pageferry_transport::Access;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::time::Instant;

/// The guest's memory, sorted by how it travels.
#[derive(Debug)]
pub struct GuestBlocks {
    /// Moved by the engine, in the order of their names (the same order on both sides).
    pub shared: Vec<SlotSource>,
    /// Moved by QEMU in its own stream.
    pub unshared: Vec<UnsharedBlock>,
    /// Not moved: nobody writes them. In the order of their names.
    pub images: Vec<Image>,
}

/// A block that QEMU sends itself, with the device state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsharedBlock {
    /// QEMU's name of the block: `pc.bios`, `0000:00:01.0/vga.vram`.
    pub name: String,
    /// Bytes of it that are in use.
    pub bytes: u64,
}

/// The first QEMU whose `x-ignore-shared` asks for a named file too.
const NAMED_FILE_SINCE: (u32, u32) = (8, 1);

/// The first QEMU whose `x-query-ramblock` tells host addresses.
const ADDRESSES_SINCE: (u32, u32) = (8, 0);

/// Finds the memory of the guest that QEMU process `pid` runs, and opens the shared part.
///
/// # Errors
/// [`Error::Refused`] with the fix where some of the guest's memory cannot be moved.
pub fn find(qmp: &mut Qmp, pid: u32, access: Access, deadline: Instant) -> Result<GuestBlocks> {
    let version = qmp.version();
    if (version.major, version.minor) < ADDRESSES_SINCE {
        return Err(Error::refused(format!(
            "QEMU {version} is too old: it does not tell where guest memory lies; pageferry needs QEMU {}.{} or newer",
            ADDRESSES_SINCE.0, ADDRESSES_SINCE.1
        )));
    }
    let blocks =
        parse_ramblocks(&human_text(&qmp.execute("x-query-ramblock", Value::Null, deadline)?)?)?;
    let backends = backends(qmp, deadline)?;
    let maps_path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&maps_path).map_err(|e| match e.kind() {
        // Looking at a process' memory asks for the same permission as tracing it.
        ErrorKind::PermissionDenied => {
            crate::inject::seize_refused(pid as i32, rustix::io::Errno::PERM)
        }
        _ => Error::os(format!("reading {maps_path}"), e),
    })?;
    let maps: Vec<Mapping> = maps.lines().filter_map(Mapping::parse).collect();
    let mut found = GuestBlocks { shared: Vec::new(), unshared: Vec::new(), images: Vec::new() };
    for block in blocks {
        if block.name.is_empty() {
            continue; // a backend that no device uses
        }
        let backend = backends.get(block.backend_id()).map(String::as_str);
        let file = shared_file(&maps, &block);
        let mapped =
            || file.as_ref().ok_or_else(|| Error::Guest(format!("{} is not mapped", block.name)));
        match judge(version, &block, backend, file.is_some())? {
            Way::Engine => found.shared.push(open(pid, &block, mapped()?, access)?),
            Way::Stays => {
                found.images.push(Image::open(pid, &block.name, block.used_bytes, mapped()?)?)
            }
            Way::QemuStream => {
                found.unshared.push(UnsharedBlock { name: block.name, bytes: block.used_bytes });
            }
        }
    }
    if found.shared.is_empty() {
        return Err(Error::refused(
            "this QEMU has no guest memory that could be moved (is it `-machine none`?)",
        ));
    }
    found.shared.sort_by(|a, b| a.name.cmp(&b.name));
    found.images.sort_by(|a, b| a.name().cmp(b.name()));
    Ok(found)
}

/// All RAM blocks with their sizes. Tables that QEMU makes as large as it needs, and grows for what
/// comes, have the size zero.
pub(crate) fn sizes(qmp: &mut Qmp, deadline: Instant) -> Result<BTreeMap<String, u64>> {
    let blocks =
        parse_ramblocks(&human_text(&qmp.execute("x-query-ramblock", Value::Null, deadline)?)?)?;
    let named = blocks.into_iter().filter(|block| !block.name.is_empty());
    Ok(named
        .map(|block| {
            let bytes = if block.name.starts_with("/rom@") { 0 } else { block.used_bytes };
            (block.name, bytes)
        })
        .collect())
}

/// How a block travels.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    Engine,
    /// It is on both hosts, and nobody writes it.
    Stays,
    QemuStream,
}

/// Decides how a block travels. Pure.
fn judge(version: Version, block: &RamBlock, backend: Option<&str>, shared: bool) -> Result<Way> {
    let needs_name = (version.major, version.minor) >= NAMED_FILE_SINCE;
    let id = block.backend_id();
    // A machine without a backend of its own names its memory `pc.ram` or the like.
    let (new_id, machine) = match id.ends_with(".ram") {
        true => ("ram0", " -machine memory-backend=ram0"),
        false => (id, ""),
    };
    let fix = format!(
        "start QEMU under `pageferry run`, or with -object memory-backend-file,id={new_id},size={},\
         mem-path=/dev/shm/NAME,share=on{machine}",
        block.used_bytes
    );
    match (backend, shared) {
        (None, _) => Ok(Way::QemuStream),
        (Some("memory-backend-file"), true) if block.read_only => Ok(Way::Stays),
        (Some("memory-backend-file"), false) if block.read_only => Err(Error::refused(format!(
            "memory block {id} ({} MiB) is a file that nobody can write, mapped in private: QEMU {version} would send all of \
             it and could not write it at the destination: start QEMU under `pageferry run`, or add share=on to its -object",
            block.used_bytes >> 20
        ))),
        (Some("memory-backend-file"), true) => Ok(Way::Engine),
        (Some(_), true) if !needs_name => Ok(Way::Engine),
        (Some(kind), true) => Err(Error::refused(format!(
            "memory block {id} is shared, but a {kind}: QEMU {version} would send all of it in its own stream, in \
             the downtime: {fix}"
        ))),
        (Some(_), false) => Err(Error::refused(format!(
            "memory block {id} ({} MiB) is not shared, so pageferry cannot reach it: {fix}",
            block.used_bytes >> 20
        ))),
    }
}

/// The memory backends by id, with their types.
fn backends(qmp: &mut Qmp, deadline: Instant) -> Result<HashMap<String, String>> {
    Ok(crate::preflight::devices::objects(qmp, deadline)?
        .into_iter()
        .filter(|(_, kind)| kind.starts_with("memory-backend"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestQemu;
    use pageferry_transport::MemoryRegion;
    use std::os::fd::AsFd;

    const V10: Version = Version { major: 10, minor: 0, micro: 2 };

    #[test]
    fn the_table_of_qemu_10_is_read() {
        let text = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
           pageferry.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f0db7fff000  rw\n\
                            4 KiB  0x0000000010000000 0x0000000000200000 0x0000000000200000 0x00007f0e0dcfb000  rw\n\
0000:00:03.0/virtio-net-pci.rom    4 KiB  0x00000000060c0000 0x0000000000040000 0x0000000000040000 0x00007fcda5a00000  ro\n\
                    huge    2 MiB  0x0000000000000000 0x0000000000200000 0x0000000000200000 0x00007f0e0c400000  rw\n\n";
        let blocks = parse_ramblocks(text).unwrap();
        let names: Vec<_> = blocks.iter().map(|b| b.name.as_str()).collect();
        assert_eq!(names, ["pageferry.ram", "", "0000:00:03.0/virtio-net-pci.rom", "huge"]);
        assert_eq!(
            blocks[0],
            RamBlock {
                name: "pageferry.ram".into(),
                page_bytes: 4096,
                used_bytes: 256 << 20,
                address: 0x7f0d_b7ff_f000,
                read_only: false,
            }
        );
        assert_eq!(blocks[3].page_bytes, 2 << 20);
        assert_eq!(
            blocks.iter().map(|b| b.read_only).collect::<Vec<_>>(),
            [false, false, true, false]
        );
    }

    #[test]
    fn other_tables_are_refused_and_not_misread() {
        let old = "  Block Name    PSize              Offset               Used              Total\n  pc.ram    4 KiB  0x0 0x1000 0x1000\n";
        for odd in ["", "nonsense", old, &format!("{}\n x 4 KiB 0x0", old.lines().next().unwrap())]
        {
            assert!(parse_ramblocks(odd).is_err(), "{odd}");
        }
        let header = "Block Name PSize Offset Used Total HVA RO\n";
        for line in [
            "a 4 KiB",
            "a 4 XiB 0x0 0x1 0x1 0x1 rw",
            "a 4 KiB 0x0 zz 0x1 0x1 rw",
            "a -1 KiB 0x0 0x1 0x1 0x1 rw",
        ] {
            assert!(parse_ramblocks(&format!("{header}{line}")).is_err(), "{line}");
        }
    }

    #[test]
    fn only_one_unbroken_shared_mapping_of_one_file_will_do() {
        let block = RamBlock {
            name: "r".into(),
            page_bytes: 4096,
            used_bytes: 0x3000,
            address: 0x10_1000,
            read_only: false,
        };
        let find = |lines: &[&str]| {
            let maps: Vec<_> = lines.iter().map(|l| Mapping::parse(l).unwrap()).collect();
            shared_file(&maps, &block).map(|m| m.offset)
        };
        let whole = "101000-104000 rw-s 00000000 00:01 7 /memfd:r (deleted)";
        assert_eq!(find(&[whole]), Some(0));
        assert_eq!(find(&["100000-105000 rw-s 00004000 00:01 7 /memfd:r"]), Some(0x5000));
        let (a, b) =
            ("101000-102000 rw-s 00000000 00:01 7 x", "102000-104000 rw-s 00001000 00:01 7 x");
        assert_eq!(find(&[a, b]), Some(0));
        assert_eq!(find(&[a]), None, "half of it");
        assert_eq!(find(&[b]), None, "the other half");
        assert_eq!(find(&[a, "102000-104000 rw-s 00002000 00:01 7 x"]), None, "a gap in the file");
        assert_eq!(find(&[a, "102000-104000 rw-s 00001000 00:01 8 x"]), None, "another file");
        assert_eq!(find(&[a, "102000-104000 rw-p 00001000 00:01 7 x"]), None, "half private");
        assert_eq!(find(&["101000-104000 rw-s 00000000 00:00 0"]), None, "no file");
        assert_eq!(find(&[]), None);
    }

    #[test]
    fn what_cannot_move_is_refused_with_the_mend() {
        let block = RamBlock {
            name: "ram0".into(),
            page_bytes: 4096,
            used_bytes: 1 << 30,
            address: 0,
            read_only: false,
        };
        assert_eq!(judge(V10, &block, Some("memory-backend-file"), true).unwrap(), Way::Engine);
        assert_eq!(judge(V10, &block, None, false).unwrap(), Way::QemuStream);
        for (kind, shared) in [
            ("memory-backend-memfd", true),
            ("memory-backend-file", false),
            ("memory-backend-ram", false),
        ] {
            let text = judge(V10, &block, Some(kind), shared).unwrap_err().to_string();
            assert!(text.contains("mem-path=/dev/shm/NAME,share=on"), "{text}");
        }
        let image = RamBlock { read_only: true, ..block.clone() };
        assert_eq!(judge(V10, &image, Some("memory-backend-file"), true).unwrap(), Way::Stays);
        let text = judge(V10, &image, Some("memory-backend-file"), false).unwrap_err().to_string();
        assert!(text.contains("nobody can write") && text.contains("share=on"), "{text}");
        let v8 = Version { major: 8, minor: 0, micro: 5 };
        assert_eq!(judge(v8, &block, Some("memory-backend-memfd"), true).unwrap(), Way::Engine);
    }

    #[test]
    fn memory_of_a_real_qemu_is_found_and_is_the_same_memory() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("ram");
        let backend =
            format!("memory-backend-file,id=ram0,size=64M,mem-path={},share=on", path.display());
        let mut qemu = TestQemu::start(&[
            "-m",
            "64M",
            "-object",
            &backend,
            "-machine",
            "q35,memory-backend=ram0",
            "-vga",
            "std",
        ]);
        let pid = qemu.pid();
        let found = find(&mut qemu.qmp, pid, Access::Write, TestQemu::soon()).unwrap();
        assert_eq!(found.shared.len(), 1);
        let ram = &found.shared[0];
        assert_eq!((ram.name.as_str(), ram.bytes, ram.file_offset), ("ram0", 64 << 20, 0));
        assert!(found.unshared.iter().any(|b| b.name.ends_with("vga.vram") && b.bytes == 16 << 20));
        let mapped =
            MemoryRegion::map_shared(ram.file.as_fd(), 0, ram.bytes as usize, Access::Write)
                .unwrap();
        mapped.write(1 << 20, b"ferry").unwrap();
        let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut seen = [0; 5];
        std::os::unix::fs::FileExt::read_exact_at(
            &memory,
            &mut seen,
            ram.process_address + (1 << 20),
        )
        .unwrap();
        assert_eq!(&seen, b"ferry");
    }

    #[test]
    fn a_file_that_nobody_writes_is_known_as_such_in_a_real_qemu_and_must_be_shared() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, vec![7; 16 << 20]).unwrap();
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        let ram = format!(
            "memory-backend-file,id=ram0,size=64M,mem-path={},share=on",
            ram.path().join("ram").display()
        );
        let found = |share: &str| {
            let image = format!(
                "memory-backend-file,id=i,size=16M,mem-path={},readonly=on,share={share}",
                path.display()
            );
            let mut qemu = TestQemu::start(&[
                "-m",
                "64M,slots=1,maxmem=1G",
                "-object",
                &ram,
                "-object",
                &image,
                "-machine",
                "q35,nvdimm=on,memory-backend=ram0",
                "-device",
                "nvdimm,memdev=i,unarmed=on",
            ]);
            let pid = qemu.pid();
            find(&mut qemu.qmp, pid, Access::Read, TestQemu::soon())
        };
        let mut shared = found("on").unwrap();
        assert_eq!(shared.shared.iter().map(|b| b.name.as_str()).collect::<Vec<_>>(), ["ram0"]);
        let image = shared.images[0].describe().unwrap();
        assert_eq!((image.name.as_str(), image.bytes), ("i", 16 << 20));
        let text = found("off").unwrap_err().to_string();
        assert!(text.contains("nobody can write") && text.contains("share=on"), "{text}");
    }

    #[test]
    fn private_and_nameless_memory_of_a_real_qemu_is_refused() {
        for (options, word) in [
            (vec!["-m", "64M", "-machine", "q35"], "is not shared"),
            (
                vec![
                    "-m",
                    "64M",
                    "-object",
                    "memory-backend-memfd,id=ram0,size=64M,share=on",
                    "-machine",
                    "q35,memory-backend=ram0",
                ],
                "would send all of it",
            ),
            (vec!["-machine", "none"], "no guest memory"),
        ] {
            let mut qemu = TestQemu::start(&options);
            let pid = qemu.pid();
            let text =
                find(&mut qemu.qmp, pid, Access::Read, TestQemu::soon()).unwrap_err().to_string();
            assert!(text.contains(word), "{options:?}: {text}");
        }
    }
}
