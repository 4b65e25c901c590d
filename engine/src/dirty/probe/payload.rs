//! A machine with one vCPU and a guest of 14 bytes that writes known pages and halts.

use crate::dirty::kvm;
use crate::dirty::kvm::{KvmSlot, KvmSlots};
use crate::dirty::ring::{EnabledRings, KVM_EXIT_DIRTY_RING_FULL, RingSet};
use crate::error::{Error, Result};
use crate::memory::page::PAGE_BYTES;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd};
use pageferry_transport::MemoryRegion;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// 32-bit code, at address 0.
const CODE: [u8; 14] = [
    0x89, 0xdf, //       0: mov edi, ebx         the first address
    0xff, 0x07, //       2: inc dword [edi]
    0x01, 0xf7, //       4: add edi, esi         the stride
    0x39, 0xd7, //       6: cmp edi, edx         the end
    0x72, 0xf8, //       8: jb 2
    0x49, //            10: dec ecx              the passes
    0x75, 0xf3, //      11: jnz 0
    0xf4, //            13: hlt
];

/// Where a processor without unrestricted guest mode keeps what it needs to run one: below 4 GiB,
/// where nothing is.
const TASK_STATE_SEGMENT: usize = 0xfffb_d000;
/// CR0: protected mode, and the bit that is always set.
const PROTECTED_MODE: u64 = 0x11;

/// Pages that are written: from `first` to before `end`, one in `stride`, each `passes` times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::dirty) struct Writes {
    pub first: u64,
    pub end: u64,
    pub stride: u64,
    pub passes: u32,
}

impl Writes {
    /// In their order.
    pub fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        (self.first..self.end).step_by(self.stride as usize)
    }
}

/// Why the vCPU is outside the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::dirty) enum Stopped {
    /// All was written.
    Done,
    /// Its ring was full, and is empty now.
    Full,
    /// A signal came.
    Called,
}

/// The machine. Its pages are one line, in two slots.
pub(in crate::dirty) struct Payload {
    // Before the memory, so that the guest is gone first; and the descriptor of the machine is in
    // the slots.
    vcpu: VcpuFd,
    rings: Option<(EnabledRings, Arc<RingSet>)>,
    slots: Arc<KvmSlots>,
    pages: u64,
    #[cfg_attr(not(test), expect(dead_code, reason = "mapped as long as the machine"))]
    memory: Arc<MemoryRegion>,
}

impl Payload {
    /// Pages of the first slot, in the first of which the code lies.
    pub const CODE_PAGES: u64 = 16;

    /// A machine of so many pages, with rings or without.
    pub fn new(pages: u64, ring_entries: Option<u32>) -> Result<Self> {
        let vm = Arc::new(kvm::new_vm(&kvm::open()?)?);
        let enabled = ring_entries.map(|entries| RingSet::enable(&vm, entries)).transpose()?;
        // Needed on older Intel processors, and unknown to other kinds of KVM.
        let _ = vm.set_tss_address(TASK_STATE_SEGMENT);
        let memory = MemoryRegion::anonymous((pages * PAGE_BYTES) as usize)?;
        memory.write(0, &CODE)?;
        let slot = |slot, first_page, pages| KvmSlot {
            slot,
            guest_address: first_page * PAGE_BYTES,
            bytes: pages * PAGE_BYTES,
            host_address: memory.as_ptr() as u64 + first_page * PAGE_BYTES,
            first_page,
        };
        // Numbers that are not their places, so that mixing them up shows.
        let slots =
            vec![slot(5, 0, Self::CODE_PAGES), slot(3, Self::CODE_PAGES, pages - Self::CODE_PAGES)];
        for slot in &slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the memory stays mapped as long as the machine lives: see the order of the
            // fields.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(|e| os("giving a machine its memory", e))?;
        }
        // SAFETY: registered just now, without flags; the memory is as above, and nobody else's.
        let slots = Arc::new(unsafe { KvmSlots::new(Arc::clone(&vm), slots) }?);
        let vcpu = vm.create_vcpu(0).map_err(|e| os("making a vCPU", e))?;
        let rings = match enabled {
            Some(enabled) => Some((enabled, RingSet::new(Arc::clone(&slots), [&vcpu], enabled)?)),
            None => None,
        };
        let mut sregs = vcpu.get_sregs().map_err(|e| os("reading a vCPU's segments", e))?;
        let flat = |selector, type_| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        // Code that is executed and read, data that is read and written, both accessed.
        sregs.cs = flat(8, 11);
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = flat(16, 3);
        }
        sregs.cr0 = PROTECTED_MODE;
        vcpu.set_sregs(&sregs).map_err(|e| os("setting a vCPU's segments", e))?;
        Ok(Self { vcpu, rings, slots, pages, memory })
    }

    /// Its pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Its slots.
    pub fn slots(&self) -> Arc<KvmSlots> {
        Arc::clone(&self.slots)
    }

    /// Its ring, if it has one.
    pub fn rings(&self) -> Option<(EnabledRings, Arc<RingSet>)> {
        self.rings.clone()
    }

    /// Its memory, the line of its pages.
    #[cfg(test)]
    pub fn memory(&self) -> Arc<MemoryRegion> {
        Arc::clone(&self.memory)
    }

    /// Has the guest write these pages when it is run next.
    pub fn begin(&mut self, writes: &Writes) -> Result<()> {
        let regs = kvm_regs {
            rip: 0,
            rflags: 2,
            rbx: writes.first * PAGE_BYTES,
            rsi: writes.stride * PAGE_BYTES,
            rdx: writes.end * PAGE_BYTES,
            rcx: writes.passes.into(),
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).map_err(|e| os("setting a vCPU's registers", e))
    }

    /// Runs the guest until it leaves, and empties its ring if it is that.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<Stopped> {
        if stop.load(Ordering::SeqCst) {
            return Err(Error::Timeout { what: "a guest writes its pages".into() });
        }
        match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => Ok(Stopped::Done),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                let Some((_, set)) = &self.rings else {
                    return Err(Error::Guest(
                        "KVM says that a ring is full, and there is none".into(),
                    ));
                };
                set.serve_full(0)?;
                Ok(Stopped::Full)
            }
            Ok(other) => {
                Err(Error::Guest(format!("a guest of a few instructions left with {other:?}")))
            }
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Ok(Stopped::Called),
            Err(e) => Err(os("running a vCPU", e)),
        }
    }
}

fn os(what: &str, error: kvm_ioctls::Error) -> Error {
    Error::os(what, io::Error::from(error))
}
