//! Rings and log on real KVM, with a vCPU that writes while its pages are taken.

use super::payload::{Payload, Stopped, Writes};
use super::tests::kvm_is_missing;
use crate::dirty::kvm::KickVcpus;
use crate::dirty::log::LogSource;
use crate::dirty::ring::{RingSet, RingSource};
use crate::dirty::{DirtySource, Synced};
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::page::PAGE_BYTES;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// For everything of one test; the lab machine is slow.
const TEST_MAX: Duration = Duration::from_secs(120);

/// Until a vCPU is called out of the guest once more.
const KICK_EVERY: Duration = Duration::from_millis(20);

/// The thread that runs a payload, once it is started.
#[derive(Default)]
struct Runner {
    /// How often the vCPU was outside the guest, and who waits for the next time.
    turns: Arc<(Mutex<u64>, Condvar)>,
    done: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<Result<Payload>>>>,
}

impl Runner {
    fn run(&self, mut payload: Payload) {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN() + 1, nothing).expect("a handler");
        let (turns, done, stop) =
            (Arc::clone(&self.turns), Arc::clone(&self.done), Arc::clone(&self.stop));
        let thread = thread::spawn(move || {
            let ran = loop {
                match payload.run(&stop) {
                    Ok(Stopped::Done) => break Ok(payload),
                    Ok(_) => {
                        *turns.0.lock().expect("lock") += 1;
                        turns.1.notify_all();
                    }
                    Err(e) => break Err(e),
                }
            };
            done.store(true, Ordering::SeqCst);
            drop(turns.0.lock().expect("lock"));
            turns.1.notify_all();
            ran
        });
        *self.thread.lock().expect("lock") = Some(thread);
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    fn end(&self) -> Payload {
        let thread = self.thread.lock().expect("lock").take().expect("once");
        thread.join().expect("no panic").expect("the payload ran to its end")
    }
}

impl KickVcpus for Runner {
    fn kick_all(&self) -> Result<()> {
        let thread = self.thread.lock().expect("lock");
        let Some(thread) = &*thread else { return Ok(()) };
        let mut turns = self.turns.0.lock().expect("lock");
        let (before, until) = (*turns, Instant::now() + TEST_MAX);
        while *turns == before && !self.is_done() {
            // Again and again: one that comes before the vCPU enters the guest is missed. Not too
            // often: real-time signals are queued, and a thread that handles them does nothing
            // else. SAFETY: the thread is not joined, so its handle is valid, and the signal has a
            // handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN() + 1) };
            turns = self.turns.1.wait_timeout(turns, KICK_EVERY).expect("lock").0;
            if Instant::now() > until {
                self.stop.store(true, Ordering::SeqCst);
                return Err(Error::Timeout { what: "calling a vCPU out of the guest".into() });
            }
        }
        Ok(())
    }
}

/// Harvests while the guest writes, and copies what is told, as a migration does. At the end the
/// copy must be the memory. Returns how many pages were told in how many syncs.
fn copy_while_it_writes(
    mut payload: Payload,
    writes: Writes,
    start: impl FnOnce(&Payload, Arc<dyn KickVcpus>) -> Result<Box<dyn DirtySource>>,
) -> (u64, u64) {
    let (memory, pages) = (payload.memory(), payload.pages());
    let count = |page: u64| {
        let mut bytes = [0; 4];
        memory.read((page * PAGE_BYTES) as usize, &mut bytes).expect("in memory");
        u32::from_le_bytes(bytes)
    };
    let before: Vec<_> = (0..pages).map(count).collect();
    let (mut copy, mut told, mut syncs) = (before.clone(), 0, 0);
    payload.begin(&writes).expect("registers");
    let runner = Arc::new(Runner::default());
    let mut source = start(&payload, Arc::clone(&runner) as Arc<dyn KickVcpus>).expect("followed");
    runner.run(payload);
    loop {
        let last = runner.is_done();
        source.drain_early().expect("drained");
        let mut dirty = DirtyBitmap::new(pages);
        told += source.sync(&mut dirty).expect("sync").pages;
        syncs += 1;
        dirty.runs(1).for_each(|run| copy[run.first.0 as usize] = count(run.first.0));
        if last {
            break;
        }
    }
    let payload = runner.end();
    // Pages that were not written are as they were, the others have been written as often as they
    // should.
    let mut expected = before;
    writes.pages().for_each(|page| expected[page as usize] += writes.passes);
    assert!(
        copy == expected,
        "{} pages differ",
        copy.iter().zip(&expected).filter(|(a, b)| a != b).count()
    );
    drop(source);
    drop(payload);
    (told, syncs)
}

#[test]
fn the_log_loses_no_write_of_a_running_vcpu() {
    if kvm_is_missing("the_log_loses_no_write_of_a_running_vcpu") {
        return;
    }
    let payload = Payload::new(1000, None).expect("a machine");
    let writes = Writes { first: 3, end: 1000, stride: 3, passes: 200 };
    let (told, syncs) = copy_while_it_writes(payload, writes, |payload, kick| {
        Ok(Box::new(LogSource::start(payload.slots(), kick)?))
    });
    println!("{told} pages in {syncs} syncs");
    assert!(told >= writes.pages().count() as u64);
}

