//! The memory of a synthetic guest.

use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{BlockDescription, GuestDescription};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::memory::{GuestMemory, SlotSource};
use pageferry_transport::{Access, MemoryRegion, sealed_memfd};
use rustix::fd::AsFd;
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::sync::Arc;

/// The guest's memory twice: as the guest has it mapped, and as the engine has.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    pub(crate) guest: Arc<MemoryRegion>,
    pub(crate) engine: Arc<GuestMemory>,
    pub(crate) file: Arc<File>,
}

impl Memory {
    pub(crate) fn new(pages: u64) -> Result<Self> {
        let file = sealed_memfd("pageferry-synthetic", MemfdFlags::empty(), pages * PAGE_BYTES)
            .map(File::from)
            .map_err(|e| Error::os("making a memfd", e))?;
        let guest = MemoryRegion::map_shared(
            file.as_fd(),
            0,
            (pages * PAGE_BYTES) as usize,
            Access::Write,
        )?;
        let again = file.try_clone().map_err(|e| Error::os("keeping a memfd", e))?;
        let slot = SlotSource {
            name: "synthetic".into(),
            file,
            file_offset: 0,
            bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
            process_address: guest.as_ptr() as u64,
        };
        Ok(Self {
            guest,
            engine: Arc::new(GuestMemory::map(vec![slot], Access::Write)?),
            file: Arc::new(again),
        })
    }
}

pub(crate) fn describe(memory: &GuestMemory) -> GuestDescription {
    let blocks = memory
        .slots()
        .iter()
        .map(|s| BlockDescription { name: s.name.clone(), bytes: s.region().len() as u64 });
    GuestDescription {
        monitor: "synthetic".into(),
        machine: "threads".into(),
        vcpus: 1,
        blocks: blocks.collect(),
        images: Vec::new(),
        platform: Vec::new(),
    }
}
