//! The memory of a machine: its files, and its slots in KVM.

use crate::boot::layout::layout;
use crate::config::{HUGE_PAGE_BYTES, MachineConfig};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use pageferry_engine::dirty::kvm::{KvmSlot, KvmSlots};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::memory::{GuestMemory, SlotSource};
use pageferry_transport::sealed_memfd;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use std::fs::File;
use std::sync::Arc;

/// Memory files of the machine, mapped.
pub(crate) fn allocate(config: &MachineConfig) -> Result<GuestMemory> {
    let mut sources = Vec::new();
    for (index, (_, bytes)) in layout(config.memory_bytes).into_iter().enumerate() {
        let name = ["low", "high"][index.min(1)];
        let mut flags = MemfdFlags::empty();
        if config.huge_pages {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let file = sealed_memfd(&format!("pageferry-{name}"), flags, bytes)
            .map_err(|e| memory_error(config, e))?;
        sources.push(SlotSource {
            name: name.into(),
            file: File::from(file),
            file_offset: 0,
            bytes,
            backing_page_bytes: if config.huge_pages { HUGE_PAGE_BYTES } else { PAGE_BYTES },
            process_address: 0,
        });
    }
    GuestMemory::map_for_machine(sources).map_err(|e| match e {
        Error::LocalTransport(e) if config.huge_pages => Error::refused(format!(
            "this host has not set aside {} huge pages of 2 MiB ({}): echo {0} > /proc/sys/vm/nr_hugepages",
            config.memory_bytes / HUGE_PAGE_BYTES,
            Error::from(e).chain()
        )),
        e => e,
    })
}

fn memory_error(config: &MachineConfig, e: Errno) -> Error {
    Error::os(format!("allocating {} MiB for the guest", config.memory_bytes >> 20), e)
}

/// Makes the memory KVM's.
pub(crate) fn register(
    vm: &Arc<VmFd>,
    memory: &Arc<GuestMemory>,
    config: &MachineConfig,
) -> Result<KvmSlots> {
    let mut slots = Vec::new();
    for (number, (slot, (guest_address, bytes))) in
        (0..).zip(memory.slots().iter().zip(layout(config.memory_bytes)))
    {
        let host_address = slot.region().as_ptr() as u64;
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: guest_address,
            memory_size: bytes,
            userspace_addr: host_address,
        };
        // SAFETY: the region is this long, shared, and mapped for as long as the machine has it.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|e| Error::os("giving the guest its memory", e))?;
        slots.push(KvmSlot {
            slot: number,
            guest_address,
            bytes,
            host_address,
            first_page: slot.first_page,
        });
    }
    // SAFETY: these are the slots as they were just registered, and the machine keeps memory and
    // slots together.
    unsafe { KvmSlots::new(Arc::clone(vm), slots) }
}
