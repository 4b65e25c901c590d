//! The rings over plain memory, with a model of the kernel.

use super::entries::{DirtyRing, Entry};
use super::sync::{ResetRings, Rings};
use crate::dirty::kvm::SlotTable;
use crate::error::Error;
use crate::memory::bitmap::DirtyBitmap;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Two slots whose numbers are not in the order of their pages, and of which none begins with a
/// word.
const SLOTS: [(u32, u64, u64); 2] = [(7, 10, 100), (2, 130, 300)];
const PAGES: u64 = 430;

fn table() -> SlotTable {
    SlotTable::new(SLOTS).expect("slots")
}

/// Slot and offset of the `nth` page that is followed.
fn place(nth: u64) -> (u32, u64) {
    if nth < 100 { (7, nth) } else { (2, nth - 100) }
}

/// Its page on the line.
fn page(nth: u64) -> u64 {
    if nth < 100 { 10 + nth } else { 130 + nth - 100 }
}

const FOLLOWED: u64 = 400;

/// A ring's memory, shared by the kernel and us.
#[derive(Debug, Clone)]
struct Memory(Arc<Vec<Entry>>);

impl Memory {
    fn new(entries: usize) -> Self {
        Self(Arc::new((0..entries).map(|_| Entry::default()).collect()))
    }
}

impl Deref for Memory {
    type Target = [Entry];

    fn deref(&self) -> &[Entry] {
        &self.0
    }
}

/// The kernel: pages that are protected, and how far each ring is filled and reset.
#[derive(Debug)]
struct Kernel {
    rings: Vec<(Memory, Mutex<Filled>)>,
    /// A bit a followed page.
    protected: Vec<AtomicU64>,
    /// Entries that one reset frees, at most.
    per_reset: AtomicU64,
    resets: AtomicU32,
}

#[derive(Debug, Default)]
struct Filled {
    filled: u64,
    freed: u64,
}

#[derive(Debug, Clone)]
struct Shared(Arc<Kernel>);

impl Kernel {
    fn new(rings: usize, entries: usize) -> Arc<Self> {
        Arc::new(Self {
            rings: (0..rings).map(|_| (Memory::new(entries), Mutex::default())).collect(),
            protected: (0..FOLLOWED.div_ceil(64)).map(|_| AtomicU64::new(u64::MAX)).collect(),
            per_reset: AtomicU64::new(u64::MAX),
            resets: AtomicU32::new(0),
        })
    }

    fn rings(self: &Arc<Self>) -> Rings<Memory, Shared> {
        Rings::new(
            Shared(Arc::clone(self)),
            table(),
            self.rings.iter().map(|(memory, _)| memory.clone()),
        )
    }

    /// A vCPU writes the `nth` page. False if its ring is full, and it has to stop before that.
    fn write(&self, vcpu: usize, nth: u64) -> bool {
        self.store(vcpu, nth, || {})
    }

    /// As [`Self::write`], with what is done to the page.
    fn store(&self, vcpu: usize, nth: u64, store: impl FnOnce()) -> bool {
        let (memory, filled) = &self.rings[vcpu];
        let mut filled = filled.lock().expect("lock");
        if filled.filled - filled.freed == memory.len() as u64 {
            return false;
        }
        let bit = 1 << (nth % 64);
        if self.protected[(nth / 64) as usize].fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
            let (slot, offset) = place(nth);
            memory[filled.filled as usize % memory.len()].fill(slot, offset);
            filled.filled += 1;
        }
        store();
        true
    }

    fn fill_raw(&self, vcpu: usize, slot: u32, offset: u64) {
        let (memory, filled) = &self.rings[vcpu];
        let mut filled = filled.lock().expect("lock");
        memory[filled.filled as usize % memory.len()].fill(slot, offset);
        filled.filled += 1;
    }
}

