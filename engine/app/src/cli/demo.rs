//! `pageferry demo`: a small Linux guest that checks all of its memory, moved live on this host.
//!
//! It uses the commands as an operator would: `run`, `receive` and `migrate`, in a runtime
//! directory of its own. The guest (docs/guest.md) talks over its serial console.

use super::display::Display;
use super::show::summary;
use super::units::downtime_max;
use crate::output::print_result;
use crate::supervisor::api::{Client, Reply, Request};
use crate::supervisor::claim::RuntimeDir;
use crate::supervisor::record::{RUNTIME_DIR_VARIABLE, Record};
use crossbeam_channel::{Receiver, unbounded};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::report::Outcome;
use pageferry_engine::source::MigrateOptions;
use pageferry_engine::text;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For the guest to boot under software emulation on a slow machine.
const BOOT_MAX: Duration = Duration::from_secs(180);
/// For the guest to check all of its memory.
const VERDICT_MAX: Duration = Duration::from_secs(180);
/// For QEMU and the supervisors to start.
const START_MAX: Duration = Duration::from_secs(30);

/// Status lines of the guest, one a second, in which it learns how its clocks drift apart.
const STATUS_LINES_BEFORE: u32 = 4;
/// Status lines to wait for after a move (docs/guest.md says why).
const STATUS_LINES_AFTER: u32 = 5;

/// The guest's name at the source and at the destination.
const HERE: &str = "demo";
const THERE: &str = "demo-moved";

/// What `pageferry demo` takes.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// The guest's kernel, as scripts/guest-image makes it.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The guest's initramfs.
    #[arg(long, value_name = "FILE")]
    initrd: PathBuf,
    /// The guest's memory, in MiB.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    memory: u32,
    /// Memory that the guest writes over and over, in MiB.
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    working_set: u32,
    /// Memory that the guest fills once and only checks, in MiB.
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    touched: u32,
    /// How fast the guest writes, in MB a second.
    #[arg(long, default_value_t = 40, value_name = "MB")]
    rate: u32,
    /// How often it is moved.
    #[arg(long, default_value_t = 1)]
    moves: u32,
    /// Longest time in which the guest may be paused.
    #[arg(long, default_value = "20ms", value_parser = downtime_max, value_name = "TIME")]
    downtime_max: Duration,
    /// Digest all memory on both sides too; the guest is paused meanwhile.
    #[arg(long)]
    verify: bool,
}

/// Runs the demo. Exit status 0 only if the guest itself says that nothing is lost.
pub fn main(args: &DemoArgs) -> Result<u8> {
    for file in [&args.kernel, &args.initrd] {
        if !file.is_file() {
            return Err(Error::refused(format!(
                "{} is not a file; scripts/guest-image makes it",
                file.display()
            )));
        }
    }
    let stage = Stage::set()?;
    print_result(&format!(
        "a Linux guest of {} MiB boots under QEMU; it will write {} MB/s and check all it reads\n",
        args.memory, args.rate
    ));
    let mut names = [HERE.to_owned(), THERE.to_owned()];
    let mut here = stage.start(args, &names[0], &["run"])?;
    here.console.wait("WORKLOAD READY", BOOT_MAX)?;
    let mut intact = true;
    for _ in 0..args.moves {
        let mut there = stage.start(args, &names[1], &["receive", "--listen", "127.0.0.1:0"])?;
        let address = there.listening()?;
        // A few seconds of steady state, as the guest counts them; then its gaps count anew.
        here.console.wait("WORKLOAD t=", START_MAX)?;
        here.console.say("reset-gap")?;
        here.console.wait("WORKLOAD GAP RESET", START_MAX)?;
        for _ in 0..STATUS_LINES_BEFORE {
            here.console.wait("WORKLOAD t=", START_MAX)?;
        }
        let mut options = MigrateOptions::to(address);
        options.downtime_us_max = args.downtime_max.as_micros() as u64;
        options.verify = args.verify;
        migrate(&stage, &names[0], options)?;
        // The guest knows how long it was paused once its CMOS clock has changed twice more.
        for _ in 0..STATUS_LINES_AFTER {
            there.console.wait("WORKLOAD t=", START_MAX)?;
        }
        there.console.say("verdict")?;
        let verdict = there.console.wait("WORKLOAD VERDICT", VERDICT_MAX)?;
        intact &= verdict.contains("VERDICT intact") && verdict.contains("errors=0");
        print_result(&format!(
            "the guest says: {}\n",
            text::reason(verdict.trim_start_matches("WORKLOAD "))
        ));
        if let Some(gap) = field(&verdict, "gap_max_ms=") {
            print_result(&format!(
                "the longest gap that the guest itself noticed: {} ms\n",
                text::name(gap)
            ));
        }
        drop(std::mem::replace(&mut here, there));
        names.swap(0, 1);
    }
    here.console.say("quit")?;
    print_result(if intact {
        "nothing is lost\n"
    } else {
        "MEMORY WAS LOST: see CORRUPT lines above\n"
    });
    Ok(if intact { 0 } else { 1 })
}

