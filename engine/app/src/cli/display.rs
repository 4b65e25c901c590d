//! How a migration goes, for people: a bar on a terminal, a line a round elsewhere.
//!
//! A terminal takes nothing while it is stopped (Ctrl-S), and a client that waits for it would not
//! hear how the migration ended. So the bar has a thread of its own, and is shown the latest state
//! when it looks.

use super::show::line;
use crate::output::say;
use crate::output::stderr_is_a_terminal;
use crossbeam_channel::{Receiver, Sender, bounded};
use indicatif::{ProgressBar, ProgressStyle};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::report::progress::Progress;
use pageferry_engine::report::stage::Stage;
use pageferry_engine::text;
use std::time::Duration;

/// For the bar to be taken away.
const CLEAR_MAX: Duration = Duration::from_secs(1);

/// What is shown.
#[derive(Debug)]
pub struct Display {
    bar: Option<Bar>,
    last: Option<(Stage, u32)>,
    link: String,
}

impl Display {
    /// A bar if stderr is a terminal.
    #[must_use]
    pub fn open() -> Self {
        let bar = stderr_is_a_terminal().then(Bar::open).flatten();
        Self { bar, last: None, link: String::new() }
    }

    /// Shows how it goes.
    pub fn show(&mut self, progress: &Progress) {
        if let Some(bar) = &self.bar {
            // One that has not been looked at yet is as good: another follows.
            let _ = bar.states.try_send(progress.clone());
            return;
        }
        if self.link != progress.link {
            self.link.clone_from(&progress.link);
            say(&format!("going by {}", self.link));
        }
        if self.last != Some((progress.stage, progress.round)) {
            say(&line(progress));
        }
        self.last = Some((progress.stage, progress.round));
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Some(Bar { states, gone }) = self.bar.take() {
            drop(states);
            let _ = gone.recv_timeout(CLEAR_MAX);
        }
    }
}

/// The bar's thread.
#[derive(Debug)]
struct Bar {
    states: Sender<Progress>,
    /// Closed when the bar is gone.
    gone: Receiver<()>,
}

impl Bar {
    /// Nothing where there is no thread for it.
    fn open() -> Option<Self> {
        let (states, shown) = bounded(1);
        let (going, gone) = bounded(0);
        let thread = std::thread::Builder::new().name("display".into());
        thread.spawn(move || draw(&shown, &going)).ok().map(|_| Self { states, gone })
    }
}

fn draw(shown: &Receiver<Progress>, _going: &Sender<()>) {
    let bar = ProgressBar::new(0);
    if let Ok(style) =
        ProgressStyle::with_template("{msg:38} {wide_bar} {bytes:>10} of {total_bytes:>10}")
    {
        bar.set_style(style);
    }
    let mut link = String::new();
    for progress in shown {
        if link != progress.link {
            link.clone_from(&progress.link);
            bar.println(format!("pageferry: going by {}", text::escape(&link)));
        }
        bar.set_length(progress.round_pages * PAGE_BYTES);
        bar.set_position(progress.round_pages_sent * PAGE_BYTES);
        bar.set_message(line(&progress));
    }
    bar.finish_and_clear();
}
