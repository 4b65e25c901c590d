//! A vCPU and its thread: runs it, parks it, kicks it.
//!
//! ```text
//!   spawn --> parked -- run() --> in the guest <--> exits served
//!               ^                      |  a kick: outside once, and in again
//!               +------- park() -------+  the pending exit is finished first
//! ```
//!
//! A vCPU is told what it should do by a flag that it reads before each entry, and a signal makes it read it:
//! the handler sets `immediate_exit`, so that a signal that comes between the look at the flag and KVM_RUN is not
//! lost (Linux, virt/kvm/api.rst, 5: `immediate_exit`).

use crate::dirty::kvm::KickVcpus;
use crate::dirty::ring::KVM_EXIT_DIRTY_RING_FULL;
use crate::error::{Error, Result};
use crate::guest::Liveness;
use crossbeam_channel::{Receiver, SendError, Sender, bounded, unbounded};
use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

#[cfg(test)]
mod tests;

/// For all vCPUs to leave the guest. Microseconds on hardware; an emulator of KVM may finish a long
/// instruction first, and an overcommitted host may not schedule the thread.
const LEAVE_MAX: Duration = Duration::from_secs(10);
/// For what a parked vCPU is asked to do, state-saving ioctls all.
const ASK_MAX: Duration = Duration::from_secs(10);

/// How a guest came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It asked for a reset: a clean end, as nothing boots it anew.
    Reset,
    /// It switched itself off.
    Off,
    /// Something went wrong in it or under it.
    Failed(String),
}

/// What serves a vCPU's exits.
pub trait Exits: Send + Sync {
    /// The guest reads a port.
    fn port_read(&self, port: u16, data: &mut [u8]);

    /// The guest writes a port; perhaps its last act.
    fn port_write(&self, port: u16, data: &[u8]) -> Option<Ending>;

    /// This vCPU's dirty ring is full.
    fn ring_full(&self, vcpu: usize) -> Result<()>;
}

/// What a vCPU's thread should be doing.
const RUN: u8 = 0;
const PARK: u8 = 1;
const END: u8 = 2;

/// What a vCPU's thread and its owner both see.
#[derive(Debug)]
struct Shared {
    wanted: AtomicU8,
    /// How often it has come out of the guest.
    turns: AtomicU64,
    /// It is out of the guest and stays so until its owner says otherwise.
    parked: AtomicBool,
    /// Somebody waits for its next turn.
    watched: AtomicBool,
    /// When it was last let run, and began to.
    began: Mutex<Option<Instant>>,
}

/// Rung by vCPU threads that somebody waits for.
#[derive(Debug, Default)]
struct Bell {
    lock: Mutex<()>,
    rung: Condvar,
}

/// Of values that are whole at every moment, so that a panic elsewhere spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bell {
    fn ring(&self) {
        // Taken and given back, so that nobody who has just looked misses it.
        drop(lock(&self.lock));
        self.rung.notify_all();
    }

    /// Waits until `done`.
    fn wait(&self, what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + LEAVE_MAX;
        let mut guard = lock(&self.lock);
        while !done() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: what.into() });
            }
            (guard, _) = self.rung.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

/// What a parked vCPU's thread is asked to do with it.
pub type Task<T> = Box<dyn FnOnce(&mut VcpuFd) -> Result<T> + Send>;

enum Order {
    /// Run, and first pass the order on to the next of the rest. Each thread wakes one other: if a caller woke all of them,
    /// the first could take the processor from it, and the others would stand still for a time slice longer.
    Run {
        stood: bool,
        rest: Vec<Sender<Order>>,
    },
    Do(Box<dyn FnOnce(&mut VcpuFd) + Send>),
}

