//! One system call made inside a running process: how pageferry gets a userfaultfd of a QEMU that
//! knows nothing of it.
//!
//! ```text
//!   SEIZE, INTERRUPT          the main thread stops where it is, mostly in ppoll(2)
//!   save registers, block signals
//!     userfaultfd(2)          run at a `syscall` instruction of its vDSO
//!     pidfd_getfd(2)          we take the descriptor over
//!     close(2)                so that only we hold it: if we die, the tracking ends
//!   INTERRUPT                 back to the kind of stop it began with
//!   restore registers and signals, DETACH
//! ```
//!
//! Nothing is written to the process' memory. A system call that was interrupted is restarted by
//! the kernel: the restored registers say `-ERESTART...` and the number of the call, and the last
//! stop is one from which the kernel looks at them again (which a system-call stop is not).
//! Signals that come meanwhile stay pending in the kernel and are delivered after the detach.
//!
//! Whoever embeds this must not wait for the process with `waitpid` (so neither
//! `std::process::Child::wait` nor `try_wait`) in another thread at the same time: the kernel would
//! hand it our stops as if the child had ended. Wait for a pidfd instead.

use crate::dirty::pagemap::{USERFAULTFD_FLAGS, userfaultfd_refused};
use crate::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long the main thread may take to stop. It is late only when the machine is overloaded, or
/// when it sleeps uninterruptibly (a dead NFS server).
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a process whose injection failed is given to turn out dead.
const DYING: Duration = Duration::from_millis(100);

/// Makes a userfaultfd inside the process `pid` and takes it over. The process keeps nothing of it.
/// Its main thread stands still for some 0.1 ms.
///
/// # Errors
/// [`Error::Refused`] with the mend where it is not permitted; [`Error::Guest`] if the process dies.
/// Whatever fails, the process goes on as if nothing had been.
pub fn userfaultfd_of(pid: u32) -> Result<OwnedFd> {
    if cfg!(not(all(target_arch = "x86_64", target_os = "linux"))) {
        return Err(Error::refused("attaching to a running process is known on x86-64 Linux only"));
    }
    // ptrace(2) binds a tracee to one thread. If that thread ends, the kernel detaches, so a thread
    // of our own for each injection also leaves nothing behind.
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("inject".into())
            .spawn_scoped(scope, || inject(pid))
            .map_err(|e| Error::os("starting a thread", e))?
            .join()
            .map_err(|_| Error::Guest("the injecting thread panicked".into()))?
    })
}

fn inject(pid: u32) -> Result<OwnedFd> {
    let raw = i32::try_from(pid).map_err(|_| Error::refused(format!("{pid} is not a process id")))?;
    let target = Pid::from_raw(raw).ok_or_else(|| Error::refused("0 is not a process id"))?;
    let pidfd = pidfd_open(target, PidfdFlags::empty()).map_err(|e| match e {
        Errno::SRCH => Error::refused(format!("there is no process {pid}")),
        Errno::INVAL => Error::refused(format!("{pid} is a thread, not a process")),
        other => Error::os(format!("opening a handle of process {pid}"), other),
    })?;
    Tracee::seize(raw).and_then(|tracee| take_over(tracee, pid, &pidfd)).map_err(|error| {
        // A process that is just dying fails in strange ways: its memory is gone before it is.
        if exits_within(&pidfd, DYING) { Error::Guest(format!("process {pid} died")) } else { error }
    })
}

fn take_over(mut tracee: Tracee, pid: u32, pidfd: &OwnedFd) -> Result<OwnedFd> {
    let syscall_address = vdso_syscall(pid)?;
    let saved = tracee.stop()?;
    let taken =
        tracee.call(syscall_address, libc::SYS_userfaultfd, USERFAULTFD_FLAGS as u64).and_then(|answer| {
            let fd = answer.map_err(userfaultfd_refused)?;
            let fd = i32::try_from(fd).map_err(|_| Error::Guest(format!("userfaultfd answered {fd}")))?;
            let ours = pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty()).map_err(|e| {
                Error::os(format!("taking a descriptor over from process {pid} (pidfd_getfd)"), e)
            });
            // Closed in any case, or the process would keep it for ever.
            let closed = tracee.call(syscall_address, libc::SYS_close, fd as u64)?;
            let ours = ours?;
            closed.map_err(|e| Error::os(format!("closing a descriptor inside process {pid}"), e))?;
            Ok(ours)
        });
    let restored = tracee.restore(&saved);
    let ours = taken?;
    restored?;
    Ok(ours)
}

