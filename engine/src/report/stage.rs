//! Where a migration stands.

use serde::{Deserialize, Serialize};

/// Where a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Nothing yet.
    Idle,
    /// Connections, checks, tracking.
    Setup,
    /// Rounds, while the guest runs.
    Rounds,
    /// The guest is paused.
    Switchover,
    /// Commit has been sent.
    Committed,
    /// It is over.
    Done,
}