/// One vCPU's thread, as its owner holds it. Dropping it ends the thread.
struct Vcpu {
    shared: Arc<Shared>,
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

/// All vCPUs of a machine.
pub struct Vcpus {
    vcpus: Vec<Vcpu>,
    bell: Arc<Bell>,
    ending: Receiver<Ending>,
    /// Stays so, whoever hears of the ending.
    ended: Arc<AtomicBool>,
}

thread_local! {
    /// The `kvm_run` of this thread's vCPU, for the signal handler. Made at compile time and never dropped, so
    /// that a handler may read it at any moment.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.with(Cell::get);
    if !run.is_null() {
        // SAFETY: the mapping lives as long as the thread has it here ([`Registered`]), and a byte that the kernel
        // reads is written by this thread alone.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

/// Has this thread's `kvm_run` known to the signal handler for as long as it lives.
struct Registered;

impl Registered {
    fn new(vcpu: &mut VcpuFd) -> Self {
        KVM_RUN.with(|run| run.set(vcpu.get_kvm_run()));
        Self
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        KVM_RUN.with(|run| run.set(null_mut()));
    }
}

fn install_handler() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(|e| Error::os("installing the signal that calls vCPUs out of the guest", e));
    });
    result
}

impl Vcpus {
    /// Starts a parked thread for each vCPU.
    pub fn spawn(fds: Vec<VcpuFd>, exits: &Arc<dyn Exits>) -> Result<Self> {
        install_handler()?;
        let (sender, ending) = bounded(fds.len().max(1));
        let bell = Arc::new(Bell::default());
        let ended = Arc::new(AtomicBool::new(false));
        let vcpus = Vec::with_capacity(fds.len());
        let mut all = Self { vcpus, bell: Arc::clone(&bell), ending, ended: Arc::clone(&ended) };
        for (index, fd) in fds.into_iter().enumerate() {
            let shared = Arc::new(Shared {
                wanted: AtomicU8::new(PARK),
                turns: AtomicU64::new(0),
                parked: AtomicBool::new(true),
                watched: AtomicBool::new(false),
                began: Mutex::new(None),
            });
            let (orders, inbox) = unbounded();
            let mut worker = Worker {
                index,
                fd,
                shared: Arc::clone(&shared),
                bell: Arc::clone(&bell),
                exits: Arc::clone(exits),
                ending: sender.clone(),
                ended: Arc::clone(&ended),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu {index}"))
                .spawn(move || worker.work(&inbox))
                .map_err(|e| Error::os("starting a vCPU's thread", e))?;
            all.vcpus.push(Vcpu { shared, orders: Some(orders), thread: Some(thread) });
        }
        Ok(all)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }

    /// Hears how the guest ends, if it does by itself.
    #[must_use]
    pub fn ending(&self) -> &Receiver<Ending> {
        &self.ending
    }

    /// A check, usable from anywhere, that the guest has not ended by itself.
    #[must_use]
    pub fn liveness(&self) -> Liveness {
        let ended = Arc::clone(&self.ended);
        Arc::new(move || {
            if ended.load(Ordering::SeqCst) {
                Err(Error::Guest("the guest has ended".into()))
            } else {
                Ok(())
            }
        })
    }

    /// Lets all of them run. `stood` if they stood still before: their guest is told, so that its watchdogs do not bark.
    pub fn run(&self, stood: bool) -> Result<()> {
        // Looked at first: all of them run, or none.
        if self.vcpus.iter().any(|vcpu| vcpu.thread.as_ref().is_none_or(JoinHandle::is_finished)) {
            return Err(thread_ended());
        }
        let parked = self.vcpus.iter().all(Vcpu::is_parked);
        for vcpu in &self.vcpus {
            *lock(&vcpu.shared.began) = None;
            vcpu.shared.wanted.store(RUN, Ordering::SeqCst);
            // Before the order: from here on a kick must reach it.
            vcpu.shared.parked.store(false, Ordering::SeqCst);
        }
        let orders = self.vcpus.iter().rev().filter_map(|vcpu| vcpu.orders.clone());
        if parked {
            run_next(stood, orders.collect());
        } else {
            // One that never came out to be parked reads no orders, and would not pass one on.
            orders.for_each(|orders| run_next(stood, vec![orders]));
        }
        Ok(())
    }

    /// Since when all of them run: when the last of them began, after [`Self::run`]. `None` if one has not yet.
    #[must_use]
    pub fn running_since(&self) -> Option<Instant> {
        let began: Option<Vec<Instant>> = self.vcpus.iter().map(|vcpu| *lock(&vcpu.shared.began)).collect();
        began?.into_iter().max()
    }

    /// Calls all of them out of the guest together, and returns when they are parked: nothing that they began is
    /// half done, and they write no memory.
    pub fn park(&self) -> Result<()> {
        for vcpu in &self.vcpus {
            vcpu.shared.wanted.store(PARK, Ordering::SeqCst);
        }
        for vcpu in &self.vcpus {
            vcpu.signal();
        }
        self.bell.wait("stopping the vCPUs", || self.vcpus.iter().all(Vcpu::is_parked))
    }

    /// Asks every parked vCPU to do something, all at once; the answers in order.
    pub fn ask_all<T: Send + 'static>(&self, mut task: impl FnMut(usize) -> Task<T>) -> Pending<T> {
        let answers = self.vcpus.iter().enumerate().map(|(index, vcpu)| vcpu.ask(task(index))).collect();
        Pending { answers }
    }

