//! What a scattered 4 KiB page costs in the RDMA link itself, on one thread: checks, keys, credits, work
//! requests and completions, with a device that has done everything as soon as it is told.
//!
//! ```text
//! rdma_page_cost [LANES] [PAGES]
//! ```
//!
//! Prints nanoseconds a page, the best and the median of nine passes: 83 is what 400 Gb/s leaves.

use pageferry_transport::rdma::{RdmaInitiator, RdmaOptions};
use pageferry_transport::{
    Initiator, MemoryRegion, RemoteAddr, RemoteKey, RemoteRegion, WorkId, WorkRequest,
};
use std::time::Instant;

const PAGE_BYTES: usize = 4096;
/// What the engine's pump hands over at a time.
const BATCH: usize = 256;
const PASSES: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let lanes = arguments.next().map_or(Ok(2), |text| text.parse())?;
    let pages: usize = arguments.next().map_or(Ok(1 << 18), |text| text.parse())?;
    let len = 2 * pages * PAGE_BYTES;
    // Never touched: nothing reads it.
    let source = MemoryRegion::anonymous(len)?;
    let remote = RemoteRegion { base: 1 << 32, len: len as u64, key: RemoteKey(0) };
    let mut initiator = RdmaInitiator::without_device(lanes, &[remote], &RdmaOptions::default())?;
    initiator.register(&source)?;
    initiator.expect(&source, std::slice::from_ref(&(0..len)))?;
    let requests = (0..pages)
        .map(|page| {
            // Every other page, so that none can be merged.
            let offset = 2 * page * PAGE_BYTES;
            let remote = RemoteAddr { key: remote.key, addr: remote.base + offset as u64 };
            Ok(WorkRequest { id: WorkId(page as u64), local: source.slice(offset, PAGE_BYTES)?, remote })
        })
        .collect::<Result<Vec<_>, pageferry_transport::Error>>()?;
    let mut passes = Vec::new();
    let mut out = Vec::with_capacity(4 * BATCH);
    for _ in 0..=PASSES {
        let (begun, mut done) = (Instant::now(), 0);
        for batch in requests.chunks(BATCH) {
            let mut rest = batch;
            while !rest.is_empty() {
                let accepted = initiator.post(rest)?;
                rest = &rest[accepted..];
                if accepted == 0 {
                    done += initiator.poll(&mut out, Instant::now() + std::time::Duration::from_secs(10))?;
                    out.clear();
                }
            }
        }
        while done < pages {
            done += initiator.poll(&mut out, Instant::now())?;
            out.clear();
        }
        passes.push(begun.elapsed().as_nanos() as f64 / pages as f64);
    }
    // The first is for the registrar and the caches.
    passes.remove(0);
    passes.sort_by(f64::total_cmp);
    println!("{lanes} lanes: {:.1} ns a page at best, {:.1} in the middle", passes[0], passes[PASSES / 2]);
    Ok(())
}
