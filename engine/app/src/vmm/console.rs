//! The operator's console of a guest that runs in its supervisor.

use crate::output::spool::Spool;
use pageferry_engine::error::{Error, Result};
use pageferry_microvm::console::serial::Console;
use pageferry_microvm::console::terminal::Terminal;
use pageferry_microvm::devices::Devices;
use rustix::process::{Signal, getpid, kill_process};
use std::os::fd::AsFd;
use std::sync::Arc;

/// What the guest's serial port is connected to: this process's stdin and stdout.
#[derive(Debug, Clone)]
pub struct OperatorConsole {
    output: Spool,
}

impl OperatorConsole {
    /// Takes stdout. Stdin is left alone until there is a guest.
    pub fn open() -> Result<Self> {
        Ok(Self { output: crate::output::console()? })
    }

    pub(crate) fn console(&self) -> Console {
        Console { output: Box::new(self.output.clone()) }
    }

    /// Gives the terminal to a guest.
    pub(crate) fn connect(devices: &Arc<Devices>) -> Result<Terminal> {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned();
        let stdin = stdin.map_err(|e| Error::os("taking stdin for the guest's serial port", e))?;
        let devices = Arc::clone(devices);
        let take = move |bytes: &[u8]| devices.input(bytes);
        let leave = || {
            // The way on which every other wish to leave comes, so that it is heard in every state.
            let _ = kill_process(getpid(), Signal::TERM);
        };
        Terminal::open(stdin, Box::new(take), Box::new(leave))
    }
}
