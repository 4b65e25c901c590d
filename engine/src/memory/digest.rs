//! A digest of all guest memory, by which both sides can tell that they hold the same bytes.

use crate::error::Result;
use crate::memory::GuestMemory;
use crate::memory::lost_page::Poisoned;
use crate::memory::page::PAGE_BYTES;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Bytes read at once: small enough to stay in a core's second-level cache.
const CHUNK_BYTES: usize = 256 << 10;

/// The wrapping sum of the XXH3-128 of every page that is not all zeros, seeded with its number. So
/// a hole and a page of zeros count alike, and only touched pages are read. The guest must be
/// stopped.
///
/// Fails if the hardware lost a page that was read before: what the other end holds of it cannot be
/// compared any more.
pub fn digest(memory: &GuestMemory) -> Result<u128> {
    let faults = memory.faults();
    let mut sum = 0u128;
    let mut chunk = vec![0u8; CHUNK_BYTES];
    for run in memory.touched()? {
        let (slot, offset) = memory.locate(run.first.0);
        let region = memory.slots()[slot].region();
        let mut done = 0;
        while done < run.bytes() {
            let len = (run.bytes() - done).min(CHUNK_BYTES as u64);
            let piece = &mut chunk[..len as usize];
            region.read((offset + done) as usize, piece)?;
            for (page, bytes) in
                (run.first.0 + done / PAGE_BYTES..).zip(piece.chunks(PAGE_BYTES as usize))
            {
                if bytes.iter().any(|b| *b != 0) {
                    sum = sum.wrapping_add(xxh3_128_with_seed(bytes, page));
                }
            }
            done += len;
        }
    }
    if memory.faults() != faults {
        memory.check_readable(Poisoned::Refuse)?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SlotSource;
    use pageferry_transport::Access;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::fs::File;

    fn memory(pages: u64) -> GuestMemory {
        let file = File::from(memfd_create("verify", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, pages * PAGE_BYTES).unwrap();
        let slot = SlotSource {
            name: "m".into(),
            file,
            file_offset: 0,
            bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
            process_address: 0,
        };
        GuestMemory::map(vec![slot], Access::Write).unwrap()
    }

    #[test]
    fn a_flipped_bit_a_swapped_page_and_a_lost_page_are_found_and_zeros_are_not() {
        let (a, b) = (memory(300), memory(300));
        let write = |m: &GuestMemory, page: u64, value: u8| {
            m.slots()[0].region().write((page * PAGE_BYTES) as usize, &[value]).unwrap()
        };
        for m in [&a, &b] {
            write(m, 3, 1);
            write(m, 200, 2);
        }
        assert_eq!(digest(&a).unwrap(), digest(&b).unwrap());
        write(&b, 77, 0); // touched, but zero
        assert_eq!(digest(&a).unwrap(), digest(&b).unwrap());
        write(&b, 3, 2);
        assert_ne!(digest(&a).unwrap(), digest(&b).unwrap());
        write(&b, 200, 1); // swapped
        assert_ne!(digest(&a).unwrap(), digest(&b).unwrap());
        write(&b, 3, 1);
        write(&b, 200, 0); // lost
        assert_ne!(digest(&a).unwrap(), digest(&b).unwrap());
    }
}