impl ResetRings for Shared {
    fn reset(&self) -> io::Result<u64> {
        self.0.resets.fetch_add(1, Ordering::Relaxed);
        let most = self.0.per_reset.load(Ordering::Relaxed);
        let (mut freed, mut protect) = (0, Vec::new());
        for (memory, filled) in &self.0.rings {
            let mut filled = filled.lock().expect("lock");
            while filled.freed < filled.filled && freed < most {
                let Some(place) = memory[filled.freed as usize % memory.len()].free() else {
                    break;
                };
                protect.push(place);
                filled.freed += 1;
                freed += 1;
            }
        }
        // As in the kernel, entries are free before their pages are protected.
        thread::yield_now();
        for (slot, offset) in protect {
            let nth = match slot {
                7 => offset,
                2 => offset.saturating_add(100),
                _ => continue,
            };
            if nth < FOLLOWED {
                self.0.protected[(nth / 64) as usize].fetch_or(1 << (nth % 64), Ordering::SeqCst);
            }
        }
        // And the addresses that vCPUs have cached are flushed last: whoever writes now has written
        // then.
        self.0.rings.iter().for_each(|(_, filled)| drop(filled.lock().expect("lock")));
        Ok(freed)
    }
}

fn told(rings: &Rings<Memory, Shared>) -> BTreeSet<u64> {
    let mut into = DirtyBitmap::new(PAGES);
    let count = rings.sync(&mut into).expect("sync");
    assert_eq!(count, into.count());
    (0..PAGES).filter(|page| into.contains(*page)).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Write { vcpu: usize, nth: u64 },
    DrainEarly,
    Synced,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        40 => (0usize..2, 0..FOLLOWED).prop_map(|(vcpu, nth)| Step::Write { vcpu, nth }),
        2 => Just(Step::DrainEarly),
        1 => Just(Step::Synced),
    ]
}

proptest! {
    #[test]
    fn every_write_is_told_once_whatever_comes_in_between(steps in prop::collection::vec(step(), 0..600)) {
        let kernel = Kernel::new(2, 16);
        let rings = kernel.rings();
        let mut model = BTreeSet::new();
        for step in steps.into_iter().chain([Step::Synced]) {
            match step {
                Step::Write { vcpu, nth } => {
                    if !kernel.write(vcpu, nth) {
                        rings.serve_full(vcpu).expect("served");
                        prop_assert!(kernel.write(vcpu, nth), "full after it was served");
                    }
                    model.insert(page(nth));
                }
                Step::DrainEarly => rings.drain_early().expect("drained"),
                Step::Synced => prop_assert_eq!(told(&rings), std::mem::take(&mut model)),
            }
        }
    }

    #[test]
    fn entries_are_taken_in_order_and_freed_before_they_are_used_again(
        batches in prop::collection::vec(0usize..=8, 1..50)
    ) {
        let memory = Memory::new(8);
        let ring = DirtyRing::new(memory.clone());
        let (mut filled, mut freed) = (0u64, 0u64);
        for batch in batches {
            let mut expected = Vec::new();
            for _ in 0..batch {
                // Each in a word of its own, so that each is marked by itself and in its turn.
                let nth = 100 + filled % 4 * 64;
                memory[(filled % 8) as usize].fill(2, nth - 100);
                expected.push(page(nth));
                filled += 1;
            }
            let mut seen = Vec::new();
            let mut reader = ring.lock();
            let taken = reader.take(&table(), |first, mask| seen.push(first + u64::from(mask.trailing_zeros())));
            prop_assert_eq!((taken.entries, taken.unknown), (batch as u64, None));
            prop_assert_eq!(seen, expected);
            prop_assert_eq!(reader.is_reset(), batch == 0);
            // Nothing is taken twice.
            prop_assert_eq!(reader.take(&table(), |_, _| {}).entries, 0);
            while freed < filled {
                prop_assert!(memory[(freed % 8) as usize].free().is_some());
                freed += 1;
            }
            prop_assert!(reader.is_reset());
        }
    }
}

#[test]
fn a_ring_is_relieved_when_it_is_half_full_and_not_before() {
    let kernel = Kernel::new(2, 16);
    let rings = kernel.rings();
    for nth in 0..8 {
        rings.drain_early().expect("drained");
        assert_eq!(kernel.resets.load(Ordering::Relaxed), 0, "{nth} of 16");
        assert!(kernel.write(1, nth));
    }
    rings.drain_early().expect("drained");
    assert_eq!(kernel.resets.load(Ordering::Relaxed), 1);
    // It is kept for the sync, and can be written and told again.
    assert!(kernel.write(1, 0));
    assert_eq!(told(&rings), (0..8).map(page).collect());
    assert_eq!(told(&rings), BTreeSet::new());
}

