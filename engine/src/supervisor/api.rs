//! What the other commands say to a supervisor, as lines of JSON over its socket, and the threads that
//! answer them.

use super::Shared;
use super::hosted::Vmm;
use crate::error::{Error, Result};
use crate::progress::{Monitor, Progress};
use crate::report::MigrationReport;
use crate::source::MigrateOptions;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A client has this long to say what it wants and to take each line.
const CLIENT_MAX: Duration = Duration::from_secs(10);
/// How often progress is sent.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Orders that may wait.
const ORDERS_MAX: usize = 16;
/// The longest line of a request.
const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// One request: one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Request {
    /// How are you?
    Status,
    /// Move the guest; progress lines and then a report.
    Migrate(MigrateOptions),
    /// End the migration under way.
    Cancel,
    /// Say what becomes of a guest whose migration ended in doubt.
    Settle {
        /// Let it run here; otherwise end it here.
        run: bool,
    },
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "lowercase")]
pub enum Reply {
    /// To Status.
    Status(Status),
    /// While a migration is under way.
    Progress(Progress),
    /// The end of a migration.
    Report(MigrationReport),
    /// Something was done.
    Done {
        /// What.
        text: String,
    },
    /// It cannot be done.
    Refused {
        /// Why, and the mend.
        text: String,
    },
}

/// What a supervisor is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Starting the guest's monitor, or taking it up.
    Starting,
    /// Waiting for a source.
    Waiting,
    /// Being filled.
    Receiving,
    /// The guest is here; it runs unless its operator paused it.
    Hosting,
    /// The guest is being moved away.
    Migrating,
    /// The guest has moved away; what is left of it here is being taken away.
    Moved,
    /// A migration ended in doubt, or with a guest that could not be let run again; it is stopped.
    Unknown,
}

impl State {
    /// Why no migration can begin now.
    fn against_migrating(self) -> Option<&'static str> {
        match self {
            Self::Hosting => None,
            Self::Migrating => Some(
                "a migration of this guest is under way already (`pageferry status`, `pageferry cancel`)",
            ),
            Self::Starting => Some("the guest is still starting; try again in a moment"),
            Self::Waiting | Self::Receiving => Some("this is a receiver that has no guest yet"),
            Self::Moved => Some("the guest has moved away"),
            Self::Unknown => Some("the last migration ended in doubt; settle it first (`pageferry settle`)"),
        }
    }
}

/// The answer to Status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The guest's name.
    pub name: String,
    /// What the supervisor is doing.
    pub state: State,
    /// Who runs the guest.
    #[serde(default)]
    pub vmm: Vmm,
    /// The process that the guest lives in.
    pub pid: Option<u32>,
    /// Where it listens for a source.
    pub listen: Option<String>,
    /// The migration under way.
    pub progress: Option<Progress>,
    /// How the last migration ended.
    pub last: Option<MigrationReport>,
}

/// A request for the guest's loop.
#[derive(Debug)]
pub enum Order {
    /// Move the guest.
    Migrate {
        /// How.
        options: MigrateOptions,
        /// Made by the API so that it can watch and cancel.
        monitor: Monitor,
        /// Where the outcome goes.
        reply: Answer,
    },
    /// See [`Request::Settle`].
    Settle {
        /// Let it run here.
        run: bool,
        /// Where the outcome goes.
        reply: Answer,
    },
}

/// The way back to the client that gave an order.
#[derive(Debug)]
pub struct Answer(Sender<Reply>);

impl Answer {
    /// Hands the last line to the client's thread and waits until it is out, so that this process may
    /// end right after.
    pub fn deliver(self, reply: Reply) {
        if self.0.send_timeout(reply.clone(), CLIENT_MAX).is_ok() {
            // The channel holds nothing: a second one is taken by nobody, and fails when the thread has
            // written the first and is gone.
            let _ = self.0.send_timeout(reply, CLIENT_MAX);
        }
    }
}

impl Order {
    /// Answers that it cannot be done now.
    pub fn refuse(self, why: &str) {
        let (Self::Migrate { reply, .. } | Self::Settle { reply, .. }) = self;
        reply.deliver(Reply::Refused { text: why.into() });
    }
}

/// Opens the socket and answers on threads of its own. Orders come out of the returned channel.
pub fn serve(path: &Path, shared: Shared) -> Result<Receiver<Order>> {
    // The name is ours by its lock, so a socket that is still there is a dead supervisor's.
    let _ = std::fs::remove_file(path);
    let listener = crate::private::listen(path).map_err(|e| super::runtime::cannot_write(path, &e))?;
    let (sender, orders) = bounded(ORDERS_MAX);
    // One migration at a time: its monitor, for Cancel.
    let current = std::sync::Arc::new(std::sync::Mutex::new(None::<Monitor>));
    super::spawn("api", move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                std::thread::sleep(PROGRESS_EVERY);
                continue;
            };
            let (shared, sender, current) = (shared.clone(), sender.clone(), current.clone());
            let answered = super::spawn("api-client", move || {
                if let Err(e) = answer(&client, &shared, &sender, &current) {
                    tracing::debug!(error = %e, "a client of the supervisor");
                }
            });
            if let Err(e) = answered {
                tracing::warn!(error = %e, "no thread for a client");
            }
        }
    })?;
    Ok(orders)
}

