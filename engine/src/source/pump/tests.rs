//! The pump over a link that takes writes in any order, and over one that has not registered
//! everything.

use super::*;
use crate::error::Error;
use crate::memory::SlotSource;
use crate::memory::staging::{STAGING_BYTES, place};
use pageferry_transport::loopback::{Faults, LoopbackInitiator, LoopbackTarget, pair};
use pageferry_transport::stripe::STRIPE_BYTES;
use pageferry_transport::work::{FenceTag, WorkRequest};
use pageferry_transport::{Access, Result as LinkResult, Target, TransportKind};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::ops::RangeInclusive;

/// Three stripes.
const PAGES: u64 = 3 * STRIPE_BYTES / PAGE_BYTES;
/// The one in the middle is not registered.
const UNREADY: RangeInclusive<u64> = 512..=1023;

/// Registers nothing that is not asked for, and counts what is.
struct Lazy {
    inner: LoopbackInitiator,
    unready: Option<(RemoteRegion, Vec<u64>)>,
    registrations: u64,
}

impl Lazy {
    fn covers(&self, write: &WorkRequest) -> bool {
        self.unready.as_ref().is_some_and(|(region, pages)| {
            let page = write.remote.addr.wrapping_sub(region.base) / PAGE_BYTES;
            region.key == write.remote.key && pages.contains(&page)
        })
    }
}

impl Initiator for Lazy {
    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }
    fn lanes(&self) -> usize {
        self.inner.lanes()
    }
    fn register(&mut self, region: &Arc<MemoryRegion>) -> LinkResult<()> {
        self.inner.register(region)
    }
    fn make_ready(&mut self, writes: &[WorkRequest]) -> LinkResult<bool> {
        let ready = !writes.iter().any(|write| self.covers(write));
        if !ready {
            (self.unready, self.registrations) = (None, self.registrations + 2);
        }
        Ok(ready)
    }
    fn is_ready(&mut self, write: &WorkRequest) -> LinkResult<bool> {
        Ok(!self.covers(write))
    }
    fn registrations(&self) -> u64 {
        self.registrations
    }
    fn post(&mut self, batch: &[WorkRequest]) -> LinkResult<usize> {
        self.make_ready(batch)?;
        self.inner.post(batch)
    }
    fn poll(&mut self, out: &mut Vec<Completion>, deadline: Instant) -> LinkResult<usize> {
        self.inner.poll(out, deadline)
    }
    fn fence(&mut self, tag: FenceTag) -> LinkResult<()> {
        self.inner.fence(tag)
    }
    fn last_fence(&mut self, tag: FenceTag) -> LinkResult<()> {
        self.inner.last_fence(tag)
    }
    fn bytes_on_wire(&self) -> u64 {
        self.inner.bytes_on_wire()
    }
}

fn memory() -> GuestMemory {
    let file = std::fs::File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, PAGES * PAGE_BYTES).unwrap();
    let slot = SlotSource {
        name: "ram".into(),
        file,
        file_offset: 0,
        bytes: PAGES * PAGE_BYTES,
        backing_page_bytes: PAGE_BYTES,
        process_address: 0,
    };
    GuestMemory::map(vec![slot], Access::Write).unwrap()
}

/// Both ends, with the guest's memory at both.
struct World {
    link: Lazy,
    target: LoopbackTarget,
    here: GuestMemory,
    there: GuestMemory,
    remote: RemoteRegion,
    state: (Arc<MemoryRegion>, RemoteRegion),
    staging: (Arc<MemoryRegion>, Arc<MemoryRegion>, RemoteRegion),
}

fn world(seed: u64, unready: RangeInclusive<u64>) -> World {
    let (mut inner, mut target) = pair(2, Faults { seed, relaxed: true, ..Faults::default() });
    let (here, there) = (memory(), memory());
    let state = MemoryRegion::anonymous(PAGE_BYTES as usize).unwrap();
    let staging = [(); 2].map(|()| MemoryRegion::anonymous(STAGING_BYTES).unwrap());
    for region in [here.slots()[0].region(), &state, &staging[0]] {
        inner.register(region).unwrap();
    }
    let remote = target.expose(there.slots()[0].region()).unwrap();
    let remote_state = target.expose(&MemoryRegion::anonymous(state.len()).unwrap()).unwrap();
    let remote_staging = target.expose(&staging[1]).unwrap();
    let [from, to] = staging;
    let unready = Some((remote, unready.collect()));
    let link = Lazy { inner, unready, registrations: 0 };
    World {
        link,
        target,
        here,
        there,
        remote,
        state: (state, remote_state),
        staging: (from, to, remote_staging),
    }
}

fn set(page: u64, memory: &GuestMemory, value: u64) {
    let word = value.to_le_bytes();
    memory.slots()[0].region().write((page * PAGE_BYTES) as usize, &word).unwrap();
}

