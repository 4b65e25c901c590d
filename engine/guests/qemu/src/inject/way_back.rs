//! The way back of a thread that runs a system call for us: what makes it go on where it was if we
//! are gone before we can put its registers back.
//!
//! ```text
//!   its stack pointer  -> |  what it uses            |
//!                         |  red zone, 128 bytes     |  may be in use (System V ABI)
//!                         +--------------------------+
//!                         |  floating point state    |  as PTRACE_GETREGSET has it
//!                         |  ucontext: registers,    |  as a signal's frame has them
//!                         |  blocked signals         |
//!   ours while we call -> |  address of the restorer |
//!                         +--------------------------+
//!
//!   instruction pointer -> syscall; ret      in its C library: the call, then to the restorer
//!        the restorer   -> mov $15, %eax; syscall         rt_sigreturn(2): everything as it was
//! ```
//!
//! A thread that is let go anywhere in there runs on by itself: the call, `ret`, `rt_sigreturn`.
//! Memory below the red zone belongs to nobody: the kernel writes frames of signals there at any
//! time. This module makes the bytes and finds the code; it makes no system call.

use pageferry_engine::host::maps::Mapping;

/// Below the stack pointer, and still the program's (System V ABI for x86-64, 3.2.2).
const RED_ZONE_BYTES: u64 = 128;
/// Alignment of the floating point state that `XRSTOR` asks for.
const STATE_ALIGNMENT: u64 = 64;

/// The frame that `rt_sigreturn(2)` reads: `struct rt_sigframe` of the kernel for x86-64.
#[repr(C)]
#[derive(Clone, Copy)]
struct SignalFrame {
    return_address: u64,
    // struct ucontext
    flags: u64,
    link: u64,
    stack_address: u64,
    stack_flags: u32,
    stack_padding: u32,
    stack_bytes: u64,
    // struct sigcontext_64
    r8_to_r15: [u64; 8],
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    rip: u64,
    eflags: u64,
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    error: u64,
    trap: u64,
    old_mask: u64,
    cr2: u64,
    floating_point: u64,
    reserved: [u64; 8],
    // the end of struct ucontext
    blocked: u64,
    info: [u64; 16],
}
const _: () = assert!(size_of::<SignalFrame>() == 8 + 304 + 128);
const FRAME_BYTES: usize = size_of::<SignalFrame>();

/// `UC_FP_XSTATE`, `UC_SIGCONTEXT_SS` and `UC_STRICT_RESTORE_SS`: there is floating point state,
/// and the stack segment is to be restored.
const CONTEXT_FLAGS: u64 = 1 | 2 | 4;
/// No value that `sigaltstack(2)` knows, so that the alternate stack stays as it is.
const STACK_UNCHANGED: u32 = 4;

/// What the kernel puts into `rax` of a system call that it interrupted and will restart:
/// `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND`, `ERESTART_RESTARTBLOCK`.
const RESTARTS: [i64; 4] = [-512, -513, -514, -516];
/// Length of the instruction `syscall`.
pub(super) const SYSCALL_BYTES: u64 = 2;

/// Where the frame lies, and its bytes.
pub(super) struct WayBack {
    /// The stack pointer while the thread calls for us.
    pub(super) stack_pointer: u64,
    pub(super) bytes: Vec<u8>,
}

/// What a stopped thread is to go back to.
pub(super) struct Context<'a> {
    pub(super) registers: &'a libc::user_regs_struct,
    /// Its blocked signals, as the kernel's 64-bit set.
    pub(super) blocked: u64,
    pub(super) floating_point: &'a FloatingPoint,
}

/// Makes the frame that leads back to `context`.
pub(super) fn way_back(context: &Context<'_>, code: Code) -> Option<WayBack> {
    let before = context.registers;
    let again = restarted(before);
    let top = before.rsp.checked_sub(RED_ZONE_BYTES)?;
    let state = context.floating_point.bytes();
    let state_at = top.checked_sub(state.len() as u64)? & !(STATE_ALIGNMENT - 1);
    let frame_at = state_at.checked_sub(FRAME_BYTES as u64)? & !0xf;
    let frame = SignalFrame {
        return_address: code.restorer,
        flags: CONTEXT_FLAGS,
        link: 0,
        stack_address: 0,
        stack_flags: STACK_UNCHANGED,
        stack_padding: 0,
        stack_bytes: 0,
        r8_to_r15: [
            before.r8, before.r9, before.r10, before.r11, before.r12, before.r13, before.r14,
            before.r15,
        ],
        rdi: before.rdi,
        rsi: before.rsi,
        rbp: before.rbp,
        rbx: before.rbx,
        rdx: before.rdx,
        rax: again.rax,
        rcx: before.rcx,
        rsp: before.rsp,
        rip: again.rip,
        eflags: before.eflags,
        cs: before.cs as u16,
        gs: before.gs as u16,
        fs: before.fs as u16,
        ss: before.ss as u16,
        error: 0,
        trap: 0,
        old_mask: 0,
        cr2: 0,
        floating_point: state_at,
        reserved: [0; 8],
        blocked: context.blocked,
        info: [0; 16],
    };
    let mut bytes = vec![0; (top - frame_at) as usize];
    bytes[..FRAME_BYTES].copy_from_slice(&frame.to_bytes());
    let at = (state_at - frame_at) as usize;
    bytes[at..at + state.len()].copy_from_slice(&state);
    Some(WayBack { stack_pointer: frame_at, bytes })
}

