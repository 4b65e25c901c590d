//! Everything that this program says: lines for the operator on stderr, and on stdout what a
//! command was asked for. Nothing else in the engine writes to either (a lint denies it), because
//! no output may end or hold up a process that has a guest in its hands:
//!
//! ```text
//!   say, tracing  -->  a bounded buffer  -->  a thread  -->  stderr    never waits, never fails; a loss is counted
//!   print         ------------------------------------->  stdout     of a client: waits as any tool does
//! ```
//!
//! A closed stdout ends `print` quietly, as the reader has what it wanted (`pageferry list | head
//! -1`). Any other failure, such as a full disk, is an error, except behind something that was
//! done: there the exit status tells what was done, and [`print_result`] says on stderr that it
//! could not be printed.

pub mod spool;

use pageferry_engine::error::{Error, Result};
use pageferry_engine::{notice, text};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use spool::{Kind, Spool};
use std::io::Write;
use std::sync::OnceLock;
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// The operator's lines: what a supervisor says in days, or a verbose one in seconds.
const LOG: Kind = Kind {
    thread: "log-out",
    buffer_bytes: 256 << 10,
    count: |bytes| bytes.iter().filter(|byte| **byte == b'\n').count() as u64,
    note: |lost| format!("pageferry: {lost} lines are missing here, as nobody took them\n"),
    // A log that is rotated, or a pipe that is read again, takes the rest.
    tries_again: true,
};
/// The longest line. Words of others are cut much earlier; our own are as long as a QEMU command.
const LINE_CHARS_MAX: usize = 16 << 10;
/// For the last lines to be out when a process ends.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// Shows the events of `tracing`: those for the operator as they are, others by the level that
/// PAGEFERRY_LOG says.
pub fn show_events() {
    let level = EnvFilter::try_from_env("PAGEFERRY_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt::layer()
        .with_writer(|| TracingLog)
        // A terminal's colours would be escaped with everything else that it obeys.
        .with_ansi(false)
        .with_filter(level.and(filter_fn(|event| event.target() != notice::TARGET)));
    let for_operator = Operator.with_filter(
        filter_fn(|event| event.target() == notice::TARGET).with_max_level_hint(LevelFilter::INFO),
    );
    tracing_subscriber::registry().with(log).with(for_operator).init();
}

/// Says what the engine wants the operator to hear.
struct Operator;

impl<S: Subscriber> Layer<S> for Operator {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        event.record(&mut Message);
    }
}

/// The text of an event.
struct Message;

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            say(&format!("{value:?}"));
        }
    }
}

/// A line for the operator on stderr. Never waits and never fails; it is escaped, so it is one line
/// whatever is in it.
pub fn say(text: &str) {
    if pageferry_engine::clock::tell(text) {
        return;
    }
    line(&format!("pageferry: {text}"));
}

fn line(text: &str) {
    let mut line = text::foreign(text, LINE_CHARS_MAX);
    line.push('\n');
    // Without a thread, as when this host has no more of them, the line is lost.
    if let Some(log) = log() {
        log.push(line.as_bytes());
    }
}

fn log() -> Option<&'static Spool> {
    static LOG_OUT: OnceLock<Option<Spool>> = OnceLock::new();
    LOG_OUT.get_or_init(|| Spool::new(LOG, Box::new(Descriptor::stderr())).ok()).as_ref()
}

/// Has the log written out, unless nobody takes it. For the end of a process.
pub fn flush() {
    if let Some(log) = log() {
        log.flush_within(LAST_WORDS_MAX);
    }
}

/// Writes what the user asked for to stdout.
pub fn print(text: &str) -> Result<()> {
    match Descriptor::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|e| Error::os("writing to stdout", e)),
    }
}

/// The same for the result of something that was done, which a full disk does not undo: it is said.
pub fn print_result(text: &str) {
    if let Err(e) = print(text) {
        say(&format!("the result could not be printed: {}", e.chain()));
    }
}

/// The guest's console on stdout. It never waits either, as vCPUs write to it.
pub fn console() -> Result<Spool> {
    Spool::new(spool::CONSOLE, Box::new(Descriptor::stdout()))
}

/// Whether the operator sees stderr as it is written.
#[must_use]
pub fn stderr_is_a_terminal() -> bool {
    rustix::termios::isatty(Descriptor::stderr().fd())
}

/// Where tracing's lines go.
#[derive(Debug, Clone, Copy, Default)]
pub struct TracingLog;

impl Write for TracingLog {
    /// A whole event, as tracing's formatter writes it.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        line(String::from_utf8_lossy(bytes).trim_end_matches('\n'));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends a panic's message the way of all others: the default hook writes to stderr itself and
/// waits for it, and a thread that waits there is never joined.
pub fn say_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name");
        say(&format!("thread {name}: {info}"));
        let trace = std::backtrace::Backtrace::capture();
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            trace.to_string().lines().for_each(line);
        }
    }));
}

/// stdout or stderr, without the buffer and the lock of the standard library's handles: that lock
/// is held while somebody waits.
enum Descriptor {
    Stdout(std::io::Stdout),
    Stderr(std::io::Stderr),
}

impl Descriptor {
    #[allow(clippy::disallowed_methods, reason = "this is the one place that writes to it")]
    fn stdout() -> Self {
        Self::Stdout(std::io::stdout())
    }

    #[allow(clippy::disallowed_methods, reason = "this is the one place that writes to it")]
    fn stderr() -> Self {
        Self::Stderr(std::io::stderr())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stdout(stdout) => stdout.as_fd(),
            Self::Stderr(stderr) => stderr.as_fd(),
        }
    }
}

impl Write for Descriptor {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let fd = self.fd();
        loop {
            match rustix::io::write(fd, bytes) {
                // Somebody else made it so; it is waited for nevertheless.
                Err(Errno::AGAIN) => {
                    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::OUT)];
                    rustix::event::poll(&mut fds, None)?;
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