fn get(page: u64, memory: &GuestMemory) -> u64 {
    let mut word = [0; 8];
    memory.slots()[0].region().read((page * PAGE_BYTES) as usize, &mut word).unwrap();
    u64::from_le_bytes(word)
}

fn pages(list: impl IntoIterator<Item = u64>) -> DirtyBitmap {
    let mut set = DirtyBitmap::new(PAGES);
    list.into_iter().for_each(|page| set.insert(PageRun::between(page, page + 1)));
    set
}

fn pump<'a>(
    link: &'a mut Lazy,
    here: &'a GuestMemory,
    remote: RemoteRegion,
    state: (Arc<MemoryRegion>, RemoteRegion),
) -> Pump<'a> {
    Pump::new(link, here, vec![remote], state, None)
}

/// Of a guest whose memory may be taken away.
fn followed<'a>(
    link: &'a mut Lazy,
    here: &'a GuestMemory,
    remote: RemoteRegion,
    state: (Arc<MemoryRegion>, RemoteRegion),
) -> Pump<'a> {
    pump(link, here, remote, state).with_witness(Some(Witness::new(here).unwrap()))
}

fn watch() -> Result<()> {
    Ok(())
}

/// Long enough for a loaded machine.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

#[test]
fn a_page_that_is_pushed_again_before_a_fence_is_the_last_that_was_pushed() {
    for seed in 0..40 {
        let World { mut link, mut target, here, there, remote, state, .. } = world(seed, UNREADY);
        let mut pump = pump(&mut link, &here, remote, state);
        for version in 1..6u64 {
            // Two rounds in turns, so that some pages come again at once and some do not.
            let list = [3, 4, 5, 600, 601, 1500 + version % 2];
            list.iter().for_each(|&page| set(page, &here, version * 10_000 + page));
            pump.push(&mut pages(list), &mut watch, &mut |_| {}).unwrap();
        }
        let tag = pump.fence().unwrap();
        target.wait_fence(tag, soon()).unwrap();
        for page in [3, 4, 5, 600, 601, 1500, 1501] {
            assert_eq!(get(page, &there), get(page, &here), "page {page}, seed {seed}");
        }
    }
}

#[test]
fn what_is_not_registered_when_the_guest_stands_still_is_staged_and_nothing_is_registered() {
    for seed in 0..20 {
        let World { mut link, mut target, here, there, remote, state, staging } =
            world(seed, UNREADY);
        let mut pump = pump(&mut link, &here, remote, state)
            .with_staging(Staging::new(Arc::clone(&staging.0), staging.2));
        pump.guest_paused();
        let list = [2, 511, 512, 513, 700, 1023, 1024];
        for version in 1..3u64 {
            list.iter().for_each(|&page| set(page, &here, version * 10_000 + page));
            pump.push(&mut pages(list), &mut watch, &mut |_| {}).unwrap();
        }
        let tag = pump.fence().unwrap();
        let staged = pump.staged();
        assert_eq!(staged.iter().map(|(page, _)| *page).collect::<Vec<_>>(), [512, 513, 700, 1023]);
        assert_eq!(pump.registrations_since(), 0);
        target.wait_fence(tag, soon()).unwrap();
        place(&staged, &staging.1, &there).unwrap();
        list.iter().for_each(|&page| assert_eq!(get(page, &there), 20_000 + page));
        for wrong in
            [(PAGES, 0), (0, (STAGING_BYTES as u64 / PAGE_BYTES) as u32), (u64::MAX, u32::MAX)]
        {
            assert!(matches!(place(&[wrong], &staging.1, &there), Err(Error::Protocol(_))));
        }
    }
}

#[test]
fn what_the_staging_region_has_no_room_for_is_registered_and_what_was_staged_of_it_is_not_placed() {
    let World { mut link, mut target, here, there, remote, state, staging } = world(1, UNREADY);
    let mut pump = pump(&mut link, &here, remote, state)
        .with_staging(Staging::new(Arc::clone(&staging.0), staging.2));
    pump.guest_paused();
    let slots = STAGING_BYTES as u64 / PAGE_BYTES;
    let mut version = 0;
    // Each turn takes a slot a page, until there are none.
    while version * 512 <= slots {
        version += 1;
        UNREADY.for_each(|page| set(page, &here, version * 10_000 + page));
        pump.push(&mut pages(UNREADY), &mut watch, &mut |_| {}).unwrap();
    }
    assert!(pump.registrations_since() > 0);
    let tag = pump.fence().unwrap();
    target.wait_fence(tag, soon()).unwrap();
    place(&pump.staged(), &staging.1, &there).unwrap();
    UNREADY.for_each(|page| assert_eq!(get(page, &there), version * 10_000 + page));
}

