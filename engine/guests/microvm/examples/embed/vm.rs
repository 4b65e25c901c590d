//! The machine: memory, one vCPU, and what follows its writes. It knows of no migration.
//!
//! The guest counts in the first word of each of its pages, one page after the other. So wherever
//! it stops, all counters are equal up to some page, and one less from there on. A page that was
//! lost or is old breaks that.

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use pageferry_engine::dirty::kvm::{KvmSlot, KvmSlots, new_vm};
use pageferry_engine::dirty::probe;
use pageferry_engine::dirty::probe::Trust;
use pageferry_engine::dirty::ring::{RING_ENTRIES, RingSet};
use pageferry_engine::guest::{BlockDescription, GuestDescription};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::memory::{GuestMemory, SlotSource};
use pageferry_engine::{Error, Result};
use pageferry_microvm::cpu;
use pageferry_microvm::cpu::{CpuProfile, HostCpu};
use pageferry_microvm::state::vcpu::{VcpuState, readable_msrs};
use pageferry_microvm::state::vm::ClockState;
use pageferry_microvm::vcpu::{Ending, Exits, Vcpus};
use pageferry_transport::Access;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// What real mode reaches.
const MEMORY_BYTES: u64 = 1 << 20;
/// Where the program lies.
const CODE: u64 = 0x1000;
/// It counts in these pages.
const COUNTERS: std::ops::Range<u64> = 0x10..0x50;
/// The program, in real mode.
const PROGRAM: [u8; 22] = [
    0xb8, 0x00, 0x10, //             start: mov ax, 0x1000     segment of the first page
    0x8e, 0xd8, //                   next:  mov ds, ax
    0x66, 0xff, 0x06, 0x00, 0x00, //        inc dword [0]
    0x05, 0x00, 0x01, //                    add ax, 0x100      segment of the next
    0x3d, 0x00, 0x50, //                    cmp ax, 0x5000
    0x72, 0xf1, //                          jb next
    0xe6, 0x10, //                          out 0x10, al       a pass over all of them is done
    0xeb, 0xea, //                          jmp start
];
/// For the guest to make a pass, under an emulator of KVM too.
const PASS_MAX: Duration = Duration::from_secs(60);
/// What older Intel processors need for real mode: three pages that nobody uses.
const TASK_STATE: usize = 0xfffb_d000;

/// See the [module](self).
pub struct Vm {
    // First, so that the vCPU's thread has ended before its memory is gone.
    pub vcpus: Arc<Vcpus>,
    pub rings: Option<Arc<RingSet>>,
    pub slots: Arc<KvmSlots>,
    fd: Arc<VmFd>,
    pub memory: Arc<GuestMemory>,
    pub host: HostCpu,
    passes: Receiver<()>,
}

/// The monitor's end of the guest's exits.
struct Ports {
    rings: Option<Arc<RingSet>>,
    passes: SyncSender<()>,
}

impl Exits for Ports {
    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_write(&self, _port: u16, _data: &[u8]) -> Option<Ending> {
        // Who waits needs one.
        let _ = self.passes.try_send(());
        None
    }

    fn ring_full(&self, vcpu: usize) -> Result<()> {
        // On the vCPU's own thread, whether a migration is under way or not.
        self.rings.as_ref().map_or(Ok(()), |rings| rings.serve_full(vcpu))
    }
}

impl Vm {
    /// A machine that is parked, with memory that is all zeros.
    pub fn new() -> Result<Self> {
        let made = |what| move |e| Error::os(what, e);
        let kvm = Kvm::new().map_err(made("opening /dev/kvm"))?;
        let fd = Arc::new(new_vm(&kvm)?);
        // Rings come before the first vCPU, or never.
        let enabled = match probe::trust()? {
            Trust::Ring { .. } => Some(RingSet::enable(&fd, RING_ENTRIES)?),
            Trust::Log { .. } => None,
        };
        let memory = Arc::new(shared_memory()?);
        let slots = Arc::new(register(&fd, &memory)?);
        fd.set_tss_address(TASK_STATE).map_err(made("placing the task state segment"))?;
        fd.create_irq_chip().map_err(made("making the interrupt controllers"))?;
        let vcpu = fd.create_vcpu(0).map_err(made("making a vCPU"))?;
        let tsc_khz =
            vcpu.get_tsc_khz().map_err(made("reading the frequency of the time-stamp counter"))?;
        let host = HostCpu::read(&kvm, tsc_khz)?;
        vcpu.set_cpuid2(&cpu::to_kvm(&host.guest_cpuid(0, 1))?)
            .map_err(made("setting the vCPU's CPUID"))?;
        let rings = enabled
            .map(|enabled| RingSet::new(Arc::clone(&slots), [&vcpu], enabled))
            .transpose()?;
        let (sender, passes) = sync_channel(1);
        let exits: Arc<dyn Exits> = Arc::new(Ports { rings: rings.clone(), passes: sender });
        let vcpus = Arc::new(Vcpus::spawn(vec![vcpu], &exits)?);
        Ok(Self { vcpus, rings, slots, fd, memory, host, passes })
    }

