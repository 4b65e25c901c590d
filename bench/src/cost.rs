//! What a page costs on our side of the NIC: from the dirty set through the pump, the link's
//! checks, keys, credits and work requests to completions and the last fence, on one thread. The
//! device is one that has done everything as soon as it is told.
//!
//! Scattered is every second page, so nothing can be merged; contiguous is every page, merged into
//! writes of a stripe. The first round looks at each page once to see whether it is zero (here it
//! never is, which its first word says); later rounds do not, for these pages were sent before.
//!
//! Two rows more are of the way into the dirty set where KVM's rings fill it ([`ring`]).

pub mod ring;

use crate::progress::Progress;
use crate::record::{Record, Spec};
use anyhow::{Context, Result, anyhow, ensure};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::source::pump::Pump;
use pageferry_transport::rdma::{RdmaInitiator, RdmaOptions};
use pageferry_transport::{
    Initiator, MemoryRegion, RemoteAddr, RemoteKey, RemoteRegion, STRIPE_BYTES, WorkId, WorkRequest,
};
use serde::Serialize;
use std::fmt;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// What a page may cost: 400 Gb/s carry one every 83 ns.
pub const PAGE_NS_MAX: f64 = 83.0;

/// Guest memory while instructions are counted, which takes long.
const COUNTED_MIB: u32 = 64;

/// For a link whose device needs no time at all.
const READY_MAX: Duration = Duration::from_secs(20);

/// What is measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CostOptions {
    /// Repetitions of each row.
    pub repeat: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Whether valgrind counts instructions, in runs of their own.
    pub instructions: bool,
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// From the dirty set to the device.
    Push(Push),
    /// From KVM's ring to the dirty set.
    Ring {
        /// Whether pages come in no order.
        scattered: bool,
    },
}

/// A round that is pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Push {
    scattered: bool,
    first: bool,
    lanes: usize,
}

impl Row {
    fn all() -> Vec<Self> {
        let with =
            |(scattered, first)| [1, 4].map(|lanes| Self::Push(Push { scattered, first, lanes }));
        let pushed =
            [(true, false), (true, true), (false, false), (false, true)].into_iter().flat_map(with);
        pushed.chain([true, false].map(|scattered| Self::Ring { scattered })).collect()
    }
}

impl Push {
    fn dirty(self, pages: u64) -> DirtyBitmap {
        if self.scattered {
            crate::memory::every_second(pages, 1)
        } else {
            crate::memory::every(pages)
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Push(Push { scattered, first, lanes }) => {
                let pages = if *scattered { "scattered" } else { "contiguous" };
                let round = if *first { "first" } else { "later" };
                write!(f, "{pages}-{round}-{lanes}")
            }
            Self::Ring { scattered: true } => f.write_str("ring-scattered"),
            Self::Ring { scattered: false } => f.write_str("ring-sequential"),
        }
    }
}

impl FromStr for Row {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let row = Self::all().into_iter().find(|row| row.to_string() == name);
        row.ok_or_else(|| format!("there is no row {name}"))
    }
}

/// Of all pages of a round.
const PAGE: Spec = Spec::headline("page", "ns");
const INSTRUCTIONS: Spec = Spec::headline("instructions a page", "");

/// Measures every row in turns, the order rotating, or until `progress` hears of an interruption.
pub fn run(options: CostOptions, progress: &Progress) -> Result<Record> {
    let guest = Guest::new(options.memory_mib)?;
    let title =
        format!("a page on our side of the NIC, {} MiB of guest memory", options.memory_mib);
    let mut record = Record::begin("cost", title, &options)?;
    record.notes = notes();
    let rows = Row::all();
    progress.expect(u64::from(options.repeat) * rows.len() as u64);
    if options.instructions {
        for row in &rows {
            record.sample(&row.to_string(), INSTRUCTIONS, 0, instructions(*row)?);
        }
    }
    'turns: for turn in 0..options.repeat {
        for place in 0..rows.len() {
            if progress.is_interrupted() {
                record.interrupted = true;
                break 'turns;
            }
            let row = rows[(place + turn as usize) % rows.len()];
            let name = row.to_string();
            progress.say(&name);
            match guest.round(row) {
                Ok((pages, ns)) => record.sample(&name, PAGE, turn, ns / pages as f64),
                Err(e) => record.fail(&name, turn, format!("{e:#}")),
            }
            progress.step();
        }
    }
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

fn notes() -> Vec<String> {
    vec![
        "Rows are named by pages, round and lanes. Scattered is every second page, contiguous is every page; the first round          looks at each page once to see whether it is zero. The device is one that has done everything as soon as it is told. The          rows of the ring are of the way from KVM's ring to the dirty set."
            .into(),
        format!(
            "At most {PAGE_NS_MAX} ns for a scattered page, which is when 400 Gb/s carry the next one, and {} ns for the ring's.",
            ring::PAGE_NS_MAX
        ),
        "Instructions are those that callgrind counts, with 64 MiB; they do not depend on noise.".into(),
    ]
}

/// One repetition; returns the number of pages.
pub fn once(row: Row, memory_mib: u32) -> Result<u64> {
    Ok(Guest::new(memory_mib)?.round(row)?.0)
}

/// Memory that was written, like a guest's.
struct Guest {
    memory: GuestMemory,
    remote: RemoteRegion,
}

