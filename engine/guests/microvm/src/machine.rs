//! A machine of this process: KVM's VM, its memory, vCPUs and devices. It knows of no migration.
//!
//! ```text
//!   Machine --+-- Vcpus     a thread each          --exits--> Devices   serial port, power, the payload's failure port
//!             +-- GuestMemory, shared memory that is KVM's slots and the lanes' regions alike
//!             +-- KvmSlots, RingSet                what a dirty source needs
//! ```

use super::cpu;
use super::cpu::{CpuProfile, HostCpu};
use super::devices::Devices;
use super::map_ahead::map_ahead;
use super::state::MachineState;
use super::vcpu::{Pending, Vcpus};
use crate::boot::layout::layout;
pub use crate::config::{MACHINE, MachineConfig, TrackingChoice, VCPUS_MAX};
use crate::console::serial::Console;
use crate::memory::{allocate, register};
use crate::state::vcpu::{VcpuState, readable_msrs};
use crate::state::vm::{ClockState, VmState, target_of};
use crossbeam_channel::bounded;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{VcpuFd, VmFd};
use pageferry_engine::dirty::kvm::{KickVcpus, KvmSlots, new_vm};
use pageferry_engine::dirty::log::LogSource;
use pageferry_engine::dirty::probe::Trust;
use pageferry_engine::dirty::ring::{RING_ENTRIES, RingSet, RingSource};
use pageferry_engine::dirty::{DirtySource, probe};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{BlockDescription, GuestDescription};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::page::PageRun;
use pageferry_engine::memory::prefault::{MapAhead, Prefault};
use pageferry_engine::watch::Watch;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

pub use pageferry_engine::dirty::kvm::open as open_kvm;

/// What writes are followed by, and what it needs.
enum Tracker {
    Ring(Arc<RingSet>),
    Log,
}

/// A machine. Its vCPUs are parked until [`Vcpus::run`].
pub struct Machine {
    // First, so that its threads have ended before what they use is gone.
    vcpus: Arc<Vcpus>,
    tracker: Tracker,
    slots: Arc<KvmSlots>,
    devices: Arc<Devices>,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    config: MachineConfig,
    host: HostCpu,
    /// What each vCPU's CPUID was set to.
    cpuids: Mutex<Vec<Vec<kvm_cpuid_entry2>>>,
    tsc_khz: u32,
}

