//! Where a piece of a memory block is in the guest's physical address space, from QEMU's `info
//! mtree -f`.
//!
//! ```text
//!   FlatView #1
//!    Root memory region: system
//!     0000000000000000-000000000009ffff (prio 0, ram): pc.ram
//!     0000000100000000-000000013fffffff (prio 0, ram): pc.ram @0000000080000000
//! ```
//!
//! The monitor's text is made for people, so nothing depends on it: an address that is not found is
//! not told.

/// The guest-physical address of a byte of a block, if one of the views shows it. The first one
/// does: the same memory may be seen at other addresses by devices.
#[must_use]
pub fn guest_physical(text: &str, block: &str, offset: u64) -> Option<u64> {
    text.lines().filter_map(Line::parse).find_map(|line| line.address_of(block, offset))
}

/// A range of memory, and what of which block it shows.
struct Line<'t> {
    first: u64,
    last: u64,
    block: &'t str,
    offset: u64,
}

impl<'t> Line<'t> {
    fn parse(line: &'t str) -> Option<Self> {
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (range, rest) = line.trim().split_once(" (prio ")?;
        let (first, last) = range.split_once('-')?;
        let (_, rest) = rest.split_once("ram): ")?;
        // What follows the name and the offset is the accelerator.
        let mut words = rest.split_whitespace();
        let block = words.next()?;
        let offset = words.find_map(|word| word.strip_prefix('@')).map_or(Some(0), hex)?;
        Some(Self { first: hex(first)?, last: hex(last)?, block, offset })
    }

    fn address_of(&self, block: &str, offset: u64) -> Option<u64> {
        let within = offset
            .checked_sub(self.offset)
            .filter(|at| *at <= self.last.saturating_sub(self.first))?;
        (self.block == block).then(|| self.first.checked_add(within))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_below_and_one_above_the_hole_of_the_pc_are_found_and_one_that_is_not_there_is_not() {
        let text = "FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n  \
             0000000000000000-00000000000bffff (prio 0, ram): ram0 KVM\n  \
             00000000000c0000-00000000000c3fff (prio 0, rom): ram0 @00000000000c0000 KVM\n  \
             00000000000c4000-000000007fffffff (prio 0, ram): ram0 @00000000000c4000 KVM\n  \
             00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios KVM\n  \
             0000000100000000-000000013fffffff (prio 0, ram): ram0 @0000000080000000 KVM\n";
        assert_eq!(guest_physical(text, "ram0", 0x1000), Some(0x1000));
        assert_eq!(guest_physical(text, "ram0", 0xc4000), Some(0xc4000));
        assert_eq!(guest_physical(text, "ram0", 0x8000_3000), Some(0x1_0000_3000));
        assert_eq!(guest_physical(text, "ram0", 0xc000_0000), None);
        assert_eq!(guest_physical(text, "ram1", 0x1000), None);
        assert_eq!(guest_physical("", "ram0", 0), None);
    }
}
