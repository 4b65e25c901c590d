//! A Linux kernel laid into guest memory, by the 64-bit boot protocol (the kernel's
//! Documentation/arch/x86/boot.rst).
//!
//! Everything that can be wrong with the files is found before the first byte of guest memory is
//! written.

use super::layout;
use super::long_mode::{Entry, long_mode};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use pageferry_engine::error::{Error, Result};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

/// Where the setup header lies in a kernel's file.
const HEADER_AT: usize = 0x1f1;
/// "HdrS", the header's magic number.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The protocol that says where a kernel's 64-bit entry is: 2.12, Linux 3.8.
const PROTOCOL_MIN: u16 = 0x020c;
/// In `loadflags`: the kernel is loaded above 1 MiB (a bzImage).
const LOADED_HIGH: u8 = 1 << 0;
/// In `xloadflags`: there is a 64-bit entry.
const KERNEL_64: u16 = 1 << 0;
/// Where that is, after the start of the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// The loader's number for one that has none of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The file's unit for the length of its real-mode part, and how long that is if it does not say.
const SECTOR_BYTES: u64 = 512;
const SETUP_SECTORS_DEFAULT: u8 = 4;
/// The file's unit for the length of the rest.
const PARAGRAPH_BYTES: u64 = 16;
/// Initial RAM disks begin on a page.
const PAGE_BYTES: u64 = 4096;
/// Kinds of memory in the map for the kernel.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Lays a kernel, its initial RAM disk, command line, memory map and ACPI tables into guest memory,
/// which is as
/// [`layout::layout`] says. Returns where vCPU 0 begins.
pub fn load_linux(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    initrd: Option<&Path>,
    command_line: &str,
    vcpus: u32,
) -> Result<Entry> {
    let low_end = low_end(memory);
    let mut image = Image::open(kernel)?;
    let room = image.place(low_end)?;
    check_command_line(command_line, image.header.cmdline_size)?;
    let mut disk = initrd.map(|path| InitialDisk::open(path, room)).transpose()?;
    if !(1..=super::acpi::VCPUS_MAX).contains(&vcpus) {
        return Err(Error::refused(format!("a machine cannot have {vcpus} vCPUs")));
    }

    let mut params = boot_params { hdr: image.header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.acpi_rsdp_addr = layout::ACPI;
    describe_memory(memory, &mut params);
    if let Some(disk) = &mut disk {
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = disk.load(memory)?;
    }
    image.load(memory)?;
    let write = |bytes: &[u8], at| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .map_err(|e| Error::os("writing boot data into guest memory", std::io::Error::other(e)))
    };
    write(command_line.as_bytes(), layout::COMMAND_LINE)?;
    write(&[0], layout::COMMAND_LINE + command_line.len() as u64)?;
    write(&super::acpi::tables(layout::ACPI, vcpus), layout::ACPI)?;
    write(params.as_slice(), layout::BOOT_PARAMS)?;
    Ok(Entry { rip: image.address + ENTRY_64, rsi: layout::BOOT_PARAMS, rsp: 0 })
}

/// Has vCPU 0 of a machine begin there. The others wait for it to start them, as they do from the
/// beginning.
pub fn enter(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: &Entry) -> Result<()> {
    let failed = |e| Error::os("setting up the first vCPU", e);
    let mut sregs = vcpu.get_sregs().map_err(failed)?;
    long_mode(memory, &mut sregs)?;
    vcpu.set_sregs(&sregs).map_err(failed)?;
    vcpu.set_regs(&entry.registers()).map_err(failed)?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(failed)
}

/// Where the memory ends that begins at zero.
fn low_end(memory: &GuestMemoryMmap) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, GuestMemoryRegion::len)
}

/// A kernel's file that has been looked at.
struct Image {
    file: File,
    name: String,
    header: setup_header,
    /// Bytes of the part that is loaded.
    loaded_bytes: u64,
    address: u64,
}

