//! A client of a supervisor.

use crate::supervisor::api::words::{CLIENT_MAX, Reply, Request};
use pageferry_engine::error::{Error, Result};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// A client's side: a request, and the lines of its answer.
#[derive(Debug)]
pub struct Client {
    lines: BufReader<UnixStream>,
}

impl Client {
    /// Sends a request to the supervisor of this name.
    pub fn request(
        dir: &crate::supervisor::claim::RuntimeDir,
        name: &str,
        request: &Request,
    ) -> Result<Self> {
        crate::supervisor::claim::check_name(name)?;
        let nobody = || {
            let fix = match dir.record(name).filter(crate::supervisor::record::Record::alive) {
                Some(record) => format!(
                    "its QEMU still runs (pid {}): attach it with `pageferry attach {name}`",
                    record.pid
                ),
                None => "`pageferry list` shows those that are".into(),
            };
            Error::refused(format!("no guest named {name} is supervised on this host; {fix}"))
        };
        let mut stream = UnixStream::connect(dir.path(name, "sock")).map_err(|_| nobody())?;
        let talking = |e| Error::os(format!("talking to the supervisor of {name}"), e);
        stream.set_read_timeout(Some(CLIENT_MAX)).map_err(talking)?;
        let mut line = serde_json::to_vec(request).map_err(|e| talking(e.into()))?;
        line.push(b'\n');
        stream.write_all(&line).map_err(talking)?;
        Ok(Self { lines: BufReader::new(stream) })
    }

    /// The next line. A migration sends one at least every 100 ms.
    pub fn next_reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        let lost = |e| {
            Error::os(
                "the supervisor does not answer any more; see its own output for how the migration ended",
                e,
            )
        };
        match self.lines.read_line(&mut line) {
            Ok(0) => Err(lost(std::io::ErrorKind::ConnectionAborted.into())),
            Ok(_) => serde_json::from_str(&line).map_err(|e| lost(e.into())),
            Err(e) => Err(lost(e)),
        }
    }
}
