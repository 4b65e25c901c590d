//! A runtime directory of its own, and the commands that run in it as an operator would type them.

use crate::console::Console;
use crate::look::{self, alive, guest_state};
use crate::words::Words;
use crate::{SOON, eventually};
use pageferry::supervisor::api::{Client, Reply, Request, State, Status};
use pageferry::supervisor::claim::RuntimeDir;
use rustix::process::{Signal, geteuid};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long a held point stays held if nobody lets it go: longer than any test waits.
const HOLD_MS: u64 = 200_000;

/// The QEMU that starts fastest: no kernel, its firmware idles.
pub const BARE: &str = "qemu-system-x86_64 -accel tcg -machine q35 -nodefaults -display none -m 64";

/// See the [module](self). Dropping it ends everything that was started in it.
#[derive(Debug)]
pub struct Stage {
    directory: tempfile::TempDir,
    binary: PathBuf,
    /// Limits of the supervisors that are not theirs by default.
    limits: Option<&'static str>,
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it said.
    pub stderr: String,
}

impl Default for Stage {
    fn default() -> Self {
        Self::new()
    }
}

impl Stage {
    /// An empty one. Points that a supervisor is told to hold at are held until [`Self::release`].
    ///
    /// # Panics
    /// If the binary is missing.
    #[must_use]
    pub fn new() -> Self {
        let stage = Self {
            directory: tempfile::Builder::new()
                .prefix("pf")
                .permissions(std::fs::Permissions::from_mode(0o700))
                .tempdir()
                .expect("a directory"),
            binary: crate::binary(),
            limits: None,
        };
        std::fs::write(stage.hold_file(), "").expect("the file of held points");
        stage
    }

    /// Has what it starts give up asking after Commit within a second, and ask on twice a second
    /// from then on.
    #[must_use]
    pub fn impatient(self) -> Self {
        self.limited("ask-again:1000,ask-later:500")
    }

    /// Has what it starts keep these limits, as `PAGEFERRY_LIMIT` takes them.
    #[must_use]
    pub fn limited(mut self, limits: &'static str) -> Self {
        self.limits = Some(limits);
        self
    }

