//! Page frame numbers and runs of them.
//!
//! The engine sees guest memory as one line of pages: the slots of [`crate::memory::GuestMemory`]
//! laid end to end in their order. A [`Pfn`] counts 4 KiB pages on that line; it is not a
//! guest-physical address (QEMU's memory below and above 4 GiB, say, is one slot without the hole
//! between).

/// Bytes of one page, the unit of dirty tracking. Huge pages are runs of these.
pub const PAGE_BYTES: u64 = 4096;

/// Number of a page on the line of all slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

/// `count` pages in a row, starting at `first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The first page.
    pub first: Pfn,
    /// How many; never zero.
    pub count: u64,
}

impl PageRun {
    /// The run of pages `[first, end)`.
    ///
    /// # Panics
    /// If it would be empty.
    #[must_use]
    pub fn between(first: u64, end: u64) -> Self {
        assert!(first < end, "a run has at least one page: {first}..{end}");
        Self { first: Pfn(first), count: end - first }
    }

    /// The page after the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first.0 + self.count
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count * PAGE_BYTES
    }
}

/// Pages that hold `bytes` bytes, the last one perhaps in part.
#[must_use]
pub fn pages_in(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES)
}
