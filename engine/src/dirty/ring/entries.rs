//! One ring as memory: taking entries out in order, without a system call.
//!
//! ```text
//!   flags   0            free; the kernel may fill it
//!           DIRTY        filled: slot and offset are valid      (kernel: smp_wmb, then flags; here: load-acquire)
//!           DIRTY|RESET
//!           or RESET     taken; the kernel protects the page again at the next reset, and frees the entry
//!                                                               (here: store-release; kernel: load-acquire)
//! ```
//!
//! See "KVM_CAP_DIRTY_LOG_RING" in `Documentation/virt/kvm/api.rst` of the kernel.

use crate::dirty::kvm::abi::{KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET};
use crate::dirty::kvm::{SlotPages, SlotTable};
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// An entry of a ring: `struct kvm_dirty_gfn`.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_bindings::kvm_dirty_gfn>());

impl Entry {
    /// Fills it as the kernel does. For tests and benchmarks.
    pub fn fill(&self, slot: u32, offset: u64) {
        self.slot.store(slot, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
        self.flags.store(KVM_DIRTY_GFN_F_DIRTY, Ordering::Release);
    }

    /// Frees it as the kernel does when it resets a ring, and returns slot and offset if it was
    /// taken. For tests and benchmarks.
    pub fn free(&self) -> Option<(u32, u64)> {
        if self.flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_RESET == 0 {
            return None;
        }
        let was = (self.slot.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed));
        self.flags.store(0, Ordering::Release);
        Some(was)
    }

    fn is_dirty(&self, ordering: Ordering) -> bool {
        let flags = self.flags.load(ordering);
        flags & (KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET) == KVM_DIRTY_GFN_F_DIRTY
    }
}

/// What was taken out of a ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Entries.
    pub entries: u64,
    /// The first entry, if any, whose slot or offset is not one that we follow, though its address
    /// space is.
    pub unknown: Option<(u32, u64)>,
}

/// A ring over memory that holds a power of two of entries.
#[derive(Debug)]
pub struct DirtyRing<M> {
    memory: M,
    /// Entries taken since it was made.
    next: Mutex<u64>,
}

/// The right to take entries out of a ring.
#[derive(Debug)]
pub struct Reader<'r> {
    entries: &'r [Entry],
    next: MutexGuard<'r, u64>,
}

impl<M: Deref<Target = [Entry]>> DirtyRing<M> {
    /// A ring over fresh memory.
    ///
    /// # Panics
    /// If the number of entries is not a power of two.
    #[must_use]
    pub fn new(memory: M) -> Self {
        assert!(memory.len().is_power_of_two(), "a ring of {} entries", memory.len());
        Self { memory, next: Mutex::new(0) }
    }

    /// Waits for whoever takes entries out now.
    pub fn lock(&self) -> Reader<'_> {
        // The count is right at every moment, whatever panicked.
        Reader {
            entries: &self.memory,
            next: self.next.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// As [`Self::lock`], if nobody takes entries out now.
    pub fn try_lock(&self) -> Option<Reader<'_>> {
        match self.next.try_lock() {
            Ok(next) => Some(Reader { entries: &self.memory, next }),
            Err(TryLockError::Poisoned(poisoned)) => {
                Some(Reader { entries: &self.memory, next: poisoned.into_inner() })
            }
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Entries in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Never: it has a power of two of entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }
}

fn place(entries: &[Entry], count: u64) -> &Entry {
    // The mask keeps it below the length.
    &entries[(count & (entries.len() as u64 - 1)) as usize]
}

impl Reader<'_> {
    /// Whether at least half of the ring is filled: entries are filled in order, so one is looked
    /// at.
    #[must_use]
    pub fn is_half_full(&self) -> bool {
        let half = self.entries.len() as u64 / 2;
        // Nothing of it is used but this flag.
        place(self.entries, *self.next + half.saturating_sub(1)).is_dirty(Ordering::Relaxed)
    }

    /// Whether the kernel has freed every entry that was taken.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        // It frees them in order.
        let Some(last) = self.next.checked_sub(1) else { return true };
        place(self.entries, last).flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_RESET == 0
    }

    /// Takes every filled entry, at most all that the ring has, and calls `mark` with the first
    /// page of a word of 64 and the pages in it. Pages of one word that follow each other are
    /// marked together.
    #[inline]
    pub fn take(&mut self, slots: &SlotTable, mut mark: impl FnMut(u64, u64)) -> Taken {
        let mut taken = Taken::default();
        let mut slot = SlotPages { slot: 0, first_page: 0, pages: 0 };
        let (mut word, mut mask) = (0, 0);
        let mut next = *self.next;
        let end = next + self.entries.len() as u64;
        while next < end {
            let entry = place(self.entries, next);
            if !entry.is_dirty(Ordering::Acquire) {
                break;
            }
            let number = entry.slot.load(Ordering::Relaxed);
            let offset = entry.offset.load(Ordering::Relaxed);
            if number != slot.slot || offset >= slot.pages {
                match slots.find(number).filter(|found| offset < found.pages) {
                    Some(found) => slot = *found,
                    None => {
                        if !slots.is_foreign(number) {
                            taken.unknown.get_or_insert((number, offset));
                        }
                        slot.pages = 0;
                    }
                }
            }
            if offset < slot.pages {
                let page = slot.first_page + offset;
                if page / 64 != word && mask != 0 {
                    mark(word * 64, mask);
                    mask = 0;
                }
                word = page / 64;
                mask |= 1 << (page % 64);
            }
            entry.flags.store(KVM_DIRTY_GFN_F_RESET, Ordering::Release);
            next += 1;
        }
        if mask != 0 {
            mark(word * 64, mask);
        }
        taken.entries = next - *self.next;
        *self.next = next;
        taken
    }
}
