use super::tracee::{STOP_TIMEOUT, ptrace};
use super::*;
use crate::testing::TestQemu;
use pageferry_engine::dirty::DirtySource;
use pageferry_engine::dirty::pagemap::{PagemapSource, TrackedRange};
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_transport::MemoryRegion;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A forked process and memory shared with it. Killed and reaped on drop.
struct Forked {
    pid: i32,
    shared: Arc<MemoryRegion>,
}

/// What the child tells through the first words of the shared memory.
#[repr(C)]
struct Told {
    rounds: AtomicU64,
    wrong: AtomicU64,
    signals: AtomicU64,
}

impl Forked {
    /// `body` runs in a fork of a process with many threads: system calls and atomics alone.
    fn new(body: impl FnOnce(&Told, *mut u8)) -> Self {
        let shared = MemoryRegion::anonymous(64 * PAGE_BYTES as usize).unwrap();
        // SAFETY: the child calls `body`, which keeps to what is allowed after a fork, and exits.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: ends with the test's thread; the memory is zeroed and large enough for
            // `Told`, and both processes reach it through atomics alone.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // A fork has the handlers of this process, which its terminal set; a QEMU,
                // executed, has none.
                libc::signal(libc::SIGCONT, libc::SIG_DFL);
                body(&*shared.as_ptr().cast::<Told>(), shared.as_ptr());
                libc::_exit(0);
            }
        }
        Self { pid, shared }
    }

    fn told(&self) -> &Told {
        // SAFETY: as in `new`.
        unsafe { &*self.shared.as_ptr().cast::<Told>() }
    }

    /// Waits until the child has gone round `count` more times.
    fn wait_rounds(&self, count: u64) {
        let until = self.told().rounds.load(Ordering::SeqCst) + count;
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.told().rounds.load(Ordering::SeqCst) < until {
            assert!(Instant::now() < deadline, "the child is paused");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        stat.rsplit(") ").next().unwrap().chars().next().unwrap()
    }

    /// A line of `/proc/PID/status`.
    fn status(&self, name: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap().trim().to_owned()
    }

    fn kill(&self, signal: i32) {
        // SAFETY: a signal to a child of ours that nobody has reaped.
        assert_eq!(unsafe { libc::kill(self.pid, signal) }, 0);
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        // SAFETY: kills and reaps a child of ours.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, null_mut(), 0);
        }
    }
}

fn take(pid: i32) -> Result<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    userfaultfd_of(pid as u32, &pidfd)
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::SeqCst);
}

/// Blocks in every way that is to be restarted; anything but the normal answer is wrong.
fn block_in_many_ways(told: &Told, bytes: &PipeReader) {
    let (mut expected, fd) = (0u8, bytes.as_raw_fd());
    // What it is not by itself: flush to zero, denormals are zero.
    set_control_of_floating_point(0x9fc0);
    let numbers = floating_point_work();
    loop {
        let pause = libc::timespec { tv_sec: 0, tv_nsec: 300_000 };
        let (mut pollfd, mut byte) = (libc::pollfd { fd: -1, events: 0, revents: 0 }, 0u8);
        // SAFETY: every pointer is to a live local variable.
        let fine = unsafe {
            let mut mask: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut mask, libc::SIGUSR2);
            libc::poll(&raw mut pollfd, 1, 1) == 0
                && libc::nanosleep(&raw const pause, null_mut()) == 0
                && libc::ppoll(&raw mut pollfd, 1, &raw const pause, &raw const mask) == 0
                && libc::read(fd, (&raw mut byte).cast(), 1) == 1
                && byte == expected
        };
        // Work in user space too, with a result that any lost register would spoil.
        let sum =
            (0..20_000u64).fold(0u64, |sum, i| sum.rotate_left(5) ^ i.wrapping_mul(0x9e37_79b9));
        let same =
            numbers == floating_point_work() && control_of_floating_point() & !0x3f == 0x9fc0;
        let sum_is_right = sum == std::hint::black_box(SUM);
        add(&told.wrong, u64::from(!fine) + u64::from(!sum_is_right) + u64::from(!same));
        expected = expected.wrapping_add(1);
        add(&told.rounds, 1);
    }
}

