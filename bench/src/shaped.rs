//! Two hosts on a cable of a known rate, on this one host: the namespaces that `scripts/shaped`
//! makes, and threads in them. Root only. What it made is removed when it is dropped, and what a
//! killed run left behind by the next run.

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The script, so that the program needs no file beside it.
const SCRIPT: &str = include_str!("../../scripts/shaped");

/// Where iproute2 keeps namespaces by name.
const NAMESPACES: &str = "/run/netns";

/// What of a cable's rate is payload: of each 1514 bytes of an Ethernet frame 1448 remain without
/// its header (14) and those of IP (20) and TCP (20, and 12 of time stamps).
const PAYLOAD_SHARE: f64 = 1448.0 / 1514.0;

/// A rate in bits a second, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rate(pub Option<u64>);

impl Rate {
    /// So many Gb/s.
    #[must_use]
    pub fn gbit(gbit: f64) -> Self {
        Self(Some((gbit * 1e9) as u64))
    }

    /// As the script takes it.
    fn words(self) -> String {
        self.0.map_or_else(|| "none".into(), |bits| format!("{bits}bit"))
    }

    /// Bytes of payload a second; endless without a rate.
    #[must_use]
    pub fn payload_bytes_per_second(self) -> f64 {
        self.0.map_or(f64::INFINITY, |bits| bits as f64 / 8.0 * PAYLOAD_SHARE)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("unshaped"),
            Some(bits) => write!(f, "{} Gb/s", bits as f64 / 1e9),
        }
    }
}

/// An end of the cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where guests come from.
    Source,
    /// Where they go.
    Destination,
}

/// The two namespaces and the cable between them.
#[derive(Debug)]
pub struct Shaped {
    name: String,
}

/// A name that no other run has, and by which a later one knows whether this is over.
fn new_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("bench-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Moves the calling thread to a namespace, for good: sockets that it makes from now on are there,
/// and so are threads and processes that it starts.
fn enter(namespace: &str) -> Result<()> {
    let path = format!("{NAMESPACES}/{namespace}");
    let file =
        File::open(&path).with_context(|| format!("opening the network namespace {path}"))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("moving a thread into {path}"))
}

impl Shaped {
    /// Makes them.
    pub fn up(rate: Rate) -> Result<Self> {
        let name = new_name();
        script(&["up", &rate.words(), &name])?;
        Ok(Self { name })
    }

    /// Gives the cable another rate.
    pub fn reshape(&self, rate: Rate) -> Result<()> {
        script(&["rate", &rate.words(), &self.name])
    }

    /// The address of an end.
    #[must_use]
    pub fn address(&self, end: End) -> IpAddr {
        Ipv4Addr::new(10, 88, 0, if end == End::Source { 1 } else { 2 }).into()
    }

    /// The namespace of an end, as `ip netns` knows it.
    #[must_use]
    pub fn namespace(&self, end: End) -> String {
        format!("pf-{}-{}", self.name, if end == End::Source { "a" } else { "b" })
    }

    /// Moves the calling thread to an end, for good; threads that it starts follow it.
    pub fn enter(&self, end: End) -> Result<()> {
        enter(&self.namespace(end))
    }
}

impl Drop for Shaped {
    fn drop(&mut self) {
        down(&self.name);
    }
}

/// A namespace with a bridge that guests in QEMU can join by taps: one switch, of which a guest
/// that moves changes the port.
#[derive(Debug)]
pub struct Bridge {
    name: String,
}

impl Bridge {
    /// Taps at the bridge, as the script makes them.
    pub const TAPS: u32 = 16;
    /// The guest's address and prefix.
    pub const GUEST: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 88, 0, 10), 24);

    /// Makes it.
    pub fn up() -> Result<Self> {
        let name = new_name();
        script(&["bridge", &name])?;
        Ok(Self { name })
    }

    /// Moves the calling thread to the bridge, for good; threads and processes that it starts
    /// follow it.
    pub fn enter(&self) -> Result<()> {
        enter(&format!("pf-{}-a", self.name))
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        down(&self.name);
    }
}

fn down(name: &str) {
    if let Err(e) = script(&["down", name]) {
        eprintln!("pageferry-bench: {e:#}");
    }
}

/// Whether namespaces of the run with this process id are there.
#[must_use]
pub fn made_by(run: u32) -> bool {
    let start = format!("pf-bench-{run}-");
    let entries = std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(&start))
}

/// Removes what runs left behind that were killed. Fails where namespaces cannot be made at all,
/// with the fix.
pub fn sweep() -> Result<()> {
    script(&["sweep"])
}

fn script(arguments: &[&str]) -> Result<()> {
    let mut child = Command::new("bash")
        .args(["-s", "--"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C is for the bench alone: half of a pair would stay.
        .process_group(0)
        .spawn()
        .context("starting bash")?;
    // Read as a whole before it does anything, as its last lines call what stands above; its pipe
    // holds all of it.
    let fed = child.stdin.take().context("its input was piped")?.write_all(SCRIPT.as_bytes());
    let output = child.wait_with_output().context("waiting for scripts/shaped")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        match said.lines().rfind(|line| line.starts_with("shaped: ")) {
            Some(line) => bail!("scripts/{line}"),
            None => bail!(
                "scripts/shaped {} failed ({}): {:?}",
                arguments.join(" "),
                output.status,
                said
            ),
        }
    }
    fed.context("handing scripts/shaped to bash")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_that_cannot_be_is_refused_in_one_line_before_anything_is_made() {
        for bits in ["none of it", "0bit", "999999999999gbit", "999bit"] {
            let error = format!("{:#}", script(&["up", bits, "test"]).unwrap_err());
            assert!(error.contains("rate") && error.lines().count() == 1, "{error}");
        }
        let error = format!("{:#}", script(&["up", "1gbit", "../x"]).unwrap_err());
        assert!(error.contains("is no name"), "{error}");
    }

    #[test]
    fn headers_are_no_payload() {
        let payload = Rate::gbit(10.0).payload_bytes_per_second();
        assert!((1.19e9..1.20e9).contains(&payload), "{payload}");
        assert_eq!(Rate(None).payload_bytes_per_second(), f64::INFINITY);
    }
}
