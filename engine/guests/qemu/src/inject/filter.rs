//! What a seccomp filter makes of a system call, found out before the call is made.
//!
//! A filter is a program of classic BPF that runs over 64 bytes: the number of the call, the
//! architecture, the address of the instruction, six arguments. All filters of a thread run, and
//! the strictest answer counts. The kernel hands out their programs, so the answer here is the
//! one that the kernel would give. See `seccomp(2)` and
//! `Documentation/userspace-api/seccomp_filter.rst`.

/// One instruction, `struct sock_filter` of `linux/filter.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    k: u32,
}
const _: () = assert!(size_of::<Instruction>() == 8);

/// Most instructions that a filter has (`BPF_MAXINSNS` of `linux/bpf_common.h`).
pub(super) const INSTRUCTIONS_MAX: usize = 4096;

/// A system call as a filter sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) number: i64,
    /// The address behind the `syscall` instruction.
    pub(super) instruction: u64,
    /// Its first argument; the others are zero.
    pub(super) argument: u64,
}

/// What becomes of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is made.
    Allowed,
    /// It is not made, and fails with this error number.
    Fails(u16),
    /// The process, or its main thread, is killed.
    Killed,
    /// Another process or a signal handler decides; nobody can know.
    Elsewhere,
}

/// The strictest verdict of all filters. Without any, everything is allowed.
pub(super) fn verdict(filters: &[Vec<Instruction>], call: Call) -> Verdict {
    let data = call.data();
    // The kernel compares the answers as signed numbers: the smallest is the strictest.
    let strictest = |answer: &u32| (answer & ACTION_MASK).cast_signed();
    let answer = filters.iter().map(|filter| run(filter, &data).unwrap_or(KILL_PROCESS));
    match answer.min_by_key(strictest) {
        None => Verdict::Allowed,
        Some(answer) => match answer & ACTION_MASK {
            ALLOW | LOG => Verdict::Allowed,
            ERRNO => Verdict::Fails(answer as u16),
            TRAP | USER_NOTIF | TRACE => Verdict::Elsewhere,
            // What the kernel does not know either kills.
            _ => Verdict::Killed,
        },
    }
}

/// `SECCOMP_RET_ACTION_FULL` and the actions, of `linux/seccomp.h`.
const ACTION_MASK: u32 = 0xffff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const USER_NOTIF: u32 = 0x7fc0_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

/// `AUDIT_ARCH_X86_64` of `linux/audit.h`.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Length of `struct seccomp_data`, in words.
const DATA_WORDS: usize = 16;
/// Words of memory that a program has (`BPF_MEMWORDS`).
const MEMORY_WORDS: usize = 16;

impl Call {
    /// `struct seccomp_data` of `linux/seccomp.h`, in words.
    fn data(self) -> [u32; DATA_WORDS] {
        let mut words = [0; DATA_WORDS];
        words[0] = self.number as u32;
        words[1] = ARCHITECTURE;
        for (at, value) in [(2, self.instruction), (4, self.argument)] {
            words[at] = value as u32;
            words[at + 1] = (value >> 32) as u32;
        }
        words
    }
}

/// Runs one program; nothing if it does what no program that the kernel accepts does.
fn run(program: &[Instruction], data: &[u32; DATA_WORDS]) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0u32, 0u32, [0u32; MEMORY_WORDS]);
    let mut at = 0;
    // Jumps go forward only, so each instruction runs once at most.
    loop {
        let Instruction { code, jump_true, jump_false, k } = *program.get(at)?;
        at += 1;
        let (class, operand) = (code & 0x07, if code & 0x08 == 0 { k } else { x });
        match (class, code) {
            (0, 0x20) => a = if k % 4 == 0 { *data.get(k as usize / 4)? } else { return None },
            (0, 0x00) => a = k,
            (1, 0x01) => x = k,
            (0, 0x80) => a = size_of_val(data) as u32,
            (1, 0x81) => x = size_of_val(data) as u32,
            (0, 0x60) => a = *memory.get(k as usize)?,
            (1, 0x61) => x = *memory.get(k as usize)?,
            (2, 0x02) => *memory.get_mut(k as usize)? = a,
            (3, 0x03) => *memory.get_mut(k as usize)? = x,
            (4, _) => {
                a = match code & 0xf0 {
                    0x00 => a.wrapping_add(operand),
                    0x10 => a.wrapping_sub(operand),
                    0x20 => a.wrapping_mul(operand),
                    // The kernel ends a program that divides by zero with the answer 0.
                    0x30 if operand == 0 => return Some(0),
                    0x30 => a / operand,
                    0x40 => a | operand,
                    0x50 => a & operand,
                    0x60 => a.wrapping_shl(operand),
                    0x70 => a.wrapping_shr(operand),
                    0x80 => a.wrapping_neg(),
                    0xa0 => a ^ operand,
                    _ => return None,
                }
            }
            (5, _) => {
                let taken = match code & 0xf0 {
                    0x00 => {
                        at = at.checked_add(k as usize)?;
                        continue;
                    }
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                at += usize::from(if taken { jump_true } else { jump_false });
            }
            (6, 0x06) => return Some(k),
            (6, 0x16) => return Some(a),
            (7, 0x07) => x = a,
            (7, 0x87) => a = x,
            _ => return None,
        }
    }
}

