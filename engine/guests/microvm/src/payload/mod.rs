//! The payload guest: a few hundred bytes of our own that write memory and keep a ledger of it. It
//! needs no kernel, boots at once, and finds out by itself if a page of it was lost, torn, or put
//! back.
//!
//! ```text
//!   0x0000_7000  the program                     0x0011_0000  ledger of vCPU 0, of vCPU 1, ...
//!   0x0010_0000  block of vCPU 0, a page each    at the end   data: share of vCPU 0, of vCPU 1, ...
//! ```
//!
//! All words of a page are one number, made of the page's address and generation, and the ledger
//! has the generation of each page. The program checks a page before it writes the next generation.
//! That data and ledger went back together is found by [`PayloadPlan::check`]: each vCPU counts in
//! a register what its ledger must add up to.

pub mod code;

use crate::boot::layout::{BOOT_PARAMS, HIGH_START, LOW_BYTES_MAX, SECOND_RAM};
use crate::boot::long_mode::{Entry, long_mode};
use code::{GENERATION_FACTOR, PAGE_FACTOR, block};
use kvm_bindings::{kvm_regs, kvm_sregs};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::page::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The program lies where a kernel would have its boot parameters.
const CODE: u64 = BOOT_PARAMS;
const BLOCKS: u64 = SECOND_RAM;
/// Room for the blocks of as many vCPUs as can be.
const LEDGER: u64 = BLOCKS + 16 * PAGE_BYTES;
/// One page in so many is hot in the pattern of that name.
const HOT_ONE_IN: u64 = 16;

/// Where a payload guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// One page after the other, over and over.
    Sequential,
    /// Any page.
    #[default]
    Random,
    /// Any page, but seven times in eight one of a sixteenth of them.
    HotCold,
}

/// What a payload guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PayloadOptions {
    /// Where it writes.
    pub pattern: Pattern,
    /// Pages that each vCPU writes in a second; `None` is as fast as it can.
    pub pages_per_second: Option<u64>,
    /// Pages that it writes at all, of all vCPUs; `None` is all of memory.
    pub working_set_pages: Option<u64>,
    /// Seed of what is written where.
    pub seed: u64,
}

/// What a payload guest knows of itself when it is paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LedgerReport {
    /// Pages written since it was born, by each vCPU.
    pub pages_written: Vec<u64>,
    /// The longest gap that each vCPU has seen between two readings of its time-stamp counter, in
    /// ticks.
    pub gap_ticks_max: Vec<u64>,
}

/// A vCPU's share of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    /// Guest address of its block.
    block: u64,
    /// Guest address of its ledger.
    ledger: u64,
    /// Address of its first page on the line of all memory, that is without the hole.
    data: u64,
    pages: u64,
}

/// What lies where in a payload guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PayloadPlan {
    options: PayloadOptions,
    shares: Vec<Share>,
}

impl PayloadPlan {
    /// What the guest was asked to do.
    #[must_use]
    pub fn options(&self) -> PayloadOptions {
        self.options
    }

    /// For a guest of this much memory.
    pub fn new(options: PayloadOptions, memory_bytes: u64, vcpus: u32) -> Result<Self> {
        let vcpus = u64::from(vcpus);
        // A ledger of 4 bytes a page, in whole pages a vCPU.
        let room = memory_bytes.saturating_sub(LEDGER) / PAGE_BYTES;
        let fits = (room.saturating_sub(vcpus) * 1024 / 1025) / vcpus.max(1);
        let wanted = options.working_set_pages.map_or(fits, |pages| pages / vcpus.max(1));
        if wanted == 0 || wanted > fits || wanted > u64::from(u32::MAX) {
            return Err(Error::refused(format!(
                "a payload guest of {} MiB has room for {} pages that {vcpus} vCPUs can write; asked for are {}: give it more memory, or a smaller working set",
                memory_bytes >> 20,
                fits * vcpus,
                options.working_set_pages.unwrap_or(0)
            )));
        }
        let ledger_bytes = (wanted * 4).next_multiple_of(PAGE_BYTES);
        // At the end of memory, so that a small working set too is in what lies above 4 GiB.
        let data = memory_bytes - vcpus * wanted * PAGE_BYTES;
        let share = |vcpu: u64| Share {
            block: BLOCKS + vcpu * PAGE_BYTES,
            ledger: LEDGER + vcpu * ledger_bytes,
            data: data + vcpu * wanted * PAGE_BYTES,
            pages: wanted,
        };
        let plan = Self { options, shares: (0..vcpus).map(share).collect() };
        // Ledgers are not spread around the hole.
        if LEDGER + vcpus * ledger_bytes > LOW_BYTES_MAX {
            return Err(Error::refused("a payload guest has at most 2 TiB of memory"));
        }
        Ok(plan)
    }

