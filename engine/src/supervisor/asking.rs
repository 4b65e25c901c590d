//! Goes on asking the destination about a guest in doubt, beside the guest's loop.

use crate::error::{Error, Result};
use crate::inquiry::{Answer, Inquiry};
use crate::net::System;
use crossbeam_channel::{Receiver, Sender, bounded};

/// A question that is being asked; dropped, it is not asked any more, and an answer under way is not heard.
#[derive(Debug)]
pub struct Asking {
    answers: Receiver<Answer>,
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
        std::thread::Builder::new()
            .name("asking".into())
            .spawn(move || {
                if let Some(settled) = inquiry.ask_on(&System, &stopped) {
                    // Nobody hears it if the operator has decided meanwhile.
                    let _ = answer.send(settled);
                }
            })
            .map_err(|e| Error::os("starting a thread", e))?;
        Ok(Self { answers, _stop: stop })
    }

    /// Where the answer comes out.
    #[must_use]
    pub fn answers(&self) -> &Receiver<Answer> {
        &self.answers
    }
}
