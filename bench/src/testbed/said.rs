//! What a monitor says on its standard error: waited for while it starts, and the reason when it
//! ends.

use anyhow::{Result, bail};
use std::io::{BufRead, BufReader};
use std::process::ChildStderr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that are kept. A QEMU that fails under KVM prints all of its registers.
const LINES_MAX: usize = 200;

/// All that was said so far.
#[derive(Debug, Default)]
pub(crate) struct Said(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    words: Mutex<Words>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Words {
    lines: Vec<String>,
    is_over: bool,
}

impl Said {
    /// Reads from now on, in a thread that ends with the process.
    pub(crate) fn of(stderr: ChildStderr) -> Self {
        let said = Self::default();
        let shared = Arc::clone(&said.0);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if std::env::var_os("PAGEFERRY_BENCH_VERBOSE").is_some() {
                    eprintln!("{line}");
                }
                shared.change(|words| {
                    if words.lines.len() < LINES_MAX {
                        words.lines.push(line);
                    }
                });
            }
            shared.change(|words| words.is_over = true);
        });
        said
    }

    /// Waits for a line with this text, and returns what comes after it.
    pub(crate) fn wait(&self, text: &str, wait: Duration) -> Result<String> {
        let deadline = Instant::now() + wait;
        let mut words = self.0.words.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let found = words.lines.iter().find_map(|line| line.split_once(text));
            if let Some((_, rest)) = found {
                return Ok(rest.to_owned());
            }
            if words.is_over {
                bail!(
                    "it did not start: {}",
                    words.lines.last().map_or("it gives no reason", String::as_str)
                );
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("it did not say {text:?} within {wait:?}");
            }
            words =
                self.0.changed.wait_timeout(words, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Its first words, for a QEMU, in brackets; nothing if it said nothing.
    pub(crate) fn first(&self) -> String {
        self.bracketed(|lines| lines.first())
    }

    /// Its last words, for pageferry, in brackets; nothing if it said nothing.
    pub(crate) fn last(&self) -> String {
        self.bracketed(|lines| lines.last())
    }

    fn bracketed(&self, choose: impl Fn(&[String]) -> Option<&String>) -> String {
        let words = self.0.words.lock().unwrap_or_else(PoisonError::into_inner);
        choose(&words.lines).map_or_else(String::new, |line| format!(" ({})", line.trim()))
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Words)) {
        change(&mut self.words.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_line_is_waited_for_and_an_end_before_it_is_told_with_its_reason() {
        let mut child = Command::new("sh")
            .args(["-c", "echo it waits on here >&2; echo no memory >&2"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Said::of(child.stderr.take().unwrap());
        assert_eq!(said.wait("waits on ", LONG).unwrap(), "here");
        let error = said.wait("runs", LONG).unwrap_err().to_string();
        assert!(error.contains("no memory"), "{error}");
        assert_eq!(
            (said.first().as_str(), said.last().as_str()),
            (" (it waits on here)", " (no memory)")
        );
        child.wait().unwrap();
    }
}
