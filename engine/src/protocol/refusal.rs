//! What a message that ends a session means as an error, and an error as such a message.

use crate::error::Error;
use crate::protocol::{Abort, Cause, Message};

/// What the peer must know of an error.
#[must_use]
pub fn cause(error: &Error) -> Cause {
    match error {
        Error::Refused(_) => Cause::Refused,
        Error::Busy(_) => Cause::Busy,
        Error::Transport(_) | Error::LocalTransport(_) => Cause::Lanes,
        _ => Cause::Failed,
    }
}

/// The error for a destination's Abort.
#[must_use]
pub fn aborted(abort: Abort) -> Error {
    match abort.cause {
        Cause::Refused => Error::Refused(format!("the destination refuses: {}", abort.reason)),
        Cause::Busy => Error::Busy(abort.reason),
        Cause::Lanes | Cause::Failed => Error::PeerAborted {
            side: "destination",
            reason: abort.reason,
            lanes: abort.cause == Cause::Lanes,
        },
    }
}

pub(crate) fn unexpected(message: Message, expected: &str) -> Error {
    match message {
        Message::Abort(Abort { reason, cause }) => {
            Error::PeerAborted { side: "source", reason, lanes: cause == Cause::Lanes }
        }
        other => Error::Protocol(format!("{} where {expected} was expected", other.name())),
    }
}
