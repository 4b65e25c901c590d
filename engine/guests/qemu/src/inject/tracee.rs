//! The main thread of another process, stopped and made to run system calls (`ptrace(2)`).
//!
//! Wherever this ends, by an error, a panic or a kill, the kernel detaches and the thread goes on
//! with the registers that it has at that moment. So [`Tracee::divert`] writes its way back before
//! it changes a register, and everything after that keeps the thread on it until
//! [`Tracee::restore`].

use super::Process;
use super::filter::{INSTRUCTIONS_MAX, Instruction};
use super::seize_refused;
use super::way_back::{Code, Context, FloatingPoint, SYSCALL_BYTES, WayBack, is_stack, way_back};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::report::hold;
use rustix::io::Errno;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long the main thread may take to stop. It is late only when the machine is overloaded, when
/// it sleeps uninterruptibly (a dead NFS server), or when it is frozen (a control group).
pub(super) const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a thread that did not stop in time is given to do so after all, before it is left to
/// its way back.
const STOP_AT_LAST: Duration = Duration::from_millis(200);

/// No process has this one.
pub(super) const NO_DESCRIPTOR: u64 = i32::MAX as u64;

/// A stopped thread: what it was about to do, and its way back there.
pub(super) struct Stopped {
    registers: libc::user_regs_struct,
    /// Its blocked signals, as the kernel's 64-bit set.
    blocked: u64,
    way: WayBack,
    code: Code,
}

/// A seized thread. Dropping it only means that this thread ends, whereupon the kernel detaches.
pub(super) struct Tracee {
    pid: i32,
    /// SIGSTOP, which cannot be blocked, came while a call was being run; it is sent again at the
    /// end.
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

impl Stopped {
    /// The registers of a thread on its way back that is to make this call first.
    fn call(
        &self,
        mut registers: libc::user_regs_struct,
        number: i64,
        argument: u64,
    ) -> libc::user_regs_struct {
        registers.rip = self.code.syscall;
        registers.rsp = self.way.stack_pointer;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX; // no system call is being left: nothing to restart
        registers.rdi = argument;
        registers
    }

    /// Whether a thread with these registers has made its call, or is about to.
    fn is_on_its_way(&self, registers: &libc::user_regs_struct) -> bool {
        registers.rsp == self.way.stack_pointer
            && (registers.rip == self.code.syscall
                || registers.rip == self.code.syscall + SYSCALL_BYTES)
    }
}

impl Tracee {
    pub(super) fn seize(pid: i32) -> Result<Self> {
        let options = u64::from(libc::PTRACE_O_TRACESYSGOOD as u32);
        ptrace(libc::PTRACE_SEIZE, pid, 0, options).map_err(|e| seize_refused(pid, e))?;
        Ok(Self { pid, stop_withheld: false })
    }

    /// Stops it where its stack has room for a way back, and sees what it was doing. Nothing of it
    /// is changed.
    pub(super) fn stop(&self, process: &Process<'_>, code: Code) -> Result<Stopped> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            self.interrupt()?;
            self.wait_for_event_stop(deadline)?;
            let registers = self.registers()?;
            if registers.cs != CS_64_BIT {
                return Err(Error::refused(format!(
                    "process {} is not a 64-bit program",
                    self.pid
                )));
            }
            let blocked = self.blocked_signals()?;
            let floating_point = self.floating_point()?;
            let context =
                Context { registers: &registers, blocked, floating_point: &floating_point };
            let way = way_back(&context, code).filter(|way| self.has_room(process, way));
            // Moving the instruction pointer out of a restartable sequence and back would hide from
            // the kernel that it must be aborted. It is over in nanoseconds; a stack that is nearly
            // used up (a coroutine's) soon.
            let sequence = self.in_restartable_sequence(process, &registers);
            match way {
                Some(way) if !sequence => return Ok(Stopped { registers, blocked, way, code }),
                _ if Instant::now() < deadline => self.resume(libc::PTRACE_CONT, 0)?,
                _ => {
                    return Err(Error::Timeout {
                        what: format!(
                            "stopping process {} where its stack has room for {} bytes",
                            self.pid,
                            context.floating_point.frame_bytes_max()
                        ),
                    });
                }
            }
        }
    }

