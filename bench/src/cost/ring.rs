//! What a page costs from KVM's dirty ring to the dirty set: entries taken in order, pages put
//! together, the set filled. The ring is plain memory, filled beforehand; the kernel's part
//! (protecting the page, freeing the entry) is not in it.

use anyhow::{Result, ensure};
use pageferry_engine::dirty::kvm::SlotTable;
use pageferry_engine::dirty::ring::RING_ENTRIES;
use pageferry_engine::dirty::ring::entries::{DirtyRing, Entry};
use pageferry_engine::dirty::ring::pending::PendingPages;
use pageferry_engine::memory::bitmap::DirtyBitmap;
use std::time::Instant;

/// What a page may cost: a quarter of what 400 Gb/s leave for all of it.
pub const PAGE_NS_MAX: f64 = 20.0;

/// The slot's number in KVM; any will do.
const SLOT: u32 = 3;

/// Fills rings with every page of the guest, in order or in none, and syncs. Returns the number of
/// pages and the nanoseconds that it took.
pub(super) fn sync(scattered: bool, pages: u64) -> Result<(u64, f64)> {
    let table = SlotTable::new([(SLOT, 0, pages)])?;
    let entries: Vec<Entry> = (0..RING_ENTRIES).map(|_| Entry::default()).collect();
    let ring = DirtyRing::new(&entries[..]);
    let (pending, mut dirty) = (PendingPages::new(pages), DirtyBitmap::new(pages));
    // Once outside of the measurement, as in a migration: what is touched first costs page faults.
    (0..pages).step_by(64).for_each(|first| pending.mark(first, 1));
    pending.drain(&mut dirty);
    dirty.runs(u64::MAX).for_each(drop);
    let mut dirty = DirtyBitmap::new(pages);
    let order = Order::new(scattered, pages);
    let (mut done, mut ns) = (0, 0.0);
    while done < pages {
        let batch = (pages - done).min(entries.len() as u64);
        (0..batch).for_each(|at| entries[at as usize].fill(SLOT, order.page(done + at)));
        let start = Instant::now();
        let taken = counted_transfer_from_ring(&ring, &table, &pending);
        ns += start.elapsed().as_nanos() as f64;
        ensure!(taken == batch, "{taken} entries of {batch} were taken");
        ensure!(
            (0..batch).all(|at| entries[at as usize].free().is_some()),
            "an entry was not taken"
        );
        done += batch;
        ensure!(batch == entries.len() as u64 || done == pages, "the ring begins anew each time");
    }
    let start = Instant::now();
    let told = counted_transfer_to_set(&pending, &mut dirty);
    ns += start.elapsed().as_nanos() as f64;
    ensure!(told == pages && dirty.count() == pages, "{told} pages of {pages} were told");
    Ok((pages, ns))
}

/// Pages in an order that visits each once.
struct Order {
    pages: u64,
    stride: u64,
}

impl Order {
    fn new(scattered: bool, pages: u64) -> Self {
        // About the golden ratio of all, so that neighbours in time are far apart in memory; odd,
        // because the number of pages is a multiple of a power of two, and made coprime to the rest
        // of it.
        let mut stride = if scattered { (pages as f64 * 0.618) as u64 | 1 } else { 1 };
        while gcd(stride, pages) != 1 {
            stride += 2;
        }
        Self { pages, stride }
    }

    fn page(&self, nth: u64) -> u64 {
        nth * self.stride % self.pages
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What valgrind counts: it finds these two functions by their names.
#[inline(never)]
fn counted_transfer_from_ring(
    ring: &DirtyRing<&[Entry]>,
    table: &SlotTable,
    pending: &PendingPages,
) -> u64 {
    take(ring, table, pending)
}

#[inline(never)]
fn counted_transfer_to_set(pending: &PendingPages, dirty: &mut DirtyBitmap) -> u64 {
    pending.drain(dirty)
}

/// Apart, so that the closure's name does not hold the name that valgrind looks for.
#[inline(always)]
fn take(ring: &DirtyRing<&[Entry]>, table: &SlotTable, pending: &PendingPages) -> u64 {
    ring.lock().take(table, |first, mask| pending.mark(first, mask)).entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_visits_every_page_once() {
        for pages in [256u64, 768, 131_072] {
            for scattered in [false, true] {
                let order = Order::new(scattered, pages);
                let mut seen: Vec<_> = (0..pages).map(|nth| order.page(nth)).collect();
                assert_eq!(scattered, seen[1] > 1);
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..pages));
            }
        }
    }
}
