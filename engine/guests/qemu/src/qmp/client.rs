//! The client: one connection, one command at a time, events kept by arrival.

use super::events::{DATA_BYTES_MAX, EventLog};
use super::lines::{LINE_BYTES_MAX, LineBuffer};
use crate::qmp::events::{Event, Turns};
use crate::qmp::version::{Version, version_in};
use crate::qmp::wire::{Answer, Data, Head, Said, excerpt, reason_in};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::text;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, socket_with,
};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For taking what is there already. A QEMU that still sends after this long sends without end.
const DRAIN_MAX: Duration = Duration::from_millis(200);

/// How often a wait that is watched looks up.
const LOOK_UP_EVERY: Duration = Duration::from_millis(20);

/// A connection to one QEMU. See the [module](crate::qmp).
#[derive(Debug)]
pub struct Qmp {
    socket: OwnedFd,
    path: PathBuf,
    version: Version,
    lines: LineBuffer,
    events: EventLog,
    next_id: u64,
    /// A command that was typed ahead, and its id.
    typed_ahead: Option<(&'static str, u64)>,
    broken: bool,
}

impl Qmp {
    /// Connects to a QMP socket and negotiates.
    ///
    /// # Errors
    /// [`Error::Refused`] with the fix where there is no socket, nobody listens, or another client
    /// holds it; [`Error::Guest`] if QEMU hangs up.
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|e| Error::os("making a unix socket", e))?;
        let address = SocketAddrUnix::new(path).map_err(|e| {
            Error::os(format!("the QMP socket's path {} is too long", path.display()), e)
        })?;
        connect(&socket, &address).map_err(|e| refused_to_connect(path, e))?;
        Self::over(socket, path, deadline)
    }

    /// A dead one, for the place of one that is lent.
    pub(crate) fn stand_in(path: &Path) -> Result<Self> {
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|e| Error::os("making a unix socket", e))?;
        Ok(Self { broken: true, ..Self::new(socket, path) })
    }

    fn new(socket: OwnedFd, path: &Path) -> Self {
        Self {
            socket,
            path: path.to_owned(),
            version: Version { major: 0, minor: 0, micro: 0 },
            lines: LineBuffer::default(),
            events: EventLog::default(),
            next_id: 1,
            typed_ahead: None,
            broken: false,
        }
    }

    /// Greets and negotiates over a connected socket, which is made non-blocking. `path` is for
    /// messages alone.
    pub fn over(socket: OwnedFd, path: &Path, deadline: Instant) -> Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)
            .map_err(|e| Error::os("making a socket non-blocking", e))?;
        let mut qmp = Self::new(socket, path);
        let line = qmp.read_line(deadline, "the greeting").map_err(|e| match e {
            Error::Timeout { .. } => busy(path),
            other => other,
        })?;
        qmp.version = version_in(&line).ok_or_else(|| {
            Error::refused(format!(
                "{} is not a QMP socket: it answered {} (is it a monitor in `readline` mode, or another program?)",
                path.display(),
                excerpt(&String::from_utf8_lossy(&line))
            ))
        })?;
        qmp.execute("qmp_capabilities", Value::Null, deadline)?;
        Ok(qmp)
    }

    /// Where its socket lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing more can be said over it.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Runs a command and returns what it returns. `arguments` is an object, or null for none.
    /// Events that come meanwhile are kept.
    ///
    /// # Errors
    /// [`Error::VmmRefused`] if QEMU refuses it, [`Error::Guest`] if QEMU hangs up, [`Error::Timeout`].
    /// After a timeout the connection is still good: the late answer is thrown away.
    pub fn execute(&mut self, command: &str, arguments: Value, deadline: Instant) -> Result<Value> {
        self.send_and_wait(command, arguments, &[], deadline, &mut || Ok(()))
    }

    /// Like [`Qmp::execute`], and asks `watch` all the while whether to go on. QEMU carries the
    /// command out all the same if it says no.
    pub fn execute_watched(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Instant,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Value> {
        self.send_and_wait(command, arguments, &[], deadline, watch)
    }

    /// Like [`Qmp::execute`], with a file descriptor that QEMU gets a copy of (`getfd`, `add-fd`).
    pub fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<Value> {
        self.send_and_wait(command, arguments, &[fd], deadline, &mut || Ok(()))
    }

    /// Hands QEMU a command without arguments but for its last byte, which the next
    /// [`Qmp::execute`] of the same command sends. Any other command takes it back first.
    pub fn type_ahead(&mut self, command: &'static str, deadline: Instant) -> Result<()> {
        if self.typed_ahead.is_some_and(|(typed, _)| typed == command) {
            return Ok(());
        }
        self.take_back(deadline)?;
        let id = self.new_id();
        let line = json!({ "execute": command, "id": id }).to_string();
        self.send(command, &line.as_bytes()[..line.len() - 1], &[], deadline)?;
        self.typed_ahead = Some((command, id));
        Ok(())
    }

    /// Spoils a command that was typed ahead, so that QEMU throws it away.
    fn take_back(&mut self, deadline: Instant) -> Result<()> {
        if self.typed_ahead.take().is_none() {
            return Ok(());
        }
        self.send("taking a command back", b"?\n", &[], deadline)?;
        let what = "its word that a command was taken back";
        loop {
            if let Said::Answer { id: None, line } = self.hear(deadline, what)?
                && reason_in(&line).is_some()
            {
                return Ok(());
            }
            not_after(deadline, || self.waiting_for(what))?;
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Returns the first event that `wanted` accepts: one already kept, or one still to come. Other
    /// events stay kept, in their order.
    pub fn wait_event(
        &mut self,
        deadline: Instant,
        wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        self.wait_event_watched(deadline, wanted, &mut || Ok(()))
    }

    /// Like [`Self::wait_event`], and asks `watch` all the while whether to go on.
    pub fn wait_event_watched(
        &mut self,
        deadline: Instant,
        mut wanted: impl FnMut(&Event) -> bool,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Event> {
        loop {
            // What has arrived is kept, so one look finds old and new ones.
            if let Some(event) = self.events.take(&mut wanted) {
                return Ok(event);
            }
            watch()?;
            match self.hear(deadline.min(Instant::now() + LOOK_UP_EVERY), "an event") {
                Ok(_) | Err(Error::Timeout { .. }) => {}
                Err(e) => return Err(e),
            }
            // The last one heard may be the one.
            if Instant::now() >= deadline {
                let last = self.events.take(&mut wanted);
                return last.ok_or_else(|| self.waiting_for("an event"));
            }
        }
    }

    /// Takes every event that is there now, oldest first, without waiting.
    pub fn drain_events(&mut self) -> Result<Vec<Event>> {
        self.look()?;
        Ok(self.events.take_all())
    }

    /// Takes in what is there now, without waiting; events stay kept.
    pub fn look(&mut self) -> Result<()> {
        let deadline = Instant::now() + DRAIN_MAX;
        while self.hear_ready()?.is_some() {
            not_after(deadline, || {
                Error::Guest(format!("QEMU sends without end on {}", self.path.display()))
            })?;
        }
        Ok(())
    }

    /// When the vCPUs were stopped, let run or reset last, as far as was heard.
    #[must_use]
    pub fn turns(&self) -> Turns {
        self.events.turns()
    }

    /// The number of the last event that was heard.
    #[must_use]
    pub fn events_heard(&self) -> u64 {
        self.events.arrived()
    }

    /// The socket, to wait on.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send_and_wait(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Value> {
        let bare = fds.is_empty() && arguments.as_object().is_none_or(serde_json::Map::is_empty);
        let id = match self.typed_ahead {
            Some((typed, id)) if bare && typed == command => {
                self.send(command, b"}\n", fds, deadline)?;
                self.typed_ahead = None;
                id
            }
            _ => {
                self.take_back(deadline)?;
                let id = self.new_id();
                let mut message = json!({ "execute": command, "id": id });
                if !bare {
                    message["arguments"] = arguments;
                }
                let mut line = message.to_string().into_bytes();
                line.push(b'\n');
                self.send(command, &line, fds, deadline)?;
                id
            }
        };
        loop {
            match self.hear(deadline.min(Instant::now() + LOOK_UP_EVERY), command) {
                Ok(Said::Answer { id: Some(theirs), line }) if theirs == id => {
                    return self.answer_in(command, &line);
                }
                Ok(Said::Answer { id: None, line }) => {
                    if let Some(reason) = reason_in(&line) {
                        return Err(self
                            .broke(format!("it could not read a command: {}", excerpt(&reason))));
                    }
                }
                // An event, which is kept; or the late answer to a command that timed out.
                Ok(_) | Err(Error::Timeout { .. }) => {}
                Err(e) => return Err(e),
            }
            watch()?;
            not_after(deadline, || self.waiting_for(command))?;
        }
    }

    /// What the answer to a command says.
    fn answer_in(&mut self, command: &str, line: &[u8]) -> Result<Value> {
        match serde_json::from_slice::<Answer>(line) {
            Ok(Answer { error: Some(error), .. }) => Err(Error::VmmRefused {
                vmm: "QEMU",
                command: command.into(),
                reason: text::reason(&error.desc),
            }),
            Ok(Answer { value, .. }) => Ok(value.unwrap_or(Value::Null)),
            Err(e) => Err(self.broke(format!("its answer to {command} is not understood: {e}"))),
        }
    }

    /// Sends a whole line; descriptors travel with its first byte.
    fn send(
        &mut self,
        command: &str,
        line: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<()> {
        if self.broken {
            return Err(self.closed());
        }
        let mut sent = 0;
        while sent < line.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Error::Guest(format!(
                    "{command}: more descriptors than one message takes"
                )));
            }
            match sendmsg(
                &self.socket,
                &[IoSlice::new(&line[sent..])],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::OUT, deadline, command).inspect_err(|_| {
                        // Half a line can never be taken back.
                        self.broken |= sent > 0;
                    })?
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.closed()),
                Err(e) => return Err(Error::os(format!("sending {command} to QEMU"), e)),
            }
        }
        Ok(())
    }

    /// The next thing that QEMU says. An event is kept for whoever waits for it.
    fn hear(&mut self, deadline: Instant, what: &str) -> Result<Said> {
        let line = self.read_line(deadline, what)?;
        self.understand(line)
    }

    /// The same, if it is here already.
    fn hear_ready(&mut self) -> Result<Option<Said>> {
        self.read_ready()?.map(|line| self.understand(line)).transpose()
    }

    /// What a line is. Only an event is parsed to its end.
    fn understand(&mut self, line: Vec<u8>) -> Result<Said> {
        let not_json = |line: &[u8], e| {
            format!(
                "it sent a line that is no message ({e}): {}",
                excerpt(&String::from_utf8_lossy(line))
            )
        };
        let head: Head<'_> = match serde_json::from_slice(&line) {
            Ok(head) => head,
            Err(e) => {
                let what = not_json(&line, e);
                return Err(self.broke(what));
            }
        };
        let id = head.id;
        let Some(name) = head.event.map(Cow::into_owned) else {
            return Ok(Said::Answer { id, line });
        };
        let data: serde_json::Result<Data> = match line.len() {
            0..=DATA_BYTES_MAX => serde_json::from_slice(&line),
            _ => Ok(Data { data: Value::Null, timestamp: None }),
        };
        match data {
            Ok(Data { data, timestamp }) => {
                let at_us = timestamp
                    .and_then(|at| at.seconds.checked_mul(1_000_000)?.checked_add(at.microseconds));
                let event = self.events.arrive(name, data, at_us.unwrap_or(0));
                self.events.keep(event, line.len());
                Ok(Said::Event)
            }
            Err(e) => {
                let what = not_json(&line, e);
                Err(self.broke(what))
            }
        }
    }

    fn read_line(&mut self, deadline: Instant, what: &str) -> Result<Vec<u8>> {
        loop {
            if let Some(line) = self.read_ready()? {
                return Ok(line);
            }
            self.wait(PollFlags::IN, deadline, what)?;
            // Half a line after the other wakes it as well.
            not_after(deadline, || self.waiting_for(what))?;
        }
    }

    /// The next line if it has come in whole, without waiting.
    fn read_ready(&mut self) -> Result<Option<Vec<u8>>> {
        if let Some(line) = self.lines.next_line() {
            return Ok(Some(line));
        }
        if self.broken {
            return Err(self.closed());
        }
        // Blank lines are lines, too.
        let mut blank = 0;
        while blank < LINE_BYTES_MAX {
            match recv(&self.socket, self.lines.room(), RecvFlags::empty()) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Err(self.closed()),
                Ok((_, count)) if self.lines.came(count) => blank += count,
                Ok(_) => {
                    return Err(
                        self.broke(format!("it sent a line of more than {LINE_BYTES_MAX} bytes"))
                    );
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::os("reading from QEMU's QMP socket", e)),
            }
            if let Some(line) = self.lines.next_line() {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    fn wait(&self, flags: PollFlags, deadline: Instant, what: &str) -> Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout =
                Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.socket, flags)], Some(&timeout)) {
                Ok(0) if Instant::now() >= deadline => return Err(self.waiting_for(what)),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(Error::os("waiting for QEMU's QMP socket", e)),
            }
        }
    }

    fn waiting_for(&self, what: &str) -> Error {
        Error::Timeout { what: format!("waiting for QEMU ({}): {what}", self.path.display()) }
    }

    fn closed(&mut self) -> Error {
        self.broken = true;
        Error::Guest(format!(
            "QEMU closed its QMP connection ({}): it exited or died",
            self.path.display()
        ))
    }

    fn broke(&mut self, what: String) -> Error {
        self.broken = true;
        Error::Guest(format!("QEMU broke the QMP protocol on {}: {what}", self.path.display()))
    }
}

