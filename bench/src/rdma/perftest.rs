//! `ib_write_bw`, the real one: a server and a client for each transfer, over connections that
//! rdma_cm makes as it makes ours, and the client's report.

use super::{RdmaBenchOptions, TRANSFER_MAX};
use crate::testbed::process::Process;
use crate::watch::{Sample, Watch};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// For the server to listen, and to end after its client.
const SERVER_MAX: Duration = Duration::from_secs(20);

const PROGRAM: &str = "ib_write_bw";

/// Its first line about itself; an error with the fix where it is missing.
pub(super) fn version() -> Result<String> {
    let said = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output();
    let said = said.map_err(|e| {
        anyhow!(
            "{PROGRAM} cannot be started ({e}): scripts/setup --lab installs it (Debian's perftest)"
        )
    })?;
    let line =
        String::from_utf8_lossy(&said.stdout).lines().next().unwrap_or_default().trim().to_owned();
    ensure!(line.contains("ersion"), "{PROGRAM} does not say its version, it says {line:?}");
    Ok(format!("{PROGRAM} {line}"))
}

/// Fails as well if it did not run with the link's MTU and number of queue pairs.
pub(super) fn run(options: &RdmaBenchOptions, mtu: u32, size: u64, flags: &str) -> Result<Sample> {
    let writes = (options.writes(size) / u64::from(options.lanes)).to_string();
    let (lanes, size) = (options.lanes.to_string(), size.to_string());
    // Free a moment ago; if somebody took it meanwhile, the server says so.
    let port = TcpListener::bind((options.to, 0))?.local_addr()?.port().to_string();
    // -R: rdma_cm. -F: no word about the CPU's clock. -N: it does not look at the clock for each
    // message.
    let mut arguments = vec![
        "-oL", PROGRAM, "-R", "-F", "-N", "-p", &port, "-q", &lanes, "-s", &size, "-n", &writes,
    ];
    arguments.extend(flags.split_whitespace());
    let (from, to) = (options.from.to_string(), options.to.to_string());
    let client = [&arguments[1..], &["--source_ip", &from, &to]].concat();

    let watch = Watch::start()?;
    // stdbuf, because otherwise its words come when it ends.
    let mut server = Process::start("stdbuf", &arguments)?;
    server.line("Waiting for client", SERVER_MAX)?;
    // It says so just before it listens, and a client that comes too early ends.
    let deadline = Instant::now() + SERVER_MAX;
    let report = loop {
        let ended = Process::start(client[0], &client[1..])?.end(TRANSFER_MAX)?;
        match ended.check() {
            Ok(()) => break ended.stdout,
            Err(e) if Instant::now() > deadline || server.has_ended()? => return Err(e),
            Err(_) => {}
        }
    };
    server.end(SERVER_MAX)?.check()?;
    let report =
        Report::parse(&report).with_context(|| format!("the report of {PROGRAM}: {report:?}"))?;
    let bytes = options.writes(report.size) * report.size;
    ensure!(
        report.mtu == mtu && report.queue_pairs == u32::from(options.lanes),
        "{PROGRAM} ran with {} queue pairs and an MTU of {}, the link has {lanes} and {mtu}",
        report.queue_pairs,
        report.mtu
    );
    ensure!(
        report.bytes() == bytes,
        "{PROGRAM} moved {} bytes in place of {bytes}",
        report.bytes()
    );
    watch.stop(bytes, Some(Duration::try_from_secs_f64(bytes as f64 / report.bytes_per_s)?))
}

/// What the client says at its end.
#[derive(Debug, PartialEq)]
struct Report {
    queue_pairs: u32,
    mtu: u32,
    size: u64,
    writes: u64,
    bytes_per_s: f64,
}

impl Report {
    /// From its table: `#bytes #iterations BW peak[MB/sec] BW average[MB/sec] MsgRate[Mpps]`, in
    /// which a MB is 2^20 bytes and the iterations are those of all queue pairs together.
    fn parse(text: &str) -> Result<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.split_once(name)).map(|(_, rest)| rest);
            let value =
                line.and_then(|rest| rest.trim_start().strip_prefix(':')).map(str::trim_start);
            let digits = value.and_then(|value| value.split(|c: char| !c.is_ascii_digit()).next());
            digits
                .and_then(|digits| digits.parse().ok())
                .with_context(|| format!("it has no {name:?}"))
        };
        let mut table = text.lines().skip_while(|line| !line.contains("BW average[MB/sec]"));
        let row = table.nth(1).context("it has no table of MB/sec")?;
        let words: Vec<_> = row.split_whitespace().collect();
        let [size, writes, _peak, average, _rate] = words[..] else {
            bail!("its table has not the five columns of MB/sec")
        };
        let (size, writes, mib_per_s) = (size.parse()?, writes.parse()?, average.parse::<f64>()?);
        ensure!(mib_per_s > 0.0 && mib_per_s.is_finite(), "its average is {mib_per_s}");
        let bytes_per_s = mib_per_s * f64::from(1 << 20);
        Ok(Self {
            queue_pairs: field("Number of qps")?,
            mtu: field("Mtu")?,
            size,
            writes,
            bytes_per_s,
        })
    }

    fn bytes(&self) -> u64 {
        self.size.saturating_mul(self.writes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As perftest 4.5 says it.
    const SAID: &str = "\
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF\t\tDevice         : rxe_v0
 Number of qps   : 2\t\tTransport type : IB
 Connection type : RC\t\tUsing SRQ      : OFF
 TX depth        : 128
 Mtu             : 1024[B]
 Link type       : Ethernet
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0012 PSN 0xdf8a59
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      400              0.00               28.35  \t\t   0.000454
---------------------------------------------------------------------------------------
";

    #[test]
    fn its_report_is_read() {
        let report = Report::parse(SAID).unwrap();
        assert_eq!((report.queue_pairs, report.mtu, report.bytes()), (2, 1024, 400 * 65536));
        assert!((report.bytes_per_s / 1e6 - 29.727).abs() < 0.001, "{report:?}");
    }

    #[test]
    fn a_report_that_is_not_whole_is_refused() {
        assert!(Report::parse("").is_err());
        for missing in ["Number of qps", "Mtu ", "BW average[MB/sec]", "28.35", " 65536      400"] {
            let error = Report::parse(&SAID.replace(missing, "")).unwrap_err();
            assert!(!error.to_string().is_empty(), "{missing}");
        }
        assert!(Report::parse(&SAID.replace("28.35", "0.00")).is_err());
        assert!(Report::parse(&SAID.replace("28.35", "nan")).is_err());
        assert!(Report::parse(SAID.split(" 65536").next().unwrap()).is_err());
    }
}
