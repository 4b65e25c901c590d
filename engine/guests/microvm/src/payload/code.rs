//! The payload guest's program: position-independent, without a stack, without interrupts, for any
//! number of vCPUs.
//!
//! ```text
//!   r15  this vCPU's block (offsets below)      r12  state of the random numbers
//!   r14  pages written                          rbp  next page of the sequential pattern
//!   r13  salt of the contents
//!
//!   step:   rbx = choose a page of the share
//!           eax = content of the page in the generation that the ledger has (zeros in generation 0)
//!           repe scasq: every word must be that, or the program ends by its failure port
//!           rep stosq:  every word is made that of the next generation; then the ledger; then r14
//!   clock:  note the longest gap between two readings of the time-stamp counter; wait until the next page is due
//! ```
//!
//! Registers hold what memory does not, so a vCPU that is restored wrongly is found like a page
//! that is.

use std::arch::global_asm;

/// Offsets in a vCPU's block, in bytes. All fields are 64 bits long.
pub mod block {
    /// Guest address of the first page of the data, before the hole is counted.
    pub const DATA: usize = 0x00;
    /// Pages in this vCPU's share.
    pub const PAGES: usize = 0x08;
    /// Guest address of the share's ledger: a generation of 32 bits a page.
    pub const LEDGER: usize = 0x10;
    /// Ticks between two pages; 0: no waiting.
    pub const INTERVAL: usize = 0x18;
    /// 0 sequential, 1 random, 2 hot and cold.
    pub const PATTERN: usize = 0x20;
    /// When the next page is due.
    pub const DUE: usize = 0x30;
    /// The last reading of the time-stamp counter.
    pub const LAST: usize = 0x38;
    /// The longest gap between two readings.
    pub const GAP_MAX: usize = 0x40;
    /// Pages of the hot part.
    pub const HOT_PAGES: usize = 0x58;
    /// Guest address of a page that was found corrupt.
    pub const CORRUPT: usize = 0x60;
    /// Guest address at which the hole begins, and how long it is.
    pub const HOLE: usize = 0x68;
    /// Length of the hole.
    pub const HOLE_BYTES: usize = 0x70;
}

/// The port that the program writes to when a word is wrong.
pub const FAILURE_PORT: u16 = 0x5046;

/// What contents are made of: odd, so that different pages and generations differ.
pub const PAGE_FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
/// See [`PAGE_FACTOR`].
pub const GENERATION_FACTOR: u64 = 0xD1B5_4A32_D192_ED03;