fn exits_within(pidfd: &OwnedFd, time: Duration) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
    matches!(poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)), Ok(1))
}

/// What a stopped thread was about to do.
struct Saved {
    registers: libc::user_regs_struct,
    /// Its blocked signals, as the kernel's 64-bit set.
    blocked: u64,
}

/// A seized thread. Dropping it only means that this thread ends, whereupon the kernel detaches.
struct Tracee {
    pid: i32,
    /// SIGSTOP, which cannot be blocked, came while a call was being run; it is sent again at the end.
    stop_withheld: bool,
}

/// Why a tracee stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// PTRACE_INTERRUPT took effect, or the process is in a group-stop (SIGSTOP).
    Event,
    /// It is about to enter or has just left a system call.
    Syscall,
    /// A signal is about to be delivered.
    Signal(i32),
}

impl Tracee {
    fn seize(pid: i32) -> Result<Self> {
        let options = u64::from(libc::PTRACE_O_TRACESYSGOOD as u32);
        ptrace(libc::PTRACE_SEIZE, pid, 0, options).map_err(|e| seize_refused(pid, e))?;
        Ok(Self { pid, stop_withheld: false })
    }

    /// Stops it, and saves what it was doing.
    fn stop(&self) -> Result<Saved> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            self.interrupt()?;
            self.wait_for_event_stop(deadline)?;
            let registers = self.registers()?;
            if registers.cs != CS_64_BIT {
                return Err(Error::refused(format!("process {} is not a 64-bit program", self.pid)));
            }
            if self.in_restartable_sequence(&registers) && Instant::now() < deadline {
                // Moving the instruction pointer out of such a sequence and back would hide from the
                // kernel that it must be aborted. It is over in nanoseconds.
                self.resume(libc::PTRACE_CONT, 0)?;
                continue;
            }
            let mut blocked = 0u64;
            let size = size_of_val(&blocked) as u64;
            ptrace(PTRACE_GETSIGMASK, self.pid, size, (&raw mut blocked) as u64)
                .map_err(|e| self.failed("reading the signal mask", e))?;
            let all = u64::MAX;
            ptrace(PTRACE_SETSIGMASK, self.pid, size, (&raw const all) as u64)
                .map_err(|e| self.failed("blocking signals", e))?;
            return Ok(Saved { registers, blocked });
        }
    }

    /// Runs one system call with one argument and returns its answer.
    fn call(&mut self, address: u64, number: i64, argument: u64) -> Result<Result<u64, Errno>> {
        let mut registers = self.registers()?;
        registers.rip = address;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX; // no system call is being left: nothing to restart
        registers.rdi = argument;
        self.set_registers(&registers)?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        for _ in ["entry", "exit"] {
            loop {
                self.resume(libc::PTRACE_SYSCALL, 0)?;
                match self.wait_stop(deadline)? {
                    Stop::Syscall => break,
                    Stop::Event => {} // another thread of it began or ended a group-stop
                    // Nothing else can be blocked but faults.
                    Stop::Signal(libc::SIGSTOP) => self.stop_withheld = true,
                    Stop::Signal(signal) => {
                        return Err(Error::Guest(format!(
                            "process {} got signal {signal} while it made a system call for us",
                            self.pid
                        )));
                    }
                }
            }
        }
        let answer = self.registers()?.rax as i64;
        // The kernel's range of error numbers.
        Ok(if (-4095..0).contains(&answer) {
            Err(Errno::from_raw_os_error(-answer as i32))
        } else {
            Ok(answer as u64)
        })
    }

    /// Puts everything back and lets it go on.
    fn restore(self, saved: &Saved) -> Result<()> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        // Registers first: should anything below fail, this thread ends, the kernel detaches, and the
        // process goes on where it was. Only a restart of its system call would then be missing.
        self.set_registers(&saved.registers)?;
        if matches!(self.peek_stop()?, Some(stop) if stop != Stop::Event) {
            // From a system-call stop the kernel goes straight to user space. It must come by where
            // it looks at signals and restarts, and must not run an instruction on the way.
            self.interrupt()?;
            self.resume(libc::PTRACE_CONT, 0)?;
            self.wait_for_event_stop(deadline)?;
            self.set_registers(&saved.registers)?;
        }
        let size = size_of_val(&saved.blocked) as u64;
        ptrace(PTRACE_SETSIGMASK, self.pid, size, (&raw const saved.blocked) as u64)
            .map_err(|e| self.failed("restoring the signal mask", e))?;
        ptrace(libc::PTRACE_DETACH, self.pid, 0, 0).map_err(|e| self.failed("detaching", e))?;
        if self.stop_withheld {
            // SAFETY: sends a signal that the process was to get anyway.
            unsafe { libc::kill(self.pid, libc::SIGSTOP) };
        }
        Ok(())
    }

    /// Whether the thread stands inside a restartable sequence (`rseq(2)`).
    fn in_restartable_sequence(&self, registers: &libc::user_regs_struct) -> bool {
        if registers.orig_rax != u64::MAX {
            return false; // in a system call, which no such sequence contains
        }
        let mut area = RseqConfiguration::default();
        let asked = ptrace(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.pid,
            size_of::<RseqConfiguration>() as u64,
            (&raw mut area) as u64,
        );
        if asked.is_err() || area.abi_pointer == 0 {
            return false;
        }
        let mut sequence = [0; 8];
        let read = fs::File::open(format!("/proc/{}/mem", self.pid)).and_then(|memory| {
            std::os::unix::fs::FileExt::read_exact_at(
                &memory,
                &mut sequence,
                area.abi_pointer + RSEQ_CS_OFFSET,
            )
        });
        read.is_ok() && u64::from_ne_bytes(sequence) != 0
    }

    fn interrupt(&self) -> Result<()> {
        ptrace(libc::PTRACE_INTERRUPT, self.pid, 0, 0).map(drop).map_err(|e| self.failed("interrupting", e))
    }

    fn resume(&self, request: libc::c_uint, signal: i32) -> Result<()> {
        ptrace(request, self.pid, 0, signal as u64).map(drop).map_err(|e| self.failed("resuming", e))
    }

    fn registers(&self) -> Result<libc::user_regs_struct> {
        // SAFETY: a struct of integers, for which zeros are a value.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        ptrace(libc::PTRACE_GETREGS, self.pid, 0, (&raw mut registers) as u64)
            .map_err(|e| self.failed("reading registers", e))?;
        Ok(registers)
    }

    fn set_registers(&self, registers: &libc::user_regs_struct) -> Result<()> {
        ptrace(libc::PTRACE_SETREGS, self.pid, 0, std::ptr::from_ref(registers) as u64)
            .map(drop)
            .map_err(|e| self.failed("setting registers", e))
    }

    /// Waits for the stop that `interrupt` asked for. Signals that come before it are delivered.
    fn wait_for_event_stop(&self, deadline: Instant) -> Result<()> {
        loop {
            match self.wait_stop(deadline)? {
                Stop::Event => return Ok(()),
                Stop::Signal(signal) => self.resume(libc::PTRACE_CONT, signal)?,
                Stop::Syscall => self.resume(libc::PTRACE_CONT, 0)?,
            }
        }
    }

    /// Waits until it stops. The kernel has no wait for this with a deadline (a pidfd tells of exits
    /// alone, and SIGCHLD belongs to whoever embeds us), so it is asked again and again; a stop takes
    /// some 20 us to come.
    fn wait_stop(&self, deadline: Instant) -> Result<Stop> {
        let mut pause = Duration::from_micros(5);
        loop {
            if let Some(stop) = self.peek_stop()? {
                return Ok(stop);
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: format!(
                        "stopping process {} for an instant: its main thread sleeps uninterruptibly (see /proc/{}/stack)",
                        self.pid, self.pid
                    ),
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }

    /// The stop that it stands in, if any. An exit is only looked at, never reaped: that is for the
    /// parent to do.
    fn peek_stop(&self) -> Result<Option<Stop>> {
        // SAFETY: a struct of integers, for which zeros are a value.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
        // SAFETY: `info` is ours to be written.
        let answer = unsafe { libc::waitid(libc::P_PID, self.pid as libc::id_t, &raw mut info, flags) };
        if answer != 0 {
            return Err(self.failed("waiting", last_errno()));
        }
        // SAFETY: waitid fills these fields, or leaves the zeros.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        if pid == 0 {
            return Ok(None);
        }
        match info.si_code {
            libc::CLD_TRAPPED | libc::CLD_STOPPED => Ok(Some(match (status & 0x7f, status >> 8) {
                (_, event) if event == libc::PTRACE_EVENT_STOP => Stop::Event,
                (libc::SIGTRAP, 0) if status & 0x80 != 0 => Stop::Syscall,
                (signal, _) => Stop::Signal(signal),
            })),
            _ => Err(Error::Guest(format!("process {} died", self.pid))),
        }
    }

    fn failed(&self, what: &str, errno: Errno) -> Error {
        match errno {
            Errno::SRCH | Errno::CHILD => Error::Guest(format!("process {} died ({what})", self.pid)),
            other => Error::os(format!("{what} of process {} (ptrace)", self.pid), other),
        }
    }
}

