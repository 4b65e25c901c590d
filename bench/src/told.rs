//! What a command prints: its reader may have gone (`| head`), which is no reason to end as if it
//! had failed.

use anyhow::{Context, Result};
use std::io::{ErrorKind, Write};

/// Prints this, to its end or as far as anybody reads.
///
/// # Errors
/// If it cannot be written for another reason: a full disk.
pub fn tell(text: &str) -> Result<()> {
    tell_to(&mut std::io::stdout().lock(), text)
}

fn tell_to(out: &mut impl Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context("writing to stdout"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes and then nothing more.
    struct Takes(usize, ErrorKind);

    impl Write for Takes {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(self.1.into());
            }
            let taken = self.0.min(bytes.len());
            self.0 -= taken;
            Ok(taken)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is() {
        tell_to(&mut Takes(4, ErrorKind::BrokenPipe), "more than that").unwrap();
        tell_to(&mut Takes(4, ErrorKind::StorageFull), "more than that").unwrap_err();
        tell_to(&mut Takes(4, ErrorKind::StorageFull), "that").unwrap();
    }
}