    /// Puts the program into it, with the vCPU at its beginning.
    pub fn boot(&self) -> Result<()> {
        self.memory.slots()[0].region().write(CODE as usize, &PROGRAM)?;
        let failed = |e| Error::os("setting the vCPU's registers", e);
        self.vcpus.ask(0, move |vcpu| {
            let mut sregs = vcpu.get_sregs().map_err(failed)?;
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            vcpu.set_sregs(&sregs).map_err(failed)?;
            let regs = kvm_regs { rip: CODE, rflags: 2, ..Default::default() };
            vcpu.set_regs(&regs).map_err(failed)
        })
    }

    /// What it is, with what only the monitor compares.
    pub fn describe(&self, platform: Vec<u8>) -> GuestDescription {
        let slot = &self.memory.slots()[0];
        let block = BlockDescription { name: slot.name.clone(), bytes: slot.region().len() as u64 };
        let (monitor, machine) = ("example".into(), "counters-1".into());
        GuestDescription {
            monitor,
            machine,
            vcpus: 1,
            blocks: vec![block],
            images: Vec::new(),
            platform,
        }
    }

    /// What the guest relies on, of this host's processor.
    pub fn profile(&self) -> Result<CpuProfile> {
        let (cpuid, msrs) = (self.host.guest_cpuid(0, 1), self.host.msrs().to_vec());
        let xsave_bytes = self.host.xsave_bytes();
        self.vcpus.ask(0, move |vcpu| {
            let tsc_khz =
                vcpu.get_tsc_khz().map_err(|e| Error::os("reading the vCPU's frequency", e))?;
            Ok(CpuProfile { cpuid, msrs: readable_msrs(vcpu, &msrs)?, tsc_khz, xsave_bytes })
        })
    }

    /// All state of the parked vCPU. `profile` is what the guest was told of its processor.
    pub fn save(&self, profile: &CpuProfile) -> Result<Vec<u8>> {
        let (fd, profile) = (Arc::clone(&self.fd), profile.clone());
        let xsave = self.host.xsave_area(profile.xsave_bytes);
        let state = self.vcpus.ask(0, move |vcpu| {
            let state = VcpuState::save(vcpu, profile.cpuid, &profile.msrs, xsave)?;
            Ok((state, ClockState::read(&fd, vcpu)?))
        })?;
        postcard::to_stdvec(&state)
            .map_err(|e| Error::Guest(format!("the state cannot be encoded: {e}")))
    }

    /// Gives a vCPU that has never run such a state.
    pub fn restore(&self, bytes: &[u8]) -> Result<()> {
        let (state, clock): (VcpuState, ClockState) = postcard::from_bytes(bytes)
            .map_err(|e| Error::Guest(format!("the state that arrived cannot be read: {e}")))?;
        let (fd, xsave) = (Arc::clone(&self.fd), self.host.xsave_area(self.host.xsave_bytes()));
        self.vcpus.ask(0, move |vcpu| {
            // The guest's clocks go on by the time that it was paused.
            let target = clock.start(&fd, state.tsc_khz, vcpu)?;
            state.restore(vcpu, &[], target, xsave)
        })
    }

    /// Returns when the guest has counted in every page since the call.
    pub fn wait_for_a_pass(&self) -> Result<()> {
        // The first may have been told long ago, and the second have begun before the call.
        (0..3).try_for_each(|_| {
            self.passes
                .recv_timeout(PASS_MAX)
                .map_err(|_| Error::Timeout { what: "waiting for the guest to count".into() })
        })
    }

    /// The counters of a guest that is paused, checked.
    pub fn counters(&self) -> Result<Vec<u32>> {
        let region = self.memory.slots()[0].region();
        let mut counters = Vec::new();
        for page in COUNTERS {
            let mut word = [0; 4];
            region.read((page * PAGE_BYTES) as usize, &mut word)?;
            counters.push(u32::from_le_bytes(word));
        }
        let (first, last) = (counters[0], counters[counters.len() - 1]);
        if counters.is_sorted_by(|a, b| a >= b) && first - last <= 1 {
            Ok(counters)
        } else {
            Err(Error::Guest(format!("a page is lost, or old: {counters:?}")))
        }
    }
}

/// Memory that others can map too: a file. A monitor on vm-memory takes
/// `pageferry_engine::embed::vm_memory` for this.
fn shared_memory() -> Result<GuestMemory> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC)
        .and_then(|file| ftruncate(&file, MEMORY_BYTES).map(|()| file))
        .map_err(|e| Error::os("allocating the guest's memory", e))?;
    let block = SlotSource {
        name: "ram".into(),
        file: file.into(),
        file_offset: 0,
        bytes: MEMORY_BYTES,
        backing_page_bytes: PAGE_BYTES,
        process_address: 0,
    };
    GuestMemory::map(vec![block], Access::Write)
}

/// Makes the memory KVM's, and tells the trackers where it has it.
fn register(vm: &Arc<VmFd>, memory: &GuestMemory) -> Result<KvmSlots> {
    let host_address = memory.slots()[0].region().as_ptr() as u64;
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY_BYTES,
        userspace_addr: host_address,
        ..Default::default()
    };
    // SAFETY: the region is this long, and stays mapped for as long as the `Vm` has it.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|e| Error::os("giving the guest its memory", e))?;
    let slot =
        KvmSlot { slot: 0, guest_address: 0, bytes: MEMORY_BYTES, host_address, first_page: 0 };
    // SAFETY: it was registered with these values above, and nobody changes it.
    unsafe { KvmSlots::new(Arc::clone(vm), vec![slot]) }
}
