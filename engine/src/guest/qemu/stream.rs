//! QEMU's own migration stream, used for the device state alone: its capabilities and parameters, the
//! socket that holds it back, and its end.
//!
//! QEMU's migration is started **ahead** of the blackout into a socket that takes only a few KiB and
//! that nobody reads. QEMU does its set-up, writes until the socket is full, and waits there with the
//! guest running. When the guest has been stopped the socket is opened wide and read to its end: what is
//! left for the blackout is the device state and the few blocks that are not shared.

use super::qmp::{Event, Qmp};
use crate::error::{Error, Result};
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

/// The name under which QEMU keeps our end of the stream.
const FD_NAME: &str = "pageferry-stream";

/// Whether a `query-migrate` status means that QEMU is busy with a migration.
#[must_use]
pub fn under_way(status: &str) -> bool {
    !matches!(status, "none" | "completed" | "failed" | "cancelled")
}

/// Migration settings as the operator left them.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Settings {
    capabilities: Vec<Value>,
    parameters: Value,
}

impl Settings {
    /// Asks QEMU for its settings.
    pub fn read(qmp: &mut Qmp) -> Result<Self> {
        let deadline = Instant::now() + QMP_MAX;
        let capabilities = qmp.execute("query-migrate-capabilities", json!({}), deadline)?;
        let all = qmp.execute("query-migrate-parameters", json!({}), deadline)?;
        let mut parameters = serde_json::Map::new();
        for name in ["max-bandwidth", "downtime-limit"] {
            if let Some(value) = all.get(name) {
                parameters.insert(name.into(), value.clone());
            }
        }
        Ok(Self {
            capabilities: capabilities.as_array().cloned().unwrap_or_default(),
            parameters: Value::Object(parameters),
        })
    }

    /// Makes QEMU's settings ours: `on` on and every other capability off, no bound on bandwidth, and any
    /// downtime allowed, so that QEMU goes to the end once it is let.
    pub fn impose(&self, qmp: &mut Qmp, on: &[&str]) -> Result<()> {
        let deadline = Instant::now() + QMP_MAX;
        let known = |name: &str| self.capabilities.iter().any(|c| c["capability"] == name);
        if let Some(missing) = on.iter().find(|name| !known(name)) {
            let version = qmp.version();
            return Err(Error::refused(format!(
                "this QEMU ({version}) does not know {missing}: 8.0 or newer is needed"
            )));
        }
        let wanted = self.capabilities.iter().filter_map(|c| {
            let name = c["capability"].as_str()?;
            let wanted = on.contains(&name);
            (c["state"].as_bool() != Some(wanted)).then(|| json!({ "capability": name, "state": wanted }))
        });
        let changes: Vec<Value> = wanted.collect();
        if !changes.is_empty() {
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": changes }), deadline)?;
        }
        // A TiB a second and the longest downtime that QEMU accepts: no bounds.
        let unbounded = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 2_000_000 });
        qmp.execute("migrate-set-parameters", unbounded, deadline)?;
        Ok(())
    }

    /// Puts everything back as it was.
    pub fn restore(&self, qmp: &mut Qmp) -> Result<()> {
        let deadline = Instant::now() + QMP_MAX;
        let now = qmp.execute("query-migrate-capabilities", json!({}), deadline)?;
        let now = now.as_array().cloned().unwrap_or_default();
        // Only what differs: QEMU reads a long command slowly, and the guest's devices wait meanwhile.
        let changes: Vec<_> = self.capabilities.iter().filter(|&c| !now.contains(c)).collect();
        if !changes.is_empty() {
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": changes }), deadline)?;
        }
        qmp.execute("migrate-set-parameters", self.parameters.clone(), deadline)?;
        Ok(())
    }
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
    /// QEMU's own time of its beginning, since the epoch: tells its events from an earlier migration's.
    begun_us: u64,
}

impl Outgoing {
    /// Starts QEMU's migration; it soon waits for us.
    pub fn start(qmp: &mut Qmp) -> Result<Self> {
        let (ours, theirs) = pair()?;
        sockopt::set_socket_send_buffer_size(&theirs, HELD_BYTES)
            .map_err(|e| Error::os("narrowing a socket", e))?;
        let deadline = Instant::now() + QMP_MAX;
        // What is known of an earlier attempt must not be taken for this one's.
        qmp.drain_events()?;
        qmp.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd(), deadline)?;
        qmp.drain_events()?;
        qmp.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") }), deadline)?;
        // Whatever set-up fails, fails now, with the guest running. `active` comes after the set-up. The end
        // of an earlier migration that was cancelled may still be on its way, ahead of our `setup`.
        let setup = qmp.wait_event(deadline, |e| is_migration(e, &["setup"]))?;
        let begun = qmp.wait_event(deadline, |e| {
            e.at_us >= setup.at_us && is_migration(e, &["active", "failed", "cancelled", "completed"])
        })?;
        if !is_migration(&begun, &["active"]) {
            return Err(migration_error(qmp, "QEMU cannot save this guest's devices"));
        }
        Ok(Self { ours, theirs: Some(theirs), begun_us: begun.at_us })
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
                Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => sink(&[])?,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    return Err(Error::Timeout { what: what.into() });
                }
                Err(e) => return Err(Error::os(what, e)),
            }
        }
        let end = qmp.wait_event(deadline, |e| {
            e.at_us >= self.begun_us && is_migration(e, &["completed", "failed", "cancelled"])
        })?;
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
    /// Has a QEMU that was started with `-incoming defer` read from us. From here on it ends by itself
    /// if we go away.
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
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
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
        qmp.execute("migrate_cancel", json!({}), deadline)?;
        qmp.wait_event(deadline, |e| is_migration(e, &["cancelled", "failed", "completed"]))?;
    }
    // QEMU 10 aborts if a migration begins while the one before still holds its yank instance.
    loop {
        let yanks = match qmp.execute("query-yank", json!({}), deadline) {
            Ok(yanks) => yanks,
            Err(Error::Qmp { .. }) => return Ok(()),
            Err(e) => return Err(e),
        };
        if !yanks.as_array().is_some_and(|list| list.iter().any(|yank| yank["type"] == "migration")) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout { what: "waiting for QEMU to clean up its migration".into() });
        }
        std::thread::sleep(YANK_LOOK_EVERY);
    }
}

/// An error with QEMU's own words, where it has some.
fn migration_error(qmp: &mut Qmp, what: &str) -> Error {
    let status = qmp.execute("query-migrate", json!({}), Instant::now() + QMP_MAX);
    match status.as_ref().ok().and_then(|s| s.get("error-desc")).and_then(Value::as_str) {
        Some(words) => Error::Guest(format!("{what}: {words}")),
        None => Error::Guest(what.into()),
    }
}
