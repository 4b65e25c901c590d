//! One QEMU with the test guest, started by hand or under `pageferry receive`, and what the host
//! sees of its guest: console lines, heartbeats, QMP events.

use crate::downtime::network::Network;
use crate::testbed::console::{Beats, Console};
use crate::testbed::said::Said;
use anyhow::{Context, Result, anyhow, bail};
use pageferry_qemu::qmp::Qmp;
use pageferry_workload::heartbeat::{Gap, GapMeter};
use serde_json::json;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For QEMU and supervisors to start, and for one answer of the guest.
pub const START_MAX: Duration = Duration::from_secs(30);
/// For the guest to boot, and to check all of its memory.
pub const GUEST_MAX: Duration = Duration::from_secs(300);

/// The guest's heartbeat, everywhere but where it is too much for the machine.
pub const BEAT: Duration = Duration::from_millis(1);

/// What runs the guest's code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// QEMU's emulation.
    #[default]
    Tcg,
    /// The host's KVM, with the host's processor.
    Kvm,
}

/// What the guest is and does.
#[derive(Debug, Clone, serde::Serialize)]
pub struct GuestOptions {
    /// What runs its code.
    pub accel: Accel,
    /// Time between two heartbeats where they come over the console, which is under KVM.
    pub beat: Duration,
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

impl GuestOptions {
    /// The guest kernel's command line. Under KVM the guest may be held for minutes while another
    /// is measured, which its watchdogs would take for a fault.
    #[must_use]
    pub fn command_line(&self) -> String {
        // No line that nobody asked for: beats on the console wait for it, some 40 ms in the lab,
        // and a line of its own accord could be taken for an answer.
        let common = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable pf.status_s=0 pf.mib={} pf.touch={} pf.rate={}",
            self.working_mib, self.touched_mib, self.rate_mb
        );
        match self.accel {
            Accel::Tcg => common,
            // The same way for the beats in every monitor; and under KVM inside an emulator no
            // program may use ports. The pulse ticks no faster than it beats: a tick is dear there
            // too.
            Accel::Kvm => format!(
                "{common} nowatchdog rcupdate.rcu_cpu_stall_suppress=1 pf.ports=0 pf.beat_us={beat} pf.tick_us={beat}",
                beat = self.beat.as_micros()
            ),
        }
    }

    /// A meter for the heartbeats of such a guest.
    fn beats(&self) -> Beats {
        Arc::new(Mutex::new(match self.accel {
            Accel::Tcg => GapMeter::new(),
            Accel::Kvm => GapMeter::shared(),
        }))
    }
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
    /// Wait for pageferry, at this address.
    Receive(IpAddr),
}

impl Begin {
    /// Wait for pageferry on this host.
    pub const RECEIVE: Self = Self::Receive(IpAddr::V4(Ipv4Addr::LOCALHOST));
}

/// The file of a guest's memory. Dropping the last handle removes it.
#[derive(Debug)]
pub struct MemoryFile(PathBuf);

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// All runs of this process count their guests together: names and files must not meet.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A name for one more monitor.
pub fn next_name() -> String {
    format!("m{}", COUNT.fetch_add(1, Ordering::Relaxed) + 1)
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
    /// Its memory.
    pub memory: Arc<MemoryFile>,
    /// The guest's console.
    pub console: Console,
    process: Child,
    said: Said,
    /// Whether `process` is a supervisor and not QEMU itself.
    supervised: bool,
}

/// All monitors of one guest on its way: a directory, and the heartbeat meter that they share.
#[derive(Debug)]
pub struct TestBed {
    /// What every guest is.
    pub options: GuestOptions,
    /// Runtime directory, sockets.
    pub directory: PathBuf,
    /// A card for each QEMU, where the guest is on a network.
    pub network: Option<Network>,
    /// Heartbeats of whichever monitor runs the guest.
    pub beats: Beats,
}

