//! Memory files of our own, whose size nobody can change.
//!
//! A memory file that is cut kills whoever touches what is gone: QEMU, and us. So its size is
//! sealed as soon as it is set.

use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;

/// A memfd of this size, which can neither shrink nor grow. Holes can still be punched into it.
pub fn sealed_memfd(name: &str, flags: MemfdFlags, bytes: u64) -> Result<OwnedFd, Errno> {
    let fd = memfd_create(name, flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, fallocate};

    #[test]
    fn its_size_cannot_be_changed_and_holes_can_be_punched() {
        let fd = sealed_memfd("sealed", MemfdFlags::empty(), 8192).unwrap();
        assert_eq!(ftruncate(&fd, 4096), Err(Errno::PERM));
        assert_eq!(ftruncate(&fd, 16384), Err(Errno::PERM));
        ftruncate(&fd, 8192).unwrap();
        fallocate(&fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096).unwrap();
    }
}
