//! How far a long run is, and whether somebody wants it to end.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// A bar with an estimate of the time left, on a terminal; and the word of an interruption.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    begun: Instant,
    interrupted: Arc<AtomicBool>,
}

impl Progress {
    /// From now on Ctrl-C, or the end of the terminal, ends the run after the step that goes on,
    /// with all that was measured kept. A second one changes nothing: to end at once would leave
    /// QEMUs behind, and every wait of a step has a deadline.
    pub fn begin(what: &str) -> Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .context("listening for Ctrl-C")?;
        }
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}, {eta} left")
            .context("the look of the progress bar")?;
        bar.set_style(style);
        bar.set_message(what.to_owned());
        Ok(Self { bar, begun: Instant::now(), interrupted })
    }

    /// So many steps are to be made.
    pub fn expect(&self, steps: u64) {
        self.bar.set_length(steps);
        self.bar.reset_eta();
    }

    /// What goes on now.
    pub fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// One is done.
    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// Whether the run shall end.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Since the beginning, in seconds.
    #[must_use]
    pub fn elapsed_s(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
