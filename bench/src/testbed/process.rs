//! A program that says what it measured: its words, and its end within a time.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// One that runs. Dropping it kills it.
pub(crate) struct Process {
    program: String,
    child: Child,
    lines: Receiver<Line>,
    said: Said,
}

enum Line {
    Out(String),
    Err(String),
}

#[derive(Default)]
struct Said {
    stdout: String,
    stderr: String,
}

/// One that has ended.
pub(crate) struct Ended {
    program: String,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Result<Self> {
        Self::spawn(program, Command::new(program).args(arguments))
    }

    /// The same of a command that has more to it than arguments.
    pub(crate) fn spawn(program: &str, command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let (sender, lines) = channel();
        read(child.stdout.take().context("its output was piped")?, sender.clone(), Line::Out);
        read(child.stderr.take().context("its errors were piped")?, sender, Line::Err);
        Ok(Self { program: program.into(), child, lines, said: Said::default() })
    }

    /// Waits for a line with this text on its standard output.
    pub(crate) fn line(&mut self, text: &str, wait: Duration) -> Result<()> {
        let deadline = Instant::now() + wait;
        while !self.said.stdout.contains(text) {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.said.add(line),
                Err(e) => bail!(
                    "{} did not say {text:?} ({e}), it said {}",
                    self.program,
                    self.said.all()
                ),
            }
        }
        Ok(())
    }

    /// Whether it is over.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// All that it has said when it has ended; it ends when it closes its output.
    pub(crate) fn end(mut self, wait: Duration) -> Result<Ended> {
        let deadline = Instant::now() + wait;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.said.add(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "{} did not end within {wait:?}, it said {}",
                        self.program,
                        self.said.all()
                    )
                }
            }
        }
        let Said { stdout, stderr } = std::mem::take(&mut self.said);
        Ok(Ended { program: self.program.clone(), status: self.child.wait()?, stdout, stderr })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Fails unless it succeeded.
    pub(crate) fn check(&self) -> Result<()> {
        if self.status.success() {
            return Ok(());
        }
        let said = Said { stdout: self.stdout.clone(), stderr: self.stderr.clone() };
        bail!("{} failed ({}): {}", self.program, self.status, said.all())
    }
}

impl Said {
    fn add(&mut self, line: Line) {
        match line {
            Line::Out(line) => self.stdout += &line,
            Line::Err(line) => self.stderr += &line,
        }
    }

    /// In one line.
    fn all(&self) -> String {
        format!("{:?}", (self.stderr.clone() + &self.stdout).trim())
    }
}

fn read(from: impl Read + Send + 'static, to: Sender<Line>, line: fn(String) -> Line) {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut text = Vec::new();
        // Nobody listens any more once it is over.
        while from.read_until(b'\n', &mut text).is_ok_and(|n| n > 0)
            && to
                .send(line(String::from_utf8_lossy(&std::mem::take(&mut text)).into_owned()))
                .is_ok()
        {}
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn its_words_are_kept_apart_and_a_failure_is_one_line() {
        let script = "echo ready; echo why >&2; exit 3";
        let mut process = Process::start("sh", &["-c", script]).unwrap();
        process.line("ready", LONG).unwrap();
        let ended = process.end(LONG).unwrap();
        assert_eq!(ended.stdout, "ready\n");
        let error = ended.check().unwrap_err().to_string();
        assert!(
            error.contains("why") && error.contains('3') && error.lines().count() == 1,
            "{error}"
        );
    }

    #[test]
    fn one_that_does_not_end_is_given_up() {
        let mut process = Process::start("sh", &["-c", "echo this; exec sleep 600"]).unwrap();
        assert!(process.line("that", Duration::from_millis(1)).is_err());
        let error = process.end(Duration::from_millis(1)).err().unwrap().to_string();
        assert!(error.contains("did not end"), "{error}");
    }
}
