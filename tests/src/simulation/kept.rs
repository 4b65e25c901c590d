//! The question of a migration, kept beyond its process as the files of a runtime directory would
//! be.

use super::world::{Process, World};
use pageferry_engine::inquiry::{Keeper, Question};
use pageferry_engine::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What lies there for whoever comes next.
#[derive(Debug, Default)]
pub struct Kept {
    ahead: Option<Question>,
    found: Option<Question>,
}

/// One process' hand on it. What a dead process does leaves no trace.
pub struct Hand {
    world: Arc<World>,
    process: Process,
    kept: Arc<Mutex<Kept>>,
}

impl std::fmt::Debug for Hand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hand").field("process", &self.process).finish_non_exhaustive()
    }
}

impl Hand {
    /// The hand of this process.
    #[must_use]
    pub fn of(world: &Arc<World>, process: Process, kept: &Arc<Mutex<Kept>>) -> Self {
        Self { world: Arc::clone(world), process, kept: Arc::clone(kept) }
    }

    /// What this process finds.
    #[must_use]
    pub fn found(&self) -> Option<Question> {
        lock(&self.kept).found.clone()
    }

    fn step(&self, name: &str) -> Result<()> {
        self.world.step(name);
        if self.world.is_dead(self.process) {
            return Err(Error::Guest("its supervisor is dead".into()));
        }
        Ok(())
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper for Hand {
    fn forget(&self) -> Result<()> {
        self.step("to forget")?;
        *lock(&self.kept) = Kept::default();
        self.step("forgot")
    }

    fn write_ahead(&self, question: &Question) -> Result<()> {
        self.step("to write ahead")?;
        lock(&self.kept).ahead = Some(question.clone());
        self.step("wrote ahead")
    }

    fn reveal(&self) -> Result<()> {
        self.step("to reveal")?;
        {
            let mut kept = lock(&self.kept);
            kept.found = kept.ahead.take().or(kept.found.take());
        }
        self.step("revealed")
    }
}
