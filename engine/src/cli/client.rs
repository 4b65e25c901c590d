//! The commands that talk to a supervisor: migrate, list, status, cancel, settle.

use super::display::Display;
use super::units::bytes;
use crate::error::{Error, Result};
use crate::output::{print, print_result, words};
use crate::page::PAGE_BYTES;
use crate::progress::{Progress, Stage};
use crate::report::{MigrationReport, Outcome};
use crate::source::MigrateOptions;
use crate::supervisor::api::{Client, Reply, Request, State, Status};
use crate::supervisor::runtime::{Record, RuntimeDir};
use crate::supervisor::say;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Moves a guest and shows how it goes.
pub fn migrate(name: &str, options: MigrateOptions, json: bool) -> Result<u8> {
    let runtime = RuntimeDir::open()?;
    let mut client = Client::request(&runtime, name, &Request::Migrate(options))?;
    cancel_on_signal(&runtime, name)?;
    let mut display = Display::open();
    let report = loop {
        match client.next_reply().map_err(|e| lost_sight(name, &e))? {
            Reply::Progress(progress) => display.show(&progress),
            Reply::Report(report) => break report,
            Reply::Refused { text } => {
                display.clear();
                return Err(Error::Refused(text));
            }
            Reply::Status(_) | Reply::Done { .. } => {}
        }
    };
    display.clear();
    // What became of the guest is the exit status, whatever becomes of the output.
    if json {
        print_result(&in_json(&report)?);
    }
    if report.outcome != Outcome::Completed {
        say(report.reason.as_deref().unwrap_or("no reason given"));
    } else if !json {
        print_result(&summary(&report));
    }
    Ok(report.exit_status())
}

/// The supervisor died, or is frozen: where the guest runs is not known here, and "aborted" would say that
/// it is.
fn lost_sight(name: &str, error: &Error) -> Error {
    Error::Unknown(format!(
        "how the migration of {name} ended is not known here ({}); `pageferry list` shows whether the guest is here, and \
         `pageferry attach {name}` takes it up again",
        error.chain()
    ))
}

/// A Ctrl-C asks the supervisor to cancel; this command then waits for how it ended.
fn cancel_on_signal(runtime: &RuntimeDir, name: &str) -> Result<()> {
    let (runtime, name) = (runtime.clone(), name.to_owned());
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])
        .map_err(|e| Error::os("listening for signals", e))?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            say("cancelling");
            if let Err(e) =
                Client::request(&runtime, &name, &Request::Cancel).and_then(|mut c| c.next_reply())
            {
                say(&e.chain());
            }
        }
    });
    Ok(())
}

/// Where a migration stands, in one line.
#[must_use]
pub(super) fn line(progress: &Progress) -> String {
    match progress.stage {
        Stage::Idle | Stage::Setup => "setting up".into(),
        Stage::Rounds if progress.bytes_per_second == 0 => format!("round {}", progress.round),
        Stage::Rounds => format!(
            "round {}: {}/s, guest writes {}/s, downtime would be {:.1} ms",
            progress.round,
            bytes(progress.bytes_per_second),
            bytes(progress.dirty_bytes_per_second),
            progress.predicted_blackout_us as f64 / 1e3
        ),
        Stage::Switchover => "switching over".into(),
        Stage::Committed => "waiting for the destination to run the guest".into(),
        Stage::Done => "done".into(),
    }
}

/// A completed migration for people.
#[must_use]
pub fn summary(report: &MigrationReport) -> String {
    let ms = |us: u64| us as f64 / 1e3;
    let blackout = &report.blackout_us;
    let mut text = format!(
        "moved in {:.2} s over {} ({} lane{}), {} written, {} untouched or zero and not sent, {} control messages\n",
        report.total_us as f64 / 1e6,
        report.transport,
        report.lanes,
        if report.lanes == 1 { "" } else { "s" },
        bytes(report.bytes_written),
        bytes(report.bytes_skipped),
        report.control_messages,
    );
    if let Some(why) = &report.fell_back {
        text += &format!("  a first attempt by RDMA was given up: {}\n", words::reason(why));
    }
    if !report.lost_pages.is_empty() {
        text += &format!(
            "  the hardware of the source lost pages of the guest, which are zeros now where they had to be sent: {}\n",
            crate::memory::lost::name(&report.lost_pages)
        );
    }
    for round in &report.rounds {
        text += &format!(
            "  round {:<3} {:>10} in {:>8.1} ms, {:>10} dirty after it\n",
            round.index,
            bytes(round.bytes),
            ms(round.elapsed_us),
            bytes(round.dirtied_pages * PAGE_BYTES)
        );
    }
    text += &format!(
        "downtime {:.2} ms (predicted {:.2}): pause {:.2}, harvest {:.2}, push {:.2}, save {:.2}, load {:.2}, {}commit {:.2}, resume {:.2}\n",
        ms(blackout.total),
        ms(report.predicted_blackout_us),
        ms(blackout.pause),
        ms(blackout.harvest),
        ms(blackout.push),
        ms(blackout.save),
        ms(blackout.load),
        if report.verified.is_some() {
            format!("verify {:.2}, ", ms(blackout.verify))
        } else {
            String::new()
        },
        ms(blackout.commit),
        ms(blackout.resume),
    );
    if report.verified == Some(true) {
        text += "verified: both sides hold the same memory\n";
    }
    text
}

