//! A guest of the built-in monitor, at the source.

use super::config::MachineConfig;
use super::cpu::CpuProfile;
use super::machine::{Machine, Saving};
use super::payload::{LedgerReport, PayloadOptions, PayloadPlan};
use super::vcpu::Ending;
use crate::boot::layout::layout;
use crate::boot::linux;
use crate::console::serial::Console;
use crossbeam_channel::Receiver;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use pageferry_engine::dirty::DirtySource;
use pageferry_engine::dirty::kvm::KickVcpus;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{Facts, FixedCosts, Liveness, SourceGuest};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::lost_page::LostPage;
use pageferry_engine::watch::Watch;
use pageferry_transport::Access;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Device state besides the vCPUs, and of each: XSAVE areas are the most of it, 11 KiB with AMX.
const STATE_BYTES_MAX: u64 = 64 << 10;
const VCPU_STATE_BYTES_MAX: u64 = 64 << 10;
const STATE_BYTES_EXPECTED: u64 = 4 << 10;
const VCPU_STATE_BYTES_EXPECTED: u64 = 12 << 10;
/// How often calling the vCPUs out is timed.
const KICKS_TIMED: u32 = 4;
/// State is handed on in pieces of this size.
const PIECE_BYTES: usize = 64 << 10;

/// What a new machine runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// A Linux kernel.
    Linux {
        /// A bzImage.
        kernel: PathBuf,
        /// Its first file system.
        initrd: Option<PathBuf>,
        /// Its command line.
        command_line: String,
    },
    /// The payload guest.
    Payload(PayloadOptions),
}

/// A guest that runs here.
pub struct KvmSource {
    machine: Machine,
    profile: CpuProfile,
    /// The registers of its profile, as saving wants them.
    msrs: Arc<[u32]>,
    payload: Option<PayloadPlan>,
    running: bool,
    sealed: bool,
    saving: Option<Saving>,
    /// The tracking of a guest that has left.
    retired: Option<Box<dyn DirtySource>>,
    /// What calling the vCPUs out took when tracking began, in microseconds.
    kick_us: u64,
    /// The memory as the lanes read it, once it is to be moved. Not the mapping in which the guest
    /// runs: a page that the host lost reads as zeros in this one.
    view: Option<Arc<GuestMemory>>,
}

impl KvmSource {
    /// Boots a guest.
    pub fn start(config: &MachineConfig, boot: &Boot, console: Console) -> Result<Self> {
        // What can be refused is refused before anything is made.
        config.check()?;
        let payload = match boot {
            Boot::Payload(options) => {
                Some(PayloadPlan::new(*options, config.memory_bytes, config.vcpus)?)
            }
            Boot::Linux { .. } => None,
        };
        let machine = Machine::new(config, console)?;
        let memory = machine.boot_memory()?;
        match (boot, &payload) {
            (Boot::Linux { kernel, initrd, command_line }, _) => {
                let entry = linux::load_linux(
                    &memory,
                    kernel,
                    initrd.as_deref(),
                    command_line,
                    config.vcpus,
                )?;
                machine.vcpus().ask(0, move |vcpu| linux::enter(vcpu, &memory, &entry))?;
            }
            (Boot::Payload(_), Some(plan)) => {
                plan.load(&memory, machine.tsc_khz())?;
                let (plan, memory) = (Arc::new(plan.clone()), Arc::new(memory));
                machine
                    .vcpus()
                    .ask_all(|index| {
                        let (plan, memory) = (Arc::clone(&plan), Arc::clone(&memory));
                        Box::new(move |vcpu: &mut VcpuFd| {
                            let failed = |e| Error::os("setting up a vCPU", e);
                            let mut sregs = vcpu.get_sregs().map_err(failed)?;
                            let regs = plan.registers(&memory, index, &mut sregs)?;
                            vcpu.set_sregs(&sregs).map_err(failed)?;
                            vcpu.set_regs(&regs).map_err(failed)?;
                            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
                                .map_err(failed)
                        })
                    })
                    .wait()?;
            }
            (Boot::Payload(_), None) => unreachable!("a payload has its plan"),
        }
        let profile = machine.profile()?;
        let mut guest = Self::of(machine, profile, payload);
        guest.go(false)?;
        Ok(guest)
    }

    /// A guest whose machine is ready and parked.
    pub(super) fn of(machine: Machine, profile: CpuProfile, payload: Option<PayloadPlan>) -> Self {
        let msrs = profile.msrs.clone().into();
        Self {
            machine,
            profile,
            msrs,
            payload,
            running: false,
            sealed: false,
            saving: None,
            retired: None,
            kick_us: 0,
            view: None,
        }
    }

    /// Its machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Hears of its end, if it ends by itself.
    #[must_use]
    pub fn ended(&self) -> Receiver<Ending> {
        self.machine.vcpus().ending().clone()
    }

