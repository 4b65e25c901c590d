//! The one error type of the engine: what failed, on what, and what to do about it.

use std::io;

/// Why a migration was refused, aborted, or left in doubt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A check before anything was touched. The text names the thing and the mend.
    #[error("{0}")]
    Refused(String),
    /// A system call failed.
    #[error("{what}")]
    Os {
        /// What was being done.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The lanes failed.
    #[error("the data lanes failed")]
    Transport(#[from] pageferry_transport::Error),
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {reason}")]
    Qmp {
        /// The QMP command.
        command: String,
        /// QEMU's own words.
        reason: String,
    },
    /// The guest, or the process that runs it, is in a state that the migration cannot go on from.
    #[error("{0}")]
    Guest(String),
    /// A wait ended at its deadline.
    #[error("timed out while {what}")]
    Timeout {
        /// What was being done or waited for.
        what: String,
    },
    /// The peer sent something that the protocol does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// The destination cannot be had now, as it serves another source.
    #[error("the destination refuses: {0}")]
    Busy(String),
    /// The peer aborted and said why.
    #[error("the {side} aborted: {reason}")]
    PeerAborted {
        /// Which side: `source` or `destination`.
        side: &'static str,
        /// Its words.
        reason: String,
        /// Whether its lanes broke.
        lanes: bool,
    },
    /// The operator cancelled.
    #[error("cancelled by the operator")]
    Cancelled,
    /// The guest writes faster than the link carries, and the user did not allow a longer downtime.
    #[error("{0}")]
    NotConverging(String),
    /// Who runs the guest is not known here: Commit was sent and no answer came, QEMU did not say whether it
    /// obeyed, or a supervisor was lost.
    #[error("{0}")]
    Unknown(String),
}

/// Result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A preflight refusal.
    pub fn refused(what: impl Into<String>) -> Self {
        Self::Refused(what.into())
    }

    /// A failed system call, with what was being done.
    pub fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os { what: what.into(), source: source.into() }
    }

    /// What the peer must know of it.
    #[must_use]
    pub fn cause(&self) -> crate::protocol::Cause {
        use crate::protocol::Cause;
        match self {
            Self::Refused(_) => Cause::Refused,
            Self::Busy(_) => Cause::Busy,
            Self::Transport(_) => Cause::Lanes,
            _ => Cause::Failed,
        }
    }

    /// The whole chain of causes on one line, for reports and for the peer.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error with the whole chain of its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}
