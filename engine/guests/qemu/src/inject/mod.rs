//! One system call made inside a running process: how pageferry gets a userfaultfd of a QEMU that
//! knows nothing of it.
//!
//! ```text
//!   SEIZE                     and the pidfd says that it is still that process
//!   INTERRUPT                 the main thread stops where it is, mostly in ppoll(2)
//!     its seccomp filters     allow what follows, or it is refused
//!     its way back            written below its stack: see `way_back`
//!   registers, signals        it stands before `syscall; ret` of its C library
//!     userfaultfd(2)
//!     pidfd_getfd(2)          we take the descriptor over
//!     close(2)                so that only we hold it: if we die, the tracking ends
//!   INTERRUPT                 back to the kind of stop it began with
//!   signals, registers        as they were
//!   DETACH
//! ```
//!
//! We may die at any moment in it, and the kernel then lets the thread go with the registers that
//! it has. It goes on right all the same: until `registers` with its own, from then on along its
//! way back, which ends in `rt_sigreturn(2)` with everything as it was
//! ([decision 30](../../../../../docs/decisions/0030-the-way-back-of-an-injected-call.md)). What
//! such a death leaves at worst is one unused descriptor in that process.
//!
//! A system call that was interrupted is restarted by the kernel: the restored registers say
//! `-ERESTART...` and the number of the call, and the last stop is one from which the kernel looks
//! at them again (which a system-call stop is not). Signals that come meanwhile stay pending in the
//! kernel and are delivered after the detach.
//!
//! Whoever embeds this must not wait for the process with `waitpid` (so neither
//! `std::process::Child::wait` nor `try_wait`) in another thread at the same time: the kernel would
//! hand it our stops as if the child had ended. Wait for a pidfd instead.

mod filter;
mod tracee;
mod unread;
mod way_back;

use filter::{Call, Verdict};
use pageferry_engine::dirty::pagemap::{USERFAULTFD_FLAGS, userfaultfd_refused};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::report::hold;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use tracee::{NO_DESCRIPTOR, Tracee};
use way_back::{Code, SYSCALL_BYTES, Search};

/// How long a process whose injection failed is given to turn out dead.
const DYING: Duration = Duration::from_millis(100);
/// Code of one file that is looked through at most, in bytes: more than the largest QEMU has.
const CODE_BYTES_MAX: u64 = 256 << 20;
/// Code that is looked through at once.
const CODE_PIECE_BYTES: u64 = 1 << 20;

/// Points at which the injected call can be held, in their order. Tests kill the tracer at each.
pub const POINTS: [&str; 13] = [
    "inject-seized",
    "inject-stopped",
    "inject-written",
    "inject-diverted",
    "inject-blocked",
    "inject-entered",
    "inject-left",
    "inject-made",
    "inject-taken",
    "inject-closed",
    "inject-returning",
    "inject-unblocked",
    "inject-restored",
];

/// Makes a userfaultfd inside the process `pid`, whose handle is `pidfd`, and takes it over. The
/// process keeps nothing of it. Its main thread is paused for less than a millisecond.
///
/// # Errors
/// [`Error::Refused`] with the remedy where it is not permitted; [`Error::Guest`] if the process
/// dies. Whatever fails, the process goes on as if nothing had been.
pub fn userfaultfd_of(pid: u32, pidfd: &OwnedFd) -> Result<OwnedFd> {
    if cfg!(not(all(target_arch = "x86_64", target_os = "linux"))) {
        return Err(Error::refused("attaching to a running process is known on x86-64 Linux only"));
    }
    // ptrace(2) binds a tracee to one thread. If that thread ends, the kernel detaches, so a thread
    // of our own for each injection also leaves nothing behind.
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("inject".into())
            .spawn_scoped(scope, || inject(pid, pidfd))
            .map_err(|e| Error::os("starting a thread", e))?
            .join()
            .map_err(|_| Error::Guest("the injecting thread panicked".into()))?
    })
}

fn inject(pid: u32, pidfd: &OwnedFd) -> Result<OwnedFd> {
    let raw =
        i32::try_from(pid).map_err(|_| Error::refused(format!("{pid} is not a process id")))?;
    same_process(pid, pidfd)?;
    let taken = Tracee::seize(raw).and_then(|tracee| {
        // Until here `pid` was a mere number. A process that lives behind its handle has kept it.
        same_process(pid, pidfd)?;
        take_over(tracee, &Process::open(pid, pidfd)?)
    });
    taken.map_err(|error| {
        // A process that is just dying fails in strange ways: its memory is gone before it is.
        if exits_within(pidfd, DYING) { Error::Guest(format!("process {pid} died")) } else { error }
    })
}