/// Whether this command line is of a QEMU with its own sandbox.
pub(super) fn is_sandboxed_qemu(command_line: &[u8]) -> bool {
    let words: Vec<_> = command_line.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| {
        matches!(pair[0], b"-sandbox" | b"--sandbox")
            && (pair[1] == b"on"
                || pair[1].starts_with(b"on,")
                || pair[1].starts_with(b"enable=on"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn op(code: u16, jump_true: u8, jump_false: u8, k: u32) -> Instruction {
        Instruction { code, jump_true, jump_false, k }
    }

    fn ret(k: u32) -> Instruction {
        op(0x06, 0, 0, k)
    }

    const USERFAULTFD: Call =
        Call { number: libc::SYS_userfaultfd, instruction: 0x7fff_1234_5678, argument: 0x80801 };

    /// One action for a call, another for all others.
    fn only(number: i64, then: u32, otherwise: u32) -> Vec<Instruction> {
        vec![op(0x20, 0, 0, 0), op(0x15, 0, 1, number as u32), ret(then), ret(otherwise)]
    }

    #[test]
    fn the_strictest_filter_counts() {
        let list = |answers: &[u32]| -> Vec<_> { answers.iter().map(|a| vec![ret(*a)]).collect() };
        let verdict = |answers: &[u32]| super::verdict(&list(answers), USERFAULTFD);
        assert_eq!(verdict(&[]), Verdict::Allowed);
        assert_eq!(verdict(&[ALLOW, LOG]), Verdict::Allowed);
        assert_eq!(verdict(&[ALLOW, ERRNO | 38, LOG]), Verdict::Fails(38));
        assert_eq!(verdict(&[ERRNO | 1, KILL_PROCESS]), Verdict::Killed);
        assert_eq!(verdict(&[0, ERRNO | 1]), Verdict::Killed, "SECCOMP_RET_KILL_THREAD");
        assert_eq!(verdict(&[TRAP, ERRNO]), Verdict::Elsewhere);
        assert_eq!(verdict(&[TRACE, ALLOW]), Verdict::Elsewhere);
        assert_eq!(verdict(&[USER_NOTIF, ALLOW]), Verdict::Elsewhere);
        assert_eq!(verdict(&[0x1234_0000]), Verdict::Killed, "an action of a later kernel");
    }

    #[test]
    fn a_default_that_kills_is_seen() {
        let filter = [only(libc::SYS_userfaultfd, ALLOW, KILL_PROCESS)];
        assert_eq!(verdict(&filter, USERFAULTFD), Verdict::Allowed);
        let close = Call { number: libc::SYS_close, ..USERFAULTFD };
        assert_eq!(verdict(&filter, close), Verdict::Killed);
    }

    #[test]
    fn address_and_argument_are_what_the_kernel_shows() {
        let word = |offset, value| {
            [vec![op(0x20, 0, 0, offset), op(0x15, 0, 1, value), ret(ALLOW), ret(ERRNO | 1)]]
        };
        let expected = [
            (0, 323),
            (4, ARCHITECTURE),
            (8, 0x1234_5678),
            (12, 0x7fff),
            (16, 0x80801),
            (20, 0),
            (24, 0),
            (60, 0),
        ];
        for (offset, value) in expected {
            assert_eq!(verdict(&word(offset, value), USERFAULTFD), Verdict::Allowed, "{offset}");
            assert_eq!(verdict(&word(offset, value + 1), USERFAULTFD), Verdict::Fails(1));
        }
    }

    #[test]
    fn arithmetic_memory_and_jumps() {
        let data = USERFAULTFD.data();
        // ((323 & 0xff) | 0x100) << 2, kept in memory, fetched into x, and subtracted from.
        let program = [
            op(0x20, 0, 0, 0),
            op(0x54, 0, 0, 0xff),
            op(0x44, 0, 0, 0x100),
            op(0x64, 0, 0, 2),
            op(0x02, 0, 0, 3),
            op(0x00, 0, 0, 2000),
            op(0x61, 0, 0, 3),
            op(0x1c, 0, 0, 0),
            op(0x05, 0, 0, 1),
            ret(1),
            op(0x16, 0, 0, 0),
        ];
        assert_eq!(run(&program, &data), Some(2000 - 323 * 4));
        let odd = [op(0x87, 0, 0, 0), op(0x84, 0, 0, 0), op(0x3c, 0, 0, 0), ret(7)];
        assert_eq!(run(&odd, &data), Some(0), "division by zero");
        for bad in
            [vec![], vec![op(0x20, 0, 0, 64)], vec![op(0x20, 0, 0, 2)], vec![op(0x1f, 0, 0, 0)]]
        {
            assert_eq!(run(&bad, &data), None);
            assert_eq!(verdict(&[bad], USERFAULTFD), Verdict::Killed);
        }
    }

    #[test]
    fn a_sandbox_is_seen_in_the_command_line() {
        let seen = |line: &str| is_sandboxed_qemu(line.replace(' ', "\0").as_bytes());
        assert!(seen("qemu -sandbox on -m 64"));
        assert!(seen("qemu --sandbox on,spawn=deny"));
        assert!(seen("qemu -sandbox enable=on,spawn=deny"));
        assert!(!seen("qemu -sandbox off"));
        assert!(!seen("qemu -name on -m 64"));
        assert!(!seen("qemu -sandbox"));
    }

    proptest! {
        #[test]
        fn no_program_panics_or_goes_on_for_ever(
            program in prop::collection::vec(
                (any::<u16>(), 0u8..4, 0u8..4, prop_oneof![0u32..70, any::<u32>()])
                    .prop_map(|(code, t, f, k)| op(code & 0xff, t, f, k)),
                0..40,
            ),
        ) {
            let _ = verdict(&[program], USERFAULTFD);
        }
    }
}
