//! Output that never makes its writer wait: a bounded buffer, and a thread that writes it out.
//!
//! A guest's console goes to whatever stands behind stdout: a terminal that was stopped with Ctrl-S, a pipe that
//! nobody reads. A vCPU that waited for it would stand still for ever, and could not be paused for a migration. So
//! what does not fit into the buffer is dropped, and a line says how much.

use crate::error::{Error, Result};
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What the buffer holds: some minutes of a chatty console.
const BUFFER_BYTES: usize = 1 << 20;
/// Written out at once.
const PIECE_BYTES: usize = 64 << 10;
/// For the last output to be written when the guest has ended.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// The writer's end. Clones write to the same place; when the last is dropped, the thread writes what is left and
/// ends.
#[derive(Debug)]
pub struct Spool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    dropped_bytes: u64,
    /// Whether the thread has taken something and has not written it yet.
    writing: bool,
    /// Whether the output takes no more: it failed.
    broken: bool,
    /// Writers that are left.
    writers: usize,
}

impl Spool {
    /// Starts the thread that writes to `output`.
    pub fn new(output: Box<dyn Write + Send>) -> Result<Self> {
        let state = State { writers: 1, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("console-out".into())
            .spawn(move || theirs.write_out(output))
            .map_err(|e| Error::os("starting a thread for the guest's console", e))?;
        Ok(Self(shared))
    }

    /// Waits until everything is out, or until the deadline: an output that nobody reads takes nothing.
    pub fn flush_within(&self, wait: Duration) {
        let state = self.0.lock();
        let busy = |state: &mut State| !state.broken && (state.writing || !state.waiting.is_empty());
        drop(self.0.changed.wait_timeout_while(state, wait, busy));
    }
}

impl Clone for Spool {
    fn clone(&self) -> Self {
        self.0.lock().writers += 1;
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.writers -= 1;
        let last = state.writers == 0;
        drop(state);
        self.0.changed.notify_all();
        if last {
            self.flush_within(LAST_WORDS_MAX);
        }
    }
}

impl Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut state = self.0.lock();
        let fits = bytes.len().min(BUFFER_BYTES - state.waiting.len());
        // What comes after a loss is not shown before the note of it: the order is kept.
        let fits = if state.dropped_bytes > 0 || state.broken { 0 } else { fits };
        state.waiting.extend_from_slice(&bytes[..fits]);
        state.dropped_bytes += (bytes.len() - fits) as u64;
        drop(state);
        self.0.changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: until no writer is left, or the output fails.
    fn write_out(&self, mut output: Box<dyn Write + Send>) {
        loop {
            let piece = {
                let mut state = self.lock();
                state.writing = false;
                self.changed.notify_all();
                while state.waiting.is_empty() && state.dropped_bytes == 0 && state.writers > 0 {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.waiting.is_empty() && state.dropped_bytes == 0 {
                    return;
                }
                state.writing = true;
                state.take()
            };
            if let Err(e) = output.write_all(&piece).and_then(|()| output.flush()) {
                tracing::warn!(error = %e, "the guest's console goes nowhere from here on");
                let mut state = self.lock();
                (state.broken, state.writing) = (true, false);
                drop(state);
                self.changed.notify_all();
                return;
            }
        }
    }
}

impl State {
    /// The next piece, or the note of what was lost after the last one.
    fn take(&mut self) -> Vec<u8> {
        if self.waiting.is_empty() {
            let dropped = std::mem::take(&mut self.dropped_bytes);
            return format!(
                "\r\n[pageferry: {dropped} bytes of console output dropped, as nobody took them]\r\n"
            )
            .into_bytes();
        }
        let rest = self.waiting.split_off(self.waiting.len().min(PIECE_BYTES));
        std::mem::replace(&mut self.waiting, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

    /// An output that takes nothing before it is allowed to, and tells what it took.
    struct Gate {
        open: Receiver<()>,
        taken: Sender<Vec<u8>>,
        entered: Sender<()>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.entered.try_send(());
            // Ends when the sender is dropped, too: then the gate is open for good.
            let _ = self.open.recv();
            let _ = self.taken.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn gate() -> (Gate, Sender<()>, Receiver<()>, Receiver<Vec<u8>>) {
        let ((sender, open), (taken, out), (entered, inside)) = (bounded(0), unbounded(), bounded(1));
        (Gate { open, taken, entered }, sender, inside, out)
    }

    #[test]
    fn a_writer_never_waits_and_what_was_lost_is_told_in_its_place() {
        let (gate, open, inside, out) = gate();
        let mut spool = Spool::new(Box::new(gate)).unwrap();
        spool.write_all(b"first").unwrap();
        inside.recv().unwrap();
        // The thread is stuck with the first piece: one buffer fits, the rest does not.
        for _ in 0..3 {
            spool.write_all(&vec![b'x'; BUFFER_BYTES / 2]).unwrap();
        }
        drop(open);
        spool.flush_within(Duration::from_secs(60));
        spool.write_all(b"last").unwrap();
        drop(spool);
        let out: Vec<u8> = out.iter().flatten().collect();
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("firstxxx"));
        assert_eq!(text.matches('x').count(), BUFFER_BYTES);
        let note = format!("x\r\n[pageferry: {} bytes of console output dropped", BUFFER_BYTES / 2);
        assert!(text.contains(&note) && text.ends_with("]\r\nlast"), "{}", &text[text.len() - 200..]);
    }

    #[test]
    fn an_output_that_nobody_reads_does_not_hold_up_the_end() {
        let (gate, open, inside, out) = gate();
        let mut spool = Spool::new(Box::new(gate)).unwrap();
        spool.write_all(b"first").unwrap();
        inside.recv().unwrap();
        drop(spool);
        assert!(out.try_recv().is_err());
        drop(open);
    }

    #[test]
    fn an_output_that_fails_is_given_up_without_harm() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut spool = Spool::new(Box::new(Closed)).unwrap();
        spool.write_all(b"text").unwrap();
        spool.flush_within(Duration::from_secs(60));
        assert!(spool.0.lock().broken);
        spool.write_all(b"more").unwrap();
        spool.flush_within(Duration::from_secs(60));
    }
}
