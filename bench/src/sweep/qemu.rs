//! QEMU's own migration over the same cables: a Linux guest in a QEMU at one end, moved to one at
//! the other end and back. QEMU never gives up by itself, so one that has not converged after
//! [`PATIENCE`] is cancelled, and the guest stays.

use crate::shaped::{End, Shaped};
use crate::testbed::images;
use anyhow::{Context, Result, anyhow, bail};
use pageferry_qemu::qmp::{Event, Qmp};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long QEMU may go over memory again and again: several times what all of it takes on the
/// slowest cable.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// For QEMU to start and to answer, and for a migration that was cancelled to end.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// For the guest to boot, and to check its memory.
const GUEST_MAX: Duration = Duration::from_secs(300);
/// Of multifd.
const CHANNELS: u32 = 2;
/// Nobody else is in these namespaces.
const PORT: u16 = 7600;
/// Status lines of the guest, one a second, after which it has its steady rate.
const STEADY_LINES: u32 = 2;

/// A way of QEMU's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One connection.
    Plain,
    /// Several, each with a thread.
    Multifd,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Plain, Self::Multifd];

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "QEMU",
            Self::Multifd => "QEMU multifd",
        }
    }
}

/// The Linux guest, and what it does.
#[derive(Debug, Clone, Copy)]
pub struct GuestSize {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Memory written over and over, in MiB.
    pub working_mib: u32,
    /// Writes in MB a second.
    pub rate_mb: u32,
}

/// What one migration took, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// From the request until the guest runs at the destination.
    pub total_ms: f64,
    /// From QEMU's STOP at the source to its RESUME at the destination.
    pub downtime_ms: f64,
}

/// A guest that runs at one end of a cable.
pub struct Traveller<'s> {
    shaped: &'s Shaped,
    directory: Directory,
    size: GuestSize,
    qemu: Qemu,
    count: u32,
}

/// Sockets of the QEMUs.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Qemu {
    process: Child,
    qmp: Qmp,
    lines: Receiver<String>,
    end: End,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Fails, with the fix, where there is no guest to boot.
pub fn check() -> Result<()> {
    images::guest().context("--qemu")?;
    let started =
        Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status();
    started.map(drop).context("--qemu: starting qemu-system-x86_64; scripts/setup installs it")
}

impl<'s> Traveller<'s> {
    /// Boots the guest at the source end, and waits until its memory is filled.
    pub fn boot(shaped: &'s Shaped, size: GuestSize) -> Result<Self> {
        let directory = Directory(
            std::env::temp_dir().join(format!("pageferry-bench-sweep-{}", std::process::id())),
        );
        std::fs::create_dir_all(&directory.0)
            .and_then(|()| std::fs::set_permissions(&directory.0, PermissionsExt::from_mode(0o700)))
            .with_context(|| format!("making {}", directory.0.display()))?;
        let qemu = start(shaped, End::Source, &directory.0.join("0"), size, false)?;
        qemu.wait_line("WORKLOAD READY", GUEST_MAX).context("the guest did not boot")?;
        Ok(Self { shaped, directory, size, qemu, count: 0 })
    }

    /// Moves it to the other end, if it converges.
    pub fn travel(&mut self, way: Way, downtime_max: Duration) -> Result<Option<Took>> {
        self.count += 1;
        let to = if self.qemu.end == End::Source { End::Destination } else { End::Source };
        let socket = self.directory.0.join(self.count.to_string());
        let mut there = start(self.shaped, to, &socket, self.size, true)?;
        for _ in 0..STEADY_LINES {
            self.qemu.wait_line("WORKLOAD t=", ANSWER_MAX)?;
        }
        let deadline = Instant::now() + ANSWER_MAX;
        let here = &mut self.qemu;
        for (qmp, sends) in [(&mut here.qmp, true), (&mut there.qmp, false)] {
            let capability =
                |name: &str, state: bool| json!({ "capability": name, "state": state });
            let wanted = [capability("events", true), capability("multifd", way == Way::Multifd)];
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": wanted }), deadline)?;
            let mut parameters = json!({ "multifd-channels": CHANNELS });
            if sends {
                parameters["max-bandwidth"] = json!(1u64 << 40);
                parameters["downtime-limit"] = json!(downtime_max.as_millis() as u64);
            }
            qmp.execute("migrate-set-parameters", parameters, deadline)?;
        }
        let uri = json!({ "uri": format!("tcp:{}:{PORT}", self.shaped.address(to)) });
        there.qmp.execute("migrate-incoming", uri.clone(), deadline)?;
        here.qmp.drain_events()?;
        there.qmp.drain_events()?;
        let begun = Instant::now();
        here.qmp.execute("migrate", uri, deadline)?;
        let over =
            here.qmp.wait_event(begun + PATIENCE, |e| is_migration(e, &["completed", "failed"]));
        let over = match over {
            Err(pageferry_engine::Error::Timeout { .. }) => {
                let deadline = Instant::now() + ANSWER_MAX;
                here.qmp.execute("migrate_cancel", Value::Null, deadline)?;
                // It may have been over in this very moment.
                here.qmp.wait_event(deadline, |e| {
                    is_migration(e, &["completed", "failed", "cancelled"])
                })?
            }
            over => over?,
        };
        if is_migration(&over, &["cancelled"]) {
            return Ok(None);
        }
        if !is_migration(&over, &["completed"]) {
            bail!("QEMU's migration failed");
        }
        let deadline = Instant::now() + ANSWER_MAX;
        let resumed = there.qmp.wait_event(deadline, |e| e.name == "RESUME")?;
        let total_ms = begun.elapsed().as_secs_f64() * 1e3;
        let stopped = here.qmp.wait_event(deadline, |e| e.name == "STOP")?;
        self.qemu = there;
        let downtime_ms = resumed.at_us.saturating_sub(stopped.at_us) as f64 / 1e3;
        Ok(Some(Took { total_ms, downtime_ms }))
    }