/// Shows every guest of this host.
pub fn list(json: bool) -> Result<u8> {
    let runtime = RuntimeDir::open()?;
    let mut found = Vec::new();
    for name in runtime.names()? {
        match ask_status(&runtime, &name) {
            Ok(status) => found.push((Some(status), name)),
            // Dead supervisors leave sockets; only a live QEMU is worth a line.
            Err(_) if runtime.record(&name).is_some_and(|r| r.alive()) => found.push((None, name)),
            Err(_) => {}
        }
    }
    if json {
        let known: Vec<_> = found
            .iter()
            .map(|(status, name)| serde_json::json!({ "name": name, "status": status }))
            .collect();
        return print(&in_json(&known)?).map(|()| 0);
    }
    if found.is_empty() {
        say("no guests on this host; start one with `pageferry run`");
    }
    let mut text = String::new();
    for (status, name) in found {
        let state = match status {
            Some(status) => describe(&status),
            None => {
                let pid = runtime.record(&name).map(|Record { pid, .. }| pid).unwrap_or_default();
                format!("without a supervisor, QEMU pid {pid}: `pageferry attach {name}` takes it up")
            }
        };
        // A file in the directory has whatever name it has.
        text += &format!("{:<20} {}\n", words::name(&name), words::escape(&state));
    }
    print(&text).map(|()| 0)
}

/// Shows one guest.
pub fn status(name: &str, json: bool) -> Result<u8> {
    let status = ask_status(&RuntimeDir::open()?, name)?;
    if json {
        return print(&in_json(&status)?).map(|()| 0);
    }
    let mut text = format!("{name}: {}\n", words::escape(&describe(&status)));
    if let Some(reason) = status.last.as_ref().and_then(|last| last.reason.as_ref()) {
        text += &format!("last migration: {}\n", words::escape(reason));
    }
    print(&text).map(|()| 0)
}

/// A request with a one-line answer.
pub fn simple(name: &str, request: &Request) -> Result<u8> {
    match Client::request(&RuntimeDir::open()?, name, request)?.next_reply()? {
        Reply::Done { text } => {
            print_result(&format!("{name}: {}\n", words::escape(&text)));
            Ok(0)
        }
        Reply::Refused { text } => Err(Error::Refused(text)),
        other => Err(Error::Protocol(format!("{other:?} from the supervisor"))),
    }
}

fn ask_status(runtime: &RuntimeDir, name: &str) -> Result<Status> {
    match Client::request(runtime, name, &Request::Status)?.next_reply()? {
        Reply::Status(status) => Ok(status),
        other => Err(Error::Protocol(format!("{other:?} from the supervisor"))),
    }
}

fn describe(status: &Status) -> String {
    let pid = status.pid.map(|pid| format!(" ({} pid {pid})", status.vmm)).unwrap_or_default();
    match status.state {
        State::Starting => "starting".into(),
        State::Waiting => format!("waits for a guest on {}{pid}", status.listen.as_deref().unwrap_or("?")),
        State::Receiving => format!("receives a guest{pid}"),
        State::Hosting => format!("here{pid}"),
        State::Migrating => {
            format!("moving: {}{pid}", status.progress.as_ref().map_or_else(|| "starting".into(), line))
        }
        State::Moved => format!("has moved away{pid}"),
        State::Unknown => format!("STOPPED, migration in doubt{pid}: `pageferry settle`"),
    }
}

fn in_json(value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::os("printing JSON", std::io::Error::from(e)))?;
    Ok(text + "\n")
}
