//! The question that a Commit without an answer leaves open: what became of the guest?
//!
//! ```text
//!   Commit sent --> ask --+--> Running: it runs at the destination, and ends here
//!                    ^    +--> Discarded: the destination promises that it never runs there; it resumes here
//!                    |    |
//!                    +----+ nothing that settles it: ask again
//! ```
//!
//! Only a destination that has said something settles it. A refused connection, silence, or a
//! receiver that does not know the session say nothing. The destination answers a session's token
//! for its whole life, so asking goes on for as long as the guest is in doubt: by
//! [`crate::source::migrate`] at first, then by the supervisor or whoever embeds the engine
//! ([`crate::report::progress::Monitor::take_inquiry`]), also after the death of the process that
//! began ([`Keeper`]).

use crate::clock;
use crate::error::{Error, Result};
use crate::net::dial::reopen;
use crate::net::{Address, Network};
use crate::protocol::refusal::aborted;
use crate::protocol::{Abort, Cause, Control, Message, Running};
use crate::report::hold;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use pageferry_transport::preamble::Token;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// For the destination to resume the vCPUs, and for one answer when asked again.
pub const RUNNING_MAX: Duration = Duration::from_secs(20);
/// How often a guest in doubt is asked about once the migration itself has ended. Long enough to be
/// no load on anybody for days, short enough that the guest does not wait long once the network is
/// back.
pub const ASK_LATER_EVERY: Duration = Duration::from_secs(10);
/// For the rest of a message whose beginning lies in the old connection.
const REST_MAX: Duration = Duration::from_secs(1);

/// What settles it.
#[derive(Debug)]
pub enum Answer {
    /// It runs at the destination.
    Running(Running),
    /// The destination has thrown its copy away, and says why.
    Discarded(Error),
}

/// An open question to one destination.
#[derive(Debug)]
pub struct Inquiry {
    to: Address,
    token: Token,
    /// The connection that Commit went over. An answer may lie in it, or come yet, although nobody
    /// is to be reached any more on a new one.
    old: Option<Control>,
    /// Messages of that connection.
    messages: u64,
}

impl Inquiry {
    /// About the session of this token, whose Commit went over the connection `old`, if it is still
    /// here.
    #[must_use]
    pub fn new(to: Address, token: Token, old: Option<Control>) -> Self {
        let messages = old.as_ref().map_or(0, Control::messages);
        Self { to, token, old, messages }
    }

    /// The same in another process.
    #[must_use]
    pub fn again(question: &Question) -> Self {
        Self::new(question.to.clone(), question.token, None)
    }

    /// Who is asked.
    #[must_use]
    pub fn to(&self) -> &Address {
        &self.to
    }