    /// Has the guest check all of its memory.
    pub fn verdict(&mut self) -> Result<()> {
        let console = self.qemu.process.stdin.as_mut().context("its console was piped")?;
        console.write_all(b"verdict\n").context("asking the guest for its verdict")?;
        let line = self.qemu.wait_line("WORKLOAD VERDICT", GUEST_MAX)?;
        if line.contains("VERDICT intact") { Ok(()) } else { bail!("the guest says: {line}") }
    }
}

fn is_migration(event: &Event, states: &[&str]) -> bool {
    event.name == "MIGRATION"
        && event.data["status"].as_str().is_some_and(|status| states.contains(&status))
}

fn start(
    shaped: &Shaped,
    end: End,
    socket: &Path,
    size: GuestSize,
    incoming: bool,
) -> Result<Qemu> {
    let images = images::guest()?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-accel",
        "tcg",
        "-machine",
        "q35",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
    ]);
    command.args(["-m", &format!("{}M", size.memory_mib)]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    command.arg("-kernel").arg(&images.kernel);
    command.arg("-initrd").arg(&images.initrd);
    command.arg("-append").arg(format!(
        "console=ttyS0 quiet panic=-1 tsc=reliable pf.mib={} pf.rate={}",
        size.working_mib, size.rate_mb
    ));
    if incoming {
        command.args(["-incoming", "defer"]);
    }
    // Ctrl-C is for the bench alone: QEMU would end by it, and the guest with it.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    // A namespace is a thread's own, and its children's.
    let started = std::thread::scope(|scope| {
        let starting = scope.spawn(|| {
            shaped.enter(end)?;
            command.spawn().context("starting qemu-system-x86_64")
        });
        starting.join().map_err(|_| anyhow!("the thread that starts QEMU panicked"))
    });
    let mut process = started??;
    let connected = connect(socket, &mut process);
    let lines = read_lines(&mut process);
    let stream = connected.inspect_err(|_| {
        let _ = process.kill();
        let _ = process.wait();
    })?;
    let qmp = Qmp::over(stream.into(), socket, Instant::now() + ANSWER_MAX).inspect_err(|_| {
        let _ = process.kill();
        let _ = process.wait();
    })?;
    Ok(Qemu { process, qmp, lines, end })
}

/// The socket appears an instant before anybody listens.
fn connect(path: &Path, process: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + ANSWER_MAX;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > deadline => {
                return Err(e).with_context(|| format!("connecting to {}", path.display()));
            }
            Err(_) => {}
        }
        if let Some(status) = process.try_wait()? {
            bail!("a QEMU ended while it started ({status})");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_lines(process: &mut Child) -> Receiver<String> {
    let (sender, lines) = channel();
    if let Some(stdout) = process.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(std::result::Result::ok) {
                // Nobody listens any more once it is over; it is read all the same, or the guest
                // would wait.
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        });
    }
    lines
}

impl Qemu {
    /// Waits for a line of the guest with this text.
    fn wait_line(&self, text: &str, wait: Duration) -> Result<String> {
        let deadline = Instant::now() + wait;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("CORRUPT") || line.contains("WORKLOAD FAILED") => {
                    bail!("the guest says: {line}")
                }
                Ok(line) if line.contains(text) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest did not say {text:?} within {wait:?}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("QEMU ended before its guest said {text:?}")
                }
            }
        }
    }
}