/// Keeps vector registers busy for some 50 us.
fn floating_point_work() -> [u64; 4] {
    let (mut sums, step) = ([1.0f64, 2.0, 3.0, 4.0], std::hint::black_box(1.000_1f64));
    for _ in 0..10_000 {
        for sum in &mut sums {
            *sum = *sum * step + 0.125;
        }
    }
    sums.map(f64::to_bits)
}

fn control_of_floating_point() -> u32 {
    let mut control = 0u32;
    // SAFETY: stores 4 bytes there.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut control) };
    control
}

fn set_control_of_floating_point(control: u32) {
    // SAFETY: all exceptions stay masked.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const control) };
}

const SUM: u64 = {
    let (mut sum, mut i) = (0u64, 0u64);
    while i < 20_000 {
        sum = sum.rotate_left(5) ^ i.wrapping_mul(0x9e37_79b9);
        i += 1;
    }
    sum
};

/// Feeds the bytes that `block_in_many_ways` reads, slowly enough that it blocks.
fn feed(mut pipe: PipeWriter) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for byte in (0..=u8::MAX).cycle() {
            std::thread::sleep(Duration::from_millis(1));
            if pipe.write_all(&[byte]).is_err() {
                return;
            }
        }
    })
}

#[test]
fn a_process_notices_nothing_of_many_injections() {
    let (reader, writer) = std::io::pipe().unwrap();
    let child = Forked::new(|told, _| block_in_many_ways(told, &reader));
    drop(reader);
    let feeder = feed(writer);
    child.wait_rounds(1);
    let fds = || fs::read_dir(format!("/proc/{}/fd", child.pid)).unwrap().count();
    let (before, mut slowest, begun) = (fds(), Duration::ZERO, Instant::now());
    for _ in 0..200 {
        let begun = Instant::now();
        drop(take(child.pid).unwrap());
        slowest = slowest.max(begun.elapsed());
    }
    println!("200 injections in {:?}, the slowest in {slowest:?}", begun.elapsed());
    child.wait_rounds(20);
    assert_eq!(child.told().wrong.load(Ordering::SeqCst), 0);
    assert_eq!(fds(), before, "the process keeps no descriptor");
    drop(child);
    feeder.join().unwrap();
}

#[test]
fn no_signal_is_lost() {
    extern "C" fn count(_: i32) {
        // SAFETY: set before the handler is installed, in a child with one thread.
        unsafe { add(&(*TOLD).signals, 1) };
    }
    static mut TOLD: *const Told = std::ptr::null();
    let child = Forked::new(|told, _| {
        // SAFETY: single-threaded child; the handler is safe to run at any time.
        unsafe {
            TOLD = told;
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as *const () as usize;
            libc::sigaction(libc::SIGRTMIN(), &raw const action, null_mut());
        }
        loop {
            // SAFETY: no pointers.
            unsafe { libc::poll(null_mut(), 0, 1) };
            add(&told.rounds, 1);
        }
    });
    child.wait_rounds(1);
    std::thread::scope(|scope| {
        // Real-time signals queue, so their number is exact.
        let sender = scope.spawn(|| {
            for _ in 0..2_000 {
                child.kill(libc::SIGRTMIN());
                std::thread::yield_now();
            }
        });
        while !sender.is_finished() {
            drop(take(child.pid).unwrap());
        }
    });
    child.wait_rounds(5);
    assert_eq!(child.told().signals.load(Ordering::SeqCst), 2_000);
}

