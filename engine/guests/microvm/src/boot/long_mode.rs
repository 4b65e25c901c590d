//! The state in which vCPU 0 begins: 64-bit mode, flat segments, all low memory mapped to itself.
//! That is what Linux's 64-bit boot protocol asks for, and what a payload without an operating
//! system can run in.

use super::layout;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use pageferry_engine::error::{Error, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Selectors that Linux's 64-bit boot protocol names: code and data.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Descriptors: null, unused, 64-bit code (execute, read), data (read, write); both present, level
/// 0, 4 GiB.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Type bits of those two (Intel SDM volume 3, 3.4.5.1), with "accessed", as a processor wants them
/// loaded.
const CODE_TYPE: u8 = 0xb;
const DATA_TYPE: u8 = 0x3;

/// Present and writable, in a page table entry.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// The entry maps a 2 MiB page.
const LARGE: u64 = 1 << 7;
/// Entries in a page table, and its length in bytes.
const ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Memory below this is mapped at the least: all that a boot needs.
const MAPPED_BYTES_MIN: u64 = 4 << 30;
/// Memory above this is not mapped at the beginning: 64 page tables in the memory below 640 KiB.
/// The guest makes page tables of its own soon enough.
const MAPPED_BYTES_MAX: u64 = 64 << 30;
const _: () = assert!(
    layout::PAGE_TABLES + (2 + MAPPED_BYTES_MAX / GIB) * TABLE_BYTES <= layout::FIRST_RAM_END
);

/// CR0: protection, and paging; CR4: large physical addresses; EFER: long mode, enabled and active.
const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set. Interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Where vCPU 0 begins, and with what in its hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub rip: u64,
    /// What the program is given: for Linux, the guest address of its boot parameters.
    pub rsi: u64,
    /// The stack, which grows down from here; zero for a program that sets its own, as Linux does.
    pub rsp: u64,
}

impl Entry {
    /// The general registers of a vCPU that begins here.
    #[must_use]
    pub fn registers(&self) -> kvm_regs {
        kvm_regs {
            rip: self.rip,
            rsi: self.rsi,
            rsp: self.rsp,
            rflags: RFLAGS,
            ..Default::default()
        }
    }
}

/// Writes the descriptor table and page tables into guest memory, and the registers that go with
/// them over those that KVM gave a new vCPU. Memory up to 64 GiB is mapped to itself, with the hole
/// below 4 GiB.
pub fn long_mode(memory: &GuestMemoryMmap, sregs: &mut kvm_sregs) -> Result<()> {
    let write = |at: u64, entry: u64| {
        memory.write_obj(entry.to_le(), GuestAddress(at)).map_err(|e| {
            Error::refused(format!(
                "the guest's memory is too small to begin with ({e}): give it more"
            ))
        })
    };
    for (index, descriptor) in (0..).zip(GDT) {
        write(layout::GDT + index * 8, descriptor)?;
    }
    let directories = mapped_bytes(memory) / GIB;
    let (top, second, first) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + TABLE_BYTES,
        layout::PAGE_TABLES + 2 * TABLE_BYTES,
    );
    write(top, second | PRESENT | WRITABLE)?;
    for directory in 0..directories {
        write(second + directory * 8, (first + directory * TABLE_BYTES) | PRESENT | WRITABLE)?;
    }
    for page in 0..directories * ENTRIES {
        write(first + page * 8, (page * LARGE_PAGE_BYTES) | PRESENT | WRITABLE | LARGE)?;
    }

    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (GDT.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE_SELECTOR, CODE_TYPE);
    let data = segment(DATA_SELECTOR, DATA_TYPE);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = top;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    Ok(())
}

/// A flat segment as the processor holds it.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    let is_code = type_ == CODE_TYPE;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!is_code),
        s: 1,
        l: u8::from(is_code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// How much of the guest's addresses is mapped: whole GiB.
fn mapped_bytes(memory: &GuestMemoryMmap) -> u64 {
    use vm_memory::GuestMemoryBackend;
    (memory.last_addr().0 + 1).next_multiple_of(GIB).clamp(MAPPED_BYTES_MIN, MAPPED_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: u64) -> GuestMemoryMmap {
        let ranges: Vec<_> = layout::layout(bytes)
            .iter()
            .map(|&(at, len)| (GuestAddress(at), len as usize))
            .collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    /// What the processor would find for this address.
    fn translate(memory: &GuestMemoryMmap, sregs: &kvm_sregs, address: u64) -> Option<u64> {
        let mut table = sregs.cr3;
        for shift in [39, 30, 21] {
            let entry: u64 =
                memory.read_obj(GuestAddress(table + (address >> shift & 511) * 8)).unwrap();
            if entry & PRESENT == 0 {
                return None;
            }
            table = entry & !0xfff;
        }
        Some(table + address % LARGE_PAGE_BYTES)
    }

    #[test]
    fn all_memory_is_mapped_to_itself() {
        let (small, large) = (memory(16 << 20), memory(6 << 30));
        for (memory, mapped, not) in [(&small, 4u64 << 30, 4u64 << 30), (&large, 7 << 30, 7 << 30)]
        {
            let mut sregs = kvm_sregs::default();
            long_mode(memory, &mut sregs).unwrap();
            for address in [0, 0x10_0123, LARGE_PAGE_BYTES, 0xc000_0000, mapped - 1] {
                assert_eq!(translate(memory, &sregs, address), Some(address), "{address:#x}");
            }
            assert_eq!(translate(memory, &sregs, not), None);
        }
    }

    #[test]
    fn the_descriptors_in_memory_are_those_in_the_segments() {
        let memory = memory(16 << 20);
        let mut sregs = kvm_sregs::default();
        long_mode(&memory, &mut sregs).unwrap();
        for segment in [sregs.cs, sregs.ds] {
            let at = GuestAddress(sregs.gdt.base + u64::from(segment.selector));
            let descriptor: u64 = memory.read_obj(at).unwrap();
            let access = (descriptor >> 40) as u8;
            assert_eq!(access & 0xf, segment.type_);
            assert_eq!(access >> 7, segment.present);
            assert_eq!((descriptor >> 53) as u8 & 1, segment.l);
            assert_eq!((descriptor >> 54) as u8 & 1, segment.db);
        }
    }

    #[test]
    fn memory_too_small_for_the_tables_is_refused() {
        let error = long_mode(&memory(32 << 10), &mut kvm_sregs::default()).unwrap_err();
        assert!(error.to_string().contains("too small"), "{error}");
    }
}
