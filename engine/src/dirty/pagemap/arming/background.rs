//! Disarming that outlasts whoever ordered it: of a terabyte it takes a minute, and nobody should
//! have to wait for it but who arms the same memory again.

use super::TrackedRange;
use crate::error::Result;
use crate::watch::Watch;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long one wait lasts before the watch is asked again.
const WATCH_EVERY: Duration = Duration::from_millis(50);

/// What is called at the end.
type After = Box<dyn FnOnce() + Send>;

/// Of one process.
struct Disarming {
    id: u64,
    pid: u32,
    after: Vec<After>,
}

/// What is under way in this process, and the number of the next.
static UNDER_WAY: Mutex<(Vec<Disarming>, u64)> = Mutex::new((Vec::new(), 0));
static ENDED: Condvar = Condvar::new();

fn under_way() -> MutexGuard<'static, (Vec<Disarming>, u64)> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Disarms, and closes the descriptor at the end. Returns when that is done, or after `patience`.
pub(super) fn disarm(pid: u32, uffd: OwnedFd, ranges: Vec<TrackedRange>, patience: Duration) {
    let until = Instant::now() + patience;
    let id = {
        let (disarming, next) = &mut *under_way();
        *next += 1;
        disarming.push(Disarming { id: *next, pid, after: Vec::new() });
        *next
    };
    let armed = Arc::new((uffd, ranges));
    let work = {
        let armed = Arc::clone(&armed);
        move || {
            super::disarm(armed.0.as_fd(), &armed.1);
            drop(armed);
            end(id);
        }
    };
    if std::thread::Builder::new().name("disarm".into()).spawn(work).is_err() {
        super::disarm(armed.0.as_fd(), &armed.1);
        drop(armed);
        return end(id);
    }
    // The last one closes it.
    drop(armed);
    let mut state = under_way();
    while state.0.iter().any(|disarming| disarming.id == id) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        state = ENDED.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn end(id: u64) {
    let mut state = under_way();
    let ended =
        state.0.iter().position(|disarming| disarming.id == id).map(|at| state.0.remove(at));
    drop(state);
    ENDED.notify_all();
    ended.into_iter().flat_map(|disarming| disarming.after).for_each(|after| after());
}

/// Waits until no memory of this process is being disarmed: it cannot be armed before.
pub(super) fn wait(pid: u32, watch: &mut Watch<'_>) -> Result<()> {
    loop {
        let state = under_way();
        if !state.0.iter().any(|disarming| disarming.pid == pid) {
            return Ok(());
        }
        drop(ENDED.wait_timeout(state, WATCH_EVERY).unwrap_or_else(PoisonError::into_inner));
        watch()?;
    }
}

/// Calls `after` once no memory of this process is being disarmed; at once if none is.
pub fn after_disarm(pid: u32, after: impl FnOnce() + Send + 'static) {
    let mut state = under_way();
    match state.0.iter_mut().rfind(|disarming| disarming.pid == pid) {
        Some(disarming) => disarming.after.push(Box::new(after)),
        None => {
            drop(state);
            after();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{PagemapSource, enable, own_userfaultfd};
    use super::super::Armed;
    use super::*;
    use crate::error::Error;
    use crate::memory::page::PAGE_BYTES;
    use pageferry_transport::MemoryRegion;
    use std::sync::mpsc;

    /// Memory that nobody touches: its windows are long and soon done.
    fn range(region: &MemoryRegion) -> TrackedRange {
        TrackedRange {
            process_address: region.as_ptr() as u64,
            bytes: region.len() as u64,
            first_page: 0,
            backing_page_bytes: PAGE_BYTES,
        }
    }

    #[test]
    fn arming_ends_when_the_watch_says_so_and_leaves_nothing_armed() {
        let region = MemoryRegion::anonymous(1 << 30).unwrap();
        let pid = std::process::id();
        let mut asked = 0;
        let mut watch = || {
            asked += 1;
            if asked < 3 { Ok(()) } else { Err(Error::Cancelled) }
        };
        let uffd = own_userfaultfd().unwrap();
        let ended = PagemapSource::watched(uffd, pid, vec![range(&region)], &mut watch);
        assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
        assert_eq!(asked, 3, "not asked on");
        // The kernel lets nobody else register what is still registered.
        PagemapSource::new(own_userfaultfd().unwrap(), pid, vec![range(&region)]).unwrap();
    }

    #[test]
    fn what_is_disarmed_in_the_background_is_waited_for_by_who_arms_it_again_and_by_who_asked() {
        let region = MemoryRegion::anonymous(8 << 30).unwrap();
        // No process has this number.
        const PID: u32 = u32::MAX;
        let arm = || {
            let uffd = own_userfaultfd().unwrap();
            enable(uffd.as_fd()).unwrap();
            Armed::new(uffd, PID, &[range(&region)], &mut || Ok(()))
        };
        let uffd = arm().unwrap().uffd.take().unwrap();
        disarm(PID, uffd, vec![range(&region)], Duration::ZERO);
        let (said, heard) = mpsc::channel();
        after_disarm(PID, move || said.send("ended").unwrap());
        // The kernel lets nobody register what is still registered.
        drop(arm().unwrap());
        assert_eq!(heard.recv_timeout(Duration::from_secs(20)), Ok("ended"));
        wait(PID, &mut || panic!("nothing is under way any more")).unwrap();
    }
}