impl TestBed {
    /// An empty one.
    pub fn new(options: GuestOptions) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!(
            "pageferry-bench-{}-{}",
            std::process::id(),
            next_name()
        ));
        std::fs::create_dir_all(&directory)?;
        std::fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        Ok(Self { beats: options.beats(), options, directory, network: None })
    }

    /// Starts one more QEMU. `memory` is the file to use as its memory; none makes a new one.
    /// `prealloc` has QEMU touch all of it first.
    pub fn start(
        &self,
        begin: Begin,
        memory: Option<Arc<MemoryFile>>,
        prealloc: bool,
    ) -> Result<Machine> {
        let name = next_name();
        let at = |what: &str| self.directory.join(format!("{name}.{what}"));
        let memory = memory.unwrap_or_else(|| {
            let file = format!("/dev/shm/pageferry-bench-{}-{name}", std::process::id());
            Arc::new(MemoryFile(PathBuf::from(file)))
        });
        let qemu = self.qemu_command(&name, &memory.0, prealloc);
        let mut command = match begin {
            Begin::Receive(address) => {
                let mut command = Command::new(&self.options.pageferry);
                let listen = SocketAddr::new(address, 0).to_string();
                command.args(["receive", &name, "--insecure", "--listen", &listen, "--"]);
                command.args(qemu);
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
        let process = command
            .env("PAGEFERRY_RUNTIME_DIR", &self.directory)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C is for the bench alone: QEMU would end by it, and the guest with it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {:?}", command.get_program()))?;
        // Whatever fails below, it is ended.
        let supervised = matches!(begin, Begin::Receive(_));
        let mut starting = Starting { process: Some(process), supervised, qemu: None };
        let process = starting.process.as_mut().context("it was started")?;
        let said = Said::of(process.stderr.take().context("its errors were piped")?);
        let listens =
            if supervised { Some(said.wait("waits for a guest on ", START_MAX)?) } else { None };
        let deadline = Instant::now() + START_MAX;
        let mut qmp =
            Qmp::over(connect(&at("qmp1"), process, &said)?.into(), &at("qmp1"), deadline)?;
        let pid = if supervised {
            qemu_of(&self.directory, &name, &self.options.pageferry)?
        } else {
            process.id()
        };
        starting.qemu = supervised.then_some(pid);
        let process = starting.process.as_mut().context("it was started")?;
        qmp.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": [{ "capability": "events", "state": true }] }),
            deadline,
        )
        .or_else(|e| if supervised { Ok(json!(null)) } else { Err(e) })?;
        if self.options.accel == Accel::Tcg {
            self.listen_to_beats(&at("beats"), process, &said)?;
        }
        let stream = connect(&at("console"), process, &said)?;
        let console = Console::open(stream.try_clone()?, Box::new(stream), Arc::clone(&self.beats));
        let process = starting.process.take().context("it was started")?;
        Ok(Machine {
            qmp,
            pid,
            name: name.clone(),
            spare_qmp: at("qmp2"),
            listens,
            memory,
            console,
            process,
            said,
            supervised,
        })
    }

    fn qemu_command(&self, name: &str, memory: &Path, prealloc: bool) -> Vec<String> {
        let o = &self.options;
        let at = |what: &str| self.directory.join(format!("{name}.{what}")).display().to_string();
        let mut words: Vec<String> =
            ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot"]
                .map(Into::into)
                .into();
        let mut add = |a: &str, b: String| words.extend([a.to_owned(), b]);
        let serial: &[_] = match o.accel {
            Accel::Tcg => {
                add("-accel", "tcg".into());
                &[("console", "console"), ("beats", "beats")]
            }
            Accel::Kvm => {
                add("-accel", "kvm".into());
                add("-cpu", "host".into());
                &[("console", "console")]
            }
        };
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
        for (id, socket) in serial {
            add("-chardev", format!("socket,id={id},path={},server=on,wait=off", at(socket)));
            add("-serial", format!("chardev:{id}"));
        }
        add("-kernel", o.kernel.display().to_string());
        add("-initrd", o.initrd.display().to_string());
        let network = self.network.as_ref().map(Network::parameters).unwrap_or_default();
        add("-append", o.command_line() + &network);
        words.extend(self.network.iter().flat_map(Network::card));
        words
    }

    fn listen_to_beats(&self, path: &Path, process: &mut Child, said: &Said) -> Result<()> {
        let mut stream = connect(path, process, said)?;
        let beats = Arc::clone(&self.beats);
        std::thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(n @ 1..) = stream.read(&mut bytes) {
                beats
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .observe(Instant::now(), &bytes[..n]);
            }
        });
        Ok(())
    }

    /// The longest time between two heartbeats since they were reset, in milliseconds.
    #[must_use]
    pub fn gap_ms(&self) -> f64 {
        self.largest_gap().map_or(f64::NAN, |gap| gap.length.as_secs_f64() * 1e3)
    }

    /// How long after this moment that gap began, in milliseconds. A gap that began long before the
    /// end of a move is not its downtime.
    #[must_use]
    pub fn gap_began_ms(&self, begun: Instant) -> f64 {
        self.largest_gap()
            .map_or(f64::NAN, |gap| gap.from.saturating_duration_since(begun).as_secs_f64() * 1e3)
    }

    fn largest_gap(&self) -> Option<Gap> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).largest()
    }

    /// Forgets the heartbeats so far.
    pub fn reset_beats(&self) {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).reset();
    }
}

