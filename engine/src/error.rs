//! The one error type of the engine: what failed, on what, and what to do about it.

use crate::text;
use std::io;

/// The longest text of an error: a page of it is more than anybody reads.
const CHAIN_CHARS_MAX: usize = 8192;

/// Why a migration was refused, aborted, or left in doubt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A check before anything was touched. The text names the thing and the fix.
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
    Transport(#[source] pageferry_transport::Error),
    /// What lanes need of this host failed: memory, an io_uring, a way by RDMA. The text is that of
    /// the transport.
    #[error(transparent)]
    LocalTransport(pageferry_transport::Error),
    /// The VMM refused a command.
    #[error("{vmm} refused {command}: {reason}")]
    VmmRefused {
        /// The VMM's name.
        vmm: &'static str,
        /// The command, in the VMM's own language.
        command: String,
        /// The VMM's words.
        reason: String,
    },
    /// The guest, or the process that runs it, is in a state that the migration cannot go on from.
    #[error("{0}")]
    Guest(String),
    /// The hardware of this host lost pages of the guest.
    #[error(
        "the memory of this host is broken: pages of the guest cannot be read any more: {}; what they held is lost, here and \
         elsewhere: `migrate --poisoned zero` moves the guest with zeros in their place",
        crate::memory::lost_page::name(.0)
    )]
    Poisoned(Vec<crate::memory::lost_page::LostPage>),
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
    /// Who runs the guest is not known here: Commit was sent and no answer came, QEMU did not say
    /// whether it obeyed, or a supervisor was lost.
    #[error("{0}")]
    Unknown(String),
}

impl From<pageferry_transport::Error> for Error {
    fn from(error: pageferry_transport::Error) -> Self {
        use pageferry_transport::Error as Cause;
        match error {
            Cause::Os { .. } | Cause::Bounds { .. } | Cause::NoPath { .. } | Cause::State(_) => {
                Self::LocalTransport(error)
            }
            _ => Self::Transport(error),
        }
    }
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

    /// The whole chain of causes on one line, for reports, for the operator and for the peer.
    /// Whatever words of a peer, a guest or QEMU are in it: it is cut and escaped.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error with the whole chain of its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text::foreign(&text, CHAIN_CHARS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lanes_are_blamed_for_what_is_theirs_alone() {
        let chain = |error: pageferry_transport::Error| Error::from(error).chain();
        let memory = pageferry_transport::Error::os(
            "mapping memory",
            io::Error::from_raw_os_error(libc::ENOMEM),
        );
        assert_eq!(chain(memory), "mapping memory: Cannot allocate memory (os error 12)");
        let lane = pageferry_transport::Error::Closed { lane: 1 };
        assert_eq!(chain(lane), "the data lanes failed: lane 1: the peer closed the connection");
    }

    #[test]
    fn an_error_is_one_line_whoever_is_quoted_in_it() {
        let theirs = || "\x1b[2J\npageferry: vm runs here\u{202e}".to_owned();
        for error in [
            Error::Refused(theirs()),
            Error::Guest(theirs()),
            Error::Protocol(theirs()),
            Error::VmmRefused { vmm: "a VMM", command: "cont".into(), reason: theirs() },
            Error::PeerAborted { side: "source", reason: theirs(), lanes: false },
            Error::os("reading", io::Error::other(theirs())),
        ] {
            let line = error.chain();
            assert!(line.contains(r"\u{1b}[2J\npageferry: vm runs here\u{202e}"), "{line}");
        }
        assert!(Error::Guest("x".repeat(8 << 20)).chain().len() < 2 * CHAIN_CHARS_MAX);
    }
}
