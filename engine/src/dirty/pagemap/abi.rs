//! The kernel's interface: `linux/userfaultfd.h` and `linux/fs.h`.

pub const UFFD_USER_MODE_ONLY: i32 = 1;
pub const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
pub const UFFD_FEATURE_POISON: u64 = 1 << 14;
pub const FEATURES: u64 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC;
pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub const PAGE_IS_WPALLOWED: u64 = 1 << 0;
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
pub const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
pub const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Types that are handed to an ioctl.
pub trait IoctlArg {}

#[repr(C)]
pub struct UffdioApi {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UffdioRange {
    pub start: u64,
    pub len: u64,
}

#[repr(C)]
pub struct UffdioRegister {
    pub range: UffdioRange,
    pub mode: u64,
    pub ioctls: u64,
}

#[repr(C)]
pub struct UffdioWriteprotect {
    pub range: UffdioRange,
    pub mode: u64,
}

#[repr(C)]
pub struct UffdioContinue {
    pub range: UffdioRange,
    pub mode: u64,
    /// Bytes that were mapped, or an errno below zero.
    pub mapped: i64,
}

#[repr(C)]
pub struct UffdioPoison {
    pub range: UffdioRange,
    pub mode: u64,
    pub updated: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PageRegion {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

#[repr(C)]
pub struct PmScanArg {
    pub size: u64,
    pub flags: u64,
    pub start: u64,
    pub end: u64,
    pub walk_end: u64,
    pub vec: u64,
    pub vec_len: u64,
    pub max_pages: u64,
    pub category_inverted: u64,
    pub category_mask: u64,
    pub category_anyof_mask: u64,
    pub return_mask: u64,
}

impl Default for PmScanArg {
    fn default() -> Self {
        Self {
            size: size_of::<Self>() as u64,
            flags: 0,
            start: 0,
            end: 0,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: 0,
            return_mask: 0,
        }
    }
}

impl IoctlArg for UffdioApi {}
impl IoctlArg for UffdioRange {}
impl IoctlArg for UffdioRegister {}
impl IoctlArg for UffdioWriteprotect {}
impl IoctlArg for UffdioContinue {}
impl IoctlArg for UffdioPoison {}
impl IoctlArg for PmScanArg {}

const fn iowr<T>(kind: u8, number: u8) -> libc::c_ulong {
    (3 << 30)
        | (size_of::<T>() as libc::c_ulong) << 16
        | (kind as libc::c_ulong) << 8
        | number as libc::c_ulong
}

pub const UFFDIO_REGISTER: libc::c_ulong = iowr::<UffdioRegister>(0xAA, 0x00);
pub const UFFDIO_UNREGISTER: libc::c_ulong =
    2 << 30 | (size_of::<UffdioRange>() as libc::c_ulong) << 16 | 0xAA << 8 | 0x01;
pub const UFFDIO_WRITEPROTECT: libc::c_ulong = iowr::<UffdioWriteprotect>(0xAA, 0x06);
pub const UFFDIO_CONTINUE: libc::c_ulong = iowr::<UffdioContinue>(0xAA, 0x07);
pub const UFFDIO_POISON: libc::c_ulong = iowr::<UffdioPoison>(0xAA, 0x08);
pub const UFFDIO_API: libc::c_ulong = iowr::<UffdioApi>(0xAA, 0x3F);
pub const PAGEMAP_SCAN: libc::c_ulong = iowr::<PmScanArg>(b'f', 16);

const _: () = {
    assert!(size_of::<UffdioApi>() == 24 && UFFDIO_API == 0xc018_aa3f);
    assert!(size_of::<UffdioRange>() == 16 && UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(size_of::<UffdioRegister>() == 32 && UFFDIO_REGISTER == 0xc020_aa00);
    assert!(size_of::<UffdioWriteprotect>() == 24 && UFFDIO_WRITEPROTECT == 0xc018_aa06);
    assert!(size_of::<UffdioContinue>() == 32 && UFFDIO_CONTINUE == 0xc020_aa07);
    assert!(size_of::<UffdioPoison>() == 32 && UFFDIO_POISON == 0xc020_aa08);
    assert!(size_of::<PageRegion>() == 24);
    assert!(size_of::<PmScanArg>() == 96 && PAGEMAP_SCAN == 0xc060_6610);
};