    /// Writes program and blocks into memory that is all zeros.
    pub fn load(&self, memory: &GuestMemoryMmap, tsc_khz: u32) -> Result<()> {
        let failed =
            |e| Error::os("writing the payload guest into its memory", std::io::Error::other(e));
        memory.write_slice(code::code(), GuestAddress(CODE)).map_err(failed)?;
        let hz = u64::from(tsc_khz) * 1000;
        let interval = self.options.pages_per_second.map_or(0, |rate| (hz / rate.max(1)).max(1));
        for share in &self.shares {
            let put = |offset: usize, value: u64| {
                memory.write_obj(value, GuestAddress(share.block + offset as u64)).map_err(failed)
            };
            put(block::DATA, share.data)?;
            put(block::PAGES, share.pages)?;
            put(block::LEDGER, share.ledger)?;
            put(block::INTERVAL, interval)?;
            put(block::PATTERN, self.options.pattern as u64)?;
            put(block::HOT_PAGES, (share.pages / HOT_ONE_IN).max(1))?;
            put(block::HOLE, LOW_BYTES_MAX)?;
            put(block::HOLE_BYTES, HIGH_START - LOW_BYTES_MAX)?;
        }
        Ok(())
    }

    /// With what a vCPU begins.
    pub fn registers(
        &self,
        memory: &GuestMemoryMmap,
        vcpu: usize,
        sregs: &mut kvm_sregs,
    ) -> Result<kvm_regs> {
        long_mode(memory, sregs)?;
        let entry = Entry { rip: CODE, rsi: 0, rsp: 0 }.registers();
        let seed = self.options.seed.wrapping_add(vcpu as u64 + 1).wrapping_mul(PAGE_FACTOR);
        // A generator of this kind never leaves zero.
        Ok(kvm_regs {
            r15: self.shares[vcpu].block,
            r13: self.options.seed,
            r12: seed | 1,
            ..entry
        })
    }

    /// Compares all memory with the ledgers, and the ledgers with what the vCPUs, whose registers
    /// these are, have counted. The guest is paused.
    pub fn check(&self, memory: &GuestMemory, registers: &[kvm_regs]) -> Result<LedgerReport> {
        let mut report = LedgerReport { pages_written: Vec::new(), gap_ticks_max: Vec::new() };
        for (vcpu, (share, regs)) in self.shares.iter().zip(registers).enumerate() {
            let written = regs.r14;
            let sum = self.check_share(memory, vcpu, share, regs)?;
            // The ledger is written just before the count.
            if sum != written && sum != written + 1 {
                return Err(Error::Guest(format!(
                    "vCPU {vcpu} has written {written} pages, and its ledger has {sum}: pages went back together with their ledger"
                )));
            }
            report.pages_written.push(written);
            report.gap_ticks_max.push(read_u64(memory, share.block + block::GAP_MAX as u64)?);
        }
        Ok(report)
    }

    /// The longest gap that each vCPU has seen since it last began to look for one, in ticks. The
    /// guest may run.
    pub fn gap_ticks_max(&self, memory: &GuestMemory) -> Result<Vec<u64>> {
        self.shares
            .iter()
            .map(|share| read_u64(memory, share.block + block::GAP_MAX as u64))
            .collect()
    }

    /// When each vCPU last read its time-stamp counter, in ticks: one that runs does so after each
    /// page. The guest may run.
    pub fn last_ticks(&self, memory: &GuestMemory) -> Result<Vec<u64>> {
        self.shares.iter().map(|share| read_u64(memory, share.block + block::LAST as u64)).collect()
    }

    /// Begins to look for the longest gap anew. The guest may run, and is not tracked.
    pub fn forget_gaps(&self, memory: &GuestMemory) -> Result<()> {
        self.shares
            .iter()
            .try_for_each(|share| write_u64(memory, share.block + block::GAP_MAX as u64, 0))
    }