/// Finds a `syscall` instruction in the vDSO, the one piece of code that every process has and that
/// never changes. Any address with these two bytes will do, even inside another instruction.
fn vdso_syscall(pid: u32) -> Result<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .map_err(|e| Error::os(format!("reading /proc/{pid}/maps"), e))?;
    let (start, end) = vdso_in(&maps)
        .ok_or_else(|| Error::refused(format!("process {pid} has no vDSO (booted with vdso=0?)")))?;
    let mut code = vec![0; (end - start) as usize];
    fs::File::open(format!("/proc/{pid}/mem"))
        .and_then(|memory| std::os::unix::fs::FileExt::read_exact_at(&memory, &mut code, start))
        .map_err(|e| Error::os(format!("reading the vDSO of process {pid}"), e))?;
    code.windows(SYSCALL.len())
        .position(|w| w == SYSCALL)
        .map(|at| start + at as u64)
        .ok_or_else(|| Error::refused(format!("the vDSO of process {pid} has no syscall instruction")))
}

/// The address range of the vDSO in a `/proc/PID/maps`.
fn vdso_in(maps: &str) -> Option<(u64, u64)> {
    /// Larger than any vDSO; keeps what is read small.
    const BYTES_MAX: u64 = 1 << 20;
    let line = maps.lines().find(|l| l.ends_with("[vdso]"))?;
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    (start < end && end - start <= BYTES_MAX).then_some((start, end))
}

