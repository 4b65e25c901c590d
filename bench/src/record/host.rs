//! The machine that figures were taken on, as far as it can be asked.

use serde::{Deserialize, Serialize};
use std::fs::read_to_string;
use std::process::Command;

/// A machine, its software, and how busy it was when the run began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Model name of the processor.
    pub processor: String,
    /// Processors that this process may use.
    pub cores: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Whether it is a virtual machine itself, and whose time may be taken away.
    pub virtual_machine: bool,
    /// Kernel release.
    pub kernel: String,
    /// Distribution.
    pub system: String,
    /// QEMU's version, or why it is not known.
    pub qemu: String,
    /// This release.
    pub pageferry: String,
    /// Threads that ran or waited for a core in the minute before.
    pub load_before: f64,
}

impl Host {
    /// Asks this one. What does not answer is said to be unknown: no figure is withheld for that.
    #[must_use]
    pub fn look() -> Self {
        let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = field(&cpuinfo, "flags").unwrap_or_default();
        Self {
            processor: field(&cpuinfo, "model name").unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(0, |n| n.get() as u32),
            memory_mib: field(&read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal")
                .and_then(|total| total.split(' ').next()?.parse::<u64>().ok())
                .map_or(0, |kib| kib / 1024),
            virtual_machine: flags.split(' ').any(|flag| flag == "hypervisor"),
            kernel: read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| "unknown".into(), |release| release.trim().to_owned()),
            system: system(),
            qemu: qemu(),
            pageferry: pageferry_engine::VERSION.into(),
            load_before: read_to_string("/proc/loadavg")
                .ok()
                .and_then(|text| text.split(' ').next()?.parse().ok())
                .unwrap_or(-1.0),
        }
    }
}

/// The value behind `name :` in a file of such lines.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn system() -> String {
    let release = read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "unknown".into(), |name| name.trim_matches('"').to_owned())
}

fn qemu() -> String {
    match Command::new("qemu-system-x86_64").arg("--version").output() {
        Ok(output) => {
            String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").to_owned()
        }
        Err(e) => format!("none ({e})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "MemTotalFree: 1 kB\nMemTotal:       2048 kB\n";
        assert_eq!(field(text, "MemTotal"), Some("2048 kB"));
        assert_eq!(field(text, "Mem"), None);
    }

    #[test]
    fn this_host_answers() {
        let host = Host::look();
        assert!(host.cores > 0 && host.memory_mib > 0 && host.kernel != "unknown", "{host:?}");
    }
}
