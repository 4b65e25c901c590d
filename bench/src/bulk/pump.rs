//! The raw pump: as many connections as lanes, a thread at each end, 1 MiB a call, over as much
//! memory as the link has.

use super::{BulkOptions, TRANSFER_MAX, streams};
use crate::watch::{Sample, Watch};
use anyhow::{Context, Result, anyhow};
use std::io::{Read, Write};
use std::ops::Range;

/// What is sent and received at a time.
pub(super) const CALL_BYTES: usize = 1 << 20;

pub(super) fn run(options: &BulkOptions, lanes: usize) -> Result<Sample> {
    let (here, there) = streams(lanes)?;
    for stream in here.iter().chain(&there) {
        stream.set_write_timeout(Some(TRANSFER_MAX))?;
        stream.set_read_timeout(Some(TRANSFER_MAX))?;
    }
    let calls = (options.total_bytes / lanes as u64).div_ceil(CALL_BYTES as u64);
    let slots = (options.region_bytes / lanes / CALL_BYTES).max(1);
    let slot = |call: u64| -> Range<usize> {
        let start = (call as usize % slots) * CALL_BYTES;
        start..start + CALL_BYTES
    };
    // Touched before the clock starts, as the link's regions are.
    let buffer = || vec![1u8; slots * CALL_BYTES];
    let mut buffers: Vec<_> = (0..lanes).map(|_| (buffer(), buffer())).collect();
    let watch = Watch::start()?;
    std::thread::scope(|scope| {
        let mut ends = Vec::new();
        for ((mut here, mut there), (from, into)) in here.into_iter().zip(there).zip(&mut buffers) {
            ends.push(
                scope.spawn(move || {
                    (0..calls).try_for_each(|call| here.write_all(&from[slot(call)]))
                }),
            );
            ends.push(scope.spawn(move || {
                (0..calls).try_for_each(|call| there.read_exact(&mut into[slot(call)]))
            }));
        }
        for end in ends {
            end.join()
                .map_err(|_| anyhow!("a thread of the raw pump panicked"))?
                .context("the raw pump")?;
        }
        anyhow::Ok(())
    })?;
    watch.stop(calls * lanes as u64 * CALL_BYTES as u64, None)
}
