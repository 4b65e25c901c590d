//! Has KVM map a guest's pages before the guest is here, so that they cost it no fault after it has
//! come. The vCPUs of the machine that waits do it: they have nothing else to do (Linux 6.11,
//! KVM_PRE_FAULT_MEMORY, on processors with second-level page tables).

use super::vcpu::Vcpus;
use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use pageferry_engine::dirty::kvm::KvmSlots;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::page::{PAGE_BYTES, PageRun};
use pageferry_engine::memory::prefault::MapAhead;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// `_IOWR(0xae, 0xd5, struct kvm_pre_fault_memory)` (Linux, include/uapi/linux/kvm.h).
const KVM_PRE_FAULT_MEMORY: u64 = 0xc040_aed5;
const _: () = assert!(size_of::<kvm_pre_fault_memory>() == 0x40);
/// The kernel stops early for a signal, or for a page that is moved meanwhile, and says how far it
/// came.
const TRIES_MAX: u32 = 100;

/// For a machine of these slots and vCPUs; `None` if its KVM cannot.
pub fn map_ahead(slots: &Arc<KvmSlots>, vcpus: &Arc<Vcpus>) -> Option<MapAhead> {
    if slots.vm().check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
        return None;
    }
    let (slots, vcpus, turn) = (Arc::clone(slots), Arc::clone(vcpus), AtomicUsize::new(0));
    Some(Arc::new(move |run: PageRun| {
        let holds = |first: u64, pages: u64| (first..first + pages).contains(&run.first.0);
        let slot = slots.slots().iter().find(|slot| holds(slot.first_page, slot.pages()));
        let slot =
            slot.ok_or_else(|| Error::Guest(format!("page {} is in no slot", run.first.0)))?;
        let gpa = slot.guest_address + (run.first.0 - slot.first_page) * PAGE_BYTES;
        let vcpu = turn.fetch_add(1, Ordering::Relaxed) % vcpus.len();
        vcpus.ask(vcpu, move |vcpu| map(vcpu, gpa, run.bytes()))
    }))
}

fn map(vcpu: &VcpuFd, gpa: u64, size: u64) -> Result<()> {
    let mut rest = kvm_pre_fault_memory { gpa, size, ..Default::default() };
    for _ in 0..TRIES_MAX {
        // SAFETY: the argument lives through the call, and the kernel writes within it; the guest's
        // memory, which is what is mapped, is the machine's already.
        if unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut rest) } == 0 {
            if rest.size == 0 {
                return Ok(());
            }
            continue;
        }
        match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
            e => return Err(Error::os("mapping a guest's memory ahead", e)),
        }
    }
    Err(Error::Timeout { what: "mapping a guest's memory ahead".into() })
}
