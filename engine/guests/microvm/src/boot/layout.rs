//! Where things are in the guest's physical memory.
//!
//! ```text
//!   0x0000_6000  GDT                        0x000e_0000  ACPI tables (not for the guest to use)
//!   0x0000_7000  boot parameters            0x0010_0000  RAM again: kernel, initrd
//!   0x0000_8000  command line               0xc000_0000  hole: nothing, then the interrupt controllers
//!   0x0000_9000  page tables              0x1_0000_0000  RAM beyond 3 GiB
//!   0x0009_fc00  end of the first RAM
//! ```

/// Where memory below the hole ends at the latest. What lies above is kept free for devices, as on
/// a PC.
pub const LOW_BYTES_MAX: u64 = 3 << 30;
/// Where memory beyond [`LOW_BYTES_MAX`] goes on.
pub const HIGH_START: u64 = 4 << 30;

/// The descriptor table with which vCPU 0 begins: one page.
pub const GDT: u64 = 0x6000;
/// Linux's boot parameters, "zero page": one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// The kernel's command line: one page.
pub const COMMAND_LINE: u64 = 0x8000;
/// Longest command line with its final zero.
pub const COMMAND_LINE_BYTES_MAX: u64 = 0x1000;
/// The page tables with which vCPU 0 begins: the top one, the next, and then one page a GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// Where the first RAM ends: the PC's place for the BIOS's own data.
pub const FIRST_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables, in the PC's place for firmware, where a kernel looks for them by itself too.
pub const ACPI: u64 = 0xe_0000;
/// Where that place ends and RAM begins again.
pub const SECOND_RAM: u64 = 0x10_0000;

/// KVM's local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// KVM's I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;

/// Guest addresses and lengths in bytes of the pieces that memory of so many bytes lies in.
#[must_use]
pub fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_BYTES_MAX);
    let high = bytes - low;
    [(0, low), (HIGH_START, high)].into_iter().filter(|&(_, bytes)| bytes > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_three_gibibytes_lies_beyond_the_hole() {
        assert_eq!(layout(0), []);
        assert_eq!(layout(512 << 20), [(0, 512 << 20)]);
        assert_eq!(layout(3 << 30), [(0, 3 << 30)]);
        assert_eq!(layout((3 << 30) + 4096), [(0, 3 << 30), (4 << 30, 4096)]);
        assert_eq!(layout(16 << 30), [(0, 3 << 30), (4 << 30, 13 << 30)]);
    }
}
