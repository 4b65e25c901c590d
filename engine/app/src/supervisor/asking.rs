//! Goes on asking the destination about a guest in doubt, beside the guest's loop.

use crossbeam_channel::{Receiver, Sender, bounded, select};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::inquiry::{Answer, Inquiry};
use pageferry_engine::net::System;
use std::time::Duration;

/// A question that is being asked; dropped, it is not asked any more, and an answer under way is
/// not heard.
#[derive(Debug)]
pub struct Asking {
    answers: Receiver<Answer>,
    /// To ask the same at once.
    apart: Inquiry,
    _stop: Sender<()>,
}

impl Asking {
    /// Starts to ask.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn start(inquiry: Inquiry) -> Result<Self> {
        let (answer, answers) = bounded(1);
        let (stop, stopped) = bounded(0);
        let apart = inquiry.apart();
        std::thread::Builder::new()
            .name("asking".into())
            .spawn(move || {
                if let Some(settled) = inquiry.ask_on(&System, &stopped) {
                    // Nobody hears it if the operator has decided meanwhile.
                    let _ = answer.send(settled);
                }
            })
            .map_err(|e| Error::os("starting a thread", e))?;
        Ok(Self { answers, apart, _stop: stop })
    }

    /// Asks once more at once, for an operator who is about to let the guest run here
    /// ([`Inquiry::ask_before_running`]), and waits so long for an answer.
    #[must_use]
    pub fn ask_before_running(&self, patience: Duration) -> Option<Answer> {
        let (answer, answered) = bounded(1);
        let apart = self.apart.apart();
        let asking = std::thread::Builder::new()
            .name("asking-now".into())
            .spawn(move || answer.send(apart.ask_before_running(&System)));
        if let Err(e) = asking {
            tracing::warn!(error = %e, "the destination is not asked once more");
        }
        select! {
            recv(answered) -> answer => answer.ok().flatten(),
            recv(self.answers) -> answer => answer.ok(),
            default(patience) => None,
        }
    }

    /// Where the answer comes out.
    #[must_use]
    pub fn answers(&self) -> &Receiver<Answer> {
        &self.answers
    }
}
