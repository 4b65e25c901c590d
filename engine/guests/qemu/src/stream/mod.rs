//! QEMU's own migration stream, used for the device state alone: the socket that holds it back, and
//! its end.
//!
//! QEMU's migration is started **ahead** of the downtime into a socket that takes only a few KiB
//! and that nobody reads. QEMU does its set-up, writes until the socket is full, and waits there
//! with the guest running. When the guest has been stopped the socket is opened wide and read to
//! its end: what is left for the downtime is the device state and the few blocks that are not
//! shared.

pub mod settings;

use super::qmp::{Event, Qmp};
pub use crate::stream::settings::Settings;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::text;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// QMP commands answer in about a millisecond; a loaded host may need a hundred times that.
pub const QMP_MAX: Duration = Duration::from_secs(10);
/// For the device state to be written or loaded, block devices flushed and all.
pub const STATE_MAX: Duration = Duration::from_secs(30);

/// The smallest send buffer that the kernel gives a socket, so that QEMU waits early.
const HELD_BYTES: usize = 4096;
/// A send buffer that takes a whole device state without a pause.
const OPEN_BYTES: usize = 8 << 20;
/// How often a wait for QEMU looks up whether to go on.
const LOOK_UP_EVERY: Duration = Duration::from_millis(50);
/// Bytes read from the stream at once.
const PIECE_BYTES: usize = 256 << 10;

/// QEMU cleans up in its main loop, in about a millisecond, and no event tells when.
const YANK_LOOK_EVERY: Duration = Duration::from_millis(1);

/// For QEMU to say why a migration failed.
const WORDS_MAX: Duration = Duration::from_secs(1);

/// QEMU's states of a guest that has stopped by itself. The first two last until it is reset.
const STOPPED_BY_ITSELF: [&str; 3] = ["shutdown", "internal-error", "guest-panicked"];

/// The name under which QEMU keeps our end of the stream.
const FD_NAME: &str = "pageferry-stream";

/// Whether a `query-migrate` status means that QEMU is busy with a migration.
#[must_use]
pub fn under_way(status: &str) -> bool {
    !matches!(status, "none" | "completed" | "failed" | "cancelled")
}

/// A MIGRATION event with one of these states.
pub fn is_migration(event: &Event, states: &[&str]) -> bool {
    event.name == "MIGRATION"
        && event.data.get("status").and_then(Value::as_str).is_some_and(|s| states.contains(&s))
}

/// QEMU's outgoing stream, held back.
#[derive(Debug)]
pub struct Outgoing {
    ours: UnixStream,
    /// A second handle of QEMU's end while it is held back: only to widen its buffer.
    theirs: Option<OwnedFd>,
    /// The number of the event of its beginning: tells its events from an earlier migration's.
    begun: u64,
}

impl Outgoing {
    /// Starts QEMU's migration; it soon waits for us.
    pub fn start(qmp: &mut Qmp) -> Result<Self> {
        let (ours, theirs) = pair()?;
        sockopt::set_socket_send_buffer_size(&theirs, HELD_BYTES)
            .map_err(|e| Error::os("narrowing a socket", e))?;
        let deadline = Instant::now() + QMP_MAX;
        qmp.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd(), deadline)?;
        // What is known of an earlier attempt must not be taken for this one's.
        qmp.drain_events()?;
        qmp.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") }), deadline)?;
        // Whatever set-up fails, fails now, with the guest running. `active` comes after the
        // set-up. The end of an earlier migration that was cancelled may still be on its way, ahead
        // of our `setup`.
        let setup = qmp.wait_event(deadline, |e| is_migration(e, &["setup"]))?;
        let begun = qmp.wait_event(deadline, |e| {
            e.number > setup.number
                && is_migration(e, &["active", "failed", "cancelled", "completed"])
        })?;
        if !is_migration(&begun, &["active"]) {
            return Err(migration_error(qmp, "QEMU cannot save this guest's devices"));
        }
        Ok(Self { ours, theirs: Some(theirs), begun: begun.number })
    }

    /// Lets QEMU go on.
    pub fn open(&mut self) -> Result<()> {
        // Closed with it: the stream's end is heard only when QEMU's handle is the last.
        let Some(theirs) = self.theirs.take() else { return Ok(()) };
        sockopt::set_socket_send_buffer_size(&theirs, OPEN_BYTES)
            .map_err(|e| Error::os("widening a socket", e))
    }

    /// Hands what QEMU writes to `sink` until it has finished.
    pub fn drain(mut self, qmp: &mut Qmp, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + STATE_MAX;
        let what = "reading the device state from QEMU";
        self.open()?;
        let mut ours = self.ours;
        ours.set_read_timeout(Some(LOOK_UP_EVERY)).map_err(|e| Error::os(what, e))?;
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match ours.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => sink(&piece[..n])?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    sink(&[])?
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    return Err(Error::Timeout { what: what.into() });
                }
                Err(e) => return Err(Error::os(what, e)),
            }
        }
        let is_end = |e: &Event| {
            e.number > self.begun && is_migration(e, &["completed", "failed", "cancelled"])
        };
        let end = qmp.wait_event_watched(deadline, is_end, &mut || sink(&[]))?;
        if is_migration(&end, &["completed"]) {
            Ok(())
        } else {
            Err(migration_error(qmp, "QEMU could not save the device state"))
        }
    }
}