impl Guest {
    fn new(memory_mib: u32) -> Result<Self> {
        let memory = crate::memory::written(memory_mib)?;
        let bytes = memory.bytes();
        let remote = RemoteRegion { base: 8 * STRIPE_BYTES, len: bytes, key: RemoteKey(0) };
        Ok(Self { memory, remote })
    }

    /// Takes the row's pages their way once; returns their number and the nanoseconds that it took.
    fn round(&self, row: Row) -> Result<(u64, f64)> {
        match row {
            Row::Push(push) => self.push(push),
            Row::Ring { scattered } => ring::sync(scattered, self.memory.pages()),
        }
    }

    fn push(&self, row: Push) -> Result<(u64, f64)> {
        let mut link =
            RdmaInitiator::without_device(row.lanes, &[self.remote], &RdmaOptions::default())?;
        let region = self.memory.slots()[0].region();
        link.register(region)?;
        link.expect(region, std::slice::from_ref(&(0..region.len())))?;
        self.wait_until_ready(&mut link)?;
        let state = (MemoryRegion::anonymous(PAGE_BYTES as usize)?, self.remote);
        let mut pump = Pump::new(&mut link, &self.memory, vec![self.remote], state, None);
        if !row.first {
            transfer(&mut pump, &mut row.dirty(self.memory.pages()))?;
        }
        timed(&mut pump, &mut row.dirty(self.memory.pages()))
    }

    /// Until every stripe can be posted from: as in a migration, where that is done ahead of the
    /// data.
    fn wait_until_ready(&self, link: &mut RdmaInitiator) -> Result<()> {
        let region = self.memory.slots()[0].region();
        let deadline = Instant::now() + READY_MAX;
        let (mut stripes, mut done, mut out) = (0, 0, Vec::new());
        for offset in (0..region.len()).step_by(STRIPE_BYTES as usize) {
            let write = WorkRequest {
                id: WorkId(0),
                local: region.slice(offset, PAGE_BYTES as usize)?,
                remote: RemoteAddr { key: self.remote.key, addr: self.remote.base + offset as u64 },
            };
            while link.post(std::slice::from_ref(&write))? == 0 {
                done += link.poll(&mut out, deadline)?;
                ensure!(Instant::now() < deadline, "the link was not ready within {READY_MAX:?}");
            }
            stripes += 1;
        }
        while done < stripes {
            done += link.poll(&mut out, deadline)?;
            ensure!(
                Instant::now() < deadline,
                "the link did not complete a write within {READY_MAX:?}"
            );
        }
        Ok(())
    }
}

fn timed(pump: &mut Pump<'_>, dirty: &mut DirtyBitmap) -> Result<(u64, f64)> {
    let wanted = dirty.count();
    let start = Instant::now();
    let pages = counted_transfer(pump, dirty)?;
    let ns = start.elapsed().as_nanos() as f64;
    ensure!(pages == wanted && dirty.is_empty(), "{pages} pages of {wanted} were pushed");
    Ok((pages, ns))
}

/// What valgrind counts: it finds the function by its name.
#[inline(never)]
fn counted_transfer(pump: &mut Pump<'_>, dirty: &mut DirtyBitmap) -> Result<u64> {
    transfer(pump, dirty)
}

/// A round as the engine does it, and every completion taken.
fn transfer(pump: &mut Pump<'_>, dirty: &mut DirtyBitmap) -> Result<u64> {
    let pages = pump.push(dirty, &mut || Ok(()), &mut |_| {})?;
    let tag = pump.fence()?;
    pump.wait_fence(tag, &mut || Ok(()))?;
    Ok(pages)
}

/// Instructions a page, of one repetition under valgrind.
fn instructions(row: Row) -> Result<f64> {
    let (row, memory) = (row.to_string(), COUNTED_MIB.to_string());
    let said = Command::new("valgrind")
        .args([
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            "--toggle-collect=*counted_transfer*",
        ])
        .arg(std::env::current_exe()?)
        .args(["cost", "--once", &row, "--memory", &memory])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| {
            anyhow!("valgrind cannot be started ({e}): install it, or leave out --instructions")
        })?;
    let (stdout, stderr) =
        (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    ensure!(said.status.success(), "{row} under valgrind: {}: {stderr}", said.status);
    collected(&stdout, &stderr)
        .with_context(|| format!("{row} under valgrind said {stdout:?} and {stderr:?}"))
}

/// From what [`once`] and valgrind say.
fn collected(stdout: &str, stderr: &str) -> Option<f64> {
    let pages: u64 = stdout.trim().strip_suffix(" pages")?.parse().ok()?;
    let (_, count) = stderr.lines().find_map(|line| line.split_once("Collected : "))?;
    let count: u64 = count.trim().parse().ok()?;
    (pages > 0 && count > 0).then(|| count as f64 / pages as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_names_that_are_their_own() {
        for row in Row::all() {
            assert_eq!(row.to_string().parse(), Ok(row));
        }
        assert!("scattered-later-2".parse::<Row>().is_err());
    }

    #[test]
    fn valgrinds_count_is_divided_by_the_pages() {
        let said =
            "==7== Callgrind, a call-graph generating profiler\n==7== \n==7== Collected : 8192\n";
        assert_eq!(collected("64 pages\n", said), Some(128.0));
        for (stdout, stderr) in
            [("", said), ("0 pages\n", said), ("64 pages\n", ""), ("64 pages", "Collected : 0")]
        {
            assert_eq!(collected(stdout, stderr), None);
        }
    }
}
