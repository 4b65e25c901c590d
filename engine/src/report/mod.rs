//! What a migration did, in numbers: the JSON of `pageferry migrate --json`.

pub mod hold;
pub mod progress;
pub mod stage;

use crate::memory::lost_page::LostPage;
use serde::{Deserialize, Serialize};

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The guest runs at the source, unless its own QEMU ended.
    Aborted,
    /// The guest is stopped at the source: Commit was sent and no answer came, or it could not be
    /// let run again.
    Unknown,
}

/// One pass over the pages that were dirty when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// From zero.
    pub index: u32,
    /// Pages sent.
    pub pages: u64,
    /// Bytes of those pages.
    pub bytes: u64,
    /// From the first post to the fence's completion, in microseconds.
    pub elapsed_us: u64,
    /// Pages that the guest wrote meanwhile.
    pub dirtied_pages: u64,
    /// The downtime that the policy predicted after this round, in microseconds.
    pub predicted_downtime_us: u64,
}

/// The time in which the guest ran nowhere, in slices that follow one another. All in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// From before the vCPUs were told to stop until all of them ran at the destination, and the
    /// way of its word of that to the source: half a round trip longer than what the guest lived
    /// through. What passed at the destination between the two is left out.
    pub total: u64,
    /// Stopping the vCPUs.
    pub pause: u64,
    /// Asking which pages were written last, before and after the save.
    pub sync: u64,
    /// Posting those pages, and waiting until they and the state had arrived.
    pub push: u64,
    /// The rest of saving the device state, which goes on while pages are posted.
    pub save: u64,
    /// Loading the device state at the destination.
    pub load: u64,
    /// Digests of all memory on both sides, with `--verify`.
    pub verify: u64,
    /// Control messages: what is left of Prepare..Ready and Commit..Running.
    pub commit: u64,
    /// Letting the vCPUs run at the destination.
    pub resume: u64,
}

/// The whole story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not complete.
    pub reason: Option<String>,
    /// Whether it was refused before anything was touched (exit status 2).
    #[serde(default)]
    pub refused: bool,
    /// What carried the bytes: `rdma`, `tcp`, `loopback`.
    pub transport: String,
    /// The way that was taken and, where it is TCP, why not RDMA, in one line.
    #[serde(default)]
    pub link: String,
    /// Why a first attempt by RDMA was given up, where there was one.
    #[serde(default)]
    pub fell_back: Option<String>,
    /// Number of lanes.
    pub lanes: u32,
    /// Size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of guest memory and device state written to the destination.
    pub bytes_written: u64,
    /// Bytes of guest memory that were never sent: never touched (and so never read), or zero.
    pub bytes_skipped: u64,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// Pages that were touched first right before the pause and went by the staging region.
    #[serde(default)]
    pub staged_pages: u64,
    /// Registrations of memory with the RDMA device, at both ends, while the guest was paused.
    #[serde(default)]
    pub registrations_in_downtime: u64,
    /// Pages that the hardware of the source's host had lost: the reason of the abort, or moved as
    /// zeros.
    #[serde(default)]
    pub lost_pages: Vec<LostPage>,
    /// Control messages, both directions.
    pub control_messages: u64,
    /// From the request until the guest ran at the destination, in microseconds.
    pub total_us: u64,
    /// The rounds while the guest ran.
    pub rounds: Vec<Round>,
    /// The slices of the downtime.
    pub downtime_us: Downtime,
    /// The prediction on which the switchover was decided, in microseconds.
    pub predicted_downtime_us: u64,
    /// Whether both sides digested all memory and agreed; null where it was not asked for.
    pub verified: Option<bool>,
}

impl MigrationReport {
    /// A report of nothing yet.
    #[must_use]
    pub fn new(memory_bytes: u64) -> Self {
        Self {
            outcome: Outcome::Aborted,
            reason: None,
            refused: false,
            transport: String::new(),
            link: String::new(),
            fell_back: None,
            lanes: 0,
            memory_bytes,
            bytes_written: 0,
            bytes_skipped: 0,
            state_bytes: 0,
            staged_pages: 0,
            registrations_in_downtime: 0,
            lost_pages: Vec::new(),
            control_messages: 0,
            total_us: 0,
            rounds: Vec::new(),
            downtime_us: Downtime::default(),
            predicted_downtime_us: 0,
            verified: None,
        }
    }

    /// Exit status of the commands: 0 completed, 1 aborted, 2 refused, 3 unknown.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self.outcome {
            Outcome::Completed => 0,
            Outcome::Aborted if self.refused => 2,
            Outcome::Aborted => 1,
            Outcome::Unknown => 3,
        }
    }
}
