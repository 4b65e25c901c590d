//! The commands that talk to a supervisor: migrate, list, status, cancel, settle.

use super::display::Display;
use crate::cli::show::{describe, in_json, summary};
use crate::output::{print, print_result};
use crate::supervisor::api::{Client, Reply, Request, Status};
use crate::supervisor::claim::RuntimeDir;
use crate::supervisor::record::Record;
use crate::supervisor::say;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::report::Outcome;
use pageferry_engine::source::MigrateOptions;
use pageferry_engine::text;
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

/// The supervisor died, or is frozen: where the guest runs is not known here, and "aborted" would
/// say that it is.
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
                format!(
                    "without a supervisor, QEMU pid {pid}: `pageferry attach {name}` takes it up"
                )
            }
        };
        // A file in the directory has whatever name it has.
        text += &format!("{:<20} {}\n", text::name(&name), text::escape(&state));
    }
    print(&text).map(|()| 0)
}

/// Shows one guest.
pub fn status(name: &str, json: bool) -> Result<u8> {
    let status = ask_status(&RuntimeDir::open()?, name)?;
    if json {
        return print(&in_json(&status)?).map(|()| 0);
    }
    let mut text = format!("{name}: {}\n", text::escape(&describe(&status)));
    if let Some(reason) = status.last.as_ref().and_then(|last| last.reason.as_ref()) {
        text += &format!("last migration: {}\n", text::escape(reason));
    }
    print(&text).map(|()| 0)
}

/// A request with a one-line answer.
pub fn simple(name: &str, request: &Request) -> Result<u8> {
    match Client::request(&RuntimeDir::open()?, name, request)?.next_reply()? {
        Reply::Done { text } => {
            print_result(&format!("{name}: {}\n", text::escape(&text)));
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