    /// Returns the sum of the generations.
    fn check_share(
        &self,
        memory: &GuestMemory,
        vcpu: usize,
        share: &Share,
        regs: &kvm_regs,
    ) -> Result<u64> {
        let mut ledger = vec![0; (share.pages * 4) as usize];
        read(memory, share.ledger, &mut ledger)?;
        let mut page = vec![0; PAGE_BYTES as usize];
        let mut sum = 0;
        for (index, generation) in ledger.chunks_exact(4).enumerate() {
            let generation = u32::from_le_bytes(generation.try_into().unwrap_or_default());
            sum += u64::from(generation);
            let at = share.data + index as u64 * PAGE_BYTES;
            read(memory, at, &mut page)?;
            let wanted = content(at, generation, self.options.seed);
            let next = content(at, generation.wrapping_add(1), self.options.seed);
            let words = || {
                page.chunks_exact(8)
                    .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            };
            // The page that the vCPU is at may be half written: new words, and then old ones.
            let begun = if regs.rbx == index as u64 {
                words().take_while(|word| *word == next).count()
            } else {
                0
            };
            if let Some((place, found)) =
                words().enumerate().skip(begun).find(|(_, word)| *word != wanted)
            {
                return Err(Error::Guest(format!(
                    "page {index} of vCPU {vcpu}, at {:#x} of the guest, is corrupt: word {place} is {found:#x}, and in generation {generation} it is {wanted:#x}",
                    guest_address(at)
                )));
            }
        }
        Ok(sum)
    }
}

/// Every word of a page.
fn content(line_address: u64, generation: u32, salt: u64) -> u64 {
    if generation == 0 {
        return 0;
    }
    (guest_address(line_address) ^ salt)
        .wrapping_mul(PAGE_FACTOR)
        .wrapping_add(u64::from(generation).wrapping_mul(GENERATION_FACTOR))
}

/// From the line of all memory to the guest's addresses: the hole lies between.
fn guest_address(line_address: u64) -> u64 {
    if line_address < LOW_BYTES_MAX {
        line_address
    } else {
        line_address + (HIGH_START - LOW_BYTES_MAX)
    }
}

fn read(memory: &GuestMemory, mut at: u64, mut out: &mut [u8]) -> Result<()> {
    while !out.is_empty() {
        let (slot, offset) = locate(memory, at)?;
        let region = memory.slots()[slot].region();
        let len = out.len().min(region.len() - offset as usize);
        let (now, later) = out.split_at_mut(len);
        region.read(offset as usize, now)?;
        (at, out) = (at + len as u64, later);
    }
    Ok(())
}

fn read_u64(memory: &GuestMemory, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    read(memory, at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn write_u64(memory: &GuestMemory, at: u64, value: u64) -> Result<()> {
    let (slot, offset) = locate(memory, at)?;
    Ok(memory.slots()[slot].region().write(offset as usize, &value.to_le_bytes())?)
}

/// The slot of an address on the line of all memory, and the offset in it.
fn locate(memory: &GuestMemory, at: u64) -> Result<(usize, u64)> {
    if at >= memory.bytes() {
        return Err(Error::Guest(format!(
            "the payload guest's plan reaches to {at:#x}, beyond its memory"
        )));
    }
    let (slot, offset) = memory.locate(at / PAGE_BYTES);
    Ok((slot, offset + at % PAGE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(memory_bytes: u64, vcpus: u32) -> PayloadPlan {
        PayloadPlan::new(PayloadOptions::default(), memory_bytes, vcpus).unwrap()
    }

    #[test]
    fn shares_do_not_overlap_and_fill_the_memory() {
        for (bytes, vcpus) in [(2 << 20, 1), (16 << 20, 3), (512 << 20, 8), (6 << 30, 4)] {
            let plan = plan(bytes, vcpus);
            let mut ends = LEDGER;
            for share in &plan.shares {
                assert!(share.ledger >= ends);
                ends = share.ledger + share.pages * 4;
            }
            for share in &plan.shares {
                assert!(share.data >= ends && share.data % PAGE_BYTES == 0);
                ends = share.data + share.pages * PAGE_BYTES;
            }
            assert!(
                ends <= bytes && bytes - ends < bytes / 20 + 16 * PAGE_BYTES,
                "{ends} of {bytes}"
            );
        }
    }

    #[test]
    fn a_guest_without_room_is_refused() {
        let options = PayloadOptions { working_set_pages: Some(1 << 20), ..Default::default() };
        for (options, bytes) in [(options, 64 << 20), (PayloadOptions::default(), 1 << 20)] {
            let error = PayloadPlan::new(options, bytes, 2).unwrap_err().chain();
            assert!(error.contains("give it more memory"), "{error}");
        }
    }

    #[test]
    fn the_hole_is_left_out() {
        assert_eq!(
            crate::boot::layout::layout(4 << 30),
            [(0, LOW_BYTES_MAX), (HIGH_START, 1 << 30)]
        );
        assert_eq!(guest_address(LOW_BYTES_MAX - 8), LOW_BYTES_MAX - 8);
        assert_eq!(guest_address(LOW_BYTES_MAX), HIGH_START);
    }
}