/// Why a process may not be traced, and so not be looked into either, with the mend.
pub(super) fn seize_refused(pid: i32, errno: Errno) -> Error {
    if errno == Errno::SRCH {
        return Error::refused(format!("there is no process {pid}"));
    }
    if errno != Errno::PERM {
        return Error::os(format!("tracing process {pid} (ptrace)"), errno);
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let word = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()
    };
    let field = |name: &str| word(name)?.parse::<u32>().ok();
    if matches!(word("State"), None | Some("Z" | "X")) {
        return Error::Guest(format!("process {pid} died"));
    }
    if let Some(tracer) = field("TracerPid").filter(|t| *t != 0) {
        return Error::refused(format!(
            "process {pid} is already traced by process {tracer} (a debugger or strace): end that first"
        ));
    }
    let ours = rustix::process::geteuid().as_raw();
    if let Some(theirs) = field("Uid").filter(|uid| *uid != ours) {
        return Error::refused(format!(
            "process {pid} belongs to user {theirs}, pageferry runs as user {ours}: run it as that user, or as root"
        ));
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match scope.trim() {
        "1" => Error::refused(format!(
            "the kernel lets only ancestors trace process {pid} (kernel.yama.ptrace_scope is 1): run pageferry as \
             root or with CAP_SYS_PTRACE, or start QEMU under `pageferry run`"
        )),
        "2" => Error::refused(format!(
            "tracing process {pid} needs CAP_SYS_PTRACE (kernel.yama.ptrace_scope is 2): run pageferry as root"
        )),
        "3" => Error::refused(
            "this kernel forbids tracing altogether (kernel.yama.ptrace_scope is 3) until it is booted anew: \
             no running QEMU can be moved on this host",
        ),
        _ => Error::refused(format!(
            "no permission to trace process {pid}: run pageferry with CAP_SYS_PTRACE (as root), in the same user \
             namespace and container as QEMU"
        )),
    }
}

/// The code segment of 64-bit programs on x86-64 Linux.
const CS_64_BIT: u64 = 0x33;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS_OFFSET: u64 = 8;

/// `struct ptrace_rseq_configuration` of `linux/ptrace.h`.
#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    abi_pointer: u64,
    abi_size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}
