//! Goodput of the RDMA link on this host's device, both ends in one process, for a comparison with
//! `ib_write_bw` in turns: the same device, message size and number of queue pairs.
//!
//! ```text
//! rdma_goodput ADDRESS [--lanes N] [--run BYTES] [--total BYTES] [--repeat N] [--region BYTES] [--to ADDRESS]
//! ```
//!
//! `--run` is the size of each write; less than a MiB leaves gaps between, as scattered pages do.
//! Everything is registered before the clock starts. Prints one line a repetition, in MB/s.

use pageferry_transport::preamble::Token;
use pageferry_transport::rdma::{RdmaInitiator, RdmaListener, RdmaOptions};
use pageferry_transport::{
    FenceTag, Initiator, MemoryRegion, RemoteAddr, STRIPE_BYTES, Target, WorkId, WorkRequest,
};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let here: IpAddr = arguments.next().ok_or("which address?")?.parse()?;
    let (mut lanes, mut run, mut total, mut repeat, mut region) =
        (1u8, 65536usize, 64u64 << 20, 3usize, 16usize << 20);
    let mut to = here;
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--lanes" => lanes = value.parse()?,
            "--run" => run = value.parse()?,
            "--total" => total = value.parse()?,
            "--repeat" => repeat = value.parse()?,
            "--region" => region = value.parse()?,
            "--to" => to = value.parse()?,
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    if run == 0 || run as u64 > STRIPE_BYTES || run > region {
        return Err(format!("--run is 1 to {STRIPE_BYTES}, and no more than --region").into());
    }
    let (token, options) = (Token([1; 16]), RdmaOptions::default());
    let deadline = Instant::now() + Duration::from_secs(600);
    let listener = RdmaListener::bind(to, token, lanes, &options)?;
    let address = SocketAddr::new(to, listener.port());
    let mut initiator = RdmaInitiator::connect(address, Some(here), token, lanes, &options, deadline)?;
    let mut target = listener.into_target(deadline)?;
    println!("{}", initiator.path());
    let source = MemoryRegion::anonymous(region)?;
    let destination = MemoryRegion::anonymous(region)?;
    initiator.register(&source)?;
    let remote = target.expose(&destination)?;
    initiator.expect(&source, std::slice::from_ref(&(0..region)))?;
    target.expect(&destination, std::slice::from_ref(&(0..region)))?;

    let step = if run < 1 << 20 { 2 * run } else { run };
    let writes: Vec<_> = (0..region / step)
        .map(|index| {
            Ok(WorkRequest {
                id: WorkId(index as u64),
                local: source.slice(index * step, run)?,
                remote: RemoteAddr { key: remote.key, addr: remote.base + (index * step) as u64 },
            })
        })
        .collect::<Result<_>>()?;
    // The first time round is for registration.
    push(&mut initiator, &mut target, &writes, writes.len() as u64, 1, deadline)?;
    for tag in 0..repeat {
        let count = (total / run as u64).max(1);
        let begun = Instant::now();
        push(&mut initiator, &mut target, &writes, count, 2 + u32::try_from(tag)?, deadline)?;
        let rate = (count * run as u64) as f64 / begun.elapsed().as_secs_f64() / 1e6;
        println!("{rate:.2} MB/s, {lanes} lanes, writes of {run} bytes");
    }
    Ok(())
}

/// Posts that many writes, and waits until they have arrived.
fn push(
    initiator: &mut RdmaInitiator,
    target: &mut impl Target,
    writes: &[WorkRequest],
    count: u64,
    tag: u32,
    deadline: Instant,
) -> Result<()> {
    let (mut posted, mut next, mut out) = (0, 0, Vec::new());
    while posted < count {
        let end = writes.len().min(next + 256).min(next + usize::try_from(count - posted)?);
        let accepted = initiator.post(&writes[next..end])?;
        posted += accepted as u64;
        next = (next + accepted) % writes.len();
        if accepted == 0 {
            initiator.poll(&mut out, deadline)?;
            out.clear();
        }
    }
    initiator.fence(FenceTag(tag))?;
    target.wait_fence(FenceTag(tag), deadline)?;
    Ok(())
}
