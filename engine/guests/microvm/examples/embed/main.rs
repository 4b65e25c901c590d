//! A virtual machine monitor of a few lines, built on kvm-ioctls, that moves its guest with
//! pageferry. This file is what an embedder writes, to be read from top to bottom; `vm.rs` is the
//! monitor. See docs/embedding.md.
//!
//! ```text
//!   cargo run -p pageferry-microvm --example embed
//!
//!   Source         the engine's trait for a guest that leaves
//!   Destination    the engine's trait for a machine that waits for one
//!   receive        takes in one guest
//!   move_guest     both in one process, over TCP, with a proof
//! ```

mod vm;

use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::dirty::DirtySource;
use pageferry_engine::dirty::kvm::KickVcpus;
use pageferry_engine::dirty::log::LogSource;
use pageferry_engine::dirty::ring::RingSource;
use pageferry_engine::guest::{
    DestinationGuest, Facts, FixedCosts, GuestDescription, Liveness, SourceGuest,
};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::net::choice::LinkChoice;
use pageferry_engine::report::Outcome;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::source::{MigrateOptions, migrate};
use pageferry_engine::watch::Watch;
use pageferry_engine::{Error, Result};
use pageferry_microvm::cpu::CpuProfile;
use pageferry_transport::MemoryRegion;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm::Vm;

/// For the source to connect.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Most device state: that of one vCPU, whose vector registers take 11 KiB at the most.
const STATE_BYTES_MAX: u64 = 64 << 10;

/// A guest that can leave.
struct Source {
    /// Kept by `retire`. Before the machine, which it looks at.
    retired: Option<Box<dyn DirtySource>>,
    vm: Vm,
    profile: CpuProfile,
    paused: bool,
    saved: Vec<u8>,
}

impl Source {
    fn start() -> Result<Self> {
        let vm = Vm::new()?;
        vm.boot()?;
        let profile = vm.profile()?;
        vm.vcpus.run(false)?;
        Ok(Self { retired: None, vm, profile, paused: false, saved: Vec::new() })
    }
}

impl SourceGuest for Source {
    // Refuse what cannot be moved: a device that is passed through, a guest that has ended.
    fn preflight(&mut self) -> Result<()> {
        (self.vm.vcpus.liveness())()
    }
    fn facts(&mut self) -> Result<Facts> {
        Ok(Facts {
            // What the destination's machine must equal; `platform` is for its `admit`.
            description: self.vm.describe(postcard::to_stdvec(&self.profile).unwrap_or_default()),
            // A bound: room for so much is set aside at both ends.
            state_bytes_max: STATE_BYTES_MAX,
            // A guess, from which the downtime is predicted.
            state_bytes_expected: 12 << 10,
            // Measured once for your monitor, in microseconds; these are guesses.
            fixed_costs: FixedCosts {
                pause_us: 100,
                sync_us: 0,
                save_us: 100,
                load_us: 200,
                resume_us: 50,
            },
            // True if you have a balloon, free page reporting or virtio-mem.
            may_discard: false,
        })
    }
    // The memory, as mapped for the lanes.
    fn memory(&self) -> &Arc<GuestMemory> {
        &self.vm.memory
    }
    // Asked between batches: fails once the guest has ended by itself.
    fn liveness(&self) -> Liveness {
        self.vm.vcpus.liveness()
    }
    // Whether your operator has it run; it will do the same at the destination.
    fn is_running(&mut self) -> Result<bool> {
        Ok(!self.paused)
    }
    // Logging on, for all memory slots. What takes long asks the watch whether to end.
    fn start_tracking(&mut self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
        let kick = Arc::clone(&self.vm.vcpus) as Arc<dyn KickVcpus>;
        Ok(match &self.vm.rings {
            Some(rings) => Box::new(RingSource::start(Arc::clone(rings), kick)?),
            None => Box::new(LogSource::watched(Arc::clone(&self.vm.slots), kick, watch)?),
        })
    }
    // Wait for transfers of disks and NICs into guest memory that are under way. The default pauses
    // the guest for it; this one has no devices.
    fn drain_io(&mut self) -> Result<()> {
        Ok(())
    }
    // Stop devices, then vCPUs: all at once, with the exits that are half done finished.
    fn pause(&mut self) -> Result<()> {
        self.paused = true;
        self.vm.vcpus.park()
    }
    // Save, or start threads that do; pages are pushed meanwhile.
    fn begin_save(&mut self) -> Result<()> {
        self.saved = self.vm.save(&self.profile)?;
        Ok(())
    }
    // Hand over what was saved, as it comes.
    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        sink(&self.saved)
    }
    // From here on a crash of yours must not let the guest run: note it where your restart looks.
    fn seal(&mut self) -> Result<()> {
        Ok(())
    }
    // Undo all since `arm`, from whatever state, also twice; the seal is lifted.
    fn resume(&mut self) -> Result<()> {
        if self.paused {
            self.vm.vcpus.run(true)?;
            self.paused = false;
        }
        Ok(())
    }
    // It runs at the destination. Keep this a while: taking it down would cost time now.
    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        self.retired = Some(tracking);
    }
}

