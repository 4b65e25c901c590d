//! The link as a migration uses it: the pump takes runs out of a dirty set, posts them, and sends a
//! fence at the end, which the target waits for.

use super::{RdmaBenchOptions, TRANSFER_MAX};
use crate::memory;
use crate::watch::{Sample, Watch};
use anyhow::{Result, ensure};
use pageferry_engine::memory::page::{PAGE_BYTES, PageRun};
use pageferry_engine::source::pump::Pump;
use pageferry_transport::preamble::Token;
use pageferry_transport::rdma::{Path, RdmaInitiator, RdmaListener, RdmaOptions, RdmaTarget};
use pageferry_transport::{Initiator, MemoryRegion, Target};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For all lanes to be connected, in a machine that may be emulated.
const CONNECT_MAX: Duration = Duration::from_secs(20);

/// Both ends are ours, and nobody else knows the port.
const TOKEN: Token = Token([7; 16]);

/// The way that the link takes, or one line that says why there is none.
pub(super) fn path(options: &RdmaBenchOptions) -> Result<Path> {
    Ok(connect(options)?.0.path().clone())
}

fn connect(options: &RdmaBenchOptions) -> Result<(RdmaInitiator, RdmaTarget)> {
    let (deadline, how) = (Instant::now() + CONNECT_MAX, RdmaOptions::default());
    let listener = RdmaListener::bind(options.to, TOKEN, options.lanes, &how)?;
    let to = SocketAddr::new(options.to, listener.port());
    let initiator =
        RdmaInitiator::connect(to, Some(options.from), TOKEN, options.lanes, &how, deadline)?;
    Ok((initiator, listener.into_target(deadline)?))
}

pub(super) fn run(options: &RdmaBenchOptions, size: u64) -> Result<Sample> {
    let (mut initiator, mut target) = connect(options)?;
    let memory = memory::written(options.memory_mib)?;
    let source = memory.slots()[0].region();
    let destination = MemoryRegion::anonymous(source.len())?;
    let remote = target.expose(&destination)?;
    initiator.register(source)?;
    let all = 0..source.len();
    target.expect(&destination, std::slice::from_ref(&all))?;
    initiator.expect(source, std::slice::from_ref(&all))?;

    let deadline = Instant::now() + TRANSFER_MAX;
    let runs = memory::every_second(memory.pages(), size / PAGE_BYTES);
    let in_time = &mut || match Instant::now() < deadline {
        true => Ok(()),
        false => Err(pageferry_engine::Error::Timeout {
            what: format!("{TRANSFER_MAX:?} for one transfer"),
        }),
    };
    let state = (Arc::clone(source), remote);
    let mut pump = Pump::new(&mut initiator, &memory, vec![remote], state, None);
    // Afterwards everything is registered, and no page is looked at for zeros.
    pump.push(&mut memory::every(memory.pages()), in_time, &mut |_| {})?;
    let tag = pump.fence()?;
    pump.wait_fence(tag, in_time)?;

    let wanted = options.writes(size) * size / PAGE_BYTES;
    let mut left = wanted;
    let watch = Watch::start()?;
    while left > 0 {
        let mut dirty = runs.clone();
        if left < dirty.count() {
            dirty.remove(PageRun::between(2 * left, memory.pages()));
        }
        left -= pump.push(&mut dirty, in_time, &mut |_| {})?;
    }
    let tag = pump.fence()?;
    target.wait_fence(tag, deadline)?;
    let sample = watch.stop(wanted * PAGE_BYTES, None)?;
    pump.wait_fence(tag, in_time)?;
    drop(pump);
    let mut ends = [[0; 8]; 2];
    for (region, end) in [source, &destination].into_iter().zip(&mut ends) {
        region.read(region.len() - PAGE_BYTES as usize, end)?;
    }
    ensure!(ends[0] == ends[1], "the last page did not arrive");
    Ok(sample)
}
