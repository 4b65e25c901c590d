//! Bytes from a QMP socket, cut into lines: bounded, and linear in what came.

/// Bytes asked for in one `recv`.
pub const RECV_BYTES: usize = 64 << 10;

/// Longest line that is taken from QEMU, in bytes. Its longest answers (`query-qmp-schema`, a
/// device tree) are some hundred KiB.
pub const LINE_BYTES_MAX: usize = 4 << 20;

/// Bytes received and not yet taken as lines.
#[derive(Debug, Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// Where the first line that was not taken begins.
    start: usize,
    /// Where what was received ends; the rest is room.
    filled: usize,
    /// Up to where the end of a line was looked for in vain.
    searched: usize,
}

impl LineBuffer {
    /// Room for one `recv`.
    pub fn room(&mut self) -> &mut [u8] {
        // Moved once a `recv` and not once a line: many short lines cost no more than one long one.
        self.bytes.copy_within(self.start..self.filled, 0);
        self.filled -= self.start;
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.len() < self.filled + RECV_BYTES {
            self.bytes.resize(self.filled + RECV_BYTES, 0);
        }
        &mut self.bytes[self.filled..self.filled + RECV_BYTES]
    }

    /// Counts what was received into the room. False if a line is too long.
    pub fn came(&mut self, count: usize) -> bool {
        self.filled = (self.filled + count).min(self.bytes.len());
        self.filled - self.start <= LINE_BYTES_MAX
            || self.bytes[self.searched..self.filled].contains(&b'\n')
    }

    /// The next line that is not blank, if it is here in whole.
    pub fn next_line(&mut self) -> Option<Vec<u8>> {
        while let Some(length) =
            self.bytes[self.searched..self.filled].iter().position(|b| *b == b'\n')
        {
            let line = self.start..self.searched + length;
            self.start = line.end + 1;
            self.searched = self.start;
            if !self.bytes[line.clone()].iter().all(u8::is_ascii_whitespace) {
                return Some(self.bytes[line].to_vec());
            }
        }
        self.searched = self.filled;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lines_come_out_as_they_went_in_however_they_were_cut(
            lines in prop::collection::vec("[ a-z]{0,9}", 0..40),
            cut in 1usize..17,
        ) {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let mut buffer = LineBuffer::default();
            let mut out = Vec::new();
            for piece in text.as_bytes().chunks(cut) {
                buffer.room()[..piece.len()].copy_from_slice(piece);
                prop_assert!(buffer.came(piece.len()));
                while let Some(line) = buffer.next_line() {
                    out.push(String::from_utf8(line).unwrap());
                }
            }
            let wanted: Vec<_> = lines.into_iter().filter(|line| !line.trim().is_empty()).collect();
            prop_assert_eq!(out, wanted);
        }
    }
}