#[test]
#[ignore = "needs rings that are right: the lab machine"]
fn lab_a_small_ring_loses_no_write_of_a_running_vcpu() {
    let payload = Payload::new(8000, Some(256)).expect("a machine");
    let (_, set) = payload.rings().expect("rings");
    let writes = Writes { first: 3, end: 8000, stride: 3, passes: 20 };
    let (told, syncs) = copy_while_it_writes(payload, writes, |payload, kick| {
        let (_, set) = payload.rings().expect("rings");
        Ok(Box::new(RingSource::start(set, kick)?))
    });
    println!("{told} pages in {syncs} syncs, {} times full", set.full_exits());
    assert!(told >= writes.pages().count() as u64 && set.full_exits() > 0);
}

/// Has the guest write, and returns what is told of it, but for the page that it executes: KVM maps
/// a page that is read for the first time as writable where it can, and tells it.
fn told_of(payload: &mut Payload, source: &mut dyn DirtySource, writes: &Writes) -> Vec<u64> {
    payload.begin(writes).expect("registers");
    while payload.run(&AtomicBool::new(false)).expect("the payload runs") != Stopped::Done {}
    let mut dirty = DirtyBitmap::new(payload.pages());
    source.sync(&mut dirty).expect("sync");
    dirty.runs(1).map(|run| run.first.0).filter(|page| *page != 0).collect()
}

fn exactly_what_is_written_is_told(payload: &mut Payload, source: &mut dyn DirtySource) {
    for (first, stride) in [(3, 3), (4, 3), (4, 1), (0x40, 0x40), (3, 3)] {
        let writes = Writes { first, end: payload.pages(), stride, passes: 1 };
        assert_eq!(told_of(payload, source, &writes), writes.pages().collect::<Vec<_>>());
    }
    let mut dirty = DirtyBitmap::new(payload.pages());
    assert_eq!(source.sync(&mut dirty).expect("sync"), Synced { pages: 0 });
}

#[test]
fn the_log_tells_exactly_what_is_written() {
    if kvm_is_missing("the_log_tells_exactly_what_is_written") {
        return;
    }
    let mut payload = Payload::new(1000, None).expect("a machine");
    let mut source =
        LogSource::start(payload.slots(), Arc::new(Runner::default())).expect("followed");
    exactly_what_is_written_is_told(&mut payload, &mut source);
}

#[test]
#[ignore = "needs rings that are right: the lab machine"]
fn lab_rings_tell_exactly_what_is_written_though_they_overflow() {
    let mut payload = Payload::new(4000, Some(256)).expect("a machine");
    let (enabled, set) = payload.rings().expect("rings");
    let mut source =
        RingSource::start(Arc::clone(&set), Arc::new(Runner::default())).expect("followed");
    exactly_what_is_written_is_told(&mut payload, &mut source);
    assert!(
        set.full_exits() >= 4000 / u64::from(enabled.entries()),
        "{} times full",
        set.full_exits()
    );
}

#[test]
#[ignore = "needs rings that are right: the lab machine"]
fn lab_a_vcpu_runs_on_when_tracking_ends_with_its_ring_full_and_can_be_followed_again() {
    let mut payload = Payload::new(4000, Some(256)).expect("a machine");
    let (_, set) = payload.rings().expect("rings");
    let writes = Writes { first: 16, end: 4000, stride: 1, passes: 3 };
    for _ in 0..2 {
        let mut source =
            RingSource::start(Arc::clone(&set), Arc::new(Runner::default())).expect("followed");
        assert!(
            RingSource::start(Arc::clone(&set), Arc::new(Runner::default())).is_err(),
            "followed twice"
        );
        payload.begin(&writes).expect("registers");
        // Once round, so that entries are left in it.
        let never = AtomicBool::new(false);
        assert_eq!(payload.run(&never).expect("the payload runs"), Stopped::Full);
        drop(source);
        while payload.run(&never).expect("the payload runs") != Stopped::Done {}
        source =
            RingSource::start(Arc::clone(&set), Arc::new(Runner::default())).expect("followed");
        let told = told_of(&mut payload, &mut source, &Writes { passes: 1, ..writes });
        assert_eq!(told, writes.pages().collect::<Vec<_>>());
    }
}

#[test]
#[ignore = "needs rings that are right: the lab machine"]
fn lab_a_machine_with_rings_is_refused_by_the_log_and_one_with_a_vcpu_by_the_rings() {
    let payload = Payload::new(100, Some(256)).expect("a machine");
    let error = LogSource::start(payload.slots(), Arc::new(Runner::default())).expect_err("no log");
    assert!(error.to_string().contains("no dirty log"), "{error}");
    let payload = Payload::new(100, None).expect("a machine");
    let error = RingSet::enable(payload.slots().vm(), 256).expect_err("a vCPU is there");
    assert!(error.to_string().contains("vCPUs or rings already"), "{error}");
}