impl Image {
    fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let (mut file, file_bytes) = open_file("kernel", path)?;
        let mut start = [0; HEADER_AT + size_of::<setup_header>()];
        let mut header = setup_header::default();
        let not_one = || {
            Error::refused(format!(
                "{name} is not a bzImage of Linux; give the file that a distribution calls /boot/vmlinuz-VERSION"
            ))
        };
        if file_bytes < start.len() as u64 {
            return Err(not_one());
        }
        file.read_exact(&mut start)
            .map_err(|e| Error::os(format!("reading the kernel {name}"), e))?;
        header.as_mut_slice().copy_from_slice(&start[HEADER_AT..]);
        if header.header != HEADER_MAGIC || header.loadflags & LOADED_HIGH == 0 {
            return Err(not_one());
        }
        if header.version < PROTOCOL_MIN || header.xloadflags & KERNEL_64 == 0 {
            return Err(Error::refused(format!(
                "the kernel {name} has no 64-bit entry; give one for x86-64, of Linux 3.8 or later"
            )));
        }
        let sectors =
            if header.setup_sects == 0 { SETUP_SECTORS_DEFAULT } else { header.setup_sects };
        let setup_bytes = (u64::from(sectors) + 1) * SECTOR_BYTES;
        let whole_bytes = setup_bytes + u64::from(header.syssize) * PARAGRAPH_BYTES;
        if file_bytes < whole_bytes {
            return Err(Error::refused(format!(
                "the kernel {name} is truncated: it has {file_bytes} bytes of {whole_bytes}; copy it anew"
            )));
        }
        Ok(Self {
            file,
            name,
            header,
            loaded_bytes: file_bytes - setup_bytes,
            address: header.pref_address,
        })
    }

    /// Checks that the kernel fits below `low_end`, where it wants to be and with what it needs to
    /// unpack itself. Returns where an initial RAM disk may lie: from here to there.
    fn place(&self, low_end: u64) -> Result<(u64, u64)> {
        if self.address < layout::SECOND_RAM {
            return Err(Error::refused(format!(
                "the kernel {} wants to be loaded at {:#x}, where the boot data is; give a relocatable one",
                self.name, self.address
            )));
        }
        let end = self.address.checked_add(self.loaded_bytes.max(self.header.init_size.into()));
        match end.filter(|end| *end <= low_end) {
            Some(end) => Ok((end, low_end.min(u64::from(self.header.initrd_addr_max) + 1))),
            None => Err(Error::refused(format!(
                "the kernel {} does not fit into the guest's memory: it needs {} MiB; give the guest more with --memory",
                self.name,
                end.map_or(u64::MAX, |end| end.next_multiple_of(1 << 20)) >> 20
            ))),
        }
    }

    fn load(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        BzImage::load(memory, Some(GuestAddress(self.address)), &mut self.file, None)
            .map(drop)
            .map_err(|e| {
                Error::os(format!("loading the kernel {}", self.name), std::io::Error::other(e))
            })
    }
}

/// An initial RAM disk's file, and its place.
struct InitialDisk {
    file: File,
    name: String,
    address: u64,
    bytes: u64,
}

impl InitialDisk {
    /// As high as it goes in the room that there is, out of the kernel's way.
    fn open(path: &Path, (start, end): (u64, u64)) -> Result<Self> {
        let name = path.display().to_string();
        let (file, bytes) = open_file("initial RAM disk", path)?;
        if bytes == 0 {
            return Err(Error::refused(format!("the initial RAM disk {name} is empty")));
        }
        let address = end.checked_sub(bytes).map(|address| address / PAGE_BYTES * PAGE_BYTES);
        match address.filter(|address| *address >= start) {
            Some(address) => Ok(Self { file, name, address, bytes }),
            None => Err(Error::refused(format!(
                "the initial RAM disk {name} ({bytes} bytes) does not fit into the guest's memory beside its kernel: {} bytes are \
                 left; give the guest more with --memory",
                end.saturating_sub(start)
            ))),
        }
    }

    /// Returns its address and length as the boot parameters have them.
    fn load(&mut self, memory: &GuestMemoryMmap) -> Result<(u32, u32)> {
        let failed = |e| Error::os(format!("loading the initial RAM disk {}", self.name), e);
        // Both are below the hole, and so below 4 GiB.
        let place = (self.address as u32, self.bytes as u32);
        memory
            .read_exact_volatile_from(
                GuestAddress(self.address),
                &mut self.file,
                self.bytes as usize,
            )
            .map_err(|e| failed(std::io::Error::other(e)))?;
        Ok(place)
    }
}

/// Fails, with the fix, if a file to boot from is not there or not one.
pub fn check_file(what: &str, path: &Path) -> Result<()> {
    open_file(what, path).map(drop)
}

/// Opens a file that is one: a pipe would keep the guest waiting for ever. Returns its length too.
fn open_file(what: &str, path: &Path) -> Result<(File, u64)> {
    let refused = |why: String| {
        Error::refused(format!(
            "cannot read the {what} {}: {why}; give a file that is there",
            path.display()
        ))
    };
    let metadata = std::fs::metadata(path).map_err(|e| refused(e.to_string()))?;
    if !metadata.is_file() {
        return Err(refused("it is not a file".into()));
    }
    let file = File::open(path).map_err(|e| refused(e.to_string()))?;
    Ok((file, metadata.len()))
}