#[test]
fn memory_that_is_made_ready_ahead_is_not_staged() {
    let World { mut link, target: _target, here, remote, state, staging, .. } = world(1, UNREADY);
    let mut pump =
        pump(&mut link, &here, remote, state).with_staging(Staging::new(staging.0, staging.2));
    assert!(!pump.make_ready([PageRun::between(100, 600)], &mut watch).unwrap());
    assert!(pump.make_ready([PageRun::between(100, 600)], &mut watch).unwrap());
    pump.guest_paused();
    set(550, &here, 1);
    pump.push(&mut pages([550]), &mut watch, &mut |_| {}).unwrap();
    assert_eq!((pump.staged(), pump.registrations_since()), (Vec::new(), 0));
}

/// A balloon takes pages away after they were sent. One of them is only read since, which nothing
/// reports as a write.
#[test]
fn what_was_freed_arrives_as_the_guest_reads_it_and_is_not_allocated_again() {
    for seed in 0..10 {
        let World { mut link, mut target, here, there, remote, state, .. } = world(seed, UNREADY);
        // The guest's process has a mapping of its own.
        let guest = here.map_again(Access::Write).unwrap();
        let zeros = MemoryRegion::anonymous(STRIPE_BYTES as usize).unwrap();
        link.register(&zeros).unwrap();
        let mut pump = followed(&mut link, &here, remote, state);
        let list = [1, 2, 3, 4, 5];
        list.iter().for_each(|&page| set(page, &guest, 7));
        pump.push(&mut pages(list), &mut watch, &mut |_| {}).unwrap();
        let tag = pump.fence().unwrap();
        target.wait_fence(tag, soon()).unwrap();
        pump.wait_fence(tag, &mut watch).unwrap();

        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let file = here.slots()[0].file().unwrap();
        fallocate(&file, punch, 2 * PAGE_BYTES, 4 * PAGE_BYTES).unwrap();
        assert_eq!(get(3, &guest), 0);
        set(4, &guest, 9);
        // 5 was written before it was taken away.
        let mut dirty = pages([4, 5]);
        assert_eq!(pump.push_freed(&mut dirty, &zeros, &mut watch).unwrap(), 2, "2 and 5");
        assert_eq!(dirty, pages([3, 4]));
        pump.push(&mut dirty, &mut watch, &mut |_| {}).unwrap();
        let tag = pump.fence().unwrap();
        target.wait_fence(tag, soon()).unwrap();
        assert_eq!(list.map(|page| get(page, &there)), [7, 0, 0, 9, 0], "seed {seed}");
        assert_eq!(here.touched().unwrap(), [PageRun::between(1, 2), PageRun::between(3, 5)]);
    }
}

/// 5 is freed and only read since; then its neighbour is sent again, and whoever reads that maps 5
/// again beside it.
#[test]
fn a_page_that_came_back_as_zeros_is_sent_again_though_its_neighbour_was_read_since() {
    for seed in 0..10 {
        let World { mut link, mut target, here, there, remote, state, .. } = world(seed, UNREADY);
        let guest = here.map_again(Access::Write).unwrap();
        let zeros = MemoryRegion::anonymous(STRIPE_BYTES as usize).unwrap();
        link.register(&zeros).unwrap();
        let mut pump = followed(&mut link, &here, remote, state);
        [5, 6].iter().for_each(|&page| set(page, &guest, 7));
        let mut push = |pump: &mut Pump<'_>, mut dirty: DirtyBitmap| {
            pump.push(&mut dirty, &mut watch, &mut |_| {}).unwrap();
            let tag = pump.fence().unwrap();
            target.wait_fence(tag, soon()).unwrap();
            pump.wait_fence(tag, &mut watch).unwrap();
        };
        push(&mut pump, pages([5, 6]));
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(here.slots()[0].file().unwrap(), punch, 5 * PAGE_BYTES, 2 * PAGE_BYTES).unwrap();
        assert_eq!(get(5, &guest), 0);
        set(6, &guest, 9);
        push(&mut pump, pages([6]));
        let mut dirty = pages([]);
        assert_eq!(pump.push_freed(&mut dirty, &zeros, &mut watch).unwrap(), 0);
        assert!(dirty.contains(5), "seed {seed}");
        push(&mut pump, dirty);
        assert_eq!([5, 6].map(|page| get(page, &there)), [0, 9], "seed {seed}");
        // It is followed as any other from now on.
        assert_eq!(pump.push_freed(&mut pages([]), &zeros, &mut watch).unwrap(), 0);
        let mut dirty = pages([]);
        pump.push_freed(&mut dirty, &zeros, &mut watch).unwrap();
        assert_eq!(dirty, pages([]), "seed {seed}");
    }
}
