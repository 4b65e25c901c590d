//! Output that never makes its writer wait: a bounded buffer, and a thread that writes it out.
//!
//! What stands behind stdout or stderr may stop taking anything: a terminal after Ctrl-S, a pipe
//! that nobody reads, a full disk. A vCPU that waited for its console could not be paused for a
//! migration, and a supervisor that waited for its log would leave a guest paused. So what does not
//! fit into the buffer, or fails to be written, is dropped, and a note in its place says how much.

use pageferry_engine::error::{Error, Result};
use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Written out at once.
const PIECE_BYTES: usize = 64 << 10;
/// For the last output to be written when the last writer goes.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);
/// Between two attempts at an output that failed, while nothing new comes.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// What is written, and what is done about a loss.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Name of the thread.
    pub thread: &'static str,
    /// What the buffer holds.
    pub buffer_bytes: usize,
    /// How much this is, in the unit of `note`.
    pub count: fn(&[u8]) -> u64,
    /// The words in the place of so much.
    pub note: fn(u64) -> String,
    /// Whether an output that failed is tried again with what comes next; otherwise it is given up.
    pub tries_again: bool,
}

/// The guest's console, and some minutes of a chatty one.
pub const CONSOLE: Kind = Kind {
    thread: "console-out",
    buffer_bytes: 1 << 20,
    count: |bytes| bytes.len() as u64,
    note: |lost| {
        format!("\r\n[pageferry: {lost} bytes of console output dropped, as nobody took them]\r\n")
    },
    tries_again: false,
};

/// The writer's end. Clones write to the same place; when the last is dropped, the thread writes
/// what is left and ends.
#[derive(Debug)]
pub struct Spool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    kind: Kind,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// In the order in which it was written.
    waiting: VecDeque<Entry>,
    /// Bytes in it.
    waiting_bytes: usize,
    /// Whether the thread has taken something and has not written it yet.
    writing: bool,
    /// Whether the last write failed.
    failing: bool,
    /// Whether the output is given up.
    broken: bool,
    /// Writers that are left.
    writers: usize,
}

/// A stretch of the output.
#[derive(Debug)]
enum Entry {
    Bytes(Vec<u8>),
    /// So much is missing here.
    Lost(u64),
}