#[test]
fn writes_of_another_process_are_followed_and_its_death_is_noticed() {
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let (mut done_reader, done_writer) = std::io::pipe().unwrap();
    let child = Forked::new(|_, memory| {
        let page = |n: usize| memory.wrapping_add(n * PAGE_BYTES as usize);
        // SAFETY: pages of the shared mapping; `read` puts two bytes, the rest is one byte each.
        unsafe {
            // The kernel's own write, then the child's, then it says so and waits for its end.
            libc::read(reader.as_raw_fd(), page(10).cast(), 2);
            page(20).write_volatile(1);
            libc::write(done_writer.as_raw_fd(), page(20).cast(), 1);
            libc::pause();
        }
    });
    let uffd = take(child.pid).unwrap();
    let range = TrackedRange {
        process_address: child.shared.as_ptr() as u64,
        bytes: child.shared.len() as u64,
        first_page: 0,
        backing_page_bytes: PAGE_BYTES,
    };
    let mut source = PagemapSource::new(uffd, child.pid as u32, vec![range]).unwrap();
    writer.write_all(b"ab").unwrap();
    done_reader.read_exact(&mut [0]).unwrap();
    let mut dirty = DirtyBitmap::new(64);
    source.sync(&mut dirty).unwrap();
    assert_eq!(dirty.runs(1).map(|r| r.first.0).collect::<Vec<_>>(), [10, 20]);
    child.kill(libc::SIGKILL);
    let pidfd = pidfd_open(Pid::from_raw(child.pid).unwrap(), PidfdFlags::empty()).unwrap();
    rustix::event::poll(
        &mut [rustix::event::PollFd::from_borrowed_fd(pidfd.as_fd(), rustix::event::PollFlags::IN)],
        None,
    )
    .unwrap();
    let error = source.sync(&mut dirty).unwrap_err().to_string();
    assert!(error.contains("not tracked any more"), "{error}");
    let _ = reader.read(&mut []);
}

#[test]
fn a_stopped_process_stays_stopped() {
    let child = Forked::new(|told, _| {
        loop {
            // SAFETY: no pointers.
            let answer = unsafe { libc::poll(null_mut(), 0, 1) };
            add(&told.wrong, u64::from(answer != 0));
            add(&told.rounds, 1);
        }
    });
    child.wait_rounds(1);
    child.kill(libc::SIGSTOP);
    let deadline = Instant::now() + Duration::from_secs(10);
    while child.state() != 'T' {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_micros(100));
    }
    drop(take(child.pid).unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    while child.state() != 'T' {
        assert!(Instant::now() < deadline, "it runs on: {}", child.state());
        std::thread::sleep(Duration::from_micros(100));
    }
    child.kill(libc::SIGCONT);
    child.wait_rounds(3);
    assert_eq!(child.told().wrong.load(Ordering::SeqCst), 0);
}

#[test]
fn a_process_that_is_traced_already_is_refused_by_name() {
    let child = Forked::new(|told, _| {
        loop {
            // SAFETY: no pointers.
            unsafe { libc::poll(null_mut(), 0, 1) };
            add(&told.rounds, 1);
        }
    });
    child.wait_rounds(1);
    ptrace(libc::PTRACE_SEIZE, child.pid, 0, 0).unwrap();
    let error = take(child.pid).unwrap_err().to_string();
    assert!(error.contains("already traced by process"), "{error}");
}

#[test]
fn a_process_that_dies_at_any_moment_is_an_error_and_no_hang() {
    for delay_us in 0..60 {
        let child = Forked::new(|told, _| {
            loop {
                // SAFETY: no pointers.
                unsafe { libc::poll(null_mut(), 0, 1) };
                add(&told.rounds, 1);
            }
        });
        child.wait_rounds(1);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let at = Instant::now() + Duration::from_micros(delay_us * 5);
                while Instant::now() < at {
                    std::hint::spin_loop();
                }
                child.kill(libc::SIGKILL);
            });
            if let Err(error) = take(child.pid) {
                let text = error.chain();
                assert!(
                    text.contains("died")
                        || text.contains("no process")
                        || text.contains("No such process"),
                    "{text}"
                );
            }
        });
        assert!(begun.elapsed() < STOP_TIMEOUT, "{:?}", begun.elapsed());
    }
}

