//! A guest's memory is known by its file, and not by a name: a file that is somebody's is nobody
//! else's, what was plugged in anew is mapped anew, what nobody writes stays where it is, and what
//! does not fit is refused.

use pageferry::supervisor::api::State;
use pageferry_tests::look::{self, tracked_mappings};
use pageferry_tests::stage::{Stage, Supervisor};
use pageferry_tests::{SOON, eventually, not_run};
use pageferry_transport::{Access, MemoryRegion};
use rustix::process::geteuid;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const QEMU: &str = "qemu-system-x86_64 -accel tcg -nodefaults -display none";
const PAGE: usize = 4096;
/// The firmware writes below and near the end of memory.
const LOW: usize = 4 << 20;
const HIGH: usize = 36 << 20;

/// Files that go with the test, in a memory file system.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("pf").tempdir_in("/dev/shm").unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A machine of 64 MiB whose memory is this file.
    fn machine(&self, name: &str) -> String {
        format!("{QEMU} -machine q35,memory-backend=m -m 64 {}", self.backend("m", name))
    }

    /// A backend of 64 MiB with this id in this file.
    fn backend(&self, id: &str, name: &str) -> String {
        format!(
            "-object memory-backend-file,id={id},size=64M,mem-path={},share=on",
            self.path(name).display()
        )
    }

    /// All of it mapped. Whoever maps a file is one of its users, so this is dropped before a
    /// receiver starts.
    fn map(&self, name: &str) -> Arc<MemoryRegion> {
        map(&self.path(name))
    }

    fn write(&self, name: &str, range: std::ops::Range<usize>, seed: u64) {
        write(&self.map(name), range, seed);
    }

    fn holds(&self, name: &str, range: std::ops::Range<usize>, seed: u64) -> bool {
        let region = self.map(name);
        let mut found = [0; PAGE];
        range.step_by(PAGE).all(|at| {
            region.read(at, &mut found).unwrap();
            found == page(at, seed)
        })
    }
}

fn map(path: &Path) -> Arc<MemoryRegion> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let bytes = file.metadata().unwrap().len() as usize;
    MemoryRegion::map_shared(file.as_fd(), 0, bytes, Access::Write).unwrap()
}

fn write(region: &MemoryRegion, range: std::ops::Range<usize>, seed: u64) {
    range.step_by(PAGE).for_each(|at| region.write(at, &page(at, seed)).unwrap());
}

/// Another one for each address and seed.
fn page(at: usize, seed: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (index, chunk) in page.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&(at as u64 ^ seed).wrapping_mul(index as u64 * 2 + 1).to_le_bytes());
    }
    page
}

/// A receiver that does not come to wait: exit status 2, and these words.
#[track_caller]
fn receive_refused(stage: &Stage, name: &str, qemu: &str, words: &[&str]) {
    supervisor_refused(stage, name, &["receive", name, "--listen", "127.0.0.1:0"], qemu, words);
}