    /// Messages of the connection that Commit went over.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.messages
    }

    /// The same question, to be asked beside this one.
    #[must_use]
    pub fn apart(&self) -> Self {
        Self::new(self.to.clone(), self.token, None)
    }

    /// Asks once, for an operator who is about to let the guest run here. It is no Commit but an
    /// Abort: a destination that still waits for Commit must not become the guest's owner by this,
    /// and gives its copy up.
    #[must_use]
    pub fn ask_before_running(&self, network: &dyn Network) -> Option<Answer> {
        let ask = || {
            let mut control = reopen(network, &self.to, self.token)?;
            let reason = "the operator lets the guest run at the source".into();
            let abort = Message::Abort(Abort { reason, cause: Cause::Failed });
            control.send(&abort, clock::now() + RUNNING_MAX)?;
            control.receive("Running", clock::now() + RUNNING_MAX)
        };
        settles(ask())
    }

    /// Waits for the answer on the connection that Commit went over.
    pub fn wait(&mut self, deadline: Instant) -> Option<Answer> {
        let old = self.old.as_mut()?;
        let heard = old.receive("Running", deadline);
        self.messages = old.messages();
        // A connection that is silent may speak yet; one that failed will not, and one that was
        // left in the middle of a message says nothing that can be understood.
        if old.is_torn() || !matches!(heard, Ok(_) | Err(Error::Timeout { .. })) {
            self.old = None;
        }
        settles(heard)
    }

    /// Asks once: looks into the old connection, then sends Commit on a new one, which the
    /// destination answers like the first. `None`: nothing was heard that settles it.
    pub fn ask(&mut self, network: &dyn Network) -> Option<Answer> {
        if let Some(answer) = self.look() {
            return Some(answer);
        }
        settles(self.ask_anew(network))
    }

    /// Asks until something settles it, or the sender of `stop` is dropped.
    #[must_use]
    pub fn ask_on(mut self, network: &dyn Network, stop: &Receiver<()>) -> Option<Answer> {
        loop {
            if let Some(answer) = self.ask(network) {
                return Some(answer);
            }
            match clock::receive(stop, clock::now() + hold::limit("ask-later", ASK_LATER_EVERY)) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// What lies in the old connection.
    fn look(&mut self) -> Option<Answer> {
        let old = self.old.as_ref()?;
        match old.readable(Duration::ZERO) {
            Ok(false) => None,
            Ok(true) => self.wait(clock::now() + REST_MAX),
            Err(_) => {
                self.old = None;
                None
            }
        }
    }

    fn ask_anew(&self, network: &dyn Network) -> Result<Message> {
        let mut control = reopen(network, &self.to, self.token)?;
        control.send(&Message::Commit, clock::now() + RUNNING_MAX)?;
        control.receive("Running", clock::now() + RUNNING_MAX)
    }
}

/// An open question in a form that outlives its process. To ask it is to say Commit: it may be
/// asked only of a guest that was sealed for it and has not run since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Question {
    /// Who is asked.
    pub to: Address,
    /// The session whose Commit it is.
    pub token: Token,
    /// Whether the vCPUs ran before they were stopped for it, and so run again if the copy was
    /// discarded.
    pub was_running: bool,
}

/// A question as it is written.
#[derive(Serialize, Deserialize)]
struct Written {
    to: String,
    token: String,
    was_running: bool,
}

impl From<Question> for Written {
    fn from(question: Question) -> Self {
        let token = format!("{:032x}", u128::from_be_bytes(question.token.0));
        Self { to: question.to.to_string(), token, was_running: question.was_running }
    }
}

impl TryFrom<Written> for Question {
    type Error = Error;

    fn try_from(written: Written) -> Result<Self> {
        let token = u128::from_str_radix(&written.token, 16)
            .map_err(|e| Error::refused(format!("the token of a question: {e}")))?;
        let to = written.to.parse()?;
        Ok(Self { to, token: Token(token.to_be_bytes()), was_running: written.was_running })
    }
}

/// Keeps the question of a migration where it is found after the death of this process, for guests
/// that outlive it ([`crate::report::progress::Monitor::keep_question_with`]). A question that is
/// found may be asked, so the order is strict:
///
/// ```text
///   forget -> the guest runs, rounds -> write_ahead -> pause .. Ready, seal -> reveal -> Commit
/// ```
///
/// Once the guest runs again, or is to run, whoever resumes it forgets the question.
pub trait Keeper: std::fmt::Debug + Send + Sync {
    /// An attempt begins. After `Ok` no earlier question is found any more.
    ///
    /// # Errors
    /// They refuse the attempt.
    fn forget(&self) -> Result<()>;

    /// Writes the question down where nobody looks for it. The guest still runs.
    ///
    /// # Errors
    /// They cost nothing but the question: nothing must be revealed then.
    fn write_ahead(&self, question: &Question) -> Result<()>;

    /// The guest is sealed, and Commit is sent next: what was written ahead is found from here on.
    /// Called in the downtime, so it must be one quick step that is done or not done.
    ///
    /// # Errors
    /// They cost nothing but the question.
    fn reveal(&self) -> Result<()>;
}

