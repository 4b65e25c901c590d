//! `run`, `attach` and `receive` stay in front of their guest as its supervisor: a process that holds the
//! guest's monitor and memory, and takes orders through a socket in the runtime directory.
//!
//! ```text
//!   pageferry migrate NAME --> NAME.sock --> api thread --> orders --> the guest's loop
//!   pageferry status NAME  --> NAME.sock --> api thread --> what is shared
//! ```

pub mod api;
pub mod asking;
pub mod doubt;
pub mod hosted;
pub mod hosting;
pub mod kvm;
pub mod launch;
pub mod qemu;
pub mod receiving;
pub mod runtime;

use crate::error::{Error, Result};
pub use crate::output::say;
use api::{Order, State, Status};
use crossbeam_channel::{Receiver, Sender, bounded};
use hosted::Vmm;
use rustix::fd::OwnedFd;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What a supervisor's threads share.
#[derive(Debug, Clone)]
pub struct Shared {
    status: Arc<Mutex<Status>>,
}

impl Shared {
    /// A supervisor of this name that is just starting.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let status = Status {
            name: name.into(),
            state: State::Starting,
            vmm: Vmm::default(),
            pid: None,
            listen: None,
            progress: None,
            last: None,
        };
        Self { status: Arc::new(Mutex::new(status)) }
    }

    /// What `pageferry status` shows.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes it.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What a supervisor's loop waits for besides its guest's migrations.
#[derive(Debug)]
pub struct Inbox {
    /// Orders from the socket.
    pub orders: Receiver<Order>,
    /// SIGTERM, SIGINT, SIGHUP.
    pub signals: Receiver<i32>,
}

impl Inbox {
    /// Starts to listen for signals; orders come from the socket's threads.
    pub fn open(orders: Receiver<Order>) -> Result<Self> {
        let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])
            .map_err(|e| Error::os("listening for signals", e))?;
        let (sender, receiver) = bounded(8);
        spawn("signals", move || {
            for signal in signals.forever() {
                let _ = sender.send(signal);
            }
        })?;
        Ok(Self { orders, signals: receiver })
    }
}

/// A channel that hears when the process behind `pidfd` has ended.
pub fn watch_end(pidfd: Arc<OwnedFd>) -> Result<Receiver<()>> {
    let (sender, receiver) = bounded(1);
    spawn("guest-end", move || watch(&pidfd, &sender))?;
    Ok(receiver)
}

fn watch(pidfd: &OwnedFd, sender: &Sender<()>) {
    // Bounded looks: poll(2) has no deadline of its own that would outlive a suspended host.
    while !crate::guest::qemu::process::ended(pidfd, Duration::from_secs(60)).unwrap_or(true) {}
    let _ = sender.send(());
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map(drop)
        .map_err(|e| Error::os("starting a thread", e))
}
