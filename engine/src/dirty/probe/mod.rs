//! Which of KVM's two ways to follow writes can be trusted on this host: a machine of a few pages
//! writes known ones, and what the rings or the log tell is compared with it.
//!
//! A capability alone says too little. Where KVM is emulated or runs under another hypervisor (PVM,
//! say), vCPUs may be carried on by an emulator that fills a ring beyond its end: entries are lost,
//! and with them pages of a guest. See docs/decisions/0019-ring-or-log.md.

#[cfg(test)]
mod on_kvm;
pub(in crate::dirty) mod payload;
#[cfg(test)]
mod tests;

use super::DirtySource;
use super::kvm::{self, KickVcpus};
use super::log::LogSource;
use super::ring::RingSource;
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use payload::{Payload, Stopped, Writes};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// For the rings or the log to be tried. It takes some 10 ms, and in an emulated machine a hundred
/// times as long.
const TRIAL_MAX: Duration = Duration::from_secs(20);

/// For a vCPU to leave the guest when it is told to, after the time is up.
const LEAVE_MAX: Duration = Duration::from_secs(2);
/// It is told so again and again: a signal that comes just before the vCPU enters the guest is
/// missed.
const TELL_EVERY: Duration = Duration::from_millis(20);

/// Entries of the ring that is tried: the smallest.
const ENTRIES: u32 = 256;
/// How often the pages that are written in one go would fill the ring.
const OVERFLOWS: u64 = 4;
/// Between two pages that are written, so that one which is reported by mistake shows. Odd, and no
/// power of two.
const STRIDE_PAGES: u64 = 3;
/// Times that each page is written.
const PASSES: u32 = 2;

/// What can be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// The rings told what was written.
    Ring {
        /// Most entries of a ring.
        entries_max: u32,
        /// See [`super::ring::EnabledRings::acquire_release`].
        acquire_release: bool,
    },
    /// The log told what was written, and the rings did not, or there are none.
    Log {
        /// What is wrong with the rings.
        why: String,
    },
}

/// What can be trusted on this host; tried once a process.
///
/// # Errors
/// [`Error::Refused`] if there is no KVM, or neither can be trusted.
pub fn trust() -> Result<Trust> {
    static TRUST: OnceLock<Result<Trust, String>> = OnceLock::new();
    TRUST.get_or_init(|| try_both().map_err(|e| e.chain())).clone().map_err(Error::Refused)
}

fn try_both() -> Result<Trust> {
    kvm::open()?;
    let why = match in_time("dirty rings", try_rings) {
        Ok(trust) => return Ok(trust),
        Err(e) => e.chain(),
    };
    in_time("dirty log", try_log).map_err(|log| {
        Error::refused(format!(
            "KVM does not tell which pages a guest writes: {why}; and the log: {}",
            log.chain()
        ))
    })?;
    Ok(Trust::Log { why })
}

/// Whether the rings tell every page.
fn try_rings(stop: &AtomicBool) -> Result<Trust> {
    let mut payload = Payload::new(memory_pages(u64::from(ENTRIES.max(1024))), Some(ENTRIES))?;
    let (enabled, set) =
        payload.rings().ok_or_else(|| Error::Guest("a machine without rings".into()))?;
    let source = RingSource::start(set, Arc::new(Outside))?;
    compare(&mut payload, Box::new(source), stop)?;
    Ok(Trust::Ring {
        entries_max: enabled.entries_max(),
        acquire_release: enabled.acquire_release(),
    })
}

/// Whether the log does.
fn try_log(stop: &AtomicBool) -> Result<()> {
    let mut payload = Payload::new(memory_pages(u64::from(ENTRIES)), None)?;
    let source = LogSource::start(payload.slots(), Arc::new(Outside))?;
    compare(&mut payload, Box::new(source), stop)
}

/// Memory in which a ring of so many entries can be filled that often.
fn memory_pages(entries: u64) -> u64 {
    Payload::CODE_PAGES + entries * OVERFLOWS * STRIDE_PAGES
}

/// Has the machine write pages, other pages, and the first again, and looks whether each time those
/// are told.
fn compare(
    payload: &mut Payload,
    mut source: Box<dyn DirtySource>,
    stop: &AtomicBool,
) -> Result<()> {
    // The last once more: pages that were reported are protected again.
    for shift in [0, 1, 0] {
        let writes = Writes {
            first: Payload::CODE_PAGES + shift,
            end: payload.pages(),
            stride: STRIDE_PAGES,
            passes: PASSES,
        };
        payload.begin(&writes)?;
        while payload.run(stop)? != Stopped::Done {}
        let mut told = DirtyBitmap::new(payload.pages());
        source.sync(&mut told)?;
        let (missing, count) =
            (writes.pages().filter(|page| !told.contains(*page)).count(), writes.pages().count());
        if missing > 0 {
            return Err(Error::Guest(format!(
                "of {count} pages that a guest wrote, {missing} were not reported"
            )));
        }
    }
    Ok(())
}

/// The vCPU and who syncs are one thread: it is outside the guest.
struct Outside;

impl KickVcpus for Outside {
    fn kick_all(&self) -> Result<()> {
        Ok(())
    }
}

/// Does it on a thread of its own, which is called out of the guest when the time is up, and left
/// behind if it does not come.
fn in_time<T: Send + 'static>(
    what: &str,
    trial: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static,
) -> Result<T> {
    let late = || Error::Timeout { what: format!("trying KVM's {what}") };
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stop);
    let (tell, told) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            let _ = tell.send(trial(&stopping));
        })
        .map_err(|e| Error::os("starting a thread to try KVM", e))?;
    let answer = told.recv_timeout(TRIAL_MAX);
    stop.store(true, Ordering::SeqCst);
    match answer {
        Ok(answer) => return answer,
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            return Err(Error::Guest(format!("the thread that tries KVM's {what} panicked")));
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {}
    }
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // Not the one that moves a guest's vCPUs, which has a handler of its own.
    let signal = SIGRTMIN() + 1;
    if register_signal_handler(signal, nothing).is_ok() {
        let until = Instant::now() + LEAVE_MAX;
        while !thread.is_finished() && Instant::now() < until {
            // SAFETY: the thread is not joined, so its handle is valid, and the signal has a
            // handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal) };
            let _ = told.recv_timeout(TELL_EVERY);
        }
    }
    Err(late())
}
