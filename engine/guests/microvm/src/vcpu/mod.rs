//! A vCPU and its thread: runs it, parks it, kicks it.
//!
//! ```text
//!   spawn --> parked -- run() --> in the guest <--> exits served
//!               ^                      |  a kick: outside once, and in again
//!               +------- park() -------+  the pending exit is finished first
//! ```
//!
//! A vCPU is told what it should do by a flag that it reads before each entry, and a signal makes
//! it read it: the handler sets `immediate_exit`, so that a signal that comes between the look at
//! the flag and KVM_RUN is not lost (Linux, virt/kvm/api.rst, 5: `immediate_exit`).

mod kick;
mod wake;
mod worker;

pub use worker::{Ending, Exits};

use crate::vcpu::kick::install_handler;
use crate::vcpu::wake::{Bell, lock};
use crate::vcpu::worker::{END, Order, PARK, RUN, Shared, Task, Worker, run_next, thread_ended};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use kvm_ioctls::VcpuFd;
use pageferry_engine::dirty::kvm::KickVcpus;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::Liveness;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::SIGRTMIN;

#[cfg(test)]
mod tests;

/// For all vCPUs to leave the guest. Microseconds on hardware; an emulator of KVM may finish a long
/// instruction first, and an overcommitted host may not schedule the thread.
const LEAVE_MAX: Duration = Duration::from_secs(10);

/// For what a parked vCPU is asked to do, state-saving ioctls all.
const ASK_MAX: Duration = Duration::from_secs(10);

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

    /// Lets all of them run. `stood` if they was paused before: their guest is told, so that its
    /// watchdogs do not bark.
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

    /// Since when all of them run: when the last of them began, after [`Self::run`]. `None` if one
    /// has not yet.
    #[must_use]
    pub fn running_since(&self) -> Option<Instant> {
        let began: Option<Vec<Instant>> =
            self.vcpus.iter().map(|vcpu| *lock(&vcpu.shared.began)).collect();
        began?.into_iter().max()
    }

    /// Calls all of them out of the guest together, and returns when they are parked: nothing that
    /// they began is half done, and they write no memory.
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
        let answers =
            self.vcpus.iter().enumerate().map(|(index, vcpu)| vcpu.ask(task(index))).collect();
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
        let before: Vec<u64> =
            self.vcpus.iter().map(|v| v.shared.turns.load(Ordering::SeqCst)).collect();
        for vcpu in self.vcpus.iter().filter(|vcpu| !vcpu.is_parked()) {
            vcpu.shared.watched.store(true, Ordering::SeqCst);
            vcpu.signal();
        }
        let out = |(vcpu, before): (&Vcpu, &u64)| {
            vcpu.is_parked() || vcpu.shared.turns.load(Ordering::SeqCst) > *before
        };
        self.bell
            .wait("calling the vCPUs out of the guest", || self.vcpus.iter().zip(&before).all(out))
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