#[track_caller]
fn supervisor_refused(stage: &Stage, name: &str, arguments: &[&str], qemu: &str, words: &[&str]) {
    let mut supervisor = stage.supervise(name, arguments, Some(qemu), "");
    assert_eq!(supervisor.end(), Some(2), "{}", supervisor.words.text());
    let said = supervisor.words.all(SOON);
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn a_guest_that_runs_keeps_its_memory_whoever_else_would_have_it() {
    let (stage, files) = (Stage::new(), Files::new());
    let mut source = stage.run("src", &files.machine("ram"), "");
    source.wait_guest_runs();
    files.write("ram", LOW..HIGH, 1);
    let path = files.path("ram").display().to_string();
    let (qemu, supervisor) =
        (format!("(process {})", source.qemu()), format!("(process {})", source.pid()));
    receive_refused(
        &stage,
        "dst",
        &files.machine("ram"),
        &[&path, "in use by", &qemu, &supervisor, "mem-path"],
    );
    supervisor_refused(&stage, "other", &["run", "other"], &files.machine("ram"), &[&path, &qemu]);
    // Also by another name, and where nobody supervises it any more.
    std::fs::hard_link(files.path("ram"), files.path("link")).unwrap();
    let pid = source.qemu();
    source.kill();
    receive_refused(&stage, "dst", &files.machine("link"), &["in use by qemu-system", &qemu]);
    assert!(source.guest_runs(), "it runs on");
    assert!(files.holds("ram", LOW..HIGH, 1), "and has its memory");
    // The lock ended with its holder: neither QEMU nor anybody else has inherited it.
    let again = stage.attach("src", &[]);
    assert_eq!(again.qemu(), pid);
    let destination = stage.receive("dst", &files.machine("there"), "filling");
    let moving = stage.migrate("src", destination.address(), &["--verify"]);
    destination.wait_held("filling");
    receive_refused(&stage, "second", &files.machine("there"), &["in use by", "qemu-system"]);
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(
        ended.status,
        Some(0),
        "one that was refused does not disturb the move: {}",
        ended.stderr
    );
    destination.wait_guest_runs();
    // A guest that has just come is as safe.
    receive_refused(&stage, "second", &files.machine("there"), &["in use by", "qemu-system"]);
    assert!(destination.guest_runs());
    assert!(files.holds("there", LOW..HIGH, 1));
}

#[test]
fn of_two_receivers_that_start_at_once_one_has_the_file() {
    let (stage, files) = (Stage::new(), Files::new());
    File::create(files.path("ram")).unwrap().set_len(64 << 20).unwrap();
    let start = |name: &str| {
        let arguments = ["receive", name, "--listen", "127.0.0.1:0"];
        stage.supervise(name, &arguments, Some(&files.machine("ram")), "")
    };
    let mut two = [start("a"), start("b")];
    let waits = |receiver: &Supervisor| receiver.words.text().contains("waits for a guest on");
    let winner = eventually("one of them waits", SOON, || two.iter().position(&waits));
    assert_eq!(two[1 - winner].end(), Some(2));
    assert!(
        two[1 - winner].words.text().contains("memory file"),
        "{}",
        two[1 - winner].words.text()
    );
    assert!(!waits(&two[1 - winner]));
    two[winner].wait_state(State::Waiting);
}

#[test]
fn a_process_that_cannot_be_seen_is_a_user_too() {
    const NAME: &str = "a_process_that_cannot_be_seen_is_a_user_too";
    if !geteuid().is_root() {
        return not_run(NAME, "it needs root, to hide a process from the receiver");
    }
    let (stage, files) = (Stage::new(), Files::new());
    let mut source = stage.run("src", &files.machine("ram"), "");
    source.wait_guest_runs();
    files.write("ram", LOW..HIGH, 1);
    let qemu = source.qemu();
    source.kill();
    let nothing = stage.path("nothing");
    std::fs::create_dir(&nothing).unwrap();
    let behind = Stage::new().behind(&format!("mount --bind {} /proc/{qemu}", nothing.display()));
    receive_refused(
        &behind,
        "dst",
        &files.machine("ram"),
        &["cannot be seen from here", "mem-path"],
    );
    assert!(files.holds("ram", LOW..HIGH, 1));
}

/// A QEMU without pageferry, ended on drop.
struct Plain(std::process::Child);

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_qemu_that_came_to_a_waiting_receivers_file_keeps_its_memory() {
    let (stage, files) = (Stage::new(), Files::new());
    let source = stage.run("src", &files.machine("here"), "");
    source.wait_guest_runs();
    let destination = stage.receive("dst", &files.machine("there"), "");
    let mut words = files.machine("there").split(' ').map(str::to_owned).collect::<Vec<_>>();
    words.extend(pageferry_tests::stage::monitor_options(&stage.path("plain.look")));
    let plain = Plain(std::process::Command::new(&words[0]).args(&words[1..]).spawn().unwrap());
    let runs = || look::guest_state(&stage.path("plain.look")).as_deref() == Some("running");
    eventually("the other QEMU runs", SOON, || runs().then_some(()));
    files.write("there", LOW..HIGH, 3);
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("(process {})", plain.0.id())), "{}", ended.stderr);
    assert!(files.holds("there", LOW..HIGH, 3));
    assert!(runs() && source.guest_runs());
    drop(plain);
    // Its user has gone. What it has left there is not the guest's: a page of zeros is not sent.
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let (here, there) = (files.map("here"), files.map("there"));
    let mut pages = [[0; PAGE]; 2];
    for at in (LOW..HIGH).step_by(PAGE) {
        here.read(at, &mut pages[0]).unwrap();
        there.read(at, &mut pages[1]).unwrap();
        assert!(pages[0] == pages[1], "the page at {at:#x}");
    }
}