type Current = std::sync::Mutex<Option<Monitor>>;

fn answer(
    client: &UnixStream,
    shared: &Shared,
    orders: &Sender<Order>,
    current: &Current,
) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_MAX))?;
    client.set_write_timeout(Some(CLIENT_MAX))?;
    let mut line = String::new();
    BufReader::new(std::io::Read::take(client, REQUEST_BYTES_MAX)).read_line(&mut line)?;
    let lock = || current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(e) => return send(client, &Reply::Refused { text: format!("not a request: {e}") }),
    };
    let (reply, replies) = bounded(0);
    let reply = Answer(reply);
    let monitor = match request {
        Request::Status => {
            let mut status = shared.status();
            status.progress =
                (*lock()).as_ref().filter(|_| status.state == State::Migrating).map(Monitor::progress);
            return send(client, &Reply::Status(status));
        }
        Request::Cancel => {
            let under_way = matches!(shared.status().state, State::Migrating);
            let answer = match lock().as_ref().filter(|_| under_way) {
                Some(monitor) => {
                    monitor.cancel();
                    Reply::Done { text: "cancelling; `migrate` reports how it ended".into() }
                }
                None => Reply::Refused { text: "no migration is under way".into() },
            };
            return send(client, &answer);
        }
        Request::Settle { run } => {
            order(orders, Order::Settle { run, reply });
            None
        }
        Request::Migrate(options) => {
            // Looked at and taken in one step, so that of two requests one is refused.
            let mut state = State::Migrating;
            shared.update(|status| {
                state = status.state;
                if state == State::Hosting {
                    status.state = State::Migrating;
                }
            });
            if let Some(why) = state.against_migrating() {
                return send(client, &Reply::Refused { text: why.into() });
            }
            let monitor = Monitor::default();
            *lock() = Some(monitor.clone());
            order(orders, Order::Migrate { options, monitor: monitor.clone(), reply });
            Some(monitor)
        }
    };
    let mut watching = true;
    loop {
        match replies.recv_timeout(PROGRESS_EVERY) {
            Ok(reply) => return send(client, &reply),
            Err(RecvTimeoutError::Timeout) => {
                // A client that went away does not end the migration.
                if let Some(monitor) = monitor.as_ref().filter(|_| watching) {
                    watching = send(client, &Reply::Progress(monitor.progress())).is_ok();
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                return send(client, &Reply::Refused { text: "the supervisor is ending".into() });
            }
        }
    }
}

fn order(orders: &Sender<Order>, order: Order) {
    if let Err(e) = orders.try_send(order) {
        e.into_inner().refuse("the supervisor is busy; try again");
    }
}

fn send(mut client: &UnixStream, reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    client.write_all(&line)
}

/// A client's side: a request, and the lines of its answer.
#[derive(Debug)]
pub struct Client {
    lines: BufReader<UnixStream>,
}

impl Client {
    /// Sends a request to the supervisor of this name.
    pub fn request(dir: &super::runtime::RuntimeDir, name: &str, request: &Request) -> Result<Self> {
        super::runtime::check_name(name)?;
        let nobody = || {
            let mend = match dir.record(name).filter(super::runtime::Record::alive) {
                Some(record) => format!(
                    "its QEMU still runs (pid {}): take it up with `pageferry attach {name}`",
                    record.pid
                ),
                None => "`pageferry list` shows those that are".into(),
            };
            Error::refused(format!("no guest named {name} is supervised on this host; {mend}"))
        };
        let mut stream = UnixStream::connect(dir.path(name, "sock")).map_err(|_| nobody())?;
        let talking = |e| Error::os(format!("talking to the supervisor of {name}"), e);
        stream.set_read_timeout(Some(CLIENT_MAX)).map_err(talking)?;
        let mut line = serde_json::to_vec(request).map_err(|e| talking(e.into()))?;
        line.push(b'\n');
        stream.write_all(&line).map_err(talking)?;
        Ok(Self { lines: BufReader::new(stream) })
    }

    /// The next line. A migration sends one at least every 100 ms.
    pub fn next_reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        let lost = |e| {
            Error::os(
                "the supervisor does not answer any more; see its own output for how the migration ended",
                e,
            )
        };
        match self.lines.read_line(&mut line) {
            Ok(0) => Err(lost(std::io::ErrorKind::ConnectionAborted.into())),
            Ok(_) => serde_json::from_str(&line).map_err(|e| lost(e.into())),
            Err(e) => Err(lost(e)),
        }
    }
}