fn check_command_line(text: &str, kernel_bytes_max: u32) -> Result<()> {
    let bytes_max = (layout::COMMAND_LINE_BYTES_MAX - 1).min(kernel_bytes_max.into());
    if text.len() as u64 > bytes_max {
        return Err(Error::refused(format!(
            "the kernel's command line has {} bytes, and the kernel takes {bytes_max}; shorten --append",
            text.len()
        )));
    }
    if text.contains('\0') {
        return Err(Error::refused(
            "the kernel's command line has a zero byte in it; take it out of --append",
        ));
    }
    Ok(())
}

/// The memory map that the kernel goes by (E820).
fn describe_memory(memory: &GuestMemoryMmap, params: &mut boot_params) {
    let low_end = low_end(memory);
    let mut pieces = vec![
        (0, layout::FIRST_RAM_END, RAM),
        (layout::FIRST_RAM_END, layout::SECOND_RAM, RESERVED),
        (layout::SECOND_RAM, low_end, RAM),
    ];
    let high = memory.iter().filter(|region| region.start_addr().0 > 0);
    pieces.extend(high.map(|region| (region.start_addr().0, region.last_addr().0 + 1, RAM)));
    for (entry, &(start, end, kind)) in params.e820_table.iter_mut().zip(&pieces) {
        *entry = boot_e820_entry { addr: start, size: end - start, r#type: kind };
    }
    params.e820_entries = pieces.len() as u8;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// What the kernel of these tests wants.
    const ADDRESS: u64 = 0x100_0000;
    const INIT_BYTES: u64 = 0x40_0000;

    fn memory(bytes: u64) -> GuestMemoryMmap {
        let ranges: Vec<_> = layout::layout(bytes)
            .iter()
            .map(|&(at, len)| (GuestAddress(at), len as usize))
            .collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    /// A directory with a kernel that is one by its header, `boot`, and 1 MiB `disk`.
    struct Files {
        dir: tempfile::TempDir,
        header: setup_header,
    }

    impl Files {
        fn new() -> Self {
            let header = setup_header {
                header: HEADER_MAGIC,
                version: 0x020f,
                loadflags: LOADED_HIGH,
                xloadflags: KERNEL_64,
                setup_sects: 1,
                syssize: 0x1000,
                cmdline_size: 64,
                initrd_addr_max: 0x7fff_ffff,
                pref_address: ADDRESS,
                init_size: INIT_BYTES as u32,
                ..Default::default()
            };
            let files = Self { dir: tempfile::tempdir().unwrap(), header };
            std::fs::write(files.path("disk"), vec![0xd1; 1 << 20]).unwrap();
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn kernel(&self) -> PathBuf {
            let mut bytes = vec![0; 2 * SECTOR_BYTES as usize];
            bytes[HEADER_AT..HEADER_AT + size_of::<setup_header>()]
                .copy_from_slice(self.header.as_slice());
            bytes.resize(bytes.len() + 0x1_0000, 0x4c);
            std::fs::write(self.path("boot"), bytes).unwrap();
            self.path("boot")
        }

        fn load(&self, memory: &GuestMemoryMmap, disk: &str, command_line: &str) -> Result<Entry> {
            load_linux(memory, &self.kernel(), Some(&self.path(disk)), command_line, 2)
        }

        /// What a change of the header is refused with.
        fn refused_with(change: impl Fn(&mut setup_header)) -> String {
            let mut files = Self::new();
            change(&mut files.header);
            refusal(&files.load(&memory(64 << 20), "disk", "quiet"))
        }
    }

    fn refusal(loaded: &Result<Entry>) -> String {
        match loaded {
            Err(Error::Refused(text)) => text.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_kernel_finds_all_that_it_was_given() {
        let (files, memory) = (Files::new(), memory(64 << 20));
        let entry = files.load(&memory, "disk", "console=ttyS0").unwrap();
        assert_eq!(entry, Entry { rip: ADDRESS + 0x200, rsi: layout::BOOT_PARAMS, rsp: 0 });
        let params: boot_params = memory.read_obj(GuestAddress(entry.rsi)).unwrap();
        let (disk, bytes) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((disk, bytes), (63 << 20, 1 << 20));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(disk.into())).unwrap(), 0xd1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(ADDRESS)).unwrap(), 0x4c);
        let mut line = [0; 14];
        memory.read_slice(&mut line, GuestAddress(params.hdr.cmd_line_ptr.into())).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        let mut root = [0; 8];
        memory.read_slice(&mut root, GuestAddress(params.acpi_rsdp_addr)).unwrap();
        assert_eq!(&root, b"RSD PTR ");
    }

    #[test]
    fn the_memory_map_has_all_memory_and_neither_hole() {
        let mut params = boot_params::default();
        describe_memory(&memory(5 << 30), &mut params);
        let table: Vec<_> = params.e820_table[..params.e820_entries.into()]
            .iter()
            .map(|e| (e.addr, { e.size }, { e.r#type }))
            .collect();
        assert_eq!(
            table,
            [
                (0, 0x9_fc00, RAM),
                (0x9_fc00, 0x6_0400, RESERVED),
                (0x10_0000, (3 << 30) - 0x10_0000, RAM),
                (4 << 30, 2 << 30, RAM)
            ]
        );
    }

    #[test]
    fn a_file_that_is_not_there_or_not_a_file_is_refused() {
        let (files, memory) = (Files::new(), memory(64 << 20));
        let text = refusal(&load_linux(&memory, &files.path("nothing"), None, "", 1));
        assert!(text.contains("cannot read the kernel") && text.contains("No such file"), "{text}");
        let text = refusal(&load_linux(&memory, files.dir.path(), None, "", 1));
        assert!(text.contains("not a file"), "{text}");
        let text = refusal(&files.load(&memory, "nothing", ""));
        assert!(text.contains("cannot read the initial RAM disk"), "{text}");
    }

    #[test]
    fn a_file_that_is_no_kernel_of_ours_is_refused() {
        assert!(Files::refused_with(|header| header.header = 0).contains("is not a bzImage"));
        assert!(Files::refused_with(|header| header.loadflags = 0).contains("is not a bzImage"));
        assert!(Files::refused_with(|header| header.version = 0x020b).contains("no 64-bit entry"));
        assert!(Files::refused_with(|header| header.xloadflags = 0).contains("no 64-bit entry"));
        let (files, memory) = (Files::new(), memory(64 << 20));
        std::fs::write(files.path("short"), b"MZ").unwrap();
        let text = refusal(&load_linux(&memory, &files.path("short"), None, "", 1));
        assert!(text.contains("is not a bzImage"), "{text}");
    }

    #[test]
    fn a_truncated_kernel_is_refused() {
        let text = Files::refused_with(|header| header.syssize = 0x1001);
        assert!(text.contains("truncated: it has 66560 bytes of 66576"), "{text}");
        Files::refused_with(|header| header.syssize = u32::MAX);
    }

    #[test]
    fn a_kernel_that_does_not_fit_into_memory_is_refused() {
        assert!(
            Files::refused_with(|header| header.init_size = 49 << 20).contains("it needs 65 MiB")
        );
        for address in [0, 0x9_0000, u64::MAX, u64::MAX - 0xffff, 64 << 20] {
            Files::refused_with(|header| header.pref_address = address);
        }
        for bytes in [4096, 1 << 20, 16 << 20, 20 << 20] {
            let text = refusal(&Files::new().load(&memory(bytes), "disk", ""));
            assert!(text.contains("--memory"), "{text}");
        }
    }

    #[test]
    fn an_initial_disk_that_does_not_fit_is_refused() {
        let files = Files::new();
        let text =
            refusal(&files.load(&memory(ADDRESS + INIT_BYTES + (1 << 20) - 4096), "disk", ""));
        assert!(text.contains("1044480 bytes are left"), "{text}");
        files.load(&memory(ADDRESS + INIT_BYTES + (1 << 20)), "disk", "").unwrap();
        Files::refused_with(|header| header.initrd_addr_max = 0x10_0000);
        std::fs::write(files.path("empty"), b"").unwrap();
        assert!(refusal(&files.load(&memory(64 << 20), "empty", "")).contains("empty"));
    }

    #[test]
    fn a_command_line_that_the_kernel_does_not_take_is_refused() {
        let (files, memory) = (Files::new(), memory(64 << 20));
        let text = refusal(&files.load(&memory, "disk", &"x".repeat(65)));
        assert!(text.contains("65 bytes, and the kernel takes 64"), "{text}");
        assert!(refusal(&files.load(&memory, "disk", "a\0b")).contains("zero byte"));
        files.load(&memory, "disk", &"x".repeat(64)).unwrap();
    }

    #[test]
    fn nothing_is_written_when_something_is_refused() {
        let (files, memory) = (Files::new(), memory(64 << 20));
        refusal(&files.load(&memory, "nothing", ""));
        let mut bytes = vec![0; 64 << 20];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_guest_images_kernel_is_loaded_where_there_is_one() {
        let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../.cache/guest/vmlinuz");
        if !kernel.exists() {
            eprintln!("NOT RUN: {} is not there; scripts/guest-image makes it", kernel.display());
            return;
        }
        let memory = memory(256 << 20);
        let entry = load_linux(&memory, &kernel, None, "console=ttyS0", 2).unwrap();
        // The 64-bit entry begins with `cld; cli`.
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(entry.rip)).unwrap(), [0xfc, 0xfa]);
    }
}
