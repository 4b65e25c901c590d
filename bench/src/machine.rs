//! One QEMU with the test guest, started by hand or under `pageferry receive`, and what the host sees of
//! its guest: console lines, heartbeats, QMP events.

use crate::downtime::network::Network;
use anyhow::{Context, Result, anyhow, bail};
use pageferry::guest::qemu::qmp::Qmp;
use pageferry_workload::heartbeat::GapMeter;
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For QEMU and supervisors to start, and for one answer of the guest.
pub const START_MAX: Duration = Duration::from_secs(30);
/// For the guest to boot, and to check all of its memory.
pub const GUEST_MAX: Duration = Duration::from_secs(300);

/// What the guest is and does.
#[derive(Debug, Clone, serde::Serialize)]
pub struct GuestOptions {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// The pageferry binary.
    pub pageferry: PathBuf,
    /// Lanes that pageferry is asked for.
    pub lanes: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Written over and over, in MiB.
    pub working_mib: u32,
    /// Filled once and only checked, in MiB.
    pub touched_mib: u32,
    /// Writes in MB a second.
    pub rate_mb: u32,
}

/// How a QEMU is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Boot.
    Boot,
    /// Wait for QEMU's own migration.
    Incoming,
    /// Wait for QEMU's own migration, and do not run after it.
    IncomingStopped,
    /// Wait for pageferry.
    Receive,
}

/// One QEMU.
#[derive(Debug)]
pub struct Machine {
    /// Our own monitor.
    pub qmp: Qmp,
    /// QEMU's process id.
    pub pid: u32,
    /// Its name for pageferry.
    pub name: String,
    /// Path of the monitor that is left for pageferry.
    pub spare_qmp: PathBuf,
    /// Where `pageferry receive` listens.
    pub listens: Option<String>,
    /// The file of its memory.
    pub memory: PathBuf,
    process: Child,
    /// Whether `process` is a supervisor and not QEMU itself.
    supervised: bool,
    console: Option<(UnixStream, Receiver<String>)>,
}

/// All QEMUs of a run: a directory, a count, and the heartbeat meter that they share.
#[derive(Debug)]
pub struct Yard {
    /// What every guest is.
    pub options: GuestOptions,
    /// Runtime directory, sockets.
    pub directory: PathBuf,
    /// A card for each QEMU, where the guest is on a network.
    pub network: Option<Network>,
    /// Bytes of COM2 of whichever QEMU runs the guest.
    pub beats: Arc<Mutex<GapMeter>>,
    count: u32,
}

impl Yard {
    /// An empty one.
    pub fn new(options: GuestOptions) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("pageferry-bench-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        std::fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        Ok(Self { options, directory, network: None, beats: Arc::new(Mutex::new(GapMeter::new())), count: 0 })
    }