/// Where and how a thread goes on that was interrupted in a system call. The kernel does this when
/// a thread comes back from a stop; on the way back through a frame nobody would. What would be
/// continued (`restart_syscall(2)`) begins anew: the kernel forgets it with the first
/// `rt_sigreturn`.
struct Again {
    rax: u64,
    rip: u64,
}

fn restarted(registers: &libc::user_regs_struct) -> Again {
    let interrupted =
        registers.orig_rax.cast_signed() >= 0 && RESTARTS.contains(&registers.rax.cast_signed());
    if interrupted {
        Again { rax: registers.orig_rax, rip: registers.rip.wrapping_sub(SYSCALL_BYTES) }
    } else {
        Again { rax: registers.rax, rip: registers.rip }
    }
}

impl SignalFrame {
    fn to_bytes(self) -> [u8; FRAME_BYTES] {
        // SAFETY: a struct of integers without padding, as the assertion on its size shows.
        unsafe { std::mem::transmute(self) }
    }
}

/// The floating point and vector registers of a stopped thread, as `XSAVE` lays them out.
pub(super) struct FloatingPoint {
    /// Without what the kernel allocates only to a thread that asked for it.
    state: Vec<u8>,
    components: u64,
}

/// Offset of the bytes in the state that are software's own (`struct _fpx_sw_bytes`).
const SOFTWARE_AT: usize = 464;
/// Length of the legacy area and the header behind it.
const STATE_BYTES_MIN: usize = 512 + 64;
/// `FP_XSTATE_MAGIC1` and `FP_XSTATE_MAGIC2` of `asm/sigcontext.h`.
const MAGIC_FRONT: u32 = 0x4650_5853;
const MAGIC_BACK: u32 = 0x4650_5845;
/// AMX tile data: the only component that a thread has to ask for (`arch_prctl(2)`).
const TILE_DATA: u64 = 1 << 18;

impl FloatingPoint {
    /// From what `PTRACE_GETREGSET` answers for `NT_X86_XSTATE`. `extent` says of a component at
    /// which byte it ends. Nothing if it makes no sense, or if the thread uses AMX: its frame
    /// would be larger than is right for a stack.
    pub(super) fn read(mut state: Vec<u8>, extent: impl Fn(u32) -> usize) -> Option<Self> {
        if state.len() < STATE_BYTES_MIN {
            return None;
        }
        let word = |at: usize| state[at..at + 8].try_into().ok().map(u64::from_le_bytes);
        // The kernel says here which components there can be, the processor which are in use.
        let (possible, used) = (word(SOFTWARE_AT)?, word(512)?);
        if used & TILE_DATA != 0 {
            return None;
        }
        let components = possible & !TILE_DATA;
        let ends = (2..63).filter(|i| components & (1 << i) != 0).map(extent);
        let bytes = ends.fold(STATE_BYTES_MIN, usize::max);
        if bytes > state.len() {
            return None;
        }
        state.truncate(bytes);
        Some(Self { state, components })
    }

    /// What a frame with it takes at most.
    pub(super) fn frame_bytes_max(&self) -> u64 {
        let alignment = STATE_ALIGNMENT + 16;
        RED_ZONE_BYTES + alignment + (FRAME_BYTES + self.state.len() + 4) as u64
    }

    /// As `rt_sigreturn(2)` reads it.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.state.clone();
        let length = bytes.len() as u32;
        let mut software = [0; 48];
        software[..4].copy_from_slice(&MAGIC_FRONT.to_le_bytes());
        software[4..8].copy_from_slice(&(length + 4).to_le_bytes());
        software[8..16].copy_from_slice(&self.components.to_le_bytes());
        software[16..20].copy_from_slice(&length.to_le_bytes());
        bytes[SOFTWARE_AT..SOFTWARE_AT + 48].copy_from_slice(&software);
        bytes.extend(MAGIC_BACK.to_le_bytes());
        bytes
    }
}

/// The two pieces of code that every C library has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Code {
    /// `syscall; ret`.
    pub(super) syscall: u64,
    /// `mov $15, %eax; syscall`.
    pub(super) restorer: u64,
    /// Behind it: by this address a seccomp filter knows it.
    pub(super) restorer_end: u64,
}