const _: () = assert!(size_of::<RseqConfiguration>() == 24);

fn ptrace(request: libc::c_uint, pid: i32, address: u64, data: u64) -> Result<i64, Errno> {
    // SAFETY: the requests used here write at most to what `data` points to, which every caller makes
    // a live variable of the size that the request, or `address`, says.
    let answer = unsafe { libc::ptrace(request, pid, address, data) };
    if answer < 0 { Err(last_errno()) } else { Ok(answer) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::DirtyBitmap;
    use crate::dirty::DirtySource;
    use crate::dirty::pagemap::{PagemapSource, TrackedRange};
    use crate::guest::qemu::testing::TestQemu;
    use crate::page::PAGE_BYTES;
    use pageferry_transport::MemoryRegion;
    use serde_json::Value;
    use std::io::{PipeReader, PipeWriter, Read, Write};
    use std::os::fd::{AsFd, AsRawFd};
    use std::ptr::null_mut;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

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
                    // A fork has the handlers of this process, which its terminal set; a QEMU, executed, has none.
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
                assert!(Instant::now() < deadline, "the child stands still");
                std::thread::sleep(Duration::from_micros(100));
            }
        }

        fn state(&self) -> char {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
            stat.rsplit(") ").next().unwrap().chars().next().unwrap()
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

    fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::SeqCst);
    }

    /// Blocks in every way that is to be restarted; anything but the normal answer is wrong.
    fn block_in_many_ways(told: &Told, bytes: &PipeReader) {
        let (mut expected, fd) = (0u8, bytes.as_raw_fd());
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
            let sum = (0..20_000u64).fold(0u64, |sum, i| sum.rotate_left(5) ^ i.wrapping_mul(0x9e37_79b9));
            add(&told.wrong, u64::from(!fine) + u64::from(sum != std::hint::black_box(SUM)));
            expected = expected.wrapping_add(1);
            add(&told.rounds, 1);
        }
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
            drop(userfaultfd_of(child.pid as u32).unwrap());
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
                drop(userfaultfd_of(child.pid as u32).unwrap());
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
        let uffd = userfaultfd_of(child.pid as u32).unwrap();
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
        source.harvest(&mut dirty).unwrap();
        assert_eq!(dirty.runs(1).map(|r| r.first.0).collect::<Vec<_>>(), [10, 20]);
        child.kill(libc::SIGKILL);
        let pidfd = pidfd_open(Pid::from_raw(child.pid).unwrap(), PidfdFlags::empty()).unwrap();
        rustix::event::poll(
            &mut [rustix::event::PollFd::from_borrowed_fd(pidfd.as_fd(), rustix::event::PollFlags::IN)],
            None,
        )
        .unwrap();
        let error = source.harvest(&mut dirty).unwrap_err().to_string();
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
        drop(userfaultfd_of(child.pid as u32).unwrap());
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
        let error = userfaultfd_of(child.pid as u32).unwrap_err().to_string();
        assert!(error.contains("already traced by process"), "{error}");
        let error = userfaultfd_of(i32::MAX as u32).unwrap_err().to_string();
        assert!(error.contains("there is no process"), "{error}");
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
                if let Err(error) = userfaultfd_of(child.pid as u32) {
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
            drop(userfaultfd_of(qemu.pid()).unwrap());
            let status = qemu.qmp.execute("query-status", Value::Null, TestQemu::soon()).unwrap();
            assert_eq!(status["running"], true);
        }
    }

    #[test]
    fn the_vdso_is_found_and_odd_maps_are_not_trusted() {
        assert_eq!(
            vdso_in("7ffd1000-7ffd3000 r-xp 00000000 00:00 0   [vdso]"),
            Some((0x7ffd_1000, 0x7ffd_3000))
        );
        for odd in
            ["", "x [vdso]", "9-1 r-xp [vdso]", "0-ffffffffffffffff r-xp [vdso]", "1000-2000 r-xp /lib"]
        {
            assert_eq!(vdso_in(odd), None, "{odd}");
        }
    }
}
