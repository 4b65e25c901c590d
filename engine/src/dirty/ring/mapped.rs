//! Rings as the kernel has them: switched on for a machine, and mapped.

use super::entries::Entry;
use super::sync::ResetRings;
use crate::dirty::kvm::KvmSlots;
use crate::dirty::kvm::abi;
use crate::error::{Error, Result};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// Entries of a vCPU's ring unless told otherwise: 1 MiB of memory a vCPU, and 256 MiB of guest
/// memory written before one has to stop. Linux allows no more.
pub const RING_ENTRIES: u32 = 65536;

/// Fewest entries: a page of them, or what the hardware's own log of 512 pages (Intel's PML) and
/// the kernel's reserve of 64 need.
const ENTRIES_MIN: u32 = 256;
const ENTRIES_MIN_HARDWARE_LOG: u32 = 1024;

/// Rings that a machine's vCPUs have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnabledRings {
    entries: u32,
    entries_max: u32,
    acquire_release: bool,
}

impl EnabledRings {
    /// Switches rings of at least `entries` entries on, as far as the kernel has them, for a
    /// machine that has no vCPU yet. They cannot be switched off.
    pub(super) fn enable(vm: &VmFd, entries: u32) -> Result<Self> {
        let (capability, bytes_max) = capability(vm).ok_or_else(|| {
            Error::refused(
                "this kernel's KVM has no dirty rings: Linux 5.11 or newer has, on x86-64",
            )
        })?;
        let entries_max = bytes_max / size_of::<Entry>() as u32;
        if entries_max < ENTRIES_MIN {
            return Err(Error::refused(format!(
                "this kernel's KVM has dirty rings of {entries_max} entries, too few"
            )));
        }
        let most = 1 << entries_max.ilog2();
        let mut entries = entries.clamp(ENTRIES_MIN, most).next_power_of_two();
        loop {
            let bytes = u64::from(entries) * size_of::<Entry>() as u64;
            let arg =
                kvm_enable_cap { cap: capability, args: [bytes, 0, 0, 0], ..Default::default() };
            match vm.enable_cap(&arg) {
                Ok(()) => break,
                // It keeps more in reserve there, and does not say so.
                Err(e)
                    if e.errno() == libc::EINVAL
                        && entries < ENTRIES_MIN_HARDWARE_LOG.min(most) =>
                {
                    entries *= 2
                }
                Err(e) if e.errno() == libc::EINVAL => {
                    return Err(Error::refused(format!(
                        "KVM takes no dirty rings of {entries} entries: the machine has vCPUs or rings already"
                    )));
                }
                Err(e) => {
                    return Err(Error::os("switching KVM's dirty rings on", io::Error::from(e)));
                }
            }
        }
        Ok(Self {
            entries,
            entries_max,
            acquire_release: capability == KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        })
    }

    /// Entries of each ring.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Most entries that this kernel allows.
    #[must_use]
    pub fn entries_max(&self) -> u32 {
        self.entries_max
    }

    /// Whether the kernel says that it pairs with acquire and release, which is what we do anyway.
    #[must_use]
    pub fn acquire_release(&self) -> bool {
        self.acquire_release
    }
}

/// The better one of the kernel's two names for rings, and the most bytes of one.
fn capability(vm: &VmFd) -> Option<(u32, u32)> {
    let ask = |capability: u32| {
        let answer = vm.check_extension_raw(capability.into());
        u32::try_from(answer).ok().filter(|bytes| *bytes > 0).map(|bytes| (capability, bytes))
    };
    ask(KVM_CAP_DIRTY_LOG_RING_ACQ_REL).or_else(|| ask(KVM_CAP_DIRTY_LOG_RING))
}

/// A vCPU's ring in our address space. It keeps the vCPU's descriptor open.
#[derive(Debug)]
pub struct MappedRing {
    entries: NonNull<Entry>,
    count: usize,
}

// SAFETY: the mapping belongs to the process and not to a thread, and entries are atomics.
unsafe impl Send for MappedRing {}
// SAFETY: as above; a shared reference gives atomics alone.
unsafe impl Sync for MappedRing {}

impl MappedRing {
    pub(super) fn new(vcpu: &VcpuFd, rings: EnabledRings) -> Result<Self> {
        let count = rings.entries as usize;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * size_of::<Entry>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * page_bytes(),
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Error::os("mapping a vCPU's dirty ring", io::Error::last_os_error()));
        }
        let entries = NonNull::new(address.cast()).ok_or_else(|| {
            Error::Guest("the kernel mapped a vCPU's dirty ring at address 0".into())
        })?;
        Ok(Self { entries, count })
    }
}

/// The kernel's page, in which the offset is counted.
fn page_bytes() -> i64 {
    rustix::param::page_size() as i64
}

impl Deref for MappedRing {
    type Target = [Entry];

    fn deref(&self) -> &[Entry] {
        // SAFETY: the mapping holds this many entries (`new`) until it is dropped, and is
        // page-aligned. Any bytes make an entry, and the kernel changes them only as atomics of
        // these sizes.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.count) }
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, of that length; nobody has a reference into it any
        // more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.count * size_of::<Entry>()) };
    }
}

/// The machine, asked to reset its rings.
impl ResetRings for Arc<KvmSlots> {
    fn reset(&self) -> io::Result<u64> {
        // A pending signal (a kick, say) ends the call early. It is delivered once signals are let
        // in again.
        let _blocked = BlockedSignals::new()?;
        abi::reset_dirty_rings(self.vm())
    }
}

/// No signal is pending for this thread as long as it lives.
struct BlockedSignals {
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn new() -> io::Result<Self> {
        let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: the first call fills `all`; the second reads it, and fills `before` if it returns
        // 0. Both touch this thread's mask alone.
        let answer = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
        };
        if answer != 0 {
            return Err(io::Error::from_raw_os_error(answer));
        }
        // SAFETY: filled, as the call has returned 0.
        Ok(Self { before: unsafe { before.assume_init() } })
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the mask that this thread had.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut())
        };
    }
}