/// What is found of them so far. The two may lie in different files.
#[derive(Debug, Default)]
pub(super) struct Search {
    syscall: Option<u64>,
    restorer: Option<(u64, u64)>,
}

/// `syscall; ret`, as in `getpid`. These bytes will do inside another instruction too.
const SYSCALL_RET: [u8; 3] = [0x0f, 0x05, 0xc3];
/// `mov $15, %rax; syscall` and `mov $15, %eax; syscall`.
const RESTORERS: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];

impl Search {
    /// Looks through code that lies at `start`.
    pub(super) fn look(&mut self, code: &[u8], start: u64) {
        let find = |pattern: &[u8]| {
            code.windows(pattern.len()).position(|w| w == pattern).map(|at| start + at as u64)
        };
        self.syscall = self.syscall.or_else(|| find(&SYSCALL_RET));
        let with_end = |pattern: &&[u8]| find(pattern).map(|at| (at, at + pattern.len() as u64));
        self.restorer = self.restorer.or_else(|| RESTORERS.iter().find_map(with_end));
    }

    pub(super) fn found(&self) -> Option<Code> {
        let (restorer, restorer_end) = self.restorer?;
        Some(Code { syscall: self.syscall?, restorer, restorer_end })
    }
}

/// Code to be looked through, the likeliest first: the C library, the program, all other files.
pub(super) fn code_in(maps: &str) -> Vec<Mapping> {
    let rank = |line: &str| match line.rsplit('/').next() {
        Some(file) if file.starts_with("libc.") || file.starts_with("libc-") => 0,
        Some(file) if file.starts_with("ld-musl") => 0,
        _ => 1,
    };
    let mut code: Vec<_> = maps
        .lines()
        .filter_map(|line| Some((rank(line), Mapping::parse(line)?)))
        .filter(|(_, m)| m.executable && m.readable && !m.writable && m.inode != 0)
        .collect();
    code.sort_by_key(|(rank, _)| *rank);
    code.into_iter().map(|(_, mapping)| mapping).collect()
}

/// Whether all of `[start, end)` is memory in which a stack may lie.
pub(super) fn is_stack(maps: &str, start: u64, end: u64) -> bool {
    let mapping =
        maps.lines().filter_map(Mapping::parse).find(|m| m.start <= start && start < m.end);
    mapping.is_some_and(|m| end <= m.end && m.readable && m.writable && !m.shared)
}