impl Spool {
    /// Starts the thread that writes to `output`.
    pub fn new(kind: Kind, output: Box<dyn Write + Send>) -> Result<Self> {
        let state = State { writers: 1, ..State::default() };
        let shared = Arc::new(Shared { kind, state: Mutex::new(state), changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(kind.thread.into())
            .spawn(move || theirs.write_out(output))
            .map_err(|e| Error::os("starting a thread for output", e))?;
        Ok(Self(shared))
    }

    /// Takes these bytes, all or none. Never waits for the output.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.0.lock();
        if state.broken {
            return;
        }
        if bytes.len() <= self.0.kind.buffer_bytes - state.waiting_bytes {
            state.append(bytes);
        } else {
            state.append_lost((self.0.kind.count)(bytes));
        }
        drop(state);
        self.0.changed.notify_all();
    }

    /// Waits until everything is out, or the output fails, or until the deadline: one that nobody
    /// reads takes nothing.
    pub fn flush_within(&self, wait: Duration) {
        let state = self.0.lock();
        let busy = |state: &mut State| {
            !state.broken && !state.failing && (state.writing || !state.waiting.is_empty())
        };
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
        self.push(bytes);
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

    /// The thread: until no writer is left, or the output is given up.
    fn write_out(&self, mut output: Box<dyn Write + Send>) {
        // Whether a failure cut the last line off.
        let mut torn = false;
        while let Some(entry) = self.next() {
            let (piece, noted) = match entry {
                Entry::Bytes(piece) => (piece, 0),
                Entry::Lost(lost) => ((self.kind.note)(lost).into_bytes(), lost),
            };
            let mut written = 0;
            let line_end: &[u8] = if torn { b"\n" } else { b"" };
            let outcome = write_counted(output.as_mut(), line_end, &mut 0)
                .and_then(|()| write_counted(output.as_mut(), &piece, &mut written));
            if written > 0 {
                torn = piece[written - 1] != b'\n' && outcome.is_err();
            }
            let Err(e) = outcome else { continue };
            let lost = if noted > 0 { noted } else { (self.kind.count)(&piece[written..]) };
            if !self.lost(lost) {
                tracing::warn!(error = %e, "{}: goes nowhere from here on", self.kind.thread);
                return;
            }
        }
    }

    /// The next thing to write; nothing when the last writer has gone.
    fn next(&self) -> Option<Entry> {
        let mut state = self.lock();
        state.writing = false;
        self.changed.notify_all();
        let failing = |state: &mut State| state.failing && state.writers > 0;
        state = self
            .changed
            .wait_timeout_while(state, RETRY_EVERY, failing)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        while state.waiting.is_empty() && state.writers > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // What failed a moment ago, and is wanted by nobody any more, is not tried for ever.
        if state.failing && state.writers == 0 {
            return None;
        }
        let entry = state.take()?;
        state.writing = true;
        Some(entry)
    }

    /// Notes that so much could not be written. Returns whether to go on.
    fn lost(&self, lost: u64) -> bool {
        let mut state = self.lock();
        if self.kind.tries_again {
            state.failing = true;
            match state.waiting.front_mut() {
                Some(Entry::Lost(more)) => *more += lost,
                _ => state.waiting.push_front(Entry::Lost(lost)),
            }
        } else {
            (state.broken, state.writing) = (true, false);
            state.waiting.clear();
        }
        drop(state);
        self.changed.notify_all();
        self.kind.tries_again
    }
}

impl State {
    fn append(&mut self, bytes: &[u8]) {
        self.waiting_bytes += bytes.len();
        self.failing = false;
        match self.waiting.back_mut() {
            Some(Entry::Bytes(last)) if last.len() < PIECE_BYTES => last.extend_from_slice(bytes),
            _ => self.waiting.push_back(Entry::Bytes(bytes.to_vec())),
        }
    }

    fn append_lost(&mut self, lost: u64) {
        match self.waiting.back_mut() {
            Some(Entry::Lost(more)) => *more += lost,
            _ => self.waiting.push_back(Entry::Lost(lost)),
        }
    }

    /// The oldest of what waits.
    fn take(&mut self) -> Option<Entry> {
        let entry = self.waiting.pop_front()?;
        if let Entry::Bytes(bytes) = &entry {
            self.waiting_bytes -= bytes.len();
        }
        Some(entry)
    }
}

/// Like `write_all`, and tells in `written` how far it came.
fn write_counted(output: &mut dyn Write, bytes: &[u8], written: &mut usize) -> std::io::Result<()> {
    while *written < bytes.len() {
        match output.write(&bytes[*written..]) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => *written += count,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    output.flush()
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
        let ((sender, open), (taken, out), (entered, inside)) =
            (bounded(0), unbounded(), bounded(1));
        (Gate { open, taken, entered }, sender, inside, out)
    }

    #[test]
    fn a_writer_never_waits_and_what_was_lost_is_told_in_its_place() {
        let (gate, open, inside, out) = gate();
        let mut spool = Spool::new(CONSOLE, Box::new(gate)).unwrap();
        spool.write_all(b"first").unwrap();
        inside.recv().unwrap();
        // The thread is stuck with the first piece: one buffer fits, the rest does not.
        for _ in 0..3 {
            spool.write_all(&vec![b'x'; CONSOLE.buffer_bytes / 2]).unwrap();
        }
        drop(open);
        spool.flush_within(Duration::from_secs(60));
        spool.write_all(b"last").unwrap();
        drop(spool);
        let out: Vec<u8> = out.iter().flatten().collect();
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("firstxxx"));
        assert_eq!(text.matches('x').count(), CONSOLE.buffer_bytes);
        let note = format!(
            "x\r\n[pageferry: {} bytes of console output dropped",
            CONSOLE.buffer_bytes / 2
        );
        assert!(
            text.contains(&note) && text.ends_with("]\r\nlast"),
            "{}",
            &text[text.len() - 200..]
        );
    }

    #[test]
    fn an_output_that_nobody_reads_does_not_hold_up_the_end() {
        let (gate, open, inside, out) = gate();
        let mut spool = Spool::new(CONSOLE, Box::new(gate)).unwrap();
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
        let mut spool = Spool::new(CONSOLE, Box::new(Closed)).unwrap();
        spool.write_all(b"text").unwrap();
        spool.flush_within(Duration::from_secs(60));
        assert!(spool.0.lock().broken);
        spool.write_all(b"more").unwrap();
        spool.flush_within(Duration::from_secs(60));
    }

    /// Lines, as the log's.
    const LINES: Kind = Kind {
        thread: "lines",
        buffer_bytes: 64,
        count: |bytes| bytes.iter().filter(|byte| **byte == b'\n').count() as u64,
        note: |lost| format!("[{lost} lines lost]\n"),
        tries_again: true,
    };

    /// A disk: takes `room` bytes and is full then.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Disk {
        fn make_room(&self, bytes: usize) {
            self.0.lock().unwrap().0 = bytes;
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().1.clone()).unwrap()
        }
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let mut disk = self.0.lock().unwrap();
            let fits = bytes.len().min(disk.0);
            if fits == 0 && !bytes.is_empty() {
                return Err(ErrorKind::StorageFull.into());
            }
            disk.0 -= fits;
            disk.1.extend_from_slice(&bytes[..fits]);
            Ok(fits)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_on_a_full_disk_goes_on_when_there_is_room_and_counts_what_is_missing() {
        let disk = Disk::default();
        let spool = Spool::new(LINES, Box::new(disk.clone())).unwrap();
        disk.make_room(9);
        for line in ["whole\n", "torn off\n", "kept\n"] {
            spool.push(line.as_bytes());
            spool.flush_within(Duration::from_secs(60));
        }
        assert_eq!(disk.text(), "whole\ntor");
        // What waits behind the loss is not lost with it.
        disk.make_room(1000);
        spool.push(b"again\n");
        spool.flush_within(Duration::from_secs(60));
        assert_eq!(disk.text(), "whole\ntor\n[1 lines lost]\nkept\nagain\n");
    }

    #[test]
    fn what_fits_again_after_an_overflow_stands_behind_the_note_of_it() {
        let (gate, open, inside, out) = gate();
        let spool = Spool::new(LINES, Box::new(gate)).unwrap();
        spool.push(b"first\n");
        inside.recv().unwrap();
        spool.push(&[[b'x'; 63].as_slice(), b"\n"].concat());
        spool.push(b"lost\n");
        spool.push(b"lost too\n");
        drop(open);
        spool.flush_within(Duration::from_secs(60));
        spool.push(b"last\n");
        drop(spool);
        let text = String::from_utf8(out.iter().flatten().collect()).unwrap();
        assert!(text.ends_with("xxx\n[2 lines lost]\nlast\n"), "{text}");
    }
}