    /// Starts everything through a shell that runs `before` first, as root in a mount namespace of
    /// its own.
    ///
    /// # Panics
    /// If the script cannot be written.
    #[must_use]
    pub fn behind(mut self, before: &str) -> Self {
        let script = self.path("behind");
        let binary = self.binary.display();
        let unshare = if geteuid().is_root() { "unshare --mount -- " } else { "" };
        let text = format!(
            "#!/bin/sh\nexec {unshare}sh -c '{before} && exec {binary} \"$@\"' pageferry \"$@\"\n"
        );
        std::fs::write(&script, text).expect("a script");
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700))
            .expect("executable");
        self.binary = script;
        self
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn hold_file(&self) -> PathBuf {
        self.path("held")
    }

    fn hold_at(&self, point: &str, command: &mut Command) {
        // Points with their times are as they are; a mere name is held until it is released.
        if point.contains(':') {
            command.env("PAGEFERRY_HOLD", point);
        } else if !point.is_empty() {
            command
                .env("PAGEFERRY_HOLD", format!("{point}:{HOLD_MS}:{}", self.hold_file().display()));
        }
    }

    /// Lets every held point go, for now and for later.
    pub fn release(&self) {
        let _ = std::fs::remove_file(self.hold_file());
    }

    /// Points will be held again.
    ///
    /// # Panics
    /// If the file cannot be made.
    pub fn hold_again(&self) {
        std::fs::write(self.hold_file(), "").expect("the file of held points");
    }

    /// The binary with this stage's runtime directory.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("PAGEFERRY_RUNTIME_DIR", self.directory.path());
        command
            .env_remove("PAGEFERRY_HOLD")
            .env_remove("PAGEFERRY_LOG")
            .env_remove("PAGEFERRY_LIMIT");
        command.envs(self.limits.map(|limits| ("PAGEFERRY_LIMIT", limits)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a command that will end by itself.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(&self, arguments: &[&str]) -> Running {
        self.start_into(arguments, Stdio::piped())
    }

    /// The same with a stdout of the test's own, of which nothing is heard here.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start_into(&self, arguments: &[&str], stdout: impl Into<Stdio>) -> Running {
        let mut child = self.command(arguments).stdout(stdout).spawn().expect("the binary starts");
        let stdout = child.stdout.take().map_or_else(|| Words::of(std::io::empty()), Words::of);
        let stderr = Words::of(child.stderr.take().expect("piped"));
        Running { child, stdout, stderr, command: arguments.join(" ") }
    }

    /// Runs a command to its end.
    #[must_use]
    pub fn done(&self, arguments: &[&str]) -> Ended {
        self.start(arguments).end(SOON)
    }

    /// Starts moving a guest. The downtime is not what most tests are about: it is allowed to be
    /// long.
    #[must_use]
    pub fn migrate(&self, name: &str, to: SocketAddr, more: &[&str]) -> Running {
        let to = to.to_string();
        let mut arguments = vec!["migrate", name, "--to", &to, "--json"];
        if !more.contains(&"--downtime-max") {
            arguments.extend(["--downtime-max", "2s"]);
        }
        arguments.extend(more);
        self.start(&arguments)
    }

    /// `pageferry run`, once its guest is there. `hold` names a point, or none.
    #[must_use]
    pub fn run(&self, name: &str, qemu: &str, hold: &str) -> Supervisor {
        let supervisor = self.supervise(name, &["run", name], Some(qemu), hold);
        supervisor.words.wait(&format!("{name} runs (QEMU pid"), SOON);
        supervisor.wait_state(State::Hosting);
        supervisor
    }

    /// `pageferry receive` on a free port of loopback, once it waits.
    #[must_use]
    pub fn receive(&self, name: &str, qemu: &str, hold: &str) -> Supervisor {
        self.receive_at("127.0.0.1:0", name, qemu, hold, &[])
    }

    /// `pageferry receive` at this address, once it waits.
    #[must_use]
    pub fn receive_at(
        &self,
        listen: &str,
        name: &str,
        qemu: &str,
        hold: &str,
        more: &[&str],
    ) -> Supervisor {
        let mut arguments = vec!["receive", name, "--listen", listen];
        arguments.extend(more);
        let supervisor = self.supervise(name, &arguments, Some(qemu), hold);
        supervisor.words.wait("waits for a guest on", SOON);
        supervisor
    }

    /// `pageferry attach`, once it is there.
    #[must_use]
    pub fn attach(&self, name: &str, more: &[&str]) -> Supervisor {
        let mut arguments = vec!["attach", name];
        arguments.extend(more);
        let supervisor = self.supervise(name, &arguments, None, "");
        supervisor.words.wait(&format!("attached to {name}"), SOON);
        supervisor.wait_state(State::Hosting);
        supervisor
    }

    /// `pageferry attach` to a guest that may be stopped in doubt, once it is there.
    #[must_use]
    pub fn attach_in_doubt(&self, name: &str) -> Supervisor {
        let supervisor = self.supervise(name, &["attach", name], None, "");
        supervisor.words.wait(&format!("attached to {name}"), SOON);
        supervisor
    }

    /// Where the console of a QEMU of this name is.
    #[must_use]
    pub fn console_path(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.console"))
    }

    /// Connects to that console.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn console(&self, name: &str) -> Console {
        Console::open(&self.console_path(name))
    }

    /// `pageferry microvm` with these arguments, once it has a guest or waits for one. Its stdin
    /// and stdout are the guest's serial port. `hold` names a point, or none.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn microvm(&self, name: &str, arguments: &[&str], hold: &str) -> (Supervisor, Console) {
        let mut command = self.command(&["microvm", name]);
        self.hold_at(hold, &mut command);
        let mut child =
            command.args(arguments).stdin(Stdio::piped()).spawn().expect("the binary starts");
        let words = Words::of(child.stderr.take().expect("piped"));
        let shown = Words::of(child.stdout.take().expect("piped"));
        let console = Console::of(shown, Box::new(child.stdin.take().expect("piped")));
        let supervisor = Supervisor {
            name: name.to_owned(),
            child,
            words,
            monitor: self.path(&format!("{name}.look")),
            directory: self.directory.path().into(),
        };
        let ready = if arguments.contains(&"--listen") {
            "waits for a guest on"
        } else {
            "runs in this process"
        };
        supervisor.words.wait(&format!("{name} {ready}"), SOON);
        (supervisor, console)
    }

    /// A supervisor, whatever becomes of it. The QEMU command is split at spaces; the test's own
    /// monitor is added to it.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn supervise(
        &self,
        name: &str,
        arguments: &[&str],
        qemu: Option<&str>,
        hold: &str,
    ) -> Supervisor {
        self.supervise_into(name, arguments, qemu, hold, Stdio::piped())
    }

    /// The same with a stderr of the test's own, of which nothing is heard here.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn supervise_into(
        &self,
        name: &str,
        arguments: &[&str],
        qemu: Option<&str>,
        hold: &str,
        stderr: impl Into<Stdio>,
    ) -> Supervisor {
        let monitor = self.path(&format!("{name}.look"));
        let mut command = self.command(arguments);
        if let Some(qemu) = qemu {
            command.arg("--").args(qemu.split(' ').filter(|word| !word.is_empty()));
            command.args(monitor_options(&monitor));
        }
        self.hold_at(hold, &mut command);
        let mut child =
            command.stdout(Stdio::null()).stderr(stderr).spawn().expect("the binary starts");
        let words = child.stderr.take().map_or_else(|| Words::of(std::io::empty()), Words::of);
        let name = name.to_owned();
        Supervisor { name, child, words, monitor, directory: self.directory.path().into() }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Supervisors, QEMUs and guardians all have the directory in their command line or are
        // children of one that has it.
        let directory = self.directory.path().display().to_string();
        look::sweep(&directory);
    }
}

