//! One `pageferry microvm` with the test guest: the same kernel, initramfs, memory and workload as
//! in QEMU, in pageferry's own monitor.

use crate::testbed::console::Console;
use crate::testbed::machine::{GUEST_MAX, START_MAX, TestBed, next_name};
use crate::testbed::said::Said;
use anyhow::{Context, Result, bail};
use pageferry_microvm::config::TrackingChoice;
use rustix::process::{Pid, Signal, kill_process};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// A monitor: with a guest, or waiting for one.
#[derive(Debug)]
pub struct Microvm {
    /// Its name for pageferry.
    pub name: String,
    /// Where it waits for a guest, if it does.
    pub listens: Option<String>,
    /// The guest's.
    pub console: Console,
    process: Child,
    said: Said,
}

impl Microvm {
    /// Starts one, with all of its memory taken first if `preallocated`; one that waits at `listen`
    /// if there is an address, and else boots.
    pub fn start(
        bed: &TestBed,
        tracking: TrackingChoice,
        listen: Option<SocketAddr>,
        preallocated: bool,
    ) -> Result<Self> {
        let (options, name) = (&bed.options, next_name());
        let mut command = Command::new(&options.pageferry);
        command.args([
            "microvm",
            &name,
            "--memory",
            &format!("{}M", options.memory_mib),
            "--cpus",
            "1",
        ]);
        if preallocated {
            command.arg("--preallocate");
        }
        command.args(["--tracking", &format!("{tracking:?}").to_lowercase()]);
        match listen {
            Some(address) => command.args(["--insecure", "--listen", &address.to_string()]),
            None => command
                .arg("--kernel")
                .arg(&options.kernel)
                .arg("--initrd")
                .arg(&options.initrd)
                .args(["--append", &options.command_line()]),
        };
        let mut process = command
            .env("PAGEFERRY_RUNTIME_DIR", &bed.directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for the bench alone.
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}", options.pageferry.display()))?;
        let stdout = process.stdout.take().context("its output was piped")?;
        let stdin = process.stdin.take().context("its input was piped")?;
        let stderr = process.stderr.take().context("its errors were piped")?;
        let console = Console::open(stdout, Box::new(stdin), Arc::clone(&bed.beats));
        // From here on dropping it ends the process.
        let mut microvm = Self { name, listens: None, console, process, said: Said::of(stderr) };
        if listen.is_some() {
            microvm.listens = Some(microvm.said.wait("waits for a guest on ", START_MAX)?);
        } else {
            microvm.said.wait("runs in this process", START_MAX)?;
        }
        Ok(microvm)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits until the guest has booted and writes; `sense` may give it up.
    pub fn wait_booted(&mut self, mut sense: impl FnMut() -> Result<()>) -> Result<()> {
        let (process, said) = (&mut self.process, &self.said);
        self.console.wait_while("WORKLOAD READY", GUEST_MAX, || {
            if let Some(status) = process.try_wait()? {
                bail!("its monitor ended ({status}){}", said.last());
            }
            sense()
        })?;
        Ok(())
    }

    /// Holds the whole process, or lets it go on.
    pub fn hold(&self, held: bool) -> Result<()> {
        let signal = if held { Signal::STOP } else { Signal::CONT };
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).context("a process id")?;
        kill_process(pid, signal).context("holding a microvm")
    }

    /// Whether its guest runs and writes.
    #[must_use]
    pub fn is_well(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
            && self.console.settle(Duration::ZERO, START_MAX).is_ok()
    }
}

impl Drop for Microvm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