    /// Whether Commit may be out.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Stops the guest, compares all of its memory with its ledger, and lets it go on. A payload
    /// guest only.
    pub fn check(&mut self) -> Result<LedgerReport> {
        let Some(plan) = self.payload.clone() else {
            return Err(Error::refused("only a payload guest keeps a ledger"));
        };
        let ran = self.running;
        self.halt()?;
        let registers = self
            .machine
            .vcpus()
            .ask_all(|_| {
                Box::new(|vcpu: &mut VcpuFd| {
                    vcpu.get_regs().map_err(|e| Error::os("reading a vCPU's registers", e))
                })
            })
            .wait()?;
        let report = self.alive().and_then(|()| plan.check(self.machine.memory(), &registers));
        if ran {
            self.go(true)?;
        }
        report
    }

    /// Has the guest look for its longest gap anew. A payload guest only.
    pub fn forget_gaps(&self) -> Result<()> {
        self.plan()?.forget_gaps(self.machine.memory())
    }

    /// The longest gap that each vCPU has seen since then, in ticks of its time-stamp counter. A
    /// payload guest only.
    pub fn gap_ticks_max(&self) -> Result<Vec<u64>> {
        self.plan()?.gap_ticks_max(self.machine.memory())
    }

    /// When each vCPU last read its time-stamp counter, in ticks: one that runs does so after each
    /// page. A payload guest only.
    pub fn last_ticks(&self) -> Result<Vec<u64>> {
        self.plan()?.last_ticks(self.machine.memory())
    }

    /// Ends it here: it runs at the destination.
    pub fn end(&mut self) -> Result<()> {
        self.halt()?;
        self.retired = None;
        Ok(())
    }

    fn plan(&self) -> Result<&PayloadPlan> {
        self.payload
            .as_ref()
            .ok_or_else(|| Error::refused("only a payload guest measures its gaps"))
    }

    fn alive(&self) -> Result<()> {
        (self.machine.vcpus().liveness())()
    }

    pub(super) fn go(&mut self, stood: bool) -> Result<()> {
        if !self.running {
            self.machine.run(stood)?;
            self.running = true;
        }
        Ok(())
    }

    fn halt(&mut self) -> Result<()> {
        if self.running {
            // Before it is known to be true: should one vCPU not come out in time, `resume` lets
            // all of them run again.
            self.running = false;
            self.machine.park()?;
        }
        Ok(())
    }
}

impl SourceGuest for KvmSource {
    fn preflight(&mut self) -> Result<()> {
        if self.sealed {
            return Err(Error::refused("the guest is stopped after a migration in doubt"));
        }
        if self.view.is_none() {
            self.view = Some(Arc::new(self.machine.memory().map_again(Access::Read)?));
        }
        self.alive()
    }

    fn facts(&mut self) -> Result<Facts> {
        let vcpus = u64::from(self.machine.config().vcpus);
        Ok(Facts {
            description: self.machine.describe(Some(&self.profile)),
            state_bytes_max: STATE_BYTES_MAX + VCPU_STATE_BYTES_MAX * vcpus,
            state_bytes_expected: STATE_BYTES_EXPECTED + VCPU_STATE_BYTES_EXPECTED * vcpus,
            // A vCPU's state is some twenty ioctls of a few microseconds, at both ends.
            fixed_costs: FixedCosts {
                pause_us: self.kick_us,
                sync_us: 0,
                save_us: 100,
                load_us: 200,
                resume_us: 50,
            },
            // No balloon, no free page reporting: memory is taken away from nobody.
            may_discard: false,
        })
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.view.as_ref().unwrap_or_else(|| self.machine.memory())
    }

    fn name_guest_physical(&mut self, pages: &mut [LostPage]) {
        let layout = layout(self.machine.config().memory_bytes);
        for (slot, (address, _)) in self.machine.memory().slots().iter().zip(layout) {
            for page in pages.iter_mut().filter(|page| page.block == slot.name) {
                page.guest_physical = Some(address + page.offset);
            }
        }
    }

    fn liveness(&self) -> Liveness {
        self.machine.vcpus().liveness()
    }

    fn is_running(&mut self) -> Result<bool> {
        Ok(self.running)
    }

    fn start_tracking(&mut self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
        let tracking = self.machine.start_tracking(watch)?;
        // The shortest counts: vCPUs that were called out go on at once, and may keep the processor
        // from the thread that waits to hear of it.
        self.kick_us = u64::MAX;
        for _ in 0..KICKS_TIMED {
            let kicking = Instant::now();
            self.machine.vcpus().kick_all()?;
            self.kick_us = self.kick_us.min(kicking.elapsed().as_micros() as u64);
        }
        Ok(tracking)
    }

    fn drain_io(&mut self) -> Result<()> {
        // No device here writes guest memory.
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.halt()?;
        // An end that came with the pause is the guest's own.
        self.alive()
    }

    fn begin_save(&mut self) -> Result<()> {
        self.saving = Some(self.machine.begin_save(&self.msrs, self.profile.xsave_bytes)?);
        Ok(())
    }

    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let saving = self
            .saving
            .take()
            .ok_or_else(|| Error::Guest("a state that nobody began to save".into()))?;
        let payload = self.payload.as_ref().map(PayloadPlan::options);
        let blob = saving.finish(&self.machine, payload)?.encode()?;
        blob.chunks(PIECE_BYTES).try_for_each(sink)
    }

    fn seal(&mut self) -> Result<()> {
        self.sealed = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.sealed = false;
        self.saving = None;
        self.go(true)
    }

    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        self.retired = Some(tracking);
    }
}