/// A deadline this far from now; for callers that count in durations.
#[must_use]
#[cfg(test)]
pub(crate) fn within(duration: Duration) -> Instant {
    Instant::now() + duration
}

fn refused_to_connect(path: &Path, errno: Errno) -> Error {
    let path_text = path.display();
    match errno {
        Errno::NOENT => Error::refused(format!(
            "there is no QMP socket {path_text}: start QEMU with -qmp unix:{path_text},server=on,wait=off, or name the right one"
        )),
        Errno::CONNREFUSED => Error::refused(format!(
            "nobody listens on the QMP socket {path_text}: the QEMU that made it is gone (if one still runs, \
             another client may hold its only connection)"
        )),
        Errno::ACCESS | Errno::PERM => Error::refused(format!(
            "no permission to connect to the QMP socket {path_text}: run pageferry as the user that runs QEMU, or as root"
        )),
        Errno::AGAIN => busy(path),
        Errno::PROTOTYPE => {
            Error::refused(format!("{path_text} is not a stream socket, so not a QMP socket"))
        }
        other => Error::os(format!("connecting to the QMP socket {path_text}"), other),
    }
}

fn busy(path: &Path) -> Error {
    Error::refused(format!(
        "no greeting comes from the QMP socket {}: another client holds it (libvirt, a script, another pageferry; \
         QEMU serves one client a socket), or QEMU hangs. Start QEMU with a second -qmp socket for pageferry, or end \
         the other client",
        path.display()
    ))
}