/// Commands to a supervisor's QEMU on the test's own monitor.
struct Monitor<'s>(&'s Supervisor);

impl Monitor<'_> {
    #[track_caller]
    fn ask(&self, command: &str, arguments: Value) -> Value {
        look::ask(&self.0.monitor, command, arguments.clone())
            .unwrap_or_else(|| panic!("QEMU does not take {command} {arguments}"))
    }

    #[track_caller]
    fn human(&self, line: &str) {
        let answer = self.ask("human-monitor-command", json!({ "command-line": line }));
        assert_eq!(answer.as_str().map(str::trim), Some(""), "{line}");
    }

    /// Plugs a DIMM of 64 MiB in, whose memory is this file.
    fn plug(&self, path: &Path) {
        let backend = json!({ "qom-type": "memory-backend-file", "id": "m0", "size": 64 << 20,
            "mem-path": path, "share": true });
        self.ask("object-add", backend);
        self.ask("device_add", json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "m0" }));
    }

    /// Unplugs it again. The guest has no operating system, so its part is done here: it ejects the
    /// DIMM by the registers of ACPI memory hot-plug (QEMU, docs/specs/acpi_mem_hotplug.rst).
    fn unplug(&self) {
        self.ask("device_del", json!({ "id": "dimm0" }));
        self.human("o /w 0xa00 0");
        self.human("o /b 0xa14 8");
        eventually("the DIMM is out", SOON, || {
            let devices = self.ask("query-memory-devices", json!({}));
            devices.as_array().is_some_and(Vec::is_empty).then_some(())
        });
        self.ask("object-del", json!({ "id": "m0" }));
    }
}

const SLOTS: &str = "-machine q35 -m 64,slots=2,maxmem=1G";

#[test]
fn memory_that_was_plugged_in_or_replaced_since_is_moved_as_it_is_now() {
    let (stage, files) = (Stage::new(), Files::new());
    let mut source = stage.run("src", &format!("{QEMU} {SLOTS}"), "");
    source.wait_guest_runs();
    // Plugged in after the supervisor came.
    Monitor(&source).plug(&files.path("first"));
    files.write("first", LOW..HIGH, 1);
    let with_dimm = |file: &str| {
        format!("{QEMU} {SLOTS} {} -device pc-dimm,id=dimm0,memdev=m0", files.backend("m0", file))
    };
    let receive = |name: &str| stage.receive(name, &with_dimm(name), "filling");
    let destination = receive("there");
    let moving = stage.migrate("src", destination.address(), &["--verify"]);
    destination.wait_held("filling");
    assert_eq!(stage.done(&["cancel", "src"]).status, Some(0));
    stage.release();
    assert_eq!(moving.end(SOON).status, Some(1));
    // Replaced by another of the same id and size. What the supervisor mapped a moment ago is
    // another file now.
    Monitor(&source).unplug();
    Monitor(&source).plug(&files.path("second"));
    files.write("second", LOW..HIGH, 2);
    destination.wait_state(State::Waiting);
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("\"verified\": true"), "{}", ended.stdout);
    destination.wait_guest_runs();
    assert!(files.holds("there", LOW..HIGH, 2), "it has what was plugged in last");
    assert_eq!(source.end(), Some(0));
}

