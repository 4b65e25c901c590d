//! The serial console of a guest that checks its memory and says so there. Two QEMUs may run it in
//! turn; each has a console of its own.

use crate::words::Words;
use crate::{SOON, eventually};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// For the guest to boot, or to check all of its memory, under software emulation on a busy
/// machine.
pub const BOOT_MAX: Duration = Duration::from_secs(300);

/// The console of one QEMU.
pub struct Console {
    words: Words,
    writer: Box<dyn Write>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("words", &self.words).finish_non_exhaustive()
    }
}

impl Console {
    /// Connects to it.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let what = format!("the console at {}", path.display());
        let writer = eventually(&what, SOON, || UnixStream::connect(path).ok());
        Self::of(Words::of(writer.try_clone().expect("a second handle")), Box::new(writer))
    }

    /// One whose two directions are there.
    #[must_use]
    pub fn of(words: Words, writer: Box<dyn Write>) -> Self {
        Self { words, writer }
    }

    /// Waits for the next line with this text.
    ///
    /// # Panics
    /// At the deadline; and if the guest has found damage.
    #[must_use]
    pub fn wait(&self, mark: usize, text: &str, wait: Duration) -> (String, usize) {
        let found = self.words.wait_after(mark, text, wait);
        let damage =
            self.words.lines().into_iter().find(|l| l.contains("CORRUPT") || l.contains("FAILED"));
        assert_eq!(damage, None, "the guest found damage");
        found
    }

    /// Waits until the guest is up and writes.
    pub fn wait_ready(&self) {
        let _ = self.wait(0, "WORKLOAD READY", BOOT_MAX);
    }

    /// Waits for the guest's next status line, in which it must have written more than `before`
    /// pages and found no error. Returns what it has written so far.
    ///
    /// # Panics
    /// If it has not.
    pub fn progress_since(&self, before: u64) -> u64 {
        let (line, _) = self.wait(self.words.mark(), "WORKLOAD t=", SOON);
        let written = number(&line, "writes=");
        assert!(written > before, "the guest does not write: {line}");
        assert_eq!(number(&line, "errors="), 0, "{line}");
        written
    }

    /// Pages that the guest has read from its disk and written to it, as its next status line has
    /// them.
    ///
    /// # Panics
    /// If it has no disk, or has found an error.
    #[must_use]
    pub fn disk_pages(&self) -> (u64, u64) {
        let (line, _) = self.wait(self.words.mark(), "disk_read=", SOON);
        assert_eq!(number(&line, "errors="), 0, "{line}");
        (number(&line, "disk_read="), number(&line, "disk_written="))
    }

    /// Where the next word will be: for [`Self::wait`].
    #[must_use]
    pub fn mark(&self) -> usize {
        self.words.mark()
    }

    /// Types a line.
    ///
    /// # Panics
    /// If the line cannot be typed.
    pub fn type_line(&mut self, line: &str) {
        self.type_keys(&format!("{line}\n"));
    }

    /// Types these keys alone.
    ///
    /// # Panics
    /// If they cannot be typed.
    pub fn type_keys(&mut self, keys: &str) {
        self.writer.write_all(keys.as_bytes()).expect("the console takes them");
    }

    /// Has the guest check all of its memory now.
    ///
    /// # Panics
    /// If anything is lost.
    pub fn verdict(&mut self) {
        let mark = self.words.mark();
        self.type_line("verdict");
        let (line, _) = self.wait(mark, "WORKLOAD VERDICT", BOOT_MAX);
        assert!(line.contains("VERDICT intact") && number(&line, "errors=") == 0, "{line}");
    }
}

/// The number behind `key` in a line of the guest.
fn number(line: &str, key: &str) -> u64 {
    let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
    word.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no {key} in {line:?}"))
}