fn migrate(stage: &Stage, name: &str, options: MigrateOptions) -> Result<()> {
    let mut client = Client::request(&stage.runtime, name, &Request::Migrate(options))?;
    let mut display = Display::open();
    loop {
        match client.next_reply()? {
            Reply::Progress(progress) => display.show(&progress),
            Reply::Report(report) => {
                display.clear();
                if report.outcome == Outcome::Completed {
                    print_result(&summary(&report));
                    return Ok(());
                }
                return Err(Error::Guest(
                    report.reason.unwrap_or_else(|| "the migration was aborted".into()),
                ));
            }
            Reply::Refused { text } => return Err(Error::Refused(text)),
            Reply::Status(_) | Reply::Done { .. } => {}
        }
    }
}

/// The value that follows `key` in a line of the guest.
fn field<'l>(line: &'l str, key: &str) -> Option<&'l str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key))
}

/// A runtime directory for the demo alone; removed at its end.
struct Stage {
    directory: PathBuf,
    runtime: RuntimeDir,
}

impl Stage {
    fn set() -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("pageferry-demo-{}", std::process::id()));
        // Not one that somebody else has put there.
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&directory).map_err(|e| {
            Error::refused(format!(
                "cannot make {}: {e}; remove it, or set TMPDIR",
                directory.display()
            ))
        })?;
        let runtime = RuntimeDir::at(&directory)?;
        Ok(Self { directory, runtime })
    }

    /// Starts one supervisor and its QEMU, and connects to the guest's console.
    fn start(&self, args: &DemoArgs, name: &str, command: &[&str]) -> Result<Actor> {
        let console = self.directory.join(format!("{name}.console"));
        let _ = std::fs::remove_file(&console);
        let append = format!(
            "console=ttyS0 quiet panic=-1 pf.mib={} pf.touch={} pf.rate={}",
            args.working_set, args.touched, args.rate
        );
        let chardev = format!("socket,id=console,path={},server=on,wait=off", console.display());
        let mut supervisor = Command::new("/proc/self/exe")
            .env(RUNTIME_DIR_VARIABLE, &self.directory)
            .arg(command[0])
            .arg(name)
            .args(&command[1..])
            .args([
                "--",
                "qemu-system-x86_64",
                "-accel",
                "tcg",
                "-machine",
                "q35",
                "-m",
                &args.memory.to_string(),
            ])
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-chardev",
                &chardev,
                "-serial",
                "chardev:console",
                "-serial",
                "null",
            ])
            .arg("-kernel")
            .arg(&args.kernel)
            .arg("-initrd")
            .arg(&args.initrd)
            .args(["-append", &append])
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::os("starting a supervisor", e))?;
        let words = supervisor.stderr.take().map(|stderr| Lines::of(stderr, None));
        let actor = Actor {
            name: name.into(),
            runtime: self.runtime.clone(),
            supervisor,
            words,
            console: Lines::none(),
        };
        actor.connected(&console)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A supervisor and its guest, both ended when it goes.
struct Actor {
    name: String,
    runtime: RuntimeDir,
    supervisor: Child,
    words: Option<Lines>,
    console: Lines,
}

impl Actor {
    fn connected(mut self, console: &Path) -> Result<Self> {
        let deadline = Instant::now() + START_MAX;
        loop {
            if let Ok(stream) = UnixStream::connect(console) {
                let reader =
                    stream.try_clone().map_err(|e| Error::os("opening the guest's console", e))?;
                self.console = Lines::of(reader, Some(stream));
                return Ok(self);
            }
            if let Some(status) =
                self.supervisor.try_wait().map_err(|e| Error::os("waiting for a supervisor", e))?
            {
                let words: Vec<String> =
                    self.words.iter().flat_map(|w| w.lines.try_iter()).collect();
                return Err(Error::Guest(format!(
                    "{} ended ({status}): {}",
                    self.name,
                    words.join("; ")
                )));
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout { what: "waiting for the guest's console".into() });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Where its receiver listens.
    fn listening(&mut self) -> Result<String> {
        let words =
            self.words.as_ref().ok_or_else(|| Error::Guest("no output of the receiver".into()))?;
        let line = words.wait("waits for a guest on ", START_MAX)?;
        Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let record: Option<Record> = self.runtime.record(&self.name).filter(Record::alive);
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        if let Some(pid) = record.and_then(|r| rustix::process::Pid::from_raw(r.pid as i32)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Lines that somebody says, and a way to answer.
struct Lines {
    lines: Receiver<String>,
    writer: Option<UnixStream>,
}

impl Lines {
    fn none() -> Self {
        Self { lines: crossbeam_channel::never(), writer: None }
    }

    fn of(reader: impl Read + Send + 'static, writer: Option<UnixStream>) -> Self {
        let (sender, lines) = unbounded();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n').map_while(std::result::Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    return;
                }
            }
        });
        Self { lines, writer }
    }

    /// The next line with this text. A line in which the guest reports damage ends the wait.
    fn wait(&self, text: &str, wait: Duration) -> Result<String> {
        let deadline = Instant::now() + wait;
        loop {
            let line = self.lines.recv_deadline(deadline).map_err(|_| Error::Timeout {
                what: format!("waiting for {text:?} from the guest"),
            })?;
            if line.contains("WORKLOAD CORRUPT") || line.contains("WORKLOAD FAILED") {
                return Err(Error::Guest(format!("the guest says: {}", text::reason(&line))));
            }
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    fn say(&mut self, text: &str) -> Result<()> {
        let console =
            self.writer.as_mut().ok_or_else(|| Error::Guest("the guest has no console".into()))?;
        console
            .write_all(format!("{text}\n").as_bytes())
            .map_err(|e| Error::os("talking to the guest", e))
    }
}
