//! A virtual machine of this process as its trackers need it: its memory slots, and a way to have
//! its vCPUs leave the guest.

pub(super) mod abi;

use crate::error::{Error, Result};
use crate::memory::page::{PAGE_BYTES, PageRun, pages_in};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use std::sync::Arc;

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`Error::Refused`] with the fix.
pub fn open() -> Result<Kvm> {
    Kvm::new().map_err(|e| {
        let fix = match e.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => {
                "load kvm_intel or kvm_amd, with virtualization switched on in the firmware"
            }
            libc::EACCES | libc::EPERM => "join the group kvm, or run as root",
            _ => "see the kernel's messages",
        };
        Error::refused(format!("/dev/kvm cannot be opened ({e}): {fix}"))
    })
}

/// A machine without vCPUs and memory. KVM gives up in the middle when a signal comes, and says so
/// (EINTR): it is asked again, as every VMM has to.
///
/// # Errors
/// [`Error::Os`] with KVM's answer.
pub fn new_vm(kvm: &Kvm) -> Result<VmFd> {
    for _ in 0..INTERRUPTED_MAX {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            made => return made.map_err(|e| Error::os("making a virtual machine", e)),
        }
    }
    Err(Error::os("making a virtual machine", std::io::Error::from_raw_os_error(libc::EINTR)))
}

/// So many signals in a row come from nobody who wants a machine made.
const INTERRUPTED_MAX: u32 = 1000;

/// KVM keeps the address space in the upper half of a slot's number.
const ADDRESS_SPACE_SHIFT: u32 = 16;

/// A memory slot, as it is registered with KVM, and the pages that it is on the engine's line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmSlot {
    /// Its number in KVM, the address space in the upper half.
    pub slot: u32,
    /// Where the guest has it, in bytes.
    pub guest_address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Where this process has it mapped.
    pub host_address: u64,
    /// Its first page on the line of all slots.
    pub first_page: u64,
}

impl KvmSlot {
    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        pages_in(self.bytes)
    }
}

/// Makes vCPUs leave the guest.
pub trait KickVcpus: Send + Sync {
    /// Returns once every vCPU has been outside the guest since the call; it may be in the guest
    /// again. All are kicked before any is waited for.
    ///
    /// The processor notes written pages in a buffer of its own (Intel's PML), and the kernel sees
    /// them when the vCPU leaves the guest.
    fn kick_all(&self) -> Result<()>;
}

/// All slots of a machine that are followed.
#[derive(Debug)]
pub struct KvmSlots {
    vm: Arc<VmFd>,
    slots: Vec<KvmSlot>,
    table: SlotTable,
}

impl KvmSlots {
    /// The slots of `vm` that are to be followed.
    ///
    /// # Errors
    /// [`Error::Refused`] if they are not whole pages, or two of them overlap on the line or have one number.
    ///
    /// # Safety
    /// Each slot is registered with `vm` with these very values and without flags, and stays so.
    /// Its host memory stays mapped, for the guest to write, as long as the machine or what is
    /// returned lives:
    /// [`Self::set_logging`] registers it again.
    pub unsafe fn new(vm: Arc<VmFd>, slots: Vec<KvmSlot>) -> Result<Self> {
        for slot in &slots {
            let whole = |bytes: u64| bytes.is_multiple_of(PAGE_BYTES);
            let fits = |from: u64, length: u64| from.checked_add(length).is_some();
            if slot.bytes == 0
                || !whole(slot.bytes)
                || !whole(slot.guest_address)
                || !whole(slot.host_address)
                || !fits(slot.guest_address, slot.bytes)
                || !fits(slot.host_address, slot.bytes)
                || !fits(slot.first_page, slot.pages())
            {
                return Err(Error::refused(format!(
                    "cannot follow writes to KVM's slot {}: {} bytes at {:#x} of the guest, {:#x} here, are not whole pages",
                    slot.slot, slot.bytes, slot.guest_address, slot.host_address
                )));
            }
        }
        let table =
            SlotTable::new(slots.iter().map(|slot| (slot.slot, slot.first_page, slot.pages())))?;
        Ok(Self { vm, slots, table })
    }

    /// The machine.
    #[must_use]
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The slots.
    #[must_use]
    pub fn slots(&self) -> &[KvmSlot] {
        &self.slots
    }

    /// Which page of the line is meant by a slot and an offset in it.
    #[must_use]
    pub fn table(&self) -> &SlotTable {
        &self.table
    }

    /// Has KVM follow writes to all slots, or stop it. An error leaves some of them changed;
    /// calling it again is allowed.
    pub fn set_logging(&self, on: bool) -> Result<()> {
        for slot in &self.slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: slot.guest_address,
                memory_size: slot.bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the slot is registered with these values already, and its memory stays mapped
            // (contract of `new`): only its flags change.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| {
                let what = if on { "following writes to" } else { "no longer following writes to" };
                Error::os(format!("{what} KVM's slot {}", slot.slot), std::io::Error::from(e))
            })?;
        }
        Ok(())
    }
}

/// From slots and offsets to pages of the line. Pure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotTable {
    /// In order of their number.
    rows: Vec<SlotPages>,
    pages: u64,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotPages {
    /// Its number in KVM.
    pub slot: u32,
    /// Its first page on the line of all slots.
    pub first_page: u64,
    /// How many pages.
    pub pages: u64,
}

impl SlotTable {
    /// From number, first page and number of pages of each slot.
    ///
    /// # Errors
    /// [`Error::Refused`] if two have one number, or overlap on the line.
    pub fn new(slots: impl IntoIterator<Item = (u32, u64, u64)>) -> Result<Self> {
        let mut rows: Vec<_> = slots
            .into_iter()
            .map(|(slot, first_page, pages)| SlotPages { slot, first_page, pages })
            .collect();
        rows.sort_by_key(|row| row.first_page);
        for pair in rows.windows(2) {
            if pair[0].first_page + pair[0].pages > pair[1].first_page {
                return Err(Error::refused(format!(
                    "KVM's slots {} and {} overlap on the line of pages",
                    pair[0].slot, pair[1].slot
                )));
            }
        }
        let pages = rows.last().map_or(0, |row| row.first_page + row.pages);
        rows.sort_by_key(|row| row.slot);
        if let Some(pair) = rows.windows(2).find(|pair| pair[0].slot == pair[1].slot) {
            return Err(Error::refused(format!(
                "two memory slots have KVM's number {}",
                pair[0].slot
            )));
        }
        Ok(Self { rows, pages })
    }

    /// The row of this slot.
    #[must_use]
    pub fn find(&self, slot: u32) -> Option<&SlotPages> {
        let index = self.rows.binary_search_by_key(&slot, |row| row.slot).ok()?;
        self.rows.get(index)
    }

    /// Whether this slot is in an address space of which we follow nothing (x86 has a second one,
    /// for system management mode).
    #[must_use]
    pub fn is_foreign(&self, slot: u32) -> bool {
        self.rows.iter().all(|row| row.slot >> ADDRESS_SPACE_SHIFT != slot >> ADDRESS_SPACE_SHIFT)
    }

    /// The page after the last, of all slots.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }
}

impl SlotPages {
    /// Its pages.
    #[must_use]
    pub fn run(&self) -> PageRun {
        PageRun::between(self.first_page, self.first_page + self.pages)
    }
}
