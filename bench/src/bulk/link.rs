//! The TCP link as the engine uses it: writes posted in batches, a fence at the end, which the
//! target waits for.

use super::{BulkOptions, Scatter, TRANSFER_MAX, Writes, streams};
use crate::stats::random::Random;
use crate::watch::{Sample, Watch};
use anyhow::{Result, ensure};
use pageferry_transport::tcp::{TcpInitiator, TcpOptions, TcpTarget, ZeroCopy};
use pageferry_transport::{
    Completion, FenceTag, Initiator, MemoryRegion, RemoteAddr, Target, WorkId, WorkRequest,
};
use std::time::Instant;

/// Writes offered to the link at a time.
const BATCH: usize = 1024;
/// The order of scattered writes is the same in every run.
const SEED: u64 = 20_260_101;

pub(super) fn run(
    options: &BulkOptions,
    lanes: usize,
    shape: Writes,
    zero_copy: ZeroCopy,
) -> Result<Sample> {
    let (here, there) = streams(lanes)?;
    let mut initiator = TcpInitiator::new(here, TcpOptions { zero_copy, ..TcpOptions::default() })?;
    let mut target = TcpTarget::new(there)?;
    let source = MemoryRegion::anonymous(options.region_bytes)?;
    let destination = MemoryRegion::anonymous(options.region_bytes)?;
    for region in [&source, &destination] {
        region.populate(0, options.region_bytes)?;
    }
    initiator.register(&source)?;
    let remote = target.expose(&destination)?;

    let step = if shape.scatter == Scatter::None { shape.bytes } else { 2 * shape.bytes };
    let mut places: Vec<usize> = (0..options.region_bytes / step).collect();
    if shape.scatter == Scatter::Random {
        let mut random = Random::new(SEED);
        (1..places.len()).rev().for_each(|last| places.swap(last, random.below(last + 1)));
    }
    let writes: Vec<_> = places
        .into_iter()
        .map(|index| {
            let offset = index * step;
            Ok(WorkRequest {
                id: WorkId(index as u64),
                local: source.slice(offset, shape.bytes)?,
                remote: RemoteAddr { key: remote.key, addr: remote.base + offset as u64 },
            })
        })
        .collect::<Result<_>>()?;

    let deadline = Instant::now() + TRANSFER_MAX;
    let mut out = Vec::new();
    let (mut posted, mut done, mut next) = (0u64, 0u64, 0);
    let watch = Watch::start()?;
    while posted * (shape.bytes as u64) < options.total_bytes {
        let accepted = initiator.post(&writes[next..writes.len().min(next + BATCH)])?;
        posted += accepted as u64;
        next = (next + accepted) % writes.len();
        if accepted == 0 {
            done += wait(&mut initiator, &mut out, deadline)?;
            out.clear();
        }
    }
    initiator.fence(FenceTag(1))?;
    target.wait_fence(FenceTag(1), deadline)?;
    let sample = watch.stop(posted * shape.bytes as u64, None)?;
    // The fence is one completion more.
    while done <= posted {
        done += wait(&mut initiator, &mut out, deadline)?;
    }
    ensure!(out.contains(&Completion::Fence(FenceTag(1))), "the link lost a fence");
    Ok(sample)
}

fn wait(initiator: &mut TcpInitiator, out: &mut Vec<Completion>, deadline: Instant) -> Result<u64> {
    let done = initiator.poll(out, deadline)?;
    ensure!(done > 0, "the link did not move its bytes within {TRANSFER_MAX:?}");
    Ok(done as u64)
}