impl Drop for TestBed {
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

    /// Waits until the guest has booted and writes; `sense` may give it up.
    pub fn wait_booted(&mut self, mut sense: impl FnMut() -> Result<()>) -> Result<()> {
        let (process, qmp, said) = (&mut self.process, &mut self.qmp, &self.said);
        self.console.wait_while("WORKLOAD READY", GUEST_MAX, || {
            if let Some(status) = process.try_wait()? {
                bail!("its QEMU ended ({status}){}", said.first());
            }
            let status = qmp.execute("query-status", json!({}), Instant::now() + START_MAX)?;
            if status["running"] != json!(true) {
                bail!(
                    "QEMU says that it is not running any more: {}{}",
                    status["status"],
                    said.first()
                );
            }
            sense()
        })?;
        Ok(())
    }

    /// Whether the guest runs and writes.
    #[must_use]
    pub fn is_well(&mut self) -> bool {
        let status = self.qmp.execute("query-status", json!({}), Instant::now() + START_MAX);
        status.is_ok_and(|status| status["running"] == json!(true))
            && self.console.settle(Duration::ZERO, START_MAX).is_ok()
    }

    /// Stops the guest, or lets it go on, by QEMU's own commands.
    pub fn hold(&mut self, held: bool) -> Result<()> {
        let command = if held { "stop" } else { "cont" };
        self.qmp.execute(command, json!({}), Instant::now() + START_MAX)?;
        Ok(())
    }
}

/// A QEMU that may not have come up: ended unless it is taken out.
struct Starting {
    process: Option<Child>,
    /// Whether `process` is its supervisor.
    supervised: bool,
    /// QEMU itself, once it is known, where it is supervised.
    qemu: Option<u32>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        let Some(process) = &mut self.process else { return };
        if self.supervised && self.qemu.is_none() {
            // Told to end, a supervisor without a guest ends its QEMU, which nobody else here
            // knows.
            terminate(process);
        }
        end(process, self.qemu);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.process, self.supervised.then_some(self.pid));
    }
}

/// Asks a process to end, and waits for it.
fn terminate(process: &mut Child) {
    if let Some(pid) = i32::try_from(process.id()).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let deadline = Instant::now() + START_MAX;
    while matches!(process.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends a process at once, and the QEMU that it supervises.
fn end(process: &mut Child, qemu: Option<u32>) {
    let _ = process.kill();
    let _ = process.wait();
    if let Some(pid) =
        qemu.and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Connects to a socket that QEMU is about to open: the path appears an instant before anybody
/// listens.
fn connect(path: &Path, process: &mut Child, said: &Said) -> Result<UnixStream> {
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
            bail!("a QEMU ended while it started ({status}){}", said.first());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
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