/// Seen before: 4096 of 4096 pages were those of the file before, with exit status 0, and
/// `--verify` agreed.
#[test]
fn memory_that_was_replaced_under_the_same_name_since_its_supervisor_came_is_moved_as_it_is_now() {
    let (stage, files) = (Stage::new(), Files::new());
    let with_dimm = |file: &str| {
        format!("{QEMU} {SLOTS} {} -device pc-dimm,id=dimm0,memdev=m0", files.backend("m0", file))
    };
    let mut source = stage.run("src", &with_dimm("before"), "");
    source.wait_guest_runs();
    // Plugged in by hand too, and each only when the one before is gone: QEMU maps it at the same
    // address then.
    let replace = |source: &Supervisor, before: &str, after: &str| {
        Monitor(source).unplug();
        let (maps, before) = (format!("/proc/{}/maps", source.qemu()), files.path(before));
        eventually("QEMU has let go", SOON, || {
            let text = std::fs::read_to_string(&maps).expect("QEMU lives");
            (!text.contains(&before.display().to_string())).then_some(())
        });
        Monitor(source).plug(&files.path(after));
    };
    replace(&source, "before", "first");
    files.write("first", LOW..HIGH, 1);
    source.kill();
    let source = stage.attach("src", &[]);
    replace(&source, "first", "second");
    files.write("second", LOW..HIGH, 2);
    let destination = stage.receive("dst", &with_dimm("there"), "");
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    destination.wait_guest_runs();
    assert!(files.holds("there", LOW..HIGH, 2), "it has what was plugged in last");
}

#[test]
fn memory_that_is_replaced_while_it_moves_ends_the_move_and_the_guest_runs_on() {
    let (stage, files) = (Stage::new(), Files::new());
    let source = stage.run("src", &format!("{QEMU} {SLOTS}"), "rounds");
    source.wait_guest_runs();
    Monitor(&source).plug(&files.path("first"));
    files.write("first", LOW..HIGH, 1);
    let there = format!(
        "{QEMU} {SLOTS} {} -device pc-dimm,id=dimm0,memdev=m0",
        files.backend("m0", "there")
    );
    let destination = stage.receive("dst", &there, "");
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    Monitor(&source).unplug();
    Monitor(&source).plug(&files.path("second"));
    files.write("second", LOW..HIGH, 2);
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(source.guest_runs());
    destination.wait_state(State::Waiting);
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(files.holds("there", LOW..HIGH, 2));
}

#[test]
fn an_image_that_nobody_writes_stays_where_it_is_if_both_have_the_same() {
    let stage = Stage::new();
    let disk = tempfile::tempdir().unwrap();
    let image = |name: &str, byte: u8| {
        let path = disk.path().join(name);
        std::fs::write(&path, vec![byte; 16 << 20]).unwrap();
        path
    };
    let qemu = |image: &Path, more: &str| {
        format!(
            "{QEMU} -machine q35,nvdimm=on -m 64,slots=2,maxmem=1G -object \
             memory-backend-file,id=image,size=16M,mem-path={},readonly=on{more} -device \
             nvdimm,id=nv0,memdev=image,unarmed=on",
            image.display()
        )
    };
    let here = image("here", 7);
    let source = stage.run("src", &qemu(&here, ""), "");
    source.wait_guest_runs();
    let other = stage.receive("other", &qemu(&image("other", 8), ""), "");
    let ended = stage.migrate("src", other.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("read-only memory image of 16 MiB"), "{}", ended.stderr);
    assert_eq!(tracked_mappings(source.qemu()), 0);
    assert!(source.guest_runs());
    // Both hosts may have one and the same file, and two guests may.
    let same = stage.receive("same", &qemu(&here, ",share=on"), "");
    let ended = stage.migrate("src", same.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    same.wait_guest_runs();
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["memory_bytes"], 64 << 20, "the image is not moved");
}

