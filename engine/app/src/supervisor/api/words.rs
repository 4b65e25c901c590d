//! What a client and a supervisor say to each other: one JSON line each.

use crate::supervisor::place::Vmm;
use crossbeam_channel::Sender;
use pageferry_engine::report::MigrationReport;
use pageferry_engine::report::progress::Progress;
use pageferry_engine::source::MigrateOptions;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A client has this long to say what it wants and to take each line.
pub(crate) const CLIENT_MAX: Duration = Duration::from_secs(10);

/// How often progress is sent.
pub(crate) const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The longest line of a request.
pub(crate) const REQUEST_BYTES_MAX: u64 = 64 << 10;

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
        /// Why, and the fix.
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
    pub(crate) fn against_migrating(self) -> Option<&'static str> {
        match self {
            Self::Hosting => None,
            Self::Migrating => Some(
                "a migration of this guest is under way already (`pageferry status`, `pageferry cancel`)",
            ),
            Self::Starting => Some("the guest is still starting; try again in a moment"),
            Self::Waiting | Self::Receiving => Some("this is a receiver that has no guest yet"),
            Self::Moved => Some("the guest has moved away"),
            Self::Unknown => {
                Some("the last migration ended in doubt; settle it first (`pageferry settle`)")
            }
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

/// The way back to the client that gave an order.
#[derive(Debug)]
pub struct Answer(pub(super) Sender<Reply>);

impl Answer {
    /// Hands the last line to the client's thread and waits until it is out, so that this process
    /// may end right after.
    pub fn deliver(self, reply: Reply) {
        if self.0.send_timeout(reply.clone(), CLIENT_MAX).is_ok() {
            // The channel holds nothing: a second one is taken by nobody, and fails when the thread
            // has written the first and is gone.
            let _ = self.0.send_timeout(reply, CLIENT_MAX);
        }
    }
}