impl Machine {
    /// Makes one, with memory that is all zeros.
    pub fn new(config: &MachineConfig, console: Console) -> Result<Self> {
        config.check()?;
        let kvm = open_kvm()?;
        if let most = kvm.get_max_vcpus().min(VCPUS_MAX as usize)
            && config.vcpus as usize > most
        {
            return Err(Error::refused(format!(
                "this host's KVM gives a guest {most} vCPUs, not {}",
                config.vcpus
            )));
        }
        let ring_entries = choose_ring(config)?;
        let made = |what| move |e| Error::os(what, e);
        let vm = Arc::new(new_vm(&kvm)?);
        let rings = ring_entries.map(|entries| RingSet::enable(&vm, entries)).transpose()?;
        // Below the top of the hole, where nothing else lies: what real mode takes on older Intel
        // processors.
        vm.set_identity_map_address(IDENTITY_MAP).map_err(made("placing the identity map"))?;
        vm.set_tss_address(IDENTITY_MAP as usize + 0x1000)
            .map_err(made("placing the task state segment"))?;
        let memory = Arc::new(allocate(config)?);
        let slots = Arc::new(register(&vm, &memory, config)?);
        vm.create_irq_chip().map_err(made("making the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(made("making the interval timer"))?;

        let mut fds = Vec::with_capacity(config.vcpus as usize);
        for index in 0..config.vcpus {
            fds.push(vm.create_vcpu(u64::from(index)).map_err(made("making a vCPU"))?);
        }
        let tsc_khz = fds[0]
            .get_tsc_khz()
            .map_err(made("reading the frequency of the time-stamp counter"))?;
        let host = HostCpu::read(&kvm, tsc_khz)?;
        let cpuids: Vec<_> =
            (0..config.vcpus).map(|index| host.guest_cpuid(index, config.vcpus)).collect();
        for (cpuid, fd) in cpuids.iter().zip(&fds) {
            fd.set_cpuid2(&cpu::to_kvm(cpuid)?).map_err(made("setting a vCPU's CPUID"))?;
        }
        let tracker = match rings {
            Some(rings) => Tracker::Ring(RingSet::new(Arc::clone(&slots), &fds, rings)?),
            None => Tracker::Log,
        };
        let rings = match &tracker {
            Tracker::Ring(set) => Some(Arc::clone(set)),
            Tracker::Log => None,
        };
        let devices = Arc::new(Devices::new(&vm, console, rings)?);
        let exits = Arc::clone(&devices) as Arc<dyn super::vcpu::Exits>;
        let vcpus = Arc::new(Vcpus::spawn(fds, &exits)?);
        if config.preallocate {
            let all = PageRun::between(0, memory.pages());
            Prefault::start(Arc::clone(&memory), &[all], map_ahead(&slots, &vcpus))?.finish()?;
            memory.note_mapped();
        }
        let (config, cpuids) = (config.clone(), Mutex::new(cpuids));
        Ok(Self { vcpus, tracker, slots, devices, vm, memory, config, host, cpuids, tsc_khz })
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Its vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> &Arc<Vcpus> {
        &self.vcpus
    }

    /// Its devices.
    #[must_use]
    pub fn devices(&self) -> &Arc<Devices> {
        &self.devices
    }

    /// How it was asked for.
    #[must_use]
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Frequency of its time-stamp counters.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// `ring` or `log`: what writes are followed by.
    #[must_use]
    pub fn tracking(&self) -> &'static str {
        match self.tracker {
            Tracker::Ring(_) => "ring",
            Tracker::Log => "log",
        }
    }

    /// How often a vCPU's ring was full.
    #[must_use]
    pub fn ring_full_exits(&self) -> u64 {
        match &self.tracker {
            Tracker::Ring(set) => set.full_exits(),
            Tracker::Log => 0,
        }
    }

    /// Its memory as loaders take it: other mappings of the same files.
    pub fn boot_memory(&self) -> Result<GuestMemoryMmap> {
        let mut ranges = Vec::new();
        for (slot, (address, bytes)) in
            self.memory.slots().iter().zip(layout(self.config.memory_bytes))
        {
            let file = FileOffset::new(slot.file()?, 0);
            ranges.push((GuestAddress(address), bytes as usize, Some(file)));
        }
        GuestMemoryMmap::from_ranges_with_files(ranges)
            .map_err(|e| Error::os("mapping the guest's memory", std::io::Error::other(e)))
    }

    /// What another machine must match to go on with this one's guest.
    #[must_use]
    pub fn describe(&self, profile: Option<&CpuProfile>) -> GuestDescription {
        let blocks = self.memory.slots().iter();
        GuestDescription {
            monitor: "kvm".into(),
            machine: MACHINE.into(),
            vcpus: self.config.vcpus,
            blocks: blocks
                .map(|slot| BlockDescription {
                    name: slot.name.clone(),
                    bytes: slot.region().len() as u64,
                })
                .collect(),
            images: Vec::new(),
            platform: profile
                .and_then(|profile| postcard::to_stdvec(profile).ok())
                .unwrap_or_default(),
        }
    }

    /// Fails, naming the difference, if a guest of this description cannot run on this host.
    pub fn admit(&self, theirs: &GuestDescription) -> Result<()> {
        let profile: CpuProfile = postcard::from_bytes(&theirs.platform).map_err(|e| {
            Error::refused(format!("what the guest needs of a processor cannot be read: {e}"))
        })?;
        self.host.admit(&profile)
    }

    /// What the guest that runs here needs of a processor. The vCPUs are parked.
    pub fn profile(&self) -> Result<CpuProfile> {
        let msrs = self.host.msrs().to_vec();
        let xsave_bytes = self.host.xsave_bytes();
        let cpuid = self.cpuids()[0].clone();
        self.vcpus.ask(0, move |vcpu| {
            let tsc_khz =
                vcpu.get_tsc_khz().map_err(|e| Error::os("reading a vCPU's frequency", e))?;
            Ok(CpuProfile { cpuid, msrs: readable_msrs(vcpu, &msrs)?, tsc_khz, xsave_bytes })
        })
    }

    /// The same of a guest that has come with this state, without asking KVM for each register once
    /// more: the guest is paused meanwhile.
    #[must_use]
    pub fn profile_of(state: &MachineState) -> CpuProfile {
        let first = &state.vcpus[0];
        CpuProfile {
            cpuid: first.cpuid.clone(),
            msrs: first.msrs.iter().map(|msr| msr.index).collect(),
            tsc_khz: first.tsc_khz,
            xsave_bytes: size_of_val(first.xsave.as_slice()) as u32,
        }
    }

    /// Starts to follow writes. See
    /// [`SourceGuest::start_tracking`](pageferry_engine::guest::SourceGuest::start_tracking).
    pub fn start_tracking(&self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
        let kick = Arc::clone(&self.vcpus) as Arc<dyn KickVcpus>;
        Ok(match &self.tracker {
            Tracker::Ring(set) => Box::new(RingSource::start(Arc::clone(set), kick)?),
            Tracker::Log => Box::new(LogSource::watched(Arc::clone(&self.slots), kick, watch)?),
        })
    }

    /// Maps pages for a guest that is yet to come, where this host's KVM can and they are not
    /// mapped already.
    #[must_use]
    pub fn map_ahead(&self) -> Option<MapAhead> {
        if self.config.preallocate { None } else { map_ahead(&self.slots, &self.vcpus) }
    }

    /// Lets the guest run. `stood` if it was paused before: it is told.
    pub fn run(&self, stood: bool) -> Result<()> {
        self.vcpus.run(stood)?;
        self.devices.thaw();
        Ok(())
    }

    /// Stops the guest.
    pub fn park(&self) -> Result<()> {
        // First, so that no interrupt of theirs comes to controllers that are being read.
        self.devices.freeze();
        self.vcpus.park()
    }

    /// Begins to read the state of a parked machine, all vCPUs at once. `msrs` are the registers to
    /// read, `xsave_bytes` is what the guest has had for vector registers since it was born.
    pub fn begin_save(&self, msrs: &Arc<[u32]>, xsave_bytes: u32) -> Result<Saving> {
        let vm_state = VmState::save(&self.vm)?;
        let xsave = self.host.xsave_area(xsave_bytes);
        let cpuids = self.cpuids();
        let vcpus = self.vcpus.ask_all(|index| {
            let (vm, msrs, cpuid) = (Arc::clone(&self.vm), Arc::clone(msrs), cpuids[index].clone());
            Box::new(move |vcpu: &mut VcpuFd| {
                let state = VcpuState::save(vcpu, cpuid, &msrs, xsave)?;
                let clock = (index == 0).then(|| ClockState::read(&vm, vcpu)).transpose()?;
                Ok((state, clock))
            })
        });
        Ok(Saving { vm_state, vcpus })
    }

    /// Gives a new machine the state of another.
    pub fn restore(&self, state: &Arc<MachineState>) -> Result<()> {
        if state.vcpus.len() != self.vcpus.len() {
            return Err(Error::Guest(format!(
                "a state of {} vCPUs for a machine of {}",
                state.vcpus.len(),
                self.vcpus.len()
            )));
        }
        let xsave = self.host.xsave_area(self.host.xsave_bytes());
        let cpuids = Arc::new(self.cpuids().clone());
        // vCPU 0 sets the clock and tells the others, so that its thread is woken once only: the
        // guest is paused.
        let (teller, told) = bounded(self.vcpus.len());
        let mut teller = Some(teller);
        let restoring = self.vcpus.ask_all(|index| {
            let (vm, state, cpuids) =
                (Arc::clone(&self.vm), Arc::clone(state), Arc::clone(&cpuids));
            let (teller, told) = (teller.take(), told.clone());
            Box::new(move |vcpu: &mut VcpuFd| {
                let (own, first) = (&state.vcpus[index], &state.vcpus[0]);
                let target = match teller {
                    Some(teller) => {
                        let target = state.clock.start(&vm, first.tsc_khz, vcpu)?;
                        for _ in 1..state.vcpus.len() {
                            // Those that wait hold the other end.
                            let _ = teller.send(target);
                        }
                        target
                    }
                    None => told
                        .recv_timeout(CLOCK_MAX)
                        .map_err(|_| Error::Guest("vCPU 0 did not set the guest's clock".into()))?,
                };
                own.restore(vcpu, &cpuids[index], target_of(target, own, first), xsave)
            })
        });
        restoring.wait()?;
        *self.cpuids() = state.vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
        state.vm.restore(&self.vm)?;
        self.devices.restore(&state.serial)
    }

    fn cpuids(&self) -> MutexGuard<'_, Vec<Vec<kvm_cpuid_entry2>>> {
        self.cpuids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A state that is being read.
pub struct Saving {
    vm_state: VmState,
    vcpus: Pending<(VcpuState, Option<ClockState>)>,
}

impl Saving {
    /// Waits for it.
    pub fn finish(
        self,
        machine: &Machine,
        payload: Option<super::payload::PayloadOptions>,
    ) -> Result<MachineState> {
        let (vcpus, clocks): (Vec<_>, Vec<_>) = self.vcpus.wait()?.into_iter().unzip();
        let clock = clocks.into_iter().flatten().next();
        let clock =
            clock.ok_or_else(|| Error::Guest("a machine without vCPUs has no clock".into()))?;
        Ok(MachineState {
            vm: self.vm_state,
            clock,
            vcpus,
            serial: machine.devices.state(),
            payload,
        })
    }
}

/// For vCPU 0 to read and set two clocks.
const CLOCK_MAX: Duration = Duration::from_secs(5);

/// Just above the local APICs, below the firmware that a PC would have.
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Entries of each vCPU's ring, or none where the log is to be used.
fn choose_ring(config: &MachineConfig) -> Result<Option<u32>> {
    if config.tracking == TrackingChoice::Log {
        return Ok(None);
    }
    match probe::trust()? {
        Trust::Ring { .. } => Ok(Some(config.ring_entries.unwrap_or(RING_ENTRIES))),
        Trust::Log { why } if config.tracking == TrackingChoice::Ring => Err(Error::refused(
            format!("KVM's dirty ring cannot be used here: {why}; use --tracking auto or log"),
        )),
        Trust::Log { why } => {
            tracing::info!(why, "following writes by the log");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_that_the_host_does_not_have_are_missed_at_the_start_and_not_by_the_guest() {
        // More than any host sets aside. Nothing of it is touched.
        let config = MachineConfig { huge_pages: true, ..MachineConfig::new(64 << 40, 1) };
        let text = allocate(&config).unwrap_err().chain();
        let without_huge_pages = text.contains("allocating");
        assert!(without_huge_pages || text.contains("nr_hugepages"), "{text}");
    }
}