    /// Asks one parked vCPU.
    pub fn ask<T: Send + 'static>(
        &self,
        index: usize,
        task: impl FnOnce(&mut VcpuFd) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        wait_for(&self.vcpus[index].ask(Box::new(task)), Instant::now() + ASK_MAX)
    }
}

impl KickVcpus for Vcpus {
    fn kick_all(&self) -> Result<()> {
        let before: Vec<u64> = self.vcpus.iter().map(|v| v.shared.turns.load(Ordering::SeqCst)).collect();
        for vcpu in self.vcpus.iter().filter(|vcpu| !vcpu.is_parked()) {
            vcpu.shared.watched.store(true, Ordering::SeqCst);
            vcpu.signal();
        }
        let out = |(vcpu, before): (&Vcpu, &u64)| {
            vcpu.is_parked() || vcpu.shared.turns.load(Ordering::SeqCst) > *before
        };
        self.bell.wait("calling the vCPUs out of the guest", || self.vcpus.iter().zip(&before).all(out))
    }
}

/// What vCPUs were asked and have not answered yet.
pub struct Pending<T> {
    answers: Vec<Receiver<Result<T>>>,
}

impl<T> Pending<T> {
    /// The answers, in the order of the vCPUs.
    pub fn wait(self) -> Result<Vec<T>> {
        let deadline = Instant::now() + ASK_MAX;
        self.answers.iter().map(|answer| wait_for(answer, deadline)).collect()
    }
}

fn wait_for<T>(answer: &Receiver<Result<T>>, deadline: Instant) -> Result<T> {
    answer.recv_deadline(deadline).unwrap_or_else(|e| {
        Err(if e.is_timeout() {
            Error::Timeout { what: "reading or writing a vCPU's state".into() }
        } else {
            thread_ended()
        })
    })
}

/// Orders the last of these to run, and to pass it on.
fn run_next(stood: bool, mut rest: Vec<Sender<Order>>) {
    while let Some(next) = rest.pop() {
        match next.send(Order::Run { stood, rest }) {
            Err(SendError(Order::Run { rest: others, .. })) => rest = others,
            _ => return,
        }
    }
}

fn thread_ended() -> Error {
    Error::Guest("a vCPU's thread has ended".into())
}

impl Vcpu {
    fn is_parked(&self) -> bool {
        self.shared.parked.load(Ordering::SeqCst)
    }

    fn order(&self, order: Order) {
        // Who is gone is heard of by its missing answer.
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
    }

