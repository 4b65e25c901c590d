//! The kernel's interface, as far as kvm-ioctls has none: `linux/kvm.h`.

use kvm_bindings::{kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log};
use kvm_bindings::{kvm_dirty_gfn, kvm_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use std::io;
use std::os::fd::AsRawFd;

const KVMIO: libc::c_ulong = 0xAE;
const WRITES: libc::c_ulong = 1 << 30;
const READS: libc::c_ulong = 2 << 30;

const fn io(number: libc::c_ulong) -> libc::c_ulong {
    KVMIO << 8 | number
}

const fn sized<T>(direction: libc::c_ulong, number: libc::c_ulong) -> libc::c_ulong {
    direction | (size_of::<T>() as libc::c_ulong) << 16 | io(number)
}

const KVM_GET_DIRTY_LOG: libc::c_ulong = sized::<kvm_dirty_log>(WRITES, 0x42);
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = sized::<kvm_clear_dirty_log>(READS | WRITES, 0xc0);
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = io(0xc7);

const _: () = {
    assert!(size_of::<kvm_dirty_log>() == 16 && KVM_GET_DIRTY_LOG == 0x4010_ae42);
    assert!(size_of::<kvm_clear_dirty_log>() == 24 && KVM_CLEAR_DIRTY_LOG == 0xc018_aec0);
    assert!(KVM_RESET_DIRTY_RINGS == 0xaec7);
    assert!(size_of::<kvm_dirty_gfn>() == 16);
};

/// Entries of a ring: written since, and not taken by us yet.
pub const KVM_DIRTY_GFN_F_DIRTY: u32 = 1 << 0;
/// Entries of a ring: taken by us, and to be protected again by the kernel.
pub const KVM_DIRTY_GFN_F_RESET: u32 = 1 << 1;

/// Words of a dirty log over this many pages.
pub const fn log_words(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// Protects again every page whose entry was taken, in all rings of the machine, and frees the
/// entries. Returns how many; fewer than there are if the thread is wanted for a signal.
pub fn reset_dirty_rings(vm: &VmFd) -> io::Result<u64> {
    // SAFETY: the call takes no argument, and changes the machine's own tables alone.
    let answer = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS as _, 0) };
    u64::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// The log of a slot of `pages` pages.
///
/// # Panics
/// If `words` is not as long as the log.
pub fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, words: &mut [u64]) -> io::Result<()> {
    assert_eq!(words.len(), log_words(pages), "a bit a page");
    let dirty_bitmap = words.as_mut_ptr().cast();
    let arg = kvm_dirty_log {
        slot,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap },
        ..Default::default()
    };
    // SAFETY: the kernel reads `arg`, and writes a bit for each page of the slot behind the pointer
    // in it. It knows the slot's length by itself; ours is the same, because a slot that is
    // registered keeps its length (contract of `KvmSlots::new`), and `words` is exclusive and of
    // that length.
    answer(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG as _, &raw const arg) })
}

/// Clears those bits of a slot's log that are set in `words`, which begin at `first_page`, and
/// protects their pages again.
///
/// # Panics
/// If `words` has not a bit for each of `pages` pages.
pub fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    assert_eq!(words.len(), log_words(u64::from(pages)), "a bit a page");
    // The kernel only reads it, whatever the type says.
    let dirty_bitmap = words.as_ptr().cast_mut().cast();
    let arg = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap },
    };
    // SAFETY: the kernel reads `arg`, and a bit for each of `pages` pages behind the pointer in it,
    // which is what `words` holds (asserted).
    answer(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG as _, &raw const arg) })
}

fn answer(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
