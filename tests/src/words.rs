//! Lines that somebody says, kept, and a way to wait for them.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Everything said so far. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Words {
    heard: Arc<(Mutex<Heard>, Condvar)>,
}

#[derive(Debug, Default)]
struct Heard {
    lines: Vec<String>,
    ended: bool,
}

impl Words {
    /// Listens on a thread of its own.
    pub fn of(reader: impl Read + Send + 'static) -> Self {
        let words = Self::default();
        let listening = words.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                listening.change(|heard| heard.lines.push(line));
            }
            listening.change(|heard| heard.ended = true);
        });
        words
    }

    fn change(&self, change: impl FnOnce(&mut Heard)) {
        change(&mut self.heard.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.heard.1.notify_all();
    }

    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.heard.0.lock().unwrap_or_else(PoisonError::into_inner).lines.clone()
    }

    /// All lines so far, as one text.
    #[must_use]
    pub fn text(&self) -> String {
        self.lines().join("\n")
    }

    /// Number of lines so far: a mark to wait beyond.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.heard.0.lock().unwrap_or_else(PoisonError::into_inner).lines.len()
    }

    /// The first line after `mark` that holds this text, and the mark behind it.
    ///
    /// # Panics
    /// At the deadline, or when the speaker has ended, with everything that was said.
    pub fn wait_after(&self, mark: usize, text: &str, wait: Duration) -> (String, usize) {
        let deadline = Instant::now() + wait;
        let mut heard = self.heard.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let found =
                heard.lines.iter().enumerate().skip(mark).find(|(_, line)| line.contains(text));
            if let Some((at, line)) = found {
                return (line.clone(), at + 1);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || heard.ended {
                let why = if heard.ended { "the speaker ended" } else { "the deadline passed" };
                let said = heard.lines.join("\n  ");
                drop(heard);
                panic!("{why} before {text:?}; said until then:\n  {said}");
            }
            heard =
                self.heard.1.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Everything, once the speaker has ended.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn all(&self, wait: Duration) -> String {
        let deadline = Instant::now() + wait;
        let mut heard = self.heard.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !heard.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the speaker goes on; said until now: {:?}", heard.lines);
            heard =
                self.heard.1.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        heard.lines.join("\n")
    }

    /// The first line with this text.
    ///
    /// # Panics
    /// See [`Self::wait_after`].
    pub fn wait(&self, text: &str, wait: Duration) -> String {
        self.wait_after(0, text, wait).0
    }
}