    fn has_room(&self, process: &Process<'_>, way: &WayBack) -> bool {
        let end = way.stack_pointer + way.bytes.len() as u64;
        process.text("maps").is_ok_and(|maps| is_stack(&maps, way.stack_pointer, end))
    }

    /// Sends it its way back: from here on it is on the way, and calls may be made on it.
    pub(super) fn divert(&self, process: &Process<'_>, stopped: &Stopped) -> Result<()> {
        process.memory.write_all_at(&stopped.way.bytes, stopped.way.stack_pointer).map_err(
            |e| Error::os(format!("writing below the stack of process {}", self.pid), e),
        )?;
        hold::point("inject-written");
        // The registers before the signals: a thread that is let go with all signals blocked must
        // come by the end of its way, which unblocks them. What it calls if it is let go here does
        // nothing, and no filter minds.
        self.set_registers(&stopped.call(stopped.registers, libc::SYS_close, NO_DESCRIPTOR))?;
        hold::point("inject-diverted");
        self.block_signals(u64::MAX)?;
        hold::point("inject-blocked");
        Ok(())
    }

    /// Runs one system call with one argument and returns its answer.
    pub(super) fn call(
        &mut self,
        stopped: &Stopped,
        number: i64,
        argument: u64,
    ) -> Result<Result<u64, Errno>> {
        self.set_registers(&stopped.call(self.registers()?, number, argument))?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        for half in ["inject-entered", "inject-left"] {
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
            hold::point(half);
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
    pub(super) fn restore(self, stopped: &Stopped) -> Result<()> {
        // From a system-call stop the kernel goes straight to user space. It must come by where it
        // looks at signals and restarts, and must not run an instruction on the way.
        let stop = self.peek_stop()?;
        if stop != Some(Stop::Event) {
            self.interrupt()?;
            if stop.is_some() {
                self.resume(libc::PTRACE_CONT, 0)?;
            }
            // One that does not stop now, as it is frozen, goes its way back by itself some day.
            self.wait_for_event_stop(Instant::now() + STOP_AT_LAST)?;
        }
        hold::point("inject-returning");
        if stopped.is_on_its_way(&self.registers()?) {
            // Signals before the registers, for the reason that `divert` gives.
            self.block_signals(stopped.blocked)?;
            hold::point("inject-unblocked");
            self.set_registers(&stopped.registers)?;
            hold::point("inject-restored");
        }
        self.leave()
    }

    /// Lets it go on as it is.
    pub(super) fn leave(self) -> Result<()> {
        ptrace(libc::PTRACE_DETACH, self.pid, 0, 0).map_err(|e| self.failed("detaching", e))?;
        if self.stop_withheld {
            // SAFETY: sends a signal that the process was to get anyway.
            unsafe { libc::kill(self.pid, libc::SIGSTOP) };
        }
        Ok(())
    }

    /// All seccomp filters of the thread, as the kernel has them.
    pub(super) fn filters(&self) -> Result<Vec<Vec<Instruction>>, Errno> {
        let mut filters = Vec::new();
        loop {
            let index = filters.len() as u64;
            let length = match ptrace(PTRACE_SECCOMP_GET_FILTER, self.pid, index, 0) {
                Ok(length) => usize::try_from(length).unwrap_or(0).min(INSTRUCTIONS_MAX),
                Err(Errno::NOENT) => return Ok(filters),
                Err(errno) => return Err(errno),
            };
            let mut program = vec![Instruction::default(); length];
            ptrace(PTRACE_SECCOMP_GET_FILTER, self.pid, index, program.as_mut_ptr() as u64)?;
            filters.push(program);
        }
    }

    fn blocked_signals(&self) -> Result<u64> {
        let mut blocked = 0u64;
        let size = size_of_val(&blocked) as u64;
        ptrace(PTRACE_GETSIGMASK, self.pid, size, (&raw mut blocked) as u64)
            .map_err(|e| self.failed("reading the signal mask", e))?;
        Ok(blocked)
    }

    fn block_signals(&self, blocked: u64) -> Result<()> {
        let size = size_of_val(&blocked) as u64;
        ptrace(PTRACE_SETSIGMASK, self.pid, size, (&raw const blocked) as u64)
            .map(drop)
            .map_err(|e| self.failed("setting the signal mask", e))
    }

    fn floating_point(&self) -> Result<FloatingPoint> {
        let mut state = vec![0u8; STATE_BYTES_MAX];
        let mut vector = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
        ptrace(libc::PTRACE_GETREGSET, self.pid, NT_X86_XSTATE, (&raw mut vector) as u64)
            .map_err(|e| self.failed("reading floating point registers", e))?;
        state.truncate(vector.iov_len);
        FloatingPoint::read(state, component_end).ok_or_else(|| {
            Error::refused(format!(
                "the main thread of process {} has floating point registers that pageferry does not know (AMX tiles): it cannot be attached to",
                self.pid
            ))
        })
    }

    /// Whether the thread stands inside a restartable sequence (`rseq(2)`).
    fn in_restartable_sequence(
        &self,
        process: &Process<'_>,
        registers: &libc::user_regs_struct,
    ) -> bool {
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
        let read = process.memory.read_exact_at(&mut sequence, area.abi_pointer + RSEQ_CS_OFFSET);
        read.is_ok() && u64::from_ne_bytes(sequence) != 0
    }

    fn interrupt(&self) -> Result<()> {
        ptrace(libc::PTRACE_INTERRUPT, self.pid, 0, 0)
            .map(drop)
            .map_err(|e| self.failed("interrupting", e))
    }

    fn resume(&self, request: libc::c_uint, signal: i32) -> Result<()> {
        ptrace(request, self.pid, 0, signal as u64)
            .map(drop)
            .map_err(|e| self.failed("resuming", e))
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

    /// Waits until it stops. The kernel has no wait for this with a deadline (a pidfd tells of
    /// exits alone, and SIGCHLD belongs to whoever embeds us), so it is asked again and again; a
    /// stop takes some 20 us to come.
    fn wait_stop(&self, deadline: Instant) -> Result<Stop> {
        let mut pause = Duration::from_micros(5);
        loop {
            if let Some(stop) = self.peek_stop()? {
                return Ok(stop);
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: format!(
                        "stopping process {} for an instant: its main thread sleeps \
                         uninterruptibly (see /proc/{}/stack) or is frozen (see /proc/{}/cgroup)",
                        self.pid, self.pid, self.pid
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
        let answer =
            unsafe { libc::waitid(libc::P_PID, self.pid as libc::id_t, &raw mut info, flags) };
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
            Errno::SRCH | Errno::CHILD => {
                Error::Guest(format!("process {} died ({what})", self.pid))
            }
            other => Error::os(format!("{what} of process {} (ptrace)", self.pid), other),
        }
    }
}

/// The code segment of 64-bit programs on x86-64 Linux.
const CS_64_BIT: u64 = 0x33;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
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

/// The register set of `linux/elf.h` that has everything that `XSAVE` saves.
const NT_X86_XSTATE: u64 = 0x202;
/// More than the state of any processor today: some 11 KiB with AMX.
const STATE_BYTES_MAX: usize = 64 << 10;

/// At which byte a component of the floating point state ends (CPUID leaf 0xd).
fn component_end(component: u32) -> usize {
    let answer = std::arch::x86_64::__cpuid_count(0xd, component);
    answer.ebx as usize + answer.eax as usize
}

pub(super) fn ptrace(
    request: libc::c_uint,
    pid: i32,
    address: u64,
    data: u64,
) -> Result<i64, Errno> {
    // SAFETY: the requests used here write at most to what `data` points to, which every caller
    // makes a live variable of the size that the request, or `address`, says.
    let answer = unsafe { libc::ptrace(request, pid, address, data) };
    if answer < 0 { Err(last_errno()) } else { Ok(answer) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
