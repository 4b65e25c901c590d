//! After Commit: acts on the destination's word, and asks again where there is none.

use crate::clock;
use crate::error::{Error, Result};
use crate::inquiry::{Answer, Inquiry, RUNNING_MAX};
use crate::net::Address;
use crate::protocol::SourceEvent;
use crate::report::{Downtime, hold};
use crate::source::attempt::Attempt;
use crate::source::switchover::Committed;
use std::time::Duration;

/// How long a source whose Commit got no answer asks again before it says "unknown", and its
/// supervisor goes on asking. Longer than a switch or a route needs to come back.
const ASK_AGAIN_MAX: Duration = Duration::from_secs(60);

/// Pause between two attempts at it.
const ASK_AGAIN_EVERY: Duration = Duration::from_millis(500);

/// What the operator is told of a Commit without an answer.
fn unanswered(to: &Address, asked_for: Duration) -> String {
    format!(
        "the destination was told to run the guest and has not answered for {} s. The guest is stopped here and stays so. \
         Its supervisor goes on asking {to} and acts on the answer. If the destination is gone for good, look whether the guest \
         runs there (`pageferry list` on that host): if it does, end this one; if it does not, let it run here again \
         (`pageferry settle NAME --end` or `--run`)",
        asked_for.as_secs()
    )
}

impl Attempt<'_> {
    /// After Commit: acts on the destination's word, and asks again where there is none. Returns
    /// the downtime. A question that is still open in the end is left with the monitor.
    pub(super) fn settle(
        &mut self,
        committed: Committed,
        sent: Result<()>,
        mut inquiry: Inquiry,
    ) -> Result<Downtime> {
        let ask_again_max = hold::limit("ask-again", ASK_AGAIN_MAX);
        let mut answer = match sent {
            Ok(()) => inquiry.wait(clock::now() + RUNNING_MAX.min(ask_again_max)),
            Err(e) => {
                tracing::warn!(error = %e.chain(), "Commit could not be sent; asking again");
                None
            }
        };
        let give_up = clock::now() + ask_again_max;
        loop {
            self.report.control_messages = inquiry.messages();
            match answer {
                Some(Answer::Running(running)) => {
                    self.phase = self.phase.on(SourceEvent::RunningReceived);
                    return Ok(committed.downtime(&running));
                }
                Some(Answer::Discarded(error)) => {
                    self.phase = self.phase.on(SourceEvent::AbortReceived);
                    return Err(error);
                }
                None if clock::now() >= give_up => {
                    self.phase = self.phase.on(SourceEvent::GivenUp);
                    let unanswered = unanswered(inquiry.to(), ask_again_max);
                    self.monitor.leave_inquiry(inquiry);
                    return Err(Error::Unknown(unanswered));
                }
                None => clock::sleep(ASK_AGAIN_EVERY),
            }
            answer = inquiry.ask(self.network);
        }
    }
}