#[test]
fn memory_in_a_file_of_readconfig_is_taken_as_that_of_the_command_line() {
    let stage = Stage::new();
    let config = stage.path("config");
    std::fs::write(&config, "[memory]\n  size = \"96\"\n").unwrap();
    let qemu = format!("{QEMU} -machine q35 -readconfig {}", config.display());
    let source = stage.run("src", &qemu, "");
    source.wait_guest_runs();
    let destination = stage.receive("dst", &qemu, "");
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["memory_bytes"], 96 << 20);
    destination.wait_guest_runs();
    std::fs::write(
        &config,
        "[object \"m\"]\n  qom-type = \"memory-backend-ram\"\n  size = \"64M\"\n",
    )
    .unwrap();
    let words = ["-readconfig", "[object \"m\"]", "share = \"on\""];
    supervisor_refused(&stage, "other", &["run", "other"], &qemu, &words);
}

/// A guest of which so much is touched, for a destination that has no room for it.
fn touched(stage: &Stage, files: &Files, mib: usize) -> Supervisor {
    let memory = files.backend("m", "ram").replace("64M", "256M");
    let source =
        stage.run("src", &format!("{QEMU} -machine q35,memory-backend=m -m 256 {memory}"), "");
    source.wait_guest_runs();
    files.write("ram", LOW..LOW + (mib << 20), 1);
    source
}

fn no_room(stage: &Stage, source: &Supervisor, destination: &Supervisor, words: &[&str]) {
    let before = destination.qemu();
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    for word in [&["no room for the guest"], words].concat() {
        assert!(ended.stderr.contains(word), "{word:?} is not in {}", ended.stderr);
    }
    assert_eq!(tracked_mappings(source.qemu()), 0);
    assert!(source.guest_runs());
    destination.wait_state(State::Waiting);
    assert_eq!(destination.qemu(), before, "its QEMU was not touched");
}

/// A destination whose memory lies in a tmpfs of its own.
fn on_a_small_tmpfs(mib: usize, hold: &str) -> (Stage, Supervisor, PathBuf) {
    let there = Stage::new();
    let mount = there.path("mount");
    std::fs::create_dir(&mount).unwrap();
    let there = there.behind(&format!("mount -t tmpfs -o size={mib}m tmpfs {}", mount.display()));
    let memory =
        format!("memory-backend-file,id=m,size=256M,mem-path={}/ram,share=on", mount.display());
    let qemu = format!("{QEMU} -machine q35,memory-backend=m -m 256 -object {memory}");
    let destination = there.receive("dst", &qemu, hold);
    (there, destination, mount)
}

#[test]
fn a_file_system_that_is_too_small_is_named_before_anything_is_touched() {
    const NAME: &str = "a_file_system_that_is_too_small_is_named_before_anything_is_touched";
    if !geteuid().is_root() {
        return not_run(NAME, "it needs root, to mount a small tmpfs");
    }
    let (stage, files) = (Stage::new(), Files::new());
    let source = touched(&stage, &files, 48);
    let (_there, destination, mount) = on_a_small_tmpfs(32, "");
    let mount = mount.display().to_string();
    no_room(&stage, &source, &destination, &["the file system of", &mount, "remount,size="]);
}

#[test]
fn why_a_destination_could_not_place_a_byte_is_told_at_the_source() {
    const NAME: &str = "why_a_destination_could_not_place_a_byte_is_told_at_the_source";
    if !geteuid().is_root() {
        return not_run(NAME, "it needs root, to mount a small tmpfs");
    }
    let (stage, files) = (Stage::new(), Files::new());
    let source = touched(&stage, &files, 48);
    let (there, destination, mount) = on_a_small_tmpfs(96, "room");
    let moving = stage.migrate("src", destination.address(), &[]);
    destination.wait_held("room");
    // There was room when it was asked; now somebody else has it.
    let inside = Path::new("/proc").join(destination.pid().to_string()).join("root");
    let other = inside.join(mount.strip_prefix("/").unwrap()).join("other");
    std::fs::write(other, vec![1; 80 << 20]).unwrap();
    there.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("is the file system behind it"), "{}", ended.stderr);
    assert!(!ended.stderr.contains("the peer closed the connection"), "{}", ended.stderr);
    assert!(source.guest_runs());
    assert_eq!(tracked_mappings(source.qemu()), 0);
}