/// The options that give a QEMU a monitor for the test alone.
#[must_use]
pub fn monitor_options(path: &Path) -> [String; 4] {
    let socket = format!("socket,id=look,path={},server=on,wait=off", path.display());
    ["-chardev".into(), socket, "-mon".into(), "chardev=look,mode=control".into()]
}

/// A command under way.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// What it prints.
    pub stdout: Words,
    /// What it says.
    pub stderr: Words,
    command: String,
}

impl Running {
    /// How it ended, if it has.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn try_end(&mut self) -> Option<Ended> {
        let status = self.child.try_wait().expect("our child")?;
        // The pipes close with it, but what was in them is still being read.
        let (stdout, stderr) = (self.stdout.all(SOON), self.stderr.all(SOON));
        Some(Ended { status: status.code(), stdout, stderr })
    }

    /// How it ended.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn end(mut self, wait: Duration) -> Ended {
        let command = self.command.clone();
        eventually(&format!("`pageferry {command}` ends"), wait, || self.try_end())
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A supervisor. Dropping it kills it, but not its guest.
#[derive(Debug)]
pub struct Supervisor {
    /// The guest's name.
    pub name: String,
    child: Child,
    /// What it and its QEMU say.
    pub words: Words,
    /// The test's own monitor of its QEMU.
    pub monitor: PathBuf,
    directory: PathBuf,
}

impl Supervisor {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it answers to `status`; nothing if it does not answer.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        let runtime = RuntimeDir::at(&self.directory).ok()?;
        match Client::request(&runtime, &self.name, &Request::Status).ok()?.next_reply().ok()? {
            Reply::Status(status) => Some(status),
            _ => None,
        }
    }

    /// Waits until `status` says this.
    pub fn wait_state(&self, state: State) {
        eventually(
            &format!("{} is {state:?}; it said:\n{}", self.name, self.words.text()),
            SOON,
            || self.status().filter(|status| status.state == state).map(drop),
        );
    }

    /// The process id of its QEMU.
    #[must_use]
    pub fn qemu(&self) -> u32 {
        eventually(&format!("the QEMU of {}", self.name), SOON, || self.status()?.pid)
    }

    /// Where it listens.
    ///
    /// # Panics
    /// If it said no address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        let line = self.words.wait("waits for a guest on", SOON);
        line.rsplit(' ').next().and_then(|word| word.parse().ok()).expect("an address")
    }

    /// Waits until it is held at this point.
    pub fn wait_held(&self, point: &str) {
        self.words.wait(&format!("held at {point} "), SOON);
    }

    /// The state of its guest as QEMU says it.
    #[must_use]
    pub fn guest_state(&self) -> Option<String> {
        guest_state(&self.monitor)
    }

    /// Whether its guest runs.
    #[must_use]
    pub fn guest_runs(&self) -> bool {
        self.guest_state().as_deref() == Some("running")
    }

    /// Waits until its guest runs.
    pub fn wait_guest_runs(&self) {
        eventually(
            &format!("the guest {} runs; it said:\n{}", self.name, self.words.text()),
            SOON,
            || self.guest_runs().then_some(()),
        );
    }

    /// Whether it lives.
    #[must_use]
    pub fn alive(&self) -> bool {
        alive(self.pid())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        look::signal(self.pid(), signal);
    }

    /// Kills it (SIGKILL), and waits for its end. QEMU is another process.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its exit status once it ends by itself.
    ///
    /// # Panics
    /// If it does not.
    pub fn end(&mut self) -> Option<i32> {
        let (name, words) = (self.name.clone(), self.words.clone());
        eventually(&format!("the supervisor of {name} ends"), SOON, || {
            self.child.try_wait().unwrap_or_else(|e| panic!("{e}: {}", words.text()))
        })
        .code()
    }

    /// The guardian processes of its QEMU.
    #[must_use]
    pub fn guardians(&self) -> Vec<u32> {
        let qmp = self.directory.join(format!("{}.qmp", self.name));
        look::processes_with(&["guardian", &qmp.display().to_string()])
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} said:\n  {}", self.name, self.words.lines().join("\n  "));
        }
        self.kill();
    }
}
