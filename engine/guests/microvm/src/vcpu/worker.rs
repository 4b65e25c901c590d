//! The thread of one vCPU: runs it, and does what it is told.

use crate::vcpu::kick::Registered;
use crate::vcpu::wake::{Bell, lock};
use crossbeam_channel::{Receiver, SendError, Sender};
use kvm_ioctls::{VcpuExit, VcpuFd};
use pageferry_engine::dirty::ring::KVM_EXIT_DIRTY_RING_FULL;
use pageferry_engine::error::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What a vCPU's thread should be doing.
pub(crate) const RUN: u8 = 0;

pub(crate) const PARK: u8 = 1;

pub(crate) const END: u8 = 2;

/// What a parked vCPU's thread is asked to do with it.
pub type Task<T> = Box<dyn FnOnce(&mut VcpuFd) -> Result<T> + Send>;

pub(crate) enum Order {
    /// Run, and first pass the order on to the next of the rest. Each thread wakes one other: if a
    /// caller woke all of them, the first could take the processor from it, and the others would be
    /// paused for a time slice longer.
    Run {
        stood: bool,
        rest: Vec<Sender<Order>>,
    },
    Do(Box<dyn FnOnce(&mut VcpuFd) + Send>),
}

/// What a vCPU's thread has.
pub(crate) struct Worker {
    pub(super) index: usize,
    pub(super) fd: VcpuFd,
    pub(super) shared: Arc<Shared>,
    pub(super) bell: Arc<Bell>,
    pub(super) exits: Arc<dyn Exits>,
    pub(super) ending: Sender<Ending>,
    pub(super) ended: Arc<AtomicBool>,
}

impl Worker {
    pub(crate) fn work(&mut self, orders: &Receiver<Order>) {
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

    /// Runs the vCPU until it is out of the guest with nothing half done and shall not run, or its
    /// guest has ended.
    ///
    /// KVM finishes an exit that user space has served (a port that was read, above all) when it is
    /// entered the next time: state that is saved before that is of a guest in the middle of an
    /// instruction. So one that is to park is entered with `immediate_exit`, until KVM says that it
    /// was interrupted. That may take long: KVM's emulator stays inside one repeated string
    /// instruction for up to 1024 of its steps, each with an exit where it reads or writes a device
    /// (Linux, arch/x86/kvm/emulate.c, x86_emulate_insn). Only who waits for the park has a
    /// deadline, and lets the guest go on after it.
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
            Err(e) => {
                return Err(Ending::Failed(format!("KVM cannot run vCPU {}: {e}", self.index)));
            }
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
            other => {
                return Err(Ending::Failed(format!(
                    "vCPU {} left the guest for {other:?}",
                    self.index
                )));
            }
        }
        Ok(true)
    }
}

/// Orders the last of these to run, and to pass it on.
pub(crate) fn run_next(stood: bool, mut rest: Vec<Sender<Order>>) {
    while let Some(next) = rest.pop() {
        match next.send(Order::Run { stood, rest }) {
            Err(SendError(Order::Run { rest: others, .. })) => rest = others,
            _ => return,
        }
    }
}

pub(crate) fn thread_ended() -> Error {
    Error::Guest("a vCPU's thread has ended".into())
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

/// What a vCPU's thread and its owner both see.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) wanted: AtomicU8,
    /// How often it has come out of the guest.
    pub(crate) turns: AtomicU64,
    /// It is out of the guest and stays so until its owner says otherwise.
    pub(crate) parked: AtomicBool,
    /// Somebody waits for its next turn.
    pub(crate) watched: AtomicBool,
    /// When it was last let run, and began to.
    pub(crate) began: Mutex<Option<Instant>>,
}
