//! iperf3, the real one: a server and a client for each transfer, the client's report read as JSON.

use super::TRANSFER_MAX;
use crate::testbed::process::Process;
use crate::watch::{Sample, Watch};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use std::fmt;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

/// For the server to listen, and to end after its client.
const SERVER_MAX: Duration = Duration::from_secs(20);

/// How it is asked to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flags {
    /// `-P`: connections.
    streams: usize,
    /// `-l 1M`: bytes a call, in place of 128 KiB.
    large: bool,
    /// `-Z`: sendfile from a file in the page cache.
    sendfile: bool,
}

impl Flags {
    /// The ways in which one would look for its best: as it comes, with as many connections as the
    /// link, with the pump's size of calls, with its own zero-copy.
    pub(super) fn sensible(lanes: usize) -> Vec<Self> {
        let mut streams = vec![1, lanes];
        streams.dedup();
        let with = |streams| {
            [(false, false), (true, false), (false, true)].map(|(large, sendfile)| Self {
                streams,
                large,
                sendfile,
            })
        };
        streams.into_iter().flat_map(with).collect()
    }
}

/// As on its command line.
impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "-P {}", self.streams)?;
        f.write_str(if self.large { " -l 1M" } else { "" })?;
        f.write_str(if self.sendfile { " -Z" } else { "" })
    }
}

/// Its first line about itself; an error with the fix where it is missing.
pub(super) fn version() -> Result<String> {
    let said = Command::new("iperf3").arg("--version").stdin(Stdio::null()).output();
    let said = said.map_err(|e| {
        anyhow!("iperf3 cannot be started ({e}): scripts/setup --bench installs it")
    })?;
    let line = String::from_utf8_lossy(&said.stdout).lines().next().unwrap_or_default().to_owned();
    ensure!(
        line.starts_with("iperf 3"),
        "iperf3 is not iperf 3, it says {line:?}: scripts/setup --bench"
    );
    Ok(line)
}

pub(super) fn run(total_bytes: u64, flags: Flags) -> Result<Sample> {
    // Free a moment ago; if somebody took it meanwhile, the server says so.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let watch = Watch::start()?;
    let mut server =
        Process::start("iperf3", &["-s", "-1", "-B", "127.0.0.1", "-p", &port, "--forceflush"])?;
    server.line("listening on", SERVER_MAX)?;
    let (bytes, asked) = (total_bytes.to_string(), flags.to_string());
    let mut arguments = vec!["-c", "127.0.0.1", "-p", &port, "-J", "-n", &bytes];
    arguments.extend(asked.split(' '));
    let client = Process::start("iperf3", &arguments)?.end(TRANSFER_MAX)?;
    // One that fails says why in its report.
    let (bytes, elapsed) =
        received(&client.stdout).map_err(|e| client.check().err().unwrap_or(e))?;
    server.end(SERVER_MAX)?.check()?;
    watch.stop(bytes, Some(elapsed))
}

/// Bytes, and how long they took, as the receiver counted them.
fn received(report: &str) -> Result<(u64, Duration)> {
    let report: Value = serde_json::from_str(report).context("iperf3's report is not JSON")?;
    if let Some(error) = report["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let sum = &report["end"]["sum_received"];
    let seconds = sum["seconds"].as_f64().filter(|s| *s > 0.0);
    let elapsed = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
    match (sum["bytes"].as_u64(), elapsed) {
        (Some(bytes @ 1..), Some(elapsed)) => Ok((bytes, elapsed)),
        _ => bail!("iperf3's report has no bytes received: {sum}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_count_is_taken_and_an_error_is_told() {
        let report = r#"{"end": {"sum_sent": {"bytes": 9, "seconds": 1.0}, "sum_received": {"bytes": 8, "seconds": 0.5}}}"#;
        assert_eq!(received(report).unwrap(), (8, Duration::from_millis(500)));
        let error = received(r#"{"end": {}, "error": "unable to connect"}"#).unwrap_err();
        assert_eq!(error.to_string(), "iperf3: unable to connect");
        for odd in ["", "{}", r#"{"end": {"sum_received": {"bytes": 0, "seconds": -1}}}"#] {
            assert!(received(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn its_ways_differ_and_read_as_its_command_line() {
        let names =
            |lanes| Flags::sensible(lanes).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(names(1), ["-P 1", "-P 1 -l 1M", "-P 1 -Z"]);
        assert_eq!(names(2)[3..], ["-P 2", "-P 2 -l 1M", "-P 2 -Z"]);
    }
}