/// Whether this settles the question, and how.
fn settles(heard: Result<Message>) -> Option<Answer> {
    match heard {
        Ok(Message::Running(running)) => Some(Answer::Running(running)),
        // A refusal says that there is no session for us now, and nothing about the one there was.
        Ok(Message::Abort(abort)) if !matches!(abort.cause, Cause::Refused | Cause::Busy) => {
            Some(Answer::Discarded(aborted(abort)))
        }
        Ok(other) => {
            tracing::warn!(message = other.name(), "an answer to Commit that settles nothing");
            None
        }
        Err(e) => {
            tracing::warn!(error = %e.chain(), "no answer to Commit; asking again");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::listener::{Incoming, SessionListener};
    use crate::net::System;
    use crate::protocol::Features;

    fn says(cause: Cause) -> Message {
        Message::Abort(Abort { reason: "because".into(), cause })
    }

    #[test]
    fn only_what_the_destination_says_of_this_guest_settles_it() {
        let running = Running { resume_us: 1, running_us: 2, features: Features::default() };
        assert!(matches!(settles(Ok(Message::Running(running))), Some(Answer::Running(_))));
        for cause in [Cause::Failed, Cause::Lanes] {
            assert!(matches!(settles(Ok(says(cause))), Some(Answer::Discarded(_))), "{cause:?}");
        }
        for cause in [Cause::Refused, Cause::Busy] {
            assert!(settles(Ok(says(cause))).is_none(), "{cause:?}");
        }
        assert!(settles(Ok(Message::Commit)).is_none());
        assert!(settles(Err(Error::Timeout { what: "it".into() })).is_none());
    }

    #[test]
    fn a_question_is_read_as_it_was_written() {
        for to in ["127.0.0.1:1", "[fe80::1%3]:1", "unix:/run/ferry.sock"] {
            for token in
                [[0; 16], [0xfe; 16], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
            {
                let question =
                    Question { to: to.parse().unwrap(), token: Token(token), was_running: true };
                let text = serde_json::to_string(&question).unwrap();
                assert_eq!(serde_json::from_str::<Question>(&text).unwrap(), question, "{text}");
            }
        }
        let odd = r#"{"to":"127.0.0.1:1","token":"zz","was_running":true}"#;
        assert!(serde_json::from_str::<Question>(odd).is_err());
    }

    #[test]
    fn what_an_operator_has_asked_is_no_commit() {
        let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
        listener.expect(Token([1; 16]));
        let inquiry = Inquiry::new(listener.address.clone(), Token([1; 16]), None);
        let asking = std::thread::spawn(move || inquiry.apart().ask_before_running(&System));
        let soon = || clock::now() + Duration::from_secs(10);
        let Some(Incoming::Control { token, mut control, first, .. }) = listener.next(soon())
        else {
            panic!("it comes")
        };
        assert_eq!(token, Token([1; 16]));
        assert!(matches!(first, Message::Abort(_)), "{first:?}");
        let running = Running { resume_us: 1, running_us: 2, features: Features::default() };
        control.send(&Message::Running(running), soon()).unwrap();
        assert!(matches!(asking.join().unwrap(), Some(Answer::Running(_))));
    }

    /// The destination has said Abort and is gone: nobody answers at its address any more.
    #[test]
    fn an_answer_in_the_old_connection_settles_it_although_nobody_listens_any_more() {
        let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
        listener.expect(Token([1; 16]));
        let soon = || clock::now() + Duration::from_secs(10);
        let mut old = reopen(&System, &listener.address, Token([1; 16])).unwrap();
        old.send(&Message::Commit, soon()).unwrap();
        let Some(Incoming::Control { mut control, .. }) = listener.next(soon()) else {
            panic!("it comes")
        };
        // A port where nobody listens.
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut inquiry = Inquiry::new(nobody.into(), Token([1; 16]), Some(old));
        assert!(inquiry.wait(clock::now() + Duration::from_millis(10)).is_none());
        assert!(inquiry.ask(&System).is_none(), "nothing was said yet");
        control.abort("gone", Cause::Failed, soon());
        drop(control);
        let deadline = soon();
        let answer = loop {
            match inquiry.ask(&System) {
                Some(answer) => break answer,
                None => assert!(clock::now() < deadline, "the old connection is not read"),
            }
        };
        assert!(matches!(answer, Answer::Discarded(e) if e.chain().contains("gone")));
    }
}
