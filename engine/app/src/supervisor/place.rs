//! What a supervisor needs of a guest besides moving it, whoever runs it.
//!
//! ```text
//!   receiving:  VmFactory --prepare--> Waiting --into_hosted--> RunningVm
//!   hosting:    RunningVm::guest is what migrates; the rest is its process, its end, and what the operator decides
//! ```

use crate::supervisor::claim::Claim;
use crate::supervisor::record::Record;
use crossbeam_channel::Receiver;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{DestinationGuest, SourceGuest};
use serde::{Deserialize, Serialize};

/// Who runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vmm {
    /// A QEMU process of its own.
    #[default]
    Qemu,
    /// This very process, with KVM.
    Kvm,
}

impl std::fmt::Display for Vmm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Qemu => "QEMU",
            Self::Kvm => "microvm",
        })
    }
}

/// How a guest came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The supervisor's exit status.
    pub status: u8,
    /// Words for it, if there are any.
    pub how: Option<String>,
}

/// A guest that is here.
pub trait RunningVm {
    /// What can be moved.
    fn guest(&mut self) -> &mut dyn SourceGuest;

    /// Who runs it.
    fn vmm(&self) -> Vmm;

    /// The process that it lives in.
    fn pid(&self) -> u32;

    /// Where it can be found after this supervisor's death; `None` if it dies with it.
    fn record(&self) -> Option<Result<Record>>;

    /// The monitor's settings as they are before a migration, for a later supervisor to put back.
    fn settings(&mut self) -> Option<serde_json::Value> {
        None
    }

    /// A channel that hears when it has ended by itself.
    fn ended(&self) -> Result<Receiver<()>>;

    /// Whether Commit may have been sent, so that only its answer, or the operator, may let it run.
    fn is_sealed(&self) -> bool;

    /// Whether [`Self::look_after`] has something to do soon after the guest was taken in or up.
    fn is_new_here(&self) -> bool;

    /// What is done now and then while nothing happens.
    fn look_after(&mut self);

    /// Whether the monitor itself says that the guest was stopped for a migration.
    fn in_doubt(&mut self) -> bool;

    /// The operator says that it may run here: it runs, whatever stopped it.
    fn run_here(&mut self) -> Result<()>;

    /// Ends it here: it runs elsewhere, or the operator says that it shall not run.
    fn end_here(&mut self) -> Result<()>;

    /// This supervisor leaves, and the guest goes on without one, if it can.
    fn let_go(&mut self);

    /// Takes away what is left of it. It has ended.
    fn reap(&mut self) -> Ended;
}

/// A guest's place, before the guest is in it.
pub trait IncomingVm {
    /// The guest that it becomes.
    type RunningVm: RunningVm;

    /// What can be filled.
    fn guest(&mut self) -> &mut dyn DestinationGuest;

    /// Who will run it.
    fn vmm(&self) -> Vmm;

    /// The process that it lives in.
    fn pid(&self) -> u32;

    /// A channel that hears when it has ended by itself.
    fn ended(&self) -> Result<Receiver<()>>;

    /// What to say of that.
    fn why_ended(&self) -> Error;

    /// Takes it away, with whatever runs it.
    fn end(self);

    /// The guest, which is this host's now.
    fn into_hosted(self) -> Result<Self::RunningVm>;
}

/// Makes places for guests: a fresh one after each that was thrown away.
pub trait VmFactory {
    /// Such a place.
    type IncomingVm: IncomingVm;

    /// Makes one. On failure nothing is left of it.
    fn prepare(&mut self, claim: &Claim) -> Result<Self::IncomingVm>;
}
