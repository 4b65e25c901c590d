//! What the test guest says on its console: lines, and between them the heartbeats of a guest that
//! has no other port for them.

use anyhow::{Context, Result, anyhow, bail};
use pageferry_workload::heartbeat::{GapMeter, SHARED_BEAT};
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a long wait looks whether it still makes sense.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A meter that both ends of a move feed.
pub type Beats = Arc<Mutex<GapMeter>>;

/// One end's console.
pub struct Console {
    lines: Receiver<String>,
    input: Box<dyn Write + Send>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    /// Reads `output` from now on, in a thread of its own that ends with it. Beats among the lines
    /// go to `beats`.
    pub fn open(
        output: impl Read + Send + 'static,
        input: Box<dyn Write + Send>,
        beats: Beats,
    ) -> Self {
        let (sender, lines) = channel();
        std::thread::spawn(move || listen(output, &beats, &sender));
        Self { lines, input }
    }

    /// Waits for a line with this text, also one that was said before and not waited for.
    pub fn wait(&self, text: &str, wait: Duration) -> Result<String> {
        self.wait_while(text, wait, || Ok(()))
    }

    /// The same, given up as soon as `sense` fails, which is asked each second.
    pub fn wait_while(
        &self,
        text: &str,
        wait: Duration,
        mut sense: impl FnMut() -> Result<()>,
    ) -> Result<String> {
        let deadline = Instant::now() + wait;
        let mut last = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let why = match self.lines.recv_timeout(left.min(LOOK_EVERY)) {
                Ok(line) if is_trouble(&line) => bail!("the guest says: {line}"),
                Ok(line) if line.contains(text) => return Ok(line),
                Ok(line) => {
                    last = Some(line).filter(|line| !line.is_empty()).or(last);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) if left > LOOK_EVERY => match sense() {
                    Ok(()) => continue,
                    Err(e) => e,
                },
                Err(RecvTimeoutError::Timeout) => {
                    anyhow!("the guest did not say {text:?} within {wait:?}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let closed = anyhow!("the guest's console closed before it said {text:?}");
                    sense().err().unwrap_or(closed)
                }
            };
            return Err(match last {
                Some(last) => anyhow!("{why:#}; the guest's last line was {last:?}"),
                None => why,
            });
        }
    }

    /// Lets the guest write for this long, and asks it how it is.
    pub fn settle(&mut self, time: Duration, wait: Duration) -> Result<()> {
        std::thread::sleep(time);
        while let Ok(line) = self.lines.try_recv() {
            if is_trouble(&line) {
                bail!("the guest says: {line}");
            }
        }
        self.ask("status")?;
        self.wait("WORKLOAD t=", wait)?;
        Ok(())
    }

    fn ask(&mut self, command: &str) -> Result<()> {
        writeln!(self.input, "{command}")
            .and_then(|()| self.input.flush())
            .with_context(|| format!("asking the guest for its {command}"))
    }

    /// Has the guest check all of its memory.
    pub fn verdict(&mut self, wait: Duration) -> Result<()> {
        self.ask("verdict")?;
        let line = self.wait("WORKLOAD VERDICT", wait)?;
        if line.contains("VERDICT intact") && line.contains("errors=0") {
            Ok(())
        } else {
            bail!("the guest says: {line}")
        }
    }
}

fn is_trouble(line: &str) -> bool {
    line.contains("CORRUPT") || line.contains("WORKLOAD FAILED")
}

fn listen(mut output: impl Read, beats: &Beats, lines: &Sender<String>) {
    let (mut bytes, mut line) = ([0; 4096], Vec::new());
    while let Ok(n @ 1..) = output.read(&mut bytes) {
        let now = Instant::now();
        let (beaten, said): (Vec<u8>, Vec<u8>) =
            bytes[..n].iter().partition(|byte| **byte & SHARED_BEAT != 0);
        if !beaten.is_empty() {
            beats.lock().unwrap_or_else(PoisonError::into_inner).observe(now, &beaten);
        }
        for byte in said {
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let text = String::from_utf8_lossy(&std::mem::take(&mut line)).trim_end().to_owned();
            // Beats may still come when nobody waits for lines any more.
            let _ = lines.send(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Cursor, sink};

    const LONG: Duration = Duration::from_secs(20);

    fn console(bytes: &[u8]) -> (Console, Beats) {
        let beats = Arc::new(Mutex::new(GapMeter::shared()));
        let output = Cursor::new(bytes.to_vec());
        (Console::open(output, Box::new(sink()), Arc::clone(&beats)), beats)
    }

    #[test]
    fn beats_are_taken_out_of_the_middle_of_a_line() {
        let (console, beats) = console(b"WORKLOAD \x80READY\x81\r\n\x82WORKLOAD t=1\n");
        assert_eq!(console.wait("READY", LONG).unwrap(), "WORKLOAD READY");
        console.wait("WORKLOAD t=", LONG).unwrap();
        let beats = beats.lock().unwrap();
        assert_eq!((beats.beats(), beats.lost()), (3, 0));
    }

    #[test]
    fn damage_ends_every_wait() {
        let error =
            console(b"WORKLOAD CORRUPT page=7\nWORKLOAD t=1\n").0.wait("t=", LONG).unwrap_err();
        assert!(error.to_string().contains("page=7"));
    }

    #[test]
    fn a_wait_that_makes_no_sense_any_more_is_given_up() {
        let (reader, writer) = std::io::pipe().unwrap();
        let beats = Arc::new(Mutex::new(GapMeter::shared()));
        let console = Console::open(reader, Box::new(sink()), beats);
        let error = console.wait_while("READY", LONG, || bail!("it ended")).unwrap_err();
        assert_eq!(error.to_string(), "it ended");
        drop(writer);
    }
}
