//! All rings of a machine: who takes entries, when the kernel protects their pages again, and where
//! the pages wait until they are reported. The kernel is behind a trait.
//!
//! ```text
//!   serve_full   own ring: lock, take -> pending, unlock, reset          a vCPU's thread
//!   drain_early      rings that are half full: the same                      the migration's thread, in mid-round
//!   sync      lock all, take all, reset, pending -> report, unlock    the migration's thread
//! ```
//!
//! Locks are taken in the order of the rings, and the lock of the reset last.

use super::entries::{DirtyRing, Entry, Reader};
use super::pending::PendingPages;
use crate::dirty::kvm::SlotTable;
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Without any entry freed, though entries were taken. A reset has no reason to wait; the thread
/// may be without a processor for a while.
const RESET_STALL_MAX: Duration = Duration::from_secs(5);

/// Times in a row that a vCPU may say that its ring is full when it is empty. Once is normal: the
/// migration's thread emptied it in between. A kernel that goes on has lost count of its entries.
const EMPTY_SERVES_MAX: u32 = 16;

/// The kernel's part in it.
pub trait ResetRings {
    /// Protects again the pages of all entries that were taken, in all rings, and frees these.
    /// Returns how many: fewer than there are if a signal is pending.
    fn reset(&self) -> io::Result<u64>;
}

/// The rings of a machine.
#[derive(Debug)]
pub struct Rings<M, K> {
    kernel: K,
    table: SlotTable,
    rings: Vec<VcpuRing<M>>,
    pending: PendingPages,
    /// One reset at a time: the kernel flushes the processors' address caches after it has let go
    /// of its own lock, so a second reset could return before the first has taken effect.
    resetting: Mutex<()>,
    /// What the next sync must report instead of pages; the first such thing.
    fault: Mutex<Option<String>>,
    full_exits: AtomicU64,
}

#[derive(Debug)]
struct VcpuRing<M> {
    ring: DirtyRing<M>,
    /// Served in a row without an entry.
    empty_serves: Mutex<u32>,
}

impl<M: Deref<Target = [Entry]>, K: ResetRings> Rings<M, K> {
    /// Over rings that were never used.
    pub fn new(kernel: K, table: SlotTable, rings: impl IntoIterator<Item = M>) -> Self {
        let pending = PendingPages::new(table.pages());
        let rings = rings
            .into_iter()
            .map(|memory| VcpuRing { ring: DirtyRing::new(memory), empty_serves: Mutex::new(0) });
        Self {
            kernel,
            table,
            rings: rings.collect(),
            pending,
            resetting: Mutex::new(()),
            fault: Mutex::new(None),
            full_exits: AtomicU64::new(0),
        }
    }

    /// Empties the ring of a vCPU that has stopped because it is full; its own thread calls this.
    /// The other vCPUs run on. An entry that makes no sense is told by the next sync: the guest is
    /// not to blame for it.
    ///
    /// # Errors
    /// [`Error::Guest`] if there is no such vCPU, or the kernel goes on about a ring that is empty.
    pub fn serve_full(&self, vcpu: usize) -> Result<()> {
        let served = self.rings.get(vcpu).ok_or_else(|| {
            Error::Guest(format!("vCPU {vcpu} has no dirty ring: there are {}", self.rings.len()))
        })?;
        self.full_exits.fetch_add(1, Ordering::Relaxed);
        let mut reader = served.ring.lock();
        if self.take(served, &mut reader) == 0 {
            let mut empty = held(&served.empty_serves);
            *empty += 1;
            if *empty > EMPTY_SERVES_MAX {
                let fault = format!(
                    "KVM stops vCPU {vcpu} for its full dirty ring again and again, and the ring is empty: \
                     this kernel's rings cannot be used"
                );
                self.fail(fault.clone());
                return Err(Error::Guest(fault));
            }
        }
        // With the lock: another thread may have taken these entries, and not reset yet.
        self.reset_until(|| reader.is_reset())
    }