/// QEMU's incoming stream, waiting for its first byte.
#[derive(Debug)]
pub struct Incoming {
    ours: UnixStream,
}

impl Incoming {
    /// Has a QEMU that was started with `-incoming defer` read from us. From here on it ends by
    /// itself if we go away.
    pub fn start(qmp: &mut Qmp) -> Result<Self> {
        let (ours, theirs) = pair()?;
        let deadline = Instant::now() + QMP_MAX;
        qmp.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd(), deadline)?;
        qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{FD_NAME}") }), deadline)?;
        Ok(Self { ours })
    }

    /// The stream, to write the device state into.
    #[must_use]
    pub fn into_stream(self) -> UnixStream {
        self.ours
    }
}

fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| Error::os("making a socket pair", e))?;
    Ok((UnixStream::from(ours), theirs))
}

/// Ends whatever migration QEMU is busy with, and waits until all of it is over.
pub fn cancel(qmp: &mut Qmp) -> Result<()> {
    let deadline = Instant::now() + QMP_MAX;
    loop {
        let status = qmp.execute("query-migrate", json!({}), deadline)?;
        if !under_way(status.get("status").and_then(Value::as_str).unwrap_or("none")) {
            break;
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout { what: "waiting for QEMU to end its migration".into() });
        }
        qmp.execute("migrate_cancel", json!({}), deadline)?;
        // The event is only quicker than asking again: it may be gone, or an earlier migration's.
        let soon = Instant::now() + LOOK_UP_EVERY;
        match qmp.wait_event(soon, |e| is_migration(e, &["cancelled", "failed", "completed"])) {
            Ok(_) | Err(Error::Timeout { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    // QEMU 10 aborts if a migration begins while the one before still holds its yank instance.
    loop {
        let yanks = match qmp.execute("query-yank", json!({}), deadline) {
            Ok(yanks) => yanks,
            Err(Error::VmmRefused { .. }) => return Ok(()),
            Err(e) => return Err(e),
        };
        if !yanks.as_array().is_some_and(|list| list.iter().any(|yank| yank["type"] == "migration"))
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout {
                what: "waiting for QEMU to clean up its migration".into(),
            });
        }
        std::thread::sleep(YANK_LOOK_EVERY);
    }
}

/// Lets a guest run that we have stopped. Returns whether QEMU was told so: not where the guest has
/// stopped by itself just before, for `cont` is then refused for good, or wrong.
pub fn let_run(qmp: &mut Qmp, deadline: Instant) -> Result<bool> {
    let status = qmp.execute("query-status", json!({}), deadline)?;
    if status["status"].as_str().is_some_and(|state| STOPPED_BY_ITSELF.contains(&state)) {
        return Ok(false);
    }
    qmp.execute("cont", json!({}), deadline)?;
    Ok(true)
}

/// An error with QEMU's own words, where it has some.
fn migration_error(qmp: &mut Qmp, what: &str) -> Error {
    // The guest may be stopped meanwhile.
    let status = qmp.execute("query-migrate", json!({}), Instant::now() + WORDS_MAX);
    match status.as_ref().ok().and_then(|s| s.get("error-desc")).and_then(Value::as_str) {
        Some(theirs) => Error::Guest(format!("{what}: {}", text::reason(theirs))),
        None => Error::Guest(what.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::path::Path;

    /// A QEMU whose clock is set back with each event, and that had a migration before.
    fn clock_going_back(stream: UnixStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        let mut stream = stream;
        let mut second = 1000;
        let mut event = |status: &str| {
            second -= 60;
            format!(
                "{{\"timestamp\": {{\"seconds\": {second}, \"microseconds\": 0}}, \"event\": \"MIGRATION\", \
                 \"data\": {{\"status\": \"{status}\"}}}}\n"
            )
        };
        writeln!(
            stream,
            "{{\"QMP\": {{\"version\": {{\"qemu\": {{\"micro\": 0, \"minor\": 0, \"major\": 10}}}}}}}}"
        )
        .unwrap();
        let mut line = String::new();
        while std::mem::take(&mut line).is_empty() && lines.read_line(&mut line).unwrap_or(0) > 0 {
            let command: Value = serde_json::from_str(&line).unwrap();
            let mut said = format!("{{\"return\": {{}}, \"id\": {}}}\n", command["id"]);
            if command["execute"] == "migrate" {
                // The end of the migration before comes late, ahead of our own.
                said += &["cancelled", "setup", "active", "completed"].map(&mut event).concat();
            }
            stream.write_all(said.as_bytes()).unwrap();
            line.clear();
        }
    }

    #[test]
    fn events_are_told_apart_by_their_arrival_and_not_by_qemus_clock() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(|| clock_going_back(theirs));
        let begun = Instant::now();
        let deadline = begun + QMP_MAX;
        let mut qmp = Qmp::over(ours.into(), Path::new("/fake"), deadline).unwrap();
        let outgoing = Outgoing::start(&mut qmp).unwrap();
        outgoing.drain(&mut qmp, &mut |_| Ok(())).unwrap();
        assert!(begun.elapsed() < QMP_MAX / 2, "{:?}", begun.elapsed());
        drop(qmp);
        qemu.join().unwrap();
    }

    /// A QEMU in this state, which refuses `cont` in some. Returns how often that was said.
    fn in_state(stream: UnixStream, state: &str) -> usize {
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let say = |line: &str| (&stream).write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut times = 0;
        say(r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}}}"#);
        for line in lines.map_while(|line| line.ok()) {
            let command: Value = serde_json::from_str(&line).unwrap();
            let id = &command["id"];
            let refused = ["shutdown", "internal-error"].contains(&state);
            match command["execute"].as_str() {
                Some("query-status") => {
                    say(&format!(
                        r#"{{"return": {{"status": "{state}", "running": false}}, "id": {id}}}"#
                    ));
                }
                Some("cont") if refused => {
                    times += 1;
                    let why = "Resetting the Virtual Machine is required";
                    say(&format!(
                        r#"{{"error": {{"class": "GenericError", "desc": "{why}"}}, "id": {id}}}"#
                    ));
                }
                said => {
                    times += usize::from(said == Some("cont"));
                    say(&format!(r#"{{"return": {{}}, "id": {id}}}"#));
                }
            }
        }
        times
    }

    #[test]
    fn a_guest_that_has_stopped_by_itself_is_not_let_run() {
        for (state, runs) in [
            ("paused", true),
            ("postmigrate", true),
            ("shutdown", false),
            ("internal-error", false),
            ("guest-panicked", false),
        ] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let qemu = std::thread::spawn(move || in_state(theirs, state));
            let deadline = Instant::now() + QMP_MAX;
            let mut qmp = Qmp::over(ours.into(), Path::new("/fake"), deadline).unwrap();
            assert_eq!(let_run(&mut qmp, deadline).unwrap(), runs, "{state}");
            drop(qmp);
            assert_eq!(qemu.join().unwrap(), usize::from(runs), "{state}");
        }
    }
}
