//! Guests of the built-in monitor, as their supervisor holds them: they live in its process and end
//! with it.

use crate::supervisor::claim::Claim;
use crate::supervisor::place::{Ended, IncomingVm, RunningVm, VmFactory, Vmm};
use crate::supervisor::record::Record;
use crate::supervisor::spawn;
use crate::vmm::console::OperatorConsole;
use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded, never};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{DestinationGuest, SourceGuest};
use pageferry_microvm::config::MachineConfig;
use pageferry_microvm::console::terminal::Terminal;
use pageferry_microvm::destination::KvmDestination;
use pageferry_microvm::source::{Boot, KvmSource};
use pageferry_microvm::vcpu::Ending;
use std::convert::Infallible;

/// A guest that runs in this process.
pub struct MicrovmRunning {
    // First, so that the terminal is given back before anything else is taken down.
    _terminal: Terminal,
    guest: KvmSource,
    /// Gone with this guest; see [`watch`].
    here: (Sender<Infallible>, Receiver<Infallible>),
}

impl MicrovmRunning {
    /// Boots a guest. It runs when this returns.
    pub fn start(config: &MachineConfig, boot: &Boot, operator: &OperatorConsole) -> Result<Self> {
        Self::new(KvmSource::start(config, boot, operator.console())?)
    }

    fn new(guest: KvmSource) -> Result<Self> {
        let terminal = OperatorConsole::connect(guest.machine().devices())?;
        Ok(Self { _terminal: terminal, guest, here: bounded(0) })
    }

    /// The guest itself.
    #[must_use]
    pub fn source(&self) -> &KvmSource {
        &self.guest
    }
}

impl RunningVm for MicrovmRunning {
    fn guest(&mut self) -> &mut dyn SourceGuest {
        &mut self.guest
    }

    fn vmm(&self) -> Vmm {
        Vmm::Kvm
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn record(&self) -> Option<Result<Record>> {
        None
    }

    fn ended(&self) -> Result<Receiver<()>> {
        let (sender, receiver) = bounded(1);
        let (ending, here) = (self.guest.ended(), self.here.1.clone());
        spawn("guest-end", move || {
            if watch(&ending, &here) {
                let _ = sender.send(());
            }
        })?;
        Ok(receiver)
    }

    fn is_sealed(&self) -> bool {
        self.guest.is_sealed()
    }

    fn is_new_here(&self) -> bool {
        false
    }

    fn look_after(&mut self) {}

    fn in_doubt(&mut self) -> bool {
        false
    }

    fn run_here(&mut self) -> Result<()> {
        self.guest.resume()
    }

    fn end_here(&mut self) -> Result<()> {
        // One that was never sealed is stopped, and ends with this process.
        if self.guest.is_sealed() { self.guest.end() } else { Ok(()) }
    }

    fn let_go(&mut self) {}

    fn reap(&mut self) -> Ended {
        match self.guest.ended().try_recv() {
            Ok(Ending::Reset) => Ended { status: 0, how: Some("it asked for a reset".into()) },
            Ok(Ending::Off) => Ended { status: 0, how: Some("it switched itself off".into()) },
            Ok(Ending::Failed(why)) => Ended { status: 1, how: Some(why) },
            Err(_) => Ended { status: 0, how: None },
        }
    }
}

/// Waits until a guest has ended, without taking its last words: the engine looks whether they are
/// there. Returns whether it has, and not just its holder.
fn watch(ending: &Receiver<Ending>, here: &Receiver<Infallible>) -> bool {
    loop {
        let mut either = Select::new();
        either.recv(ending);
        either.recv(here);
        either.ready();
        if !ending.is_empty() {
            return true;
        }
        if here.try_recv() == Err(TryRecvError::Disconnected) {
            return false;
        }
    }
}

/// A machine that waits to be filled.
pub struct MicrovmIncoming {
    guest: KvmDestination,
}

impl IncomingVm for MicrovmIncoming {
    type RunningVm = MicrovmRunning;

    fn guest(&mut self) -> &mut dyn DestinationGuest {
        &mut self.guest
    }

    fn vmm(&self) -> Vmm {
        Vmm::Kvm
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn ended(&self) -> Result<Receiver<()>> {
        // Nothing runs in it yet.
        Ok(never())
    }

    fn why_ended(&self) -> Error {
        Error::Guest("the machine ended while it waited for a guest".into())
    }

    fn end(self) {}

    fn into_hosted(self) -> Result<MicrovmRunning> {
        let guest = self.guest.into_source();
        MicrovmRunning::new(
            guest
                .ok_or_else(|| Error::Unknown("the guest that was received is not there".into()))?,
        )
    }
}

/// Makes machines that wait, all of one kind.
#[derive(Debug)]
pub struct MicrovmFactory {
    config: MachineConfig,
    operator: OperatorConsole,
}

impl MicrovmFactory {
    /// One for such machines.
    #[must_use]
    pub fn new(config: MachineConfig, operator: OperatorConsole) -> Self {
        Self { config, operator }
    }
}

impl VmFactory for MicrovmFactory {
    type IncomingVm = MicrovmIncoming;

    fn prepare(&mut self, _claim: &Claim) -> Result<MicrovmIncoming> {
        Ok(MicrovmIncoming { guest: KvmDestination::new(&self.config, self.operator.console())? })
    }
}