#[test]
fn a_real_qemu_goes_on_after_many_injections() {
    let mut qemu = TestQemu::start(&["-machine", "none"]);
    for _ in 0..50 {
        drop(take(qemu.pid() as i32).unwrap());
        let status = qemu.qmp.execute("query-status", Value::Null, TestQemu::soon()).unwrap();
        assert_eq!(status["running"], true);
    }
}

/// A child that blocks in many ways, and those who feed it.
struct Busy {
    child: Forked,
    _feeder: std::thread::JoinHandle<()>,
}

impl Busy {
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let child = Forked::new(|told, _| block_in_many_ways(told, &reader));
        drop(reader);
        let feeder = feed(writer);
        child.wait_rounds(1);
        Self { child, _feeder: feeder }
    }

    /// It goes on, and nothing of it is other than it was.
    fn check(&self, after: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.child.status("TracerPid") != "0" {
            assert!(Instant::now() < deadline, "still traced after {after}");
            std::thread::sleep(Duration::from_micros(100));
        }
        self.child.wait_rounds(5);
        assert_eq!(self.child.told().wrong.load(Ordering::SeqCst), 0, "after {after}");
        // It blocks nothing, but in ppoll.
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.child.status("SigBlk") != "0000000000000000" {
            assert!(Instant::now() < deadline, "signals stay blocked after {after}");
        }
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.pid)).unwrap().count()
    }
}

/// A process that does the injecting, so that it can be killed: this test binary anew.
struct Injector {
    child: Child,
    _directory: tempfile::TempDir,
    held: PathBuf,
}

impl Injector {
    /// Injects once, or over and over; held at this point, if there is one.
    fn start(pid: i32, point: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let held = directory.path().join("held");
        fs::write(&held, "").unwrap();
        let this = std::env::current_exe().unwrap();
        let mut command = Command::new(this);
        command
            .args(["--exact", "inject::tests::injector", "--ignored", "--nocapture"])
            .env("PAGEFERRY_TEST_PID", pid.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(point) = point {
            command.env("PAGEFERRY_HOLD", format!("{point}:200000:{}", held.display()));
        }
        let child = command.spawn().unwrap();
        Self { child, _directory: directory, held }
    }

    fn wait_held(&mut self) {
        let mut words = BufReader::new(self.child.stderr.take().unwrap());
        let mut line = String::new();
        while words.read_line(&mut line).unwrap() > 0 {
            if line.contains("held at") {
                return;
            }
        }
        panic!("the injector ended: {line}");
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
#[ignore = "the process that other tests start and kill"]
#[allow(clippy::disallowed_methods, reason = "the test beside it reads its stderr")]
fn injector() {
    // Whoever runs all that is ignored has no process for it.
    let Ok(pid) = std::env::var("PAGEFERRY_TEST_PID") else { return };
    let pid = pid.parse().unwrap();
    // Where it is held is an event, as everything that the engine has to say.
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let once = std::env::var_os("PAGEFERRY_HOLD").is_some();
    loop {
        drop(take(pid).unwrap());
        if once {
            return;
        }
    }
}

#[test]
fn a_tracer_killed_at_any_step_leaves_the_process_as_it_was() {
    let busy = Busy::new();
    let before = busy.descriptors();
    for point in POINTS {
        let mut left = 0;
        // Each time it is stopped in another of its ways to block.
        for _ in 0..4 {
            let already = busy.descriptors();
            let mut injector = Injector::start(busy.child.pid, Some(point));
            injector.wait_held();
            injector.kill();
            busy.check(point);
            left += busy.descriptors() - already;
        }
        // It may keep the descriptor that was made; of that there can be only one each time.
        let expected = match point {
            "inject-entered" | "inject-left" | "inject-made" | "inject-taken" => 4,
            _ => 0,
        };
        assert_eq!(left, expected, "descriptors left behind at {point}");
    }
    assert_eq!(busy.descriptors(), before + 16);
    drop(take(busy.child.pid).unwrap());
    busy.check("all of it");
}

#[test]
fn a_tracer_killed_at_random_leaves_the_process_as_it_was() {
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut random = seed | 1;
    let busy = Busy::new();
    for _ in 0..60 {
        let mut injector = Injector::start(busy.child.pid, None);
        let deadline = Instant::now() + Duration::from_secs(30);
        while busy.child.status("TracerPid") == "0" {
            assert!(Instant::now() < deadline, "it does not inject");
        }
        // xorshift64; an injection takes some hundred microseconds.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = Instant::now() + Duration::from_micros(random % 1_000);
        while Instant::now() < at {
            std::hint::spin_loop();
        }
        assert!(injector.child.try_wait().unwrap().is_none(), "it was to inject on");
        injector.kill();
        busy.check(&format!("a kill, seed {seed}"));
    }
}

/// A control group with a freezer, of version 1 or 2, if this host has one and lets us.
fn freezer(version: u32) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts.lines().find_map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        let fits = match version {
            1 => {
                words.get(2) == Some(&"cgroup") && words.get(3)?.split(',').any(|o| o == "freezer")
            }
            _ => words.get(2) == Some(&"cgroup2"),
        };
        fits.then(|| PathBuf::from(words[1]))
    })?;
    let group = mount.join(format!("pageferry-test-{}-{version}", std::process::id()));
    fs::create_dir(&group).ok()?;
    Some(group)
}