fn take_over(mut tracee: Tracee, process: &Process<'_>) -> Result<OwnedFd> {
    hold::point("inject-seized");
    if way_back::has_shadow_stack(&process.text("status")?) {
        return Err(Error::refused(format!(
            "process {pid} runs with a shadow stack, which would end it on its way back from an injected \
             call: start QEMU without one (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)",
            pid = process.pid
        )));
    }
    let code = process.find_code()?;
    let stopped = tracee.stop(process, code)?;
    hold::point("inject-stopped");
    let filters = match allowed(&tracee, process, code) {
        Ok(filters) => filters,
        Err(refused) => return tracee.leave().and(Err(refused)),
    };
    let taken = tracee.divert(process, &stopped).and_then(|()| {
        let flags = USERFAULTFD_FLAGS as u64;
        let fd =
            tracee.call(&stopped, libc::SYS_userfaultfd, flags)?.map_err(userfaultfd_refused)?;
        hold::point("inject-made");
        let fd =
            i32::try_from(fd).map_err(|_| Error::Guest(format!("userfaultfd answered {fd}")))?;
        let ours = pidfd_getfd(process.pidfd, fd, PidfdGetfdFlags::empty()).map_err(|e| {
            Error::os(
                format!("taking a descriptor over from process {} (pidfd_getfd)", process.pid),
                e,
            )
        });
        hold::point("inject-taken");
        // Closed in any case, or the process would keep it for ever.
        permitted(&filters, process, "close", code.close(fd as u64))?;
        let closed = tracee.call(&stopped, libc::SYS_close, fd as u64)?;
        hold::point("inject-closed");
        let ours = ours?;
        closed.map_err(|e| {
            Error::os(format!("closing a descriptor inside process {}", process.pid), e)
        })?;
        Ok(ours)
    });
    let restored = tracee.restore(&stopped);
    let ours = taken?;
    restored?;
    Ok(ours)
}

/// Fails if the process has ended, so that its number may be another's.
fn same_process(pid: u32, pidfd: &OwnedFd) -> Result<()> {
    if exits_within(pidfd, Duration::ZERO) {
        return Err(Error::Guest(format!("process {pid} died")));
    }
    Ok(())
}

fn exits_within(pidfd: &OwnedFd, time: Duration) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
    matches!(poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)), Ok(1))
}

/// A process, its handle and its memory.
struct Process<'a> {
    pid: u32,
    pidfd: &'a OwnedFd,
    memory: File,
}

impl<'a> Process<'a> {
    fn open(pid: u32, pidfd: &'a OwnedFd) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let memory = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| Error::os(format!("opening {path}"), e))?;
        same_process(pid, pidfd)?;
        Ok(Self { pid, pidfd, memory })
    }

    /// The contents of a file in its directory of `/proc`.
    fn read(&self, file: &str) -> Result<Vec<u8>> {
        let path = format!("/proc/{}/{file}", self.pid);
        let bytes = fs::read(&path).map_err(|e| Error::os(format!("reading {path}"), e))?;
        same_process(self.pid, self.pidfd)?;
        Ok(bytes)
    }

    fn text(&self, file: &str) -> Result<String> {
        self.read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Finds the code that the way back needs; it stays where it is as long as the process runs.
    fn find_code(&self) -> Result<Code> {
        let mut search = Search::default();
        for mapping in way_back::code_in(&self.text("maps")?) {
            let (mut at, end) = (mapping.start, mapping.end.min(mapping.start + CODE_BYTES_MAX));
            while at < end {
                let mut piece = vec![0; (end - at).min(CODE_PIECE_BYTES) as usize];
                if self.memory.read_exact_at(&mut piece, at).is_err() {
                    break; // behind the end of its file: nothing that could be run
                }
                search.look(&piece, at);
                if let Some(code) = search.found() {
                    return Ok(code);
                }
                at += CODE_PIECE_BYTES;
            }
        }
        Err(Error::refused(format!(
            "process {} has no C library for x86-64 whose code pageferry knows (glibc and musl have it): \
             start QEMU from such a build",
            self.pid
        )))
    }
}

impl Code {
    fn userfaultfd(self) -> Call {
        self.call(libc::SYS_userfaultfd, USERFAULTFD_FLAGS as u64)
    }

    fn close(self, fd: u64) -> Call {
        self.call(libc::SYS_close, fd)
    }

    fn rt_sigreturn(self) -> Call {
        Call { number: libc::SYS_rt_sigreturn, instruction: self.restorer_end, argument: 0 }
    }

    fn call(self, number: i64, argument: u64) -> Call {
        Call { number, instruction: self.syscall + SYSCALL_BYTES, argument }
    }
}

type Filters = Vec<Vec<filter::Instruction>>;

/// The seccomp filters of a stopped process, if they allow what is to be called in it.
fn allowed(tracee: &Tracee, process: &Process<'_>, code: Code) -> Result<Filters> {
    let filters = match tracee.filters() {
        Ok(filters) => filters,
        Err(errno) => {
            unread::allows(process, errno)?;
            Vec::new()
        }
    };
    // Which descriptor it will be is asked again when it is known.
    let needed = [
        ("userfaultfd", code.userfaultfd()),
        ("close", code.close(NO_DESCRIPTOR)),
        ("rt_sigreturn", code.rt_sigreturn()),
    ];
    for (name, call) in needed {
        permitted(&filters, process, name, call)?;
    }
    Ok(filters)
}

fn permitted(filters: &Filters, process: &Process<'_>, name: &str, call: Call) -> Result<()> {
    let what = match filter::verdict(filters, call) {
        Verdict::Allowed => return Ok(()),
        Verdict::Fails(errno) => {
            format!("lets {name}(2) fail ({})", std::io::Error::from_raw_os_error(errno.into()))
        }
        Verdict::Killed => format!("kills it for {name}(2)"),
        Verdict::Elsewhere => format!("has another process or a handler decide on {name}(2)"),
    };
    Err(Error::refused(format!(
        "process {} runs under a seccomp filter that {what}: allow userfaultfd in it (a container's \
         seccomp profile, SystemCallFilter= of a systemd unit) and start QEMU anew; QEMU's own \
         -sandbox allows it",
        process.pid
    )))
}

/// Why a process may not be traced, and so not be looked into either, with the fix.
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

#[cfg(test)]
mod tests;
