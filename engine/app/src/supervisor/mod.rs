//! `run`, `attach` and `receive` stay in front of their guest as its supervisor: a process that
//! holds the guest's monitor and memory, and takes orders through a socket in the runtime
//! directory.
//!
//! ```text
//!   pageferry migrate NAME --> NAME.sock --> api thread --> orders --> the guest's loop
//!   pageferry status NAME  --> NAME.sock --> api thread --> what is shared
//! ```

pub mod api;
pub mod asking;
pub mod claim;
pub mod doubt;
pub mod hosting;
pub mod place;
pub mod receiving;
pub mod record;

pub use crate::output::say;
use api::{Order, State, Status};
use crossbeam_channel::{Receiver, bounded};
use pageferry_engine::error::{Error, Result};
use place::Vmm;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::sync::{Arc, Mutex, PoisonError};

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

pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map(drop)
        .map_err(|e| Error::os("starting a thread", e))
}