fn freeze(group: &Path, frozen: bool) {
    let (file, words) = match group.join("cgroup.freeze") {
        file if file.exists() => (file, ["0", "1"]),
        _ => (group.join("freezer.state"), ["THAWED", "FROZEN"]),
    };
    fs::write(file, words[usize::from(frozen)]).unwrap();
}

#[test]
fn a_process_frozen_in_the_call_goes_on_right_when_it_is_thawed() {
    std::thread::scope(|scope| {
        for version in [1, 2] {
            scope.spawn(move || {
                let Some(group) = freezer(version) else {
                    eprintln!("NOT RUN: frozen in the call: no freezer of version {version} here");
                    return;
                };
                let busy = Busy::new();
                let mut injector = Injector::start(busy.child.pid, Some("inject-blocked"));
                injector.wait_held();
                fs::write(group.join("cgroup.procs"), busy.child.pid.to_string()).unwrap();
                freeze(&group, true);
                fs::remove_file(&injector.held).unwrap();
                // It gives up after its deadline.
                let ended = injector.child.wait().unwrap();
                assert!(!ended.success() && ended.signal().is_none(), "{ended}");
                let before = busy.child.told().rounds.load(Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(20));
                let now = busy.child.told().rounds.load(Ordering::SeqCst);
                assert_eq!(now, before, "it is frozen");
                freeze(&group, false);
                busy.check(&format!("freezer of version {version}"));
                drop(busy);
                fs::remove_dir(&group).unwrap();
            });
        }
    });
}

/// Lets a filter say `listed` for these system calls and `otherwise` for all others.
fn install_filter(calls: &[i64], listed: u32, otherwise: u32) {
    let mut program = vec![libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 }];
    for call in calls {
        program.push(libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: *call as u32 });
        program.push(libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: listed });
    }
    program.push(libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: otherwise });
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a valid program, copied by the kernel.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program), 0);
    }
}

