//! Huge pages of 2 MiB that a test has for itself.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Reserved huge pages, given back at the end. One test of a process has some at a time.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

    fn count(path: &str) -> Option<u64> {
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// So many free ones.
    ///
    /// # Errors
    /// Why there are none to be had.
    pub fn reserve(pages: u64) -> Result<Self, String> {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = Self::count(Self::RESERVED).ok_or("this kernel has no huge pages of 2 MiB")?;
        let kept = Self { before, _alone: alone };
        if !Path::new(Self::RESERVED).metadata().is_ok_and(|m| !m.permissions().readonly()) {
            return Err("/sys is read-only".into());
        }
        std::fs::write(Self::RESERVED, (before + pages).to_string())
            .map_err(|e| format!("reserving huge pages needs root: {e}"))?;
        match Self::count(Self::FREE) {
            Some(free) if free >= pages => Ok(kept),
            free => Err(format!("the kernel found {free:?} of {pages} huge pages of 2 MiB")),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::RESERVED, self.before.to_string());
    }
}