#[test]
fn a_reset_that_stops_early_is_gone_on_with_and_fails_the_sync_until_a_fresh_start() {
    let kernel = Kernel::new(1, 16);
    let rings = kernel.rings();
    (0..16).for_each(|nth| assert!(kernel.write(0, nth)));
    kernel.per_reset.store(5, Ordering::Relaxed);
    rings.serve_full(0).expect("the vCPU runs on");
    assert_eq!(kernel.resets.load(Ordering::Relaxed), 4, "16 entries, 5 at once");
    kernel.per_reset.store(u64::MAX, Ordering::Relaxed);
    for _ in 0..2 {
        let error = rings.sync(&mut DirtyBitmap::new(PAGES)).expect_err("pages may be unprotected");
        assert!(error.to_string().contains("interrupted"), "{error}");
    }
    rings.discard().expect("a fresh start");
    assert!(kernel.write(0, 3));
    assert_eq!(told(&rings), [page(3)].into());
}

#[test]
fn an_entry_of_no_slot_of_ours_fails_the_sync_and_not_the_vcpu() {
    for (slot, offset) in [(3, 0), (7, 100), (2, u64::MAX), (0, 0)] {
        let kernel = Kernel::new(1, 16);
        let rings = kernel.rings();
        kernel.fill_raw(0, slot, offset);
        rings.serve_full(0).expect("the vCPU runs on");
        let error = rings.sync(&mut DirtyBitmap::new(PAGES)).expect_err("no such page");
        assert!(
            matches!(&error, Error::Guest(text) if text.contains(&format!("slot {slot:#x}"))),
            "{error}"
        );
    }
}

#[test]
fn an_entry_of_another_address_space_is_passed_over() {
    let kernel = Kernel::new(1, 16);
    let rings = kernel.rings();
    kernel.fill_raw(0, 1 << 16 | 7, 5);
    assert!(kernel.write(0, 150));
    assert_eq!(told(&rings), [page(150)].into());
}

#[test]
fn a_vcpu_that_stops_for_an_empty_ring_for_ever_is_an_error() {
    let kernel = Kernel::new(1, 16);
    let rings = kernel.rings();
    let first = (0..1000).find(|_| rings.serve_full(0).is_err()).expect("an end");
    assert!(first > 1, "another thread may have been faster");
    assert!(rings.serve_full(1).is_err(), "no such vCPU");
}

#[test]
fn no_write_is_lost_while_vcpus_and_the_migration_sync_at_once() {
    const WRITES: u64 = 60_000;
    let kernel = Kernel::new(2, 16);
    let rings = kernel.rings();
    let memory: Vec<AtomicU64> = (0..FOLLOWED).map(|_| AtomicU64::new(0)).collect();
    // As a migration does, pages are read once they have been told.
    let mut copy = vec![0; FOLLOWED as usize];
    let deadline = Instant::now() + Duration::from_secs(60);
    thread::scope(|scope| {
        let (kernel, rings, memory) = (&kernel, &rings, &memory);
        let vcpu = |vcpu: usize| {
            move || {
                let mut random = 0x9e37_79b9_7f4a_7c15_u64 + vcpu as u64;
                for count in 1..=WRITES {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // Each has pages of its own, so that a page's last value is known.
                    let nth = (random >> 33) % (FOLLOWED / 2) * 2 + vcpu as u64;
                    while !kernel
                        .store(vcpu, nth, || memory[nth as usize].store(count, Ordering::SeqCst))
                    {
                        rings.serve_full(vcpu).expect("served");
                    }
                }
            }
        };
        let vcpus = [scope.spawn(vcpu(0)), scope.spawn(vcpu(1))];
        loop {
            let last = vcpus.iter().all(thread::ScopedJoinHandle::is_finished);
            rings.drain_early().expect("drained");
            let mut dirty = DirtyBitmap::new(PAGES);
            rings.sync(&mut dirty).expect("sync");
            for nth in (0..FOLLOWED).filter(|nth| dirty.contains(page(*nth))) {
                copy[nth as usize] = memory[nth as usize].load(Ordering::SeqCst);
            }
            if last {
                break;
            }
            assert!(Instant::now() < deadline, "two vCPUs are not done yet");
        }
    });
    let now: Vec<u64> = memory.iter().map(|page| page.load(Ordering::SeqCst)).collect();
    assert_eq!(copy, now);
}