fn not_after(deadline: Instant, error: impl FnOnce() -> Error) -> Result<()> {
    if Instant::now() < deadline { Ok(()) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::lines::RECV_BYTES;
    use crate::testing::TestQemu;
    use proptest::prelude::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread::{self, JoinHandle};

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 1, "major": 9}, "package": ""}, "capabilities": ["oob"]}}"#;

    fn soon() -> Instant {
        within(Duration::from_secs(10))
    }

    /// A QEMU that greets, answers the negotiation, and then does as `then` says.
    fn fake(
        then: impl FnOnce(BufReader<UnixStream>) + Send + 'static,
    ) -> (Result<Qmp>, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = thread::spawn(move || {
            let mut stream = BufReader::new(theirs);
            say(&mut stream, GREETING);
            assert_eq!(hear(&mut stream)["execute"], "qmp_capabilities");
            say(&mut stream, r#"{"return": {}, "id": 1}"#);
            then(stream);
        });
        (Qmp::over(ours.into(), Path::new("/fake"), soon()), qemu)
    }

    fn say(stream: &mut BufReader<UnixStream>, line: &str) {
        stream.get_mut().write_all(format!("{line}\r\n").as_bytes()).unwrap();
    }

    fn hear(stream: &mut BufReader<UnixStream>) -> Value {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or(Value::Null)
    }

    #[test]
    fn events_between_a_command_and_its_answer_are_kept_in_order() {
        let (qmp, qemu) = fake(|mut stream| {
            assert_eq!(hear(&mut stream), json!({"execute": "stop", "id": 2}));
            say(
                &mut stream,
                r#"{"timestamp": {"seconds": 3, "microseconds": 7}, "event": "STOP"}"#,
            );
            say(&mut stream, r#"{"event": "MIGRATION", "data": {"status": "setup"}}"#);
            say(&mut stream, r#"{"return": {"done": true}, "id": 2}"#);
            say(&mut stream, r#"{"event": "MIGRATION", "data": {"status": "active"}}"#);
            hear(&mut stream);
        });
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.version(), Version { major: 9, minor: 1, micro: 2 });
        assert_eq!(qmp.execute("stop", Value::Null, soon()).unwrap(), json!({"done": true}));
        let active = qmp.wait_event(soon(), |e| e.data["status"] == "active").unwrap();
        assert_eq!(active.name, "MIGRATION");
        let stop = qmp.wait_event(soon(), |_| true).unwrap();
        assert_eq!((stop.name.as_str(), stop.number, stop.at_us), ("STOP", 1, 3_000_007));
        assert_eq!(qmp.drain_events().unwrap().len(), 1);
        drop(qmp);
        qemu.join().unwrap();
    }

    #[test]
    fn a_command_typed_ahead_is_complete_only_when_it_is_executed() {
        let (qmp, qemu) = fake(|mut stream| {
            let mut bytes = [0; 24];
            stream.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, br#"{"execute":"cont","id":2"#);
            let mut last = String::new();
            stream.read_line(&mut last).unwrap();
            assert_eq!(last, "}\n");
            say(&mut stream, r#"{"event": "RESUME"}"#);
            say(&mut stream, r#"{"return": {}, "id": 2}"#);
            let mut spoiled = String::new();
            stream.read_line(&mut spoiled).unwrap();
            assert_eq!(spoiled, "{\"execute\":\"cont\",\"id\":3?\n");
            say(&mut stream, r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#);
            assert_eq!(hear(&mut stream), json!({"execute": "stop", "id": 4}));
            say(&mut stream, r#"{"return": "stopped", "id": 4}"#);
            hear(&mut stream);
        });
        let mut qmp = qmp.unwrap();
        qmp.type_ahead("cont", soon()).unwrap();
        assert_eq!(qmp.execute("cont", json!({}), soon()).unwrap(), json!({}));
        qmp.type_ahead("cont", soon()).unwrap();
        assert_eq!(qmp.execute("stop", json!({}), soon()).unwrap(), "stopped");
        assert_eq!(qmp.drain_events().unwrap().len(), 1);
        drop(qmp);
        qemu.join().unwrap();
    }

    #[test]
    fn a_real_qemu_runs_nothing_that_was_taken_back() {
        let mut qemu = TestQemu::start(&["-S"]);
        let status = |qmp: &mut Qmp| {
            qmp.execute("query-status", json!({}), soon()).unwrap()["status"].clone()
        };
        qemu.qmp.type_ahead("cont", soon()).unwrap();
        assert_eq!(status(&mut qemu.qmp), "prelaunch");
        qemu.qmp.type_ahead("cont", soon()).unwrap();
        qemu.qmp.execute("cont", json!({}), soon()).unwrap();
        assert_eq!(status(&mut qemu.qmp), "running");
    }

    #[test]
    fn a_refusal_carries_the_words_of_qemu() {
        let (qmp, qemu) = fake(|mut stream| {
            assert_eq!(hear(&mut stream)["arguments"], json!({"uri": "fd:x"}));
            say(
                &mut stream,
                r#"{"id": 2, "error": {"class": "GenericError", "desc": "no such fd"}}"#,
            );
        });
        let error = qmp.unwrap().execute("migrate", json!({"uri": "fd:x"}), soon()).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused migrate: no such fd");
        qemu.join().unwrap();
    }

    #[test]
    fn after_a_timeout_the_late_answer_is_not_taken_for_the_next() {
        let (qmp, qemu) = fake(|mut stream| {
            hear(&mut stream);
            hear(&mut stream);
            say(&mut stream, r#"{"return": "late", "id": 2}"#);
            say(&mut stream, r#"{"return": "right", "id": 3}"#);
        });
        let mut qmp = qmp.unwrap();
        let error =
            qmp.execute("slow", Value::Null, within(Duration::from_millis(20))).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert_eq!(qmp.execute("quick", Value::Null, soon()).unwrap(), "right");
        qemu.join().unwrap();
    }

    #[test]
    fn a_descriptor_travels_with_its_command() {
        let path = tempfile::tempdir().unwrap().keep().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            say(&mut stream, GREETING);
            hear(&mut stream);
            say(&mut stream, r#"{"return": {}, "id": 1}"#);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 4096];
            let got = rustix::net::recvmsg(
                stream.get_ref(),
                &mut [std::io::IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::empty(),
            )
            .unwrap();
            assert!(bytes[..got.bytes].starts_with(b"{"));
            let fds: Vec<OwnedFd> = control
                .drain()
                .filter_map(|m| match m {
                    rustix::net::RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            say(&mut stream, r#"{"return": {}, "id": 2}"#);
            let mut text = String::new();
            std::fs::File::from(fds.into_iter().next().unwrap()).read_to_string(&mut text).unwrap();
            text
        });
        let mut qmp = Qmp::connect(&path, soon()).unwrap();
        let (reader, mut writer) = std::io::pipe().unwrap();
        qmp.execute_with_fd("getfd", json!({"fdname": "x"}), reader.as_fd(), soon()).unwrap();
        writer.write_all(b"through").unwrap();
        drop((reader, writer));
        assert_eq!(qemu.join().unwrap(), "through");
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_qemu_that_sends_without_end_stretches_no_deadline_and_fills_no_memory() {
        // One line after the other, half lines, blank ones, and answers that nobody waits for.
        let kinds = [
            b"{\"event\": \"NOISE\", \"data\": [[], [], [], [], [], [], [], [], [], []]}\n"
                .repeat(40),
            b"\n".repeat(4096),
            b"{\"return\": [[], [], [], [], [], []], \"id\": 99}\n".repeat(80),
            b" ".repeat(100),
        ];
        for noise in kinds {
            let (qmp, qemu) =
                fake(move |mut stream| while stream.get_mut().write_all(&noise).is_ok() {});
            let mut qmp = qmp.unwrap();
            let begun = Instant::now();
            let short = || within(Duration::from_millis(50));
            assert!(qmp.execute("stop", Value::Null, short()).is_err());
            assert!(qmp.wait_event(short(), |_| false).is_err());
            let _ = qmp.drain_events();
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
            drop(qmp);
            qemu.join().unwrap();
        }
    }

    #[test]
    fn a_watched_wait_ends_when_its_watch_says_no() {
        let (qmp, qemu) = fake(|mut stream| {
            hear(&mut stream);
            hear(&mut stream);
        });
        let mut qmp = qmp.unwrap();
        let mut looks = 0;
        let mut watch = || {
            looks += 1;
            if looks < 3 { Ok(()) } else { Err(Error::Cancelled) }
        };
        let begun = Instant::now();
        assert!(matches!(
            qmp.wait_event_watched(soon(), |_| true, &mut watch),
            Err(Error::Cancelled)
        ));
        let said = qmp.execute_watched("stop", Value::Null, soon(), &mut || Err(Error::Cancelled));
        assert!(matches!(said, Err(Error::Cancelled)));
        assert!(begun.elapsed() < Duration::from_secs(5));
        drop(qmp);
        qemu.join().unwrap();
    }

    #[test]
    fn a_qemu_that_dies_is_said_to_have_died() {
        let (qmp, qemu) = fake(|mut stream| {
            hear(&mut stream);
        });
        let mut qmp = qmp.unwrap();
        let error = qmp.execute("stop", Value::Null, soon()).unwrap_err();
        assert!(error.to_string().contains("exited or died"), "{error}");
        assert!(qmp.execute("stop", Value::Null, soon()).is_err());
        assert!(qmp.wait_event(soon(), |_| true).is_err());
        qemu.join().unwrap();
    }

    #[test]
    fn a_socket_held_by_another_client_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = Qmp::connect(&path, within(Duration::from_millis(20))).unwrap_err();
        assert!(error.to_string().contains("another client holds it"), "{error}");
        let error = Qmp::connect(&directory.path().join("none"), soon()).unwrap_err();
        assert!(error.to_string().contains("there is no QMP socket"), "{error}");
    }

    #[test]
    fn a_line_without_end_is_refused_and_a_long_one_is_not() {
        let (qmp, qemu) = fake(|mut stream| {
            hear(&mut stream);
            say(&mut stream, &format!(r#"{{"return": "{}", "id": 2}}"#, "x".repeat(3 << 20)));
            hear(&mut stream);
            let _ = stream.get_mut().write_all(&vec![b'x'; LINE_BYTES_MAX + RECV_BYTES]);
        });
        let mut qmp = qmp.unwrap();
        let long = qmp.execute("long", Value::Null, soon()).unwrap();
        assert_eq!(long.as_str().map(str::len), Some(3 << 20));
        let error = qmp.execute("endless", Value::Null, soon()).unwrap_err();
        assert!(error.to_string().contains("a line of more than"), "{error}");
        drop(qmp);
        qemu.join().unwrap();
    }

    proptest! {
        #[test]
        fn no_bytes_can_make_it_panic(lines in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            "[{}\\[\\]\",:a-z0-9 ]{0,60}".prop_map(String::into_bytes),
            Just(GREETING.as_bytes().to_vec()),
            Just(br#"{"event": 7}"#.to_vec()),
            Just(br#"{"return": {}, "id": 1}"#.to_vec()),
            Just(br#"{"event": "X", "timestamp": {"seconds": 18446744073709551615, "microseconds": 9}}"#.to_vec()),
        ], 0..6)) {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            for line in lines {
                theirs.write_all(&line).unwrap();
                theirs.write_all(b"\n").unwrap();
            }
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            if let Ok(mut qmp) = Qmp::over(ours.into(), Path::new("/fake"), soon()) {
                let _ = qmp.execute("x", Value::Null, soon());
                let _ = qmp.wait_event(soon(), |_| false);
            }
        }
    }
}