    fn ask<T: Send + 'static>(&self, task: Task<T>) -> Receiver<Result<T>> {
        let (sender, answer) = bounded(1);
        self.order(Order::Do(Box::new(move |fd| {
            let _ = sender.send(task(fd));
        })));
        answer
    }

    fn signal(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread is not joined yet, so its handle is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.wanted.store(END, Ordering::SeqCst);
        self.signal();
        // A parked thread ends when its orders do.
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a vCPU's thread has.
struct Worker {
    index: usize,
    fd: VcpuFd,
    shared: Arc<Shared>,
    bell: Arc<Bell>,
    exits: Arc<dyn Exits>,
    ending: Sender<Ending>,
    ended: Arc<AtomicBool>,
}

impl Worker {
    fn work(&mut self, orders: &Receiver<Order>) {
        let _registered = Registered::new(&mut self.fd);
        let mut ended = false;
        while let Ok(order) = orders.recv() {
            match order {
                Order::Do(task) => task(&mut self.fd),
                Order::Run { stood, rest } => {
                    run_next(stood, rest);
                    if stood {
                        // A guest without kvmclock cannot be told.
                        let _ = self.fd.kvmclock_ctrl();
                    }
                    *lock(&self.shared.began) = Some(Instant::now());
                    if !ended && let Some(ending) = self.run() {
                        ended = true;
                        self.ended.store(true, Ordering::SeqCst);
                        let _ = self.ending.try_send(ending);
                    }
                    self.shared.parked.store(true, Ordering::SeqCst);
                    if self.wanted() == RUN && !ended {
                        // Let run in this very moment, and not parked: the order is here, or comes.
                        self.shared.parked.store(false, Ordering::SeqCst);
                    }
                    self.bell.ring();
                }
            }
        }
    }

    fn wanted(&self) -> u8 {
        self.shared.wanted.load(Ordering::SeqCst)
    }

    /// Runs the vCPU until it is out of the guest with nothing half done and shall not run, or its guest has ended.
    ///
    /// KVM finishes an exit that user space has served (a port that was read, above all) when it is entered the
    /// next time: state that is saved before that is of a guest in the middle of an instruction. So one that is to
    /// park is entered with `immediate_exit`, until KVM says that it was interrupted. That may take long: KVM's
    /// emulator stays inside one repeated string instruction for up to 1024 of its steps, each with an exit where
    /// it reads or writes a device (Linux, arch/x86/kvm/emulate.c, x86_emulate_insn). Only who waits for the park
    /// has a deadline, and lets the guest go on after it.
    fn run(&mut self) -> Option<Ending> {
        loop {
            let parking = match self.wanted() {
                RUN => false,
                PARK => true,
                _ => return None,
            };
            if parking {
                self.fd.set_kvm_immediate_exit(1);
            }
            let entered = self.enter();
            self.fd.set_kvm_immediate_exit(0);
            if !parking {
                self.shared.turns.fetch_add(1, Ordering::SeqCst);
                if self.shared.watched.swap(false, Ordering::SeqCst) {
                    self.bell.ring();
                }
            }
            match entered {
                Ok(served) if served || !parking => {}
                Ok(_) => return None,
                Err(ending) => return Some(ending),
            }
        }
    }

    /// Enters the guest once and serves its exit. `false` if it was called out.
    fn enter(&mut self) -> Result<bool, Ending> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(false),
            Err(e) => return Err(Ending::Failed(format!("KVM cannot run vCPU {}: {e}", self.index))),
        };
        match exit {
            VcpuExit::IoIn(port, data) => self.exits.port_read(port, data),
            VcpuExit::IoOut(port, data) => {
                if let Some(ending) = self.exits.port_write(port, data) {
                    return Err(ending);
                }
            }
            // Nothing is there: reads are all ones, as on a bus without a device.
            VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::MmioWrite(..) | VcpuExit::IrqWindowOpen | VcpuExit::Intr => {}
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                if let Err(e) = self.exits.ring_full(self.index) {
                    return Err(Ending::Failed(format!(
                        "the dirty ring of vCPU {}: {}",
                        self.index,
                        e.chain()
                    )));
                }
            }
            VcpuExit::Hlt => return Err(Ending::Failed("the guest halted for good".into())),
            VcpuExit::Shutdown => {
                return Err(Ending::Failed(format!("vCPU {} hit a triple fault", self.index)));
            }
            other => return Err(Ending::Failed(format!("vCPU {} left the guest for {other:?}", self.index))),
        }
        Ok(true)
    }
}
