//! Wakes a thread that waits for an order.

use crate::vcpu::LEAVE_MAX;
use pageferry_engine::error::{Error, Result};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Rung by vCPU threads that somebody waits for.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    lock: Mutex<()>,
    rung: Condvar,
}

/// Of values that are whole at every moment, so that a panic elsewhere spoils nothing.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bell {
    pub(crate) fn ring(&self) {
        // Taken and given back, so that nobody who has just looked misses it.
        drop(lock(&self.lock));
        self.rung.notify_all();
    }

    /// Waits until `done`.
    pub(crate) fn wait(&self, what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + LEAVE_MAX;
        let mut guard = lock(&self.lock);
        while !done() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: what.into() });
            }
            (guard, _) =
                self.rung.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}
