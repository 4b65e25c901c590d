//! What can be seen of a process and of a QEMU from outside, without its supervisor.

use crate::{LOOK_EVERY, SOON};
use pageferry_qemu::qmp::Qmp;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

/// One look at a QEMU must not hold up the test if its monitor is busy.
const ONE_LOOK: Duration = Duration::from_secs(3);

/// Whether the process runs (a zombie does not).
#[must_use]
pub fn alive(pid: u32) -> bool {
    // A process whose first thread has ended looks like a zombie while others are still ending.
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    match process_state(pid) {
        None => false,
        Some('Z' | 'X') => threads() > 1,
        Some(_) => true,
    }
}

/// The letter of a process' state (proc_pid_stat(5)): `T` is stopped by a signal.
#[must_use]
pub fn process_state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Waits for the end of a process.
///
/// # Panics
/// If it lives on.
pub fn wait_gone(pid: u32) {
    crate::eventually(&format!("process {pid} ends"), SOON, || (!alive(pid)).then_some(()));
}

/// Processor time that the vCPUs of a `pageferry microvm` have had; nothing if it is gone.
#[must_use]
pub fn vcpu_time(pid: u32) -> Option<Duration> {
    let mut total = Duration::ZERO;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let read = |file: &str| fs::read_to_string(thread.path().join(file)).ok();
        // Nanoseconds on a processor are the first of its figures (Linux,
        // Documentation/scheduler/sched-stats.rst).
        if read("comm").is_some_and(|name| name.starts_with("vcpu "))
            && let Some(ns) =
                read("schedstat").and_then(|text| text.split(' ').next()?.parse().ok())
        {
            total += Duration::from_nanos(ns);
        }
    }
    alive(pid).then_some(total)
}

/// Sends a signal; a process that is gone already is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// The state that QEMU itself reports (`running`, `paused`, `inmigrate`...), asked on the test's
/// own monitor; nothing if no QEMU answers there.
#[must_use]
pub fn guest_state(monitor: &Path) -> Option<String> {
    let answer = ask(monitor, "query-status", json!({}))?;
    answer.get("status").and_then(Value::as_str).map(str::to_owned)
}

/// One QMP command on the test's own monitor.
#[must_use]
pub fn ask(monitor: &Path, command: &str, arguments: Value) -> Option<Value> {
    let deadline = Instant::now() + ONE_LOOK;
    Qmp::connect(monitor, deadline).ok()?.execute(command, arguments, deadline).ok()
}

/// Number of mappings of a process whose writes somebody follows (`uw`: userfaultfd write-protect).
#[must_use]
pub fn tracked_mappings(pid: u32) -> usize {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.filter(|flags| flags.split_whitespace().any(|flag| flag == "uw")).count()
}

/// The file of a QEMU's memory that pageferry has made, of which there is one of this size.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn memory_file(pid: u32, bytes: u64) -> File {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("QEMU runs")
        .flatten()
        .map(|fd| fd.path())
        .filter(|fd| {
            fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().contains("memfd:pageferry-"))
        })
        .filter_map(|fd| File::options().read(true).write(true).open(fd).ok())
        .find(|file| file.metadata().is_ok_and(|of| of.len() == bytes))
        .expect("a memory file of that size")
}

/// Number of connections to a local socket, also those that nobody has accepted yet.
#[must_use]
pub fn connections(socket: &Path) -> usize {
    let (table, path) =
        (fs::read_to_string("/proc/net/unix").unwrap_or_default(), socket.to_string_lossy());
    let mut count = 0;
    for line in table.lines() {
        // Number, references, protocol, flags (a listener's have one of their own), type, state,
        // inode, path.
        let fields: Vec<_> = line.split_whitespace().collect();
        if let [_, _, _, flags, _, _, _, at] = fields[..] {
            count += usize::from(at == path && flags != "00010000");
        }
    }
    count
}

/// Number of open descriptors.
#[must_use]
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The processes whose command line holds all of these texts.
#[must_use]
pub fn processes_with(texts: &[&str]) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && alive(*pid))
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            texts.iter().all(|text| line.contains(text))
        })
        .collect()
}

/// Ends every process whose command line holds this text, and waits for it.
pub fn sweep(text: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let left = processes_with(&[text]);
        if left.is_empty() || Instant::now() >= deadline {
            return;
        }
        left.iter().for_each(|pid| signal(*pid, Signal::KILL));
        std::thread::sleep(LOOK_EVERY);
    }
}