    /// Starts one more QEMU. `memory` is the file to use as its memory; none makes a new one. `prealloc`
    /// has QEMU touch all of it first.
    pub fn start(&mut self, begin: Begin, memory: Option<PathBuf>, prealloc: bool) -> Result<Machine> {
        self.count += 1;
        let name = format!("m{}", self.count);
        let at = |what: &str| self.directory.join(format!("{name}.{what}"));
        let memory = memory.unwrap_or_else(|| {
            PathBuf::from(format!("/dev/shm/pageferry-bench-{}-{name}", std::process::id()))
        });
        let qemu = self.qemu_command(&name, &memory, prealloc);
        let mut command = match begin {
            Begin::Receive => {
                let mut command = Command::new(&self.options.pageferry);
                command
                    .args(["receive", &name, "--listen", "127.0.0.1:0", "--"])
                    .args(qemu)
                    .stderr(Stdio::piped());
                command
            }
            _ => {
                let mut command = Command::new(&qemu[0]);
                command.args(&qemu[1..]);
                match begin {
                    Begin::Incoming => command.args(["-incoming", "defer"]),
                    Begin::IncomingStopped => command.args(["-incoming", "defer", "-S"]),
                    _ => &mut command,
                };
                command
            }
        };
        let mut process = command
            .env("PAGEFERRY_RUNTIME_DIR", &self.directory)
            .stdin(Stdio::null())
            // Ctrl-C is for the bench alone: QEMU would end by it, and the guest with it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {:?}", command.get_program()))?;
        let listens = match process.stderr.take() {
            Some(stderr) => Some(listening(stderr)?),
            None => None,
        };
        let deadline = Instant::now() + START_MAX;
        let mut qmp = Qmp::over(connect(&at("qmp1"), &mut process)?.into(), &at("qmp1"), deadline)?;
        let supervised = begin == Begin::Receive;
        let pid =
            if supervised { qemu_of(&self.directory, &name, &self.options.pageferry)? } else { process.id() };
        qmp.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": [{ "capability": "events", "state": true }] }),
            deadline,
        )
        .or_else(|e| if supervised { Ok(json!(null)) } else { Err(e) })?;
        self.listen_to_beats(&at("beats"), &mut process)?;
        let console = Some(open_console(&at("console"), &mut process)?);
        Ok(Machine {
            qmp,
            pid,
            name: name.clone(),
            spare_qmp: at("qmp2"),
            listens,
            memory,
            process,
            supervised,
            console,
        })
    }

    fn qemu_command(&self, name: &str, memory: &Path, prealloc: bool) -> Vec<String> {
        let o = &self.options;
        let at = |what: &str| self.directory.join(format!("{name}.{what}")).display().to_string();
        let mut words: Vec<String> =
            ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none"].map(Into::into).into();
        let mut add = |a: &str, b: String| words.extend([a.to_owned(), b]);
        add("-name", "guest,debug-threads=on".into());
        add("-machine", "q35,memory-backend=ram0".into());
        add("-m", format!("{}M", o.memory_mib));
        let prealloc = if prealloc { "on" } else { "off" };
        add(
            "-object",
            format!(
                "memory-backend-file,id=ram0,size={}M,mem-path={},share=on,prealloc={prealloc}",
                o.memory_mib,
                memory.display()
            ),
        );
        for (monitor, socket) in [("q1", "qmp1"), ("q2", "qmp2")] {
            add("-chardev", format!("socket,id={monitor},path={},server=on,wait=off", at(socket)));
            add("-mon", format!("chardev={monitor},mode=control"));
        }
        for (id, socket) in [("console", "console"), ("beats", "beats")] {
            add("-chardev", format!("socket,id={id},path={},server=on,wait=off", at(socket)));
            add("-serial", format!("chardev:{id}"));
        }
        add("-kernel", o.kernel.display().to_string());
        add("-initrd", o.initrd.display().to_string());
        let network = self.network.as_ref().map(Network::parameters).unwrap_or_default();
        add(
            "-append",
            format!(
                "console=ttyS0 quiet panic=-1 tsc=reliable pf.mib={} pf.touch={} pf.rate={}{network}",
                o.working_mib, o.touched_mib, o.rate_mb
            ),
        );
        words.extend(self.network.iter().flat_map(|network| network.card(self.count)));
        words
    }

    fn listen_to_beats(&self, path: &Path, process: &mut Child) -> Result<()> {
        let mut stream = connect(path, process)?;
        let beats = Arc::clone(&self.beats);
        std::thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(n @ 1..) = stream.read(&mut bytes) {
                beats.lock().unwrap_or_else(PoisonError::into_inner).observe(Instant::now(), &bytes[..n]);
            }
        });
        Ok(())
    }

    /// The longest time between two heartbeats since they were reset, in milliseconds.
    #[must_use]
    pub fn gap_ms(&self) -> f64 {
        let beats = self.beats.lock().unwrap_or_else(PoisonError::into_inner);
        beats.largest().map_or(f64::NAN, |gap| gap.length.as_secs_f64() * 1e3)
    }

    /// Forgets the heartbeats so far.
    pub fn reset_beats(&self) {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).reset();
    }
}

impl Drop for Yard {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Machine {
    /// The processes whose CPU time counts.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        if self.supervised { vec![self.pid, self.process.id()] } else { vec![self.pid] }
    }

    /// Waits for a line of the guest with this text.
    pub fn wait_line(&mut self, text: &str, wait: Duration) -> Result<String> {
        let (_, lines) = self.console.as_ref().ok_or_else(|| anyhow!("no console"))?;
        let deadline = Instant::now() + wait;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(line) if line.contains("CORRUPT") || line.contains("WORKLOAD FAILED") => {
                    bail!("the guest says: {line}")
                }
                Ok(line) if line.contains(text) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("the guest did not say {text:?} within {wait:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest's console closed before {text:?}"),
            }
        }
    }

    /// Has the guest check all of its memory.
    pub fn verdict(&mut self) -> Result<()> {
        let (console, _) = self.console.as_mut().ok_or_else(|| anyhow!("no console"))?;
        console.write_all(b"verdict\n")?;
        let line = self.wait_line("WORKLOAD VERDICT", GUEST_MAX)?;
        if line.contains("VERDICT intact") && line.contains("errors=0") {
            Ok(())
        } else {
            bail!("the guest says: {line}")
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if self.supervised
            && let Some(pid) = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Connects to a socket that QEMU is about to open: the path appears an instant before anybody listens.
fn connect(path: &Path, process: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + START_MAX;
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

fn open_console(path: &Path, process: &mut Child) -> Result<(UnixStream, Receiver<String>)> {
    let stream = connect(path, process)?;
    let reader = stream.try_clone()?;
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(std::result::Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    Ok((stream, lines))
}

/// Reads a receiver's stderr until it says where it listens; the rest is passed on.
fn listening(stderr: std::process::ChildStderr) -> Result<String> {
    let (sender, found) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
            match line.split_once("waits for a guest on ") {
                Some((_, address)) => drop(sender.send(address.to_owned())),
                None if std::env::var_os("PAGEFERRY_BENCH_VERBOSE").is_some() => eprintln!("{line}"),
                None => {}
            }
        }
    });
    found.recv_timeout(START_MAX).context(
        "the receiver did not say where it listens; set PAGEFERRY_BENCH_VERBOSE=1 to see what it says",
    )
}

fn qemu_of(directory: &Path, name: &str, pageferry: &Path) -> Result<u32> {
    let output = Command::new(pageferry)
        .env("PAGEFERRY_RUNTIME_DIR", directory)
        .args(["status", name, "--json"])
        .output()?;
    let status: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("the receiver's status")?;
    status["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok())
        .ok_or_else(|| anyhow!("the receiver has no QEMU"))
}