    /// Empties rings that are at least half full, so that vCPUs need not stop for it.
    pub fn drain_early(&self) -> Result<()> {
        for ring in &self.rings {
            // Whoever has the lock is emptying it.
            let Some(mut reader) = ring.ring.try_lock() else { continue };
            if reader.is_half_full() {
                self.take(ring, &mut reader);
                self.reset_until(|| reader.is_reset())?;
            }
        }
        Ok(())
    }

    /// Adds every page that is in a ring, or was taken out of one since the last call, to `into`,
    /// all protected again. Returns how many. The caller has had every vCPU leave the guest.
    ///
    /// # Errors
    /// [`Error::Guest`] if an entry made no sense, or a reset did not do its work. It stays so until [`Self::discard`].
    pub fn sync(&self, into: &mut DirtyBitmap) -> Result<u64> {
        let readers = self.take_all()?;
        let pages = self.pending.drain(into);
        drop(readers);
        match held(&self.fault).clone() {
            None => Ok(pages),
            Some(fault) => Err(Error::Guest(fault)),
        }
    }

    /// How often a vCPU had to stop because its ring was full.
    pub fn full_exits(&self) -> u64 {
        self.full_exits.load(Ordering::Relaxed)
    }

    /// Forgets all pages that are in a ring or wait to be reported, and what was wrong with them.
    pub fn discard(&self) -> Result<()> {
        let readers = self.take_all()?;
        self.pending.clear();
        drop(readers);
        *held(&self.fault) = None;
        Ok(())
    }

    /// Takes every entry and has their pages protected again. The rings stay locked.
    fn take_all(&self) -> Result<Vec<Reader<'_>>> {
        let mut readers: Vec<_> = self.rings.iter().map(|ring| ring.ring.lock()).collect();
        for (ring, reader) in self.rings.iter().zip(&mut readers) {
            self.take(ring, reader);
        }
        self.reset_until(|| readers.iter().all(Reader::is_reset))?;
        Ok(readers)
    }

    fn take(&self, ring: &VcpuRing<M>, reader: &mut Reader<'_>) -> u64 {
        let taken = reader.take(&self.table, |first, mask| self.pending.mark(first, mask));
        if taken.entries > 0 {
            *held(&ring.empty_serves) = 0;
        }
        if let Some((slot, offset)) = taken.unknown {
            // It is taken all the same, or the vCPU could never run again.
            self.fail(format!(
                "KVM's dirty ring names page {offset:#x} of slot {slot:#x}, which the guest does not have: were memory \
                 slots changed while they were followed?"
            ));
        }
        taken.entries
    }

    /// Has the kernel reset until all that was taken is free. That an entry is free does not say
    /// that its page is protected, only that a reset has come to it: so nothing is looked at but
    /// between two resets.
    fn reset_until(&self, done: impl Fn() -> bool) -> Result<()> {
        let _resetting = held(&self.resetting);
        let mut progress = Instant::now();
        while !done() {
            let freed = match self.kernel.reset() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                answer => answer.map_err(|e| Error::os("KVM_RESET_DIRTY_RINGS", e))?,
            };
            if done() {
                break;
            }
            // Since Linux 6.16 it stops when the thread is wanted (a debugger, a freezer: signals
            // are blocked), after it has freed entries whose pages it has yet to protect. Which
            // ones is not told.
            self.fail(
                "the kernel was interrupted while it protected dirty pages again, and may have left some out (was a \
                 debugger attached, or the process frozen?): migrate again"
                    .into(),
            );
            if freed > 0 {
                progress = Instant::now();
            } else if progress.elapsed() > RESET_STALL_MAX {
                return Err(Error::Guest(format!(
                    "KVM has not freed the entries of its dirty rings for {} s (KVM_RESET_DIRTY_RINGS): this \
                     kernel's rings cannot be used",
                    RESET_STALL_MAX.as_secs()
                )));
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// The first fault is the one that is told.
    fn fail(&self, fault: String) {
        held(&self.fault).get_or_insert(fault);
    }
}

/// What these locks guard is right at every moment, whatever panicked.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
