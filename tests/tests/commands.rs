//! A user's own QEMU command works as it is. Every guest here gets a pattern over all of its memory
//! before it is moved, and the test itself looks for it at the destination, besides `--verify`.

use pageferry_tests::huge_pages::HugePages;
use pageferry_tests::look;
use pageferry_tests::stage::{Stage, Supervisor};
use pageferry_tests::{SOON, not_run};
use pageferry_transport::{Access, MemoryRegion};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

const QEMU: &str = "qemu-system-x86_64 -accel tcg -nodefaults -display none";
const PAGE: u64 = 4096;
/// The firmware writes below and near the end of memory (on q35 below the 16 MiB set aside for
/// SMM).
const LOW_BYTES: u64 = 2 << 20;
const HIGH_BYTES: u64 = 24 << 20;

/// The memory files of a QEMU that have one of these texts in their path, mapped (files of huge
/// pages can be neither read nor written), in order of their paths.
fn memory_files(qemu: u32, texts: &[&str]) -> Vec<Arc<MemoryRegion>> {
    let mut found: Vec<(String, File, u64)> = std::fs::read_dir(format!("/proc/{qemu}/fd"))
        .unwrap()
        .filter_map(|fd| {
            let fd = fd.ok()?.path();
            let path = std::fs::read_link(&fd).ok()?.display().to_string();
            if !texts.iter().any(|text| path.contains(text)) {
                return None;
            }
            let file = File::options().read(true).write(true).open(fd).ok()?;
            let bytes = file.metadata().ok()?.len();
            Some((path, file, bytes))
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    // QEMU has more than one descriptor of a file.
    found.dedup_by(|a, b| a.0 == b.0);
    let map = |(_, file, bytes): (String, File, u64)| {
        MemoryRegion::map_shared(file.as_fd(), 0, bytes as usize, Access::Write).unwrap()
    };
    found.into_iter().map(map).collect()
}

/// Every fourth page between the firmware's.
fn pattern(bytes: u64) -> impl Iterator<Item = (u64, [u8; PAGE as usize])> {
    (LOW_BYTES..bytes - HIGH_BYTES).step_by(4 * PAGE as usize).map(|at| {
        let mut page = [0; PAGE as usize];
        for (index, chunk) in page.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&(at ^ 0x5eed).wrapping_mul(index as u64 * 2 + 1).to_le_bytes());
        }
        (at, page)
    })
}

/// Moves a guest of this command and looks at its memory. `blocks` are the sizes of its memory
/// files in MiB.
fn moves(source: &str, destination: &str, texts: &[&str], blocks: &[u64]) {
    let stage = Stage::new();
    let mut from = stage.run("src", &format!("{QEMU} {source}"), "");
    from.wait_guest_runs();
    let sized = |supervisor: &Supervisor| {
        let files = memory_files(supervisor.qemu(), texts);
        let mut sizes: Vec<u64> = files.iter().map(|file| file.len() as u64 >> 20).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, blocks, "{source}");
        files
    };
    for file in sized(&from) {
        pattern(file.len() as u64).for_each(|(at, page)| file.write(at as usize, &page).unwrap());
    }
    let to = stage.receive("dst", &format!("{QEMU} {destination}"), "");
    let ended = stage.migrate("src", to.address(), &["--verify", "--lanes", "2"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{source}: {}", ended.stderr);
    assert!(ended.stdout.contains("\"verified\": true"), "{}", ended.stdout);
    to.wait_guest_runs();
    assert_eq!(from.end(), Some(0));
    let mut page = [0; PAGE as usize];
    for file in sized(&to) {
        for (at, wanted) in pattern(file.len() as u64) {
            file.read(at as usize, &mut page).unwrap();
            assert!(page == wanted, "{source}: the page at {at:#x} is not what it was");
        }
    }
}

/// The same command on both sides, with memory that pageferry makes.
fn moves_as_it_is(qemu: &str, blocks: &[u64]) {
    moves(qemu, qemu, &["memfd:pageferry-"], blocks);
}

#[test]
fn a_size_of_memory() {
    moves_as_it_is("-m 256", &[256]);
    moves_as_it_is("-m size=256M", &[256]);
}

#[test]
fn no_size_of_memory() {
    moves_as_it_is("-machine q35", &[128]);
}

#[test]
fn several_vcpus() {
    moves_as_it_is("-m 64 -smp 2", &[64]);
}

#[test]
fn machine_types() {
    moves_as_it_is("-machine pc -m 64", &[64]);
    moves_as_it_is("-M q35 -m 64", &[64]);
}

#[test]
fn a_video_card_and_a_serial_port() {
    moves_as_it_is("-machine q35 -m 64 -vga std -serial null", &[64]);
}

#[test]
fn an_own_backend_is_rewritten() {
    for kind in ["memory-backend-ram", "memory-backend-memfd"] {
        moves_as_it_is(
            &format!("-machine q35,memory-backend=m -m 64 -object {kind},id=m,size=64M"),
            &[64],
        );
    }
}

#[test]
fn an_own_shared_file_stays_as_it_is() {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let qemu = |file: &str| {
        format!(
            "-machine q35,memory-backend=m -m 64 -object memory-backend-file,id=m,size=64M,mem-path={},share=on",
            memory.path().join(file).display()
        )
    };
    moves(&qemu("here"), &qemu("there"), &[memory.path().to_str().unwrap()], &[64]);
}

#[test]
fn two_numa_nodes_with_a_backend_each() {
    moves_as_it_is(
        "-machine q35 -m 96 -smp 2 -object memory-backend-ram,id=n0,size=32M -object memory-backend-memfd,id=n1,size=64M \
         -numa node,nodeid=0,cpus=0,memdev=n0 -numa node,nodeid=1,cpus=1,memdev=n1",
        &[32, 64],
    );
}

#[test]
fn huge_pages() {
    let _reserved = match HugePages::reserve(64 + 4) {
        Ok(reserved) => reserved,
        Err(why) => return not_run("huge_pages", &why),
    };
    moves_as_it_is(
        "-machine q35,memory-backend=h -m 64 -object memory-backend-memfd,id=h,size=64M,hugetlb=on,hugetlbsize=2M",
        &[64],
    );
}

#[test]
fn a_paused_guest_is_moved_paused() {
    let stage = Stage::new();
    let mut from = stage.run("src", &format!("{QEMU} -machine q35 -m 64"), "");
    from.wait_guest_runs();
    look::ask(&from.monitor, "stop", serde_json::json!({})).expect("QEMU stops");
    let to = stage.receive("dst", &format!("{QEMU} -machine q35 -m 64"), "");
    let ended = stage.migrate("src", to.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(from.end(), Some(0));
    assert_eq!(to.guest_state().as_deref(), Some("paused"));
    look::ask(&to.monitor, "cont", serde_json::json!({})).expect("QEMU goes on");
    to.wait_guest_runs();
}