#[test]
fn a_pool_of_huge_pages_that_is_too_small_is_named_before_memory_is_taken_from_it() {
    const NAME: &str =
        "a_pool_of_huge_pages_that_is_too_small_is_named_before_memory_is_taken_from_it";
    let pool = |file: &str| {
        std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}"))
    };
    if !geteuid().is_root() || pool("nr_hugepages").is_err() {
        return not_run(
            NAME,
            "it needs root and a kernel with huge pages of 2 MiB, for a hugetlbfs of its own",
        );
    }
    let stage = Stage::new();
    let mount = stage.path("mount");
    std::fs::create_dir(&mount).unwrap();
    let stage =
        stage.behind(&format!("mount -t hugetlbfs -o pagesize=2M none {}", mount.display()));
    // More than any pool has: what is not reserved is not missed until it is touched.
    let memory = format!(
        "memory-backend-file,id=m,size=512G,mem-path={},share=on,reserve=off",
        mount.display()
    );
    let qemu = format!("{QEMU} -machine q35,memory-backend=m -m 512G -object {memory}");
    receive_refused(
        &stage,
        "dst",
        &qemu,
        &["no room", "the pool of huge pages of 2048 KiB", "nr_hugepages"],
    );
}

/// A memory cgroup below this process's own, taken away at the end.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(limit_mib: u64) -> Result<Self, String> {
        let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
        let v1 = own
            .lines()
            .find_map(|line| line.splitn(3, ':').nth(2).filter(|_| line.contains(":memory:")));
        let v2 = own.lines().find_map(|line| line.strip_prefix("0::"));
        let (parent, file) = match (v1, v2) {
            (Some(path), _) => {
                (Path::new("/sys/fs/cgroup/memory").join(&path[1..]), "memory.limit_in_bytes")
            }
            (None, Some(path)) => (Path::new("/sys/fs/cgroup").join(&path[1..]), "memory.max"),
            (None, None) => return Err("no memory cgroup is mounted".into()),
        };
        let path = parent.join(format!("pageferry-test-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|e| format!("making {}: {e}", path.display()))?;
        let made = Self(path);
        std::fs::write(made.0.join(file), (limit_mib << 20).to_string())
            .map_err(|e| format!("limiting {}: {e}", made.0.display()))?;
        Ok(made)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What was in it has ended; the kernel may need a moment to see so.
        if !std::thread::panicking() {
            eventually("the cgroup is empty", SOON, || std::fs::remove_dir(&self.0).ok());
        }
    }
}

#[test]
fn a_memory_cgroup_that_is_too_small_is_named_before_anything_is_touched() {
    const NAME: &str = "a_memory_cgroup_that_is_too_small_is_named_before_anything_is_touched";
    let cgroup = match Cgroup::new(160) {
        Ok(cgroup) => cgroup,
        Err(why) => return not_run(NAME, &why),
    };
    let (stage, files) = (Stage::new(), Files::new());
    let source = touched(&stage, &files, 180);
    let there = Stage::new().behind(&format!("echo $$ > {}/cgroup.procs", cgroup.0.display()));
    let memory = files.backend("m", "there").replace("64M", "256M");
    let qemu = format!("{QEMU} -machine q35,memory-backend=m -m 256 {memory}");
    let destination = there.receive("dst", &qemu, "");
    let name = cgroup.0.file_name().unwrap().to_str().unwrap();
    no_room(
        &stage,
        &source,
        &destination,
        &["the memory cgroup", name, "(limit 160 MiB)", "raise its memory."],
    );
}
