//! What an observer may see of a migration under way, and how it asks for an end.

use crate::error::{Error, Result};
use crate::inquiry::{Inquiry, Keeper};
pub use crate::report::stage::Stage;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it stands.
    pub stage: Stage,
    /// The way that the data take, once it is chosen.
    #[serde(default)]
    pub link: String,
    /// Index of the round, from zero.
    pub round: u32,
    /// Pages that this round began with.
    pub round_pages: u64,
    /// Pages of this round posted so far.
    pub round_pages_sent: u64,
    /// What the link carried in the last round, in bytes a second.
    pub bytes_per_second: u64,
    /// What the guest wrote in the last round, in bytes a second.
    pub dirty_bytes_per_second: u64,
    /// Predicted downtime after the last round, in microseconds.
    pub predicted_downtime_us: u64,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            stage: Stage::Idle,
            link: String::new(),
            round: 0,
            round_pages: 0,
            round_pages_sent: 0,
            bytes_per_second: 0,
            dirty_bytes_per_second: 0,
            predicted_downtime_us: 0,
        }
    }
}

/// Shared by a migration and whoever watches it.
#[derive(Debug, Default, Clone)]
pub struct Monitor {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    cancelled: AtomicBool,
    inquiry: Mutex<Option<Inquiry>>,
    keeper: OnceLock<Arc<dyn Keeper>>,
}

impl Monitor {
    /// What can be seen now.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what can be seen.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Enters a stage.
    pub fn enter(&self, stage: Stage) {
        self.update(|p| p.stage = stage);
        crate::report::hold::at(stage);
    }

    /// Notes the way that the data take.
    pub fn take(&self, link: &str) {
        self.update(|p| p.link = link.into());
    }

    /// Leaves the question that a migration with the outcome `unknown` could not get an answer to.
    pub(crate) fn leave_inquiry(&self, inquiry: Inquiry) {
        *self.shared.inquiry.lock().unwrap_or_else(PoisonError::into_inner) = Some(inquiry);
    }

    /// After a migration with the outcome `unknown`: the question to go on asking, if Commit got no
    /// answer.
    #[must_use]
    pub fn take_inquiry(&self) -> Option<Inquiry> {
        self.shared.inquiry.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Has the question of this migration kept, for whoever comes after this process. The first
    /// keeper counts; one that is given after the migration has begun comes too late.
    pub fn keep_question_with(&self, keeper: Arc<dyn Keeper>) {
        let _ = self.shared.keeper.set(keeper);
    }

    /// Who keeps the question.
    pub(crate) fn keeper(&self) -> Option<&dyn Keeper> {
        self.shared.keeper.get().map(AsRef::as_ref)
    }

    /// Asks the migration to stop. It does so at its next step unless Commit has been sent.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// Fails if somebody asked for an end.
    pub fn check(&self) -> Result<()> {
        if self.shared.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