/// A machine that waits for a guest.
struct Destination {
    vm: Vm,
    discarded: bool,
}

impl DestinationGuest for Destination {
    // What this machine is: the source's description must be equal, but for `platform`.
    fn describe(&self) -> GuestDescription {
        self.vm.describe(Vec::new())
    }
    // Compare what only you can: here, whether this processor has all that the guest was told of.
    fn admit(&mut self, theirs: &GuestDescription) -> Result<()> {
        let profile = postcard::from_bytes(&theirs.platform)
            .map_err(|e| Error::refused(format!("the guest's processor cannot be read: {e}")))?;
        self.vm.host.admit(&profile)
    }
    // The memory that is written from afar, all zeros before.
    fn memory(&self) -> &Arc<GuestMemory> {
        &self.vm.memory
    }
    // As at the source.
    fn liveness(&self) -> Liveness {
        self.vm.vcpus.liveness()
    }
    // All memory is here: read the state, and trust no byte of it.
    fn load(&mut self, state: &MemoryRegion, len: usize) -> Result<()> {
        let mut bytes = vec![0; len];
        state.read(0, &mut bytes)?;
        self.vm.restore(&bytes)
    }
    // Commit is here: it is yours now, also if you crash before it runs.
    fn seal(&mut self, _was_running: bool) -> Result<()> {
        Ok(())
    }
    // Let the vCPUs run, if they ran.
    fn run(&mut self, was_running: bool) -> Result<()> {
        if self.discarded {
            return Err(Error::Guest("a copy that was thrown away cannot run".into()));
        }
        if was_running {
            self.vm.vcpus.run(true)?;
        }
        Ok(())
    }
    // It must never run here: the source is told so, and lets it run there.
    fn discard(&mut self) -> Result<()> {
        self.discarded = true;
        self.vm.vcpus.park()
    }
}

/// Takes in one guest.
fn receive(listener: SessionListener) -> Result<Destination> {
    let mut guest = Destination { vm: Vm::new()?, discarded: false };
    // This memory is new. Where it was used before, this makes it zeros.
    guest.vm.memory.make_zero()?;
    let mut receiver = Receiver::new(listener, LinkChoice::default());
    let incoming = receiver
        .listener()
        .next(Instant::now() + CONNECT_MAX)
        .ok_or_else(|| Error::Timeout { what: "waiting for the source".into() })?;
    let served = receiver.serve(incoming, &mut guest, &mut || Ok(()));
    // A source that did not hear that the guest runs asks again.
    receiver.answer_afterwards();
    match served {
        Served::Received(_) => Ok(guest),
        Served::Nothing => Err(Error::refused("the source's guest was refused")),
        Served::Doubtful(e) | Served::Discarded(e) => Err(e),
    }
}

/// Starts a guest, moves it, and proves that it goes on where it stopped, with every page.
fn move_guest() -> Result<()> {
    let mut source = Source::start()?;
    println!("dirty pages by {}", if source.vm.rings.is_some() { "the rings" } else { "the log" });
    source.vm.wait_for_a_pass()?;

    let listener = SessionListener::open(SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    let mut options = MigrateOptions::to(listener.address.to_string());
    // For emulators of KVM; on hardware it takes a millisecond or two.
    options.downtime_us_max = 1_000_000;
    options.verify = true;
    let receiver = std::thread::spawn(move || receive(listener));
    let report = migrate(&mut source, &options, &Monitor::default());
    let destination = receiver
        .join()
        .unwrap_or_else(|_| Err(Error::Guest("the receiver's thread panicked".into())));
    println!("{report:#?}");
    if report.outcome != Outcome::Completed {
        return Err(Error::Guest(report.reason.unwrap_or_default()));
    }
    let left = source.vm.counters()?;
    // It runs there: release what it has here.
    source.retired = None;
    let Destination { vm, .. } = destination?;

    vm.wait_for_a_pass()?;
    vm.vcpus.park()?;
    let now = vm.counters()?;
    println!("the first counter stopped at {} there and is {} here", left[0], now[0]);
    if left[0] > 0 && left.iter().zip(&now).all(|(left, now)| now > left) {
        Ok(())
    } else {
        Err(Error::Guest(format!("the counters did not go on: {left:?}, {now:?}")))
    }
}

fn main() -> ExitCode {
    match move_guest() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("embed: {}", e.chain());
            ExitCode::FAILURE
        }
    }
}