global_asm!(
    ".pushsection .rodata.pageferry_payload, \"a\"",
    ".balign 16",
    ".globl pageferry_payload_begin",
    ".globl pageferry_payload_end",
    "pageferry_payload_begin:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [r15 + {LAST}], rax",
    "mov [r15 + {DUE}], rax",
    "cld",
    // Choose a page.
    "20:",
    "mov rax, [r15 + {PATTERN}]",
    "test rax, rax",
    "jz 24f",
    // Marsaglia's xorshift64.
    "mov rax, r12",
    "shl rax, 13",
    "xor r12, rax",
    "mov rax, r12",
    "shr rax, 7",
    "xor r12, rax",
    "mov rax, r12",
    "shl rax, 17",
    "xor r12, rax",
    "mov rcx, [r15 + {PAGES}]",
    "mov rax, [r15 + {PATTERN}]",
    "cmp rax, 1",
    "je 22f",
    // Hot and cold: seven in eight go to the hot part.
    "test r12, 7",
    "jz 22f",
    "mov rcx, [r15 + {HOT_PAGES}]",
    "22:",
    "mov rax, r12",
    "shr rax, 32",
    "mul rcx",
    "shr rax, 32",
    "mov rbx, rax",
    "jmp 26f",
    "24:",
    "mov rbx, rbp",
    "inc rbp",
    "cmp rbp, [r15 + {PAGES}]",
    "jb 26f",
    "xor ebp, ebp",
    // Where it lies, and which generation it is of.
    "26:",
    "mov rdi, rbx",
    "shl rdi, 12",
    "add rdi, [r15 + {DATA}]",
    "cmp rdi, [r15 + {HOLE}]",
    "jb 28f",
    "add rdi, [r15 + {HOLE_BYTES}]",
    "28:",
    "mov r8, rbx",
    "shl r8, 2",
    "add r8, [r15 + {LEDGER}]",
    "mov r9d, [r8]",
    "mov r11, rdi",
    "xor eax, eax",
    "test r9d, r9d",
    "jz 30f",
    "mov rax, rdi",
    "xor rax, r13",
    "mov rcx, {PAGE_FACTOR}",
    "imul rax, rcx",
    "mov r10, r9",
    "mov rcx, {GENERATION_FACTOR}",
    "imul r10, rcx",
    "add rax, r10",
    // Check it.
    "30:",
    "mov ecx, 512",
    "repe scasq",
    "jne 44f",
    // Write it.
    "inc r9d",
    "mov rdi, r11",
    "mov rax, r11",
    "xor rax, r13",
    "mov rcx, {PAGE_FACTOR}",
    "imul rax, rcx",
    "mov r10, r9",
    "mov rcx, {GENERATION_FACTOR}",
    "imul r10, rcx",
    "add rax, r10",
    "mov ecx, 512",
    "rep stosq",
    "mov [r8], r9d",
    "inc r14",
    // Look at the clock.
    "34:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov rdx, rax",
    "sub rdx, [r15 + {LAST}]",
    "mov [r15 + {LAST}], rax",
    "cmp rdx, [r15 + {GAP_MAX}]",
    "jbe 36f",
    "mov [r15 + {GAP_MAX}], rdx",
    "36:",
    "mov rcx, [r15 + {INTERVAL}]",
    "test rcx, rcx",
    "jz 20b",
    "cmp rax, [r15 + {DUE}]",
    "jae 38f",
    "pause",
    "jmp 34b",
    // Due. What was missed while the guest was paused is not made up for.
    "38:",
    "add rcx, [r15 + {DUE}]",
    "cmp rax, rcx",
    "jb 40f",
    "mov rcx, rax",
    "40:",
    "mov [r15 + {DUE}], rcx",
    "jmp 20b",
    // Corrupt.
    "44:",
    "mov [r15 + {CORRUPT}], r11",
    "mov dx, {FAILURE_PORT}",
    "mov eax, ebx",
    "out dx, eax",
    "jmp 44b",
    "pageferry_payload_end:",
    ".popsection",
    DATA = const block::DATA,
    PAGES = const block::PAGES,
    LEDGER = const block::LEDGER,
    INTERVAL = const block::INTERVAL,
    PATTERN = const block::PATTERN,
    DUE = const block::DUE,
    LAST = const block::LAST,
    GAP_MAX = const block::GAP_MAX,
    HOT_PAGES = const block::HOT_PAGES,
    CORRUPT = const block::CORRUPT,
    HOLE = const block::HOLE,
    HOLE_BYTES = const block::HOLE_BYTES,
    PAGE_FACTOR = const PAGE_FACTOR as i64,
    GENERATION_FACTOR = const GENERATION_FACTOR as i64,
    FAILURE_PORT = const FAILURE_PORT,
);

unsafe extern "C" {
    static pageferry_payload_begin: u8;
    static pageferry_payload_end: u8;
}

/// The program.
#[must_use]
pub fn code() -> &'static [u8] {
    let (begin, end) = (&raw const pageferry_payload_begin, &raw const pageferry_payload_end);
    // SAFETY: the two labels enclose the program above, in one section of constants.
    unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_a_few_hundred_bytes() {
        assert!((200..1024).contains(&code().len()), "{} bytes", code().len());
        // It begins by reading the time-stamp counter.
        assert_eq!(code()[..2], [0x0f, 0x31]);
    }
}