/// Whether the thread of this `/proc/PID/status` has a shadow stack, on which a return to where no
/// call was made is fatal (`Documentation/arch/x86/shstk.rst`).
pub(super) fn has_shadow_stack(status: &str) -> bool {
    let features = status.lines().find_map(|line| line.strip_prefix("x86_Thread_features:"));
    features.is_some_and(|words| words.split_whitespace().any(|word| word == "shstk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> libc::user_regs_struct {
        // SAFETY: a struct of integers, for which zeros are a value.
        unsafe { std::mem::zeroed() }
    }

    fn floating_point() -> FloatingPoint {
        let mut state = vec![0xaa; 4096];
        state[SOFTWARE_AT..SOFTWARE_AT + 8].copy_from_slice(&(0b111 | TILE_DATA).to_le_bytes());
        state[512..520].copy_from_slice(&0b111u64.to_le_bytes());
        FloatingPoint::read(state, |_| 832).unwrap()
    }

    const CODE: Code = Code { syscall: 0x1000, restorer: 0x2000, restorer_end: 0x2009 };

    #[test]
    fn the_frame_lies_below_the_red_zone_and_leads_back() {
        for rsp in [0x7fff_0000_1000, 0x7fff_0000_1008, 0x7fff_0000_1ff0] {
            let before =
                libc::user_regs_struct { rsp, rbx: 7, r15: 15, orig_rax: u64::MAX, ..registers() };
            let context =
                Context { registers: &before, blocked: 0xb10c, floating_point: &floating_point() };
            let way = way_back(&context, CODE).unwrap();
            assert_eq!(way.stack_pointer % 16, 0);
            assert_eq!(way.stack_pointer + way.bytes.len() as u64, rsp - 128);
            let word = |at: usize| u64::from_le_bytes(way.bytes[at..at + 8].try_into().unwrap());
            assert_eq!(word(0), CODE.restorer);
            assert_eq!(word(std::mem::offset_of!(SignalFrame, rsp)), rsp);
            assert_eq!(word(std::mem::offset_of!(SignalFrame, rbx)), 7);
            assert_eq!(word(std::mem::offset_of!(SignalFrame, r8_to_r15) + 56), 15);
            // Offsets of the kernel's ABI, counted from the ucontext.
            assert_eq!(std::mem::offset_of!(SignalFrame, blocked), 8 + 296);
            assert_eq!(word(8 + 296), 0xb10c);
            let state_at = word(8 + 40 + 184);
            assert_eq!(state_at % 64, 0);
            let at = (state_at - way.stack_pointer) as usize;
            assert_eq!(way.bytes[at + SOFTWARE_AT..][..4], MAGIC_FRONT.to_le_bytes());
            assert_eq!(way.bytes[at + 832..][..4], MAGIC_BACK.to_le_bytes());
        }
        let before = libc::user_regs_struct { rsp: 100, ..registers() };
        let context = Context { registers: &before, blocked: 0, floating_point: &floating_point() };
        assert!(way_back(&context, CODE).is_none(), "no stack");
    }

    #[test]
    fn an_interrupted_call_is_made_again_and_a_finished_one_is_not() {
        for code in RESTARTS {
            let before = libc::user_regs_struct {
                rax: code as u64,
                orig_rax: 271,
                rip: 0x5002,
                ..registers()
            };
            let again = restarted(&before);
            assert_eq!((again.rax, again.rip), (271, 0x5000));
            // In user space a register may hold any number.
            let again = restarted(&libc::user_regs_struct { orig_rax: u64::MAX, ..before });
            assert_eq!((again.rax, again.rip), (code as u64, 0x5002));
        }
        let done =
            libc::user_regs_struct { rax: -4i64 as u64, orig_rax: 271, rip: 2, ..registers() };
        assert_eq!((restarted(&done).rax, restarted(&done).rip), (-4i64 as u64, 2));
    }

    #[test]
    fn state_that_makes_no_sense_or_no_room_is_not_taken() {
        assert!(FloatingPoint::read(vec![0; 575], |_| 0).is_none(), "shorter than its header");
        let mut state = vec![0; 4096];
        state[SOFTWARE_AT] = 0b111;
        assert!(FloatingPoint::read(state.clone(), |_| 5000).is_none(), "longer than what came");
        assert_eq!(FloatingPoint::read(state.clone(), |_| 832).unwrap().state.len(), 832);
        state[514] = 4; // component 18 is in use
        assert!(FloatingPoint::read(state, |_| 832).is_none(), "AMX");
    }

    #[test]
    fn code_is_found_where_every_c_library_has_it() {
        let mut search = Search::default();
        search.look(&[0x90, 0x0f, 0x05, 0x5d, 0xc3], 0x100);
        assert_eq!(search.found(), None);
        search.look(&[0xb8, 0x27, 0, 0, 0, 0x0f, 0x05, 0xc3], 0x1000);
        assert_eq!(search.found(), None);
        search.look(&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], 0x2000);
        let code = Code { syscall: 0x1005, restorer: 0x2000, restorer_end: 0x2009 };
        assert_eq!(search.found(), Some(code));
        search.look(&[0x0f, 0x05, 0xc3], 0x3000);
        assert_eq!(search.found(), Some(code), "the first one counts");
        let mut musl = Search::default();
        musl.look(&[0x0f, 0x05, 0xc3, 0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05], 0);
        let code = Code { syscall: 0, restorer: 3, restorer_end: 10 };
        assert_eq!(musl.found(), Some(code));
    }

    #[test]
    fn a_shadow_stack_is_seen() {
        let locked = "x86_Thread_features_locked:\tshstk wrss\n";
        assert!(has_shadow_stack(&format!("x86_Thread_features:\tshstk wrss\n{locked}")));
        assert!(!has_shadow_stack(&format!("x86_Thread_features:\t\n{locked}")));
        assert!(!has_shadow_stack("Name:\tqemu\n"));
    }

    #[test]
    fn the_c_library_comes_first_and_odd_maps_are_not_trusted() {
        let maps = "1000-2000 r-xp 0 08:01 5 /usr/bin/qemu\n\
                    3000-4000 r-xp 0 08:01 6 /usr/lib/libc.so.6\n\
                    5000-6000 rwxp 0 08:01 7 /usr/lib/odd.so\n\
                    7000-8000 r-xp 0 00:00 0 [vdso]\n\
                    x [vdso]\n";
        assert_eq!(code_in(maps).iter().map(|m| m.start).collect::<Vec<_>>(), [0x3000, 0x1000]);
        let stacks = "1000-2000 rw-p 0 00:00 0 [stack]\n2000-3000 ---p 0 00:00 0 \n\
                      4000-5000 rw-s 0 00:00 9 /dev/shm/x";
        assert!(is_stack(stacks, 0x1800, 0x2000));
        assert!(!is_stack(stacks, 0x1800, 0x2001), "over its end");
        assert!(!is_stack(stacks, 0xff0, 0x1100), "below its start");
        assert!(!is_stack(stacks, 0x2100, 0x2200), "a guard page");
        assert!(!is_stack(stacks, 0x4100, 0x4200), "shared memory");
    }
}