/// A child with such a filter that only polls.
fn filtered(calls: &[i64], listed: u32, otherwise: u32) -> Forked {
    let child = Forked::new(|told, _| {
        install_filter(calls, listed, otherwise);
        loop {
            // SAFETY: no pointers.
            let answer = unsafe { libc::poll(null_mut(), 0, 1) };
            add(&told.wrong, u64::from(answer != 0));
            add(&told.rounds, 1);
        }
    });
    child.wait_rounds(1);
    child
}

const POLLS: [i64; 3] = [libc::SYS_poll, libc::SYS_restart_syscall, libc::SYS_exit_group];
const NEEDED: [i64; 6] = [
    libc::SYS_poll,
    libc::SYS_restart_syscall,
    libc::SYS_exit_group,
    libc::SYS_userfaultfd,
    libc::SYS_close,
    libc::SYS_rt_sigreturn,
];
const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;
const FAIL: u32 = 0x0005_0000 | 1;

#[test]
fn a_filter_that_would_kill_is_seen_and_the_process_lives() {
    let lives = |child: &Forked| {
        child.wait_rounds(3);
        assert_eq!(child.told().wrong.load(Ordering::SeqCst), 0);
        assert_eq!(child.status("TracerPid"), "0");
    };
    let refused = |child: &Forked, words: &str| {
        let error = take(child.pid).unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        lives(child);
    };
    refused(&filtered(&POLLS, ALLOW, KILL), "kills it for userfaultfd(2)");
    // Whichever of the three it is.
    for missing in 3..6 {
        let mut calls = NEEDED.to_vec();
        calls.remove(missing);
        refused(&filtered(&calls, ALLOW, KILL), "kills it for");
    }
    refused(&filtered(&[libc::SYS_userfaultfd], FAIL, ALLOW), "lets userfaultfd(2) fail");

    let allowed = filtered(&NEEDED, ALLOW, KILL);
    drop(take(allowed.pid).unwrap());
    lives(&allowed);
}

#[test]
fn a_filter_that_cannot_be_read_is_refused_unless_it_is_qemus_own() {
    let known = |pid: u32| {
        let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
        unread::allows(&Process::open(pid, &pidfd).unwrap(), Errno::ACCESS)
    };
    let error = known(filtered(&NEEDED, ALLOW, KILL).pid as u32).unwrap_err();
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
    known(TestQemu::start(&["-machine", "none"]).pid()).unwrap();
    known(TestQemu::start(&["-machine", "none", "-sandbox", "on"]).pid()).unwrap();
}

#[test]
fn a_sandboxed_qemu_goes_on_after_many_injections() {
    let strict = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let mut qemu = TestQemu::start(&["-machine", "none", "-sandbox", strict]);
    let status = fs::read_to_string(format!("/proc/{}/status", qemu.pid())).unwrap();
    assert!(status.contains("Seccomp:\t2"), "{status}");
    for _ in 0..20 {
        drop(take(qemu.pid() as i32).unwrap());
        let status = qemu.qmp.execute("query-status", Value::Null, TestQemu::soon()).unwrap();
        assert_eq!(status["running"], true);
    }
}

#[test]
#[ignore = "the process that the next test starts: a filter stays for ever"]
fn trial_under_a_filter() {
    let kills = std::env::var_os("PAGEFERRY_TEST_PID").is_some();
    let listed = if kills { KILL } else { FAIL };
    let error = std::thread::spawn(move || {
        install_filter(&[libc::SYS_userfaultfd], listed, ALLOW);
        unread::try_our_own().unwrap_err()
    });
    println!("{}", error.join().unwrap());
}

#[test]
fn a_filter_that_is_ours_too_is_tried_in_a_child() {
    for kills in [false, true] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([
            "--exact",
            "inject::tests::trial_under_a_filter",
            "--ignored",
            "--nocapture",
        ]);
        command.env_remove("PAGEFERRY_TEST_PID");
        if kills {
            command.env("PAGEFERRY_TEST_PID", "1");
        }
        let ended = command.output().unwrap();
        let words = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success() && words.contains("forbids userfaultfd"), "{words}");
    }
}
