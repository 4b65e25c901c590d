//! Nothing outlives a run, however it ends: a process of its own waits for the run's death, ends
//! whatever it had started, and takes away memory files, directories and namespaces.
//!
//! ```text
//!   pageferry-bench --pipe--> pageferry-bench sweeper     reads to the end of the pipe, which a SIGKILL closes, too
//!        | PAGEFERRY_BENCH_RUN=PID in the environment
//!        +-- pageferry receive -- QEMU, guardian ...      all have it, whoever their parents are
//! ```
//!
//! QEMUs and supervisors are in process groups of their own, so that Ctrl-C is the run's alone, and
//! a death signal (PR_SET_PDEATHSIG) would follow the thread that started them and stop at the
//! first of them. So they are known by their environment.

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What every process of a run has in its environment: the run's process id.
const RUN_VARIABLE: &str = "PAGEFERRY_BENCH_RUN";
/// For all that a run started to be gone. A QEMU of a terabyte takes long to free it.
const SWEEP_MAX: Duration = Duration::from_secs(60);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// As many looks in a row must find nothing: a process that executes a program has no environment
/// for an instant.
const EMPTY_LOOKS: u32 = 5;

/// Has this process, and so all that it will start, known by its environment. Executes itself once,
/// since that is the one way to change it before there are threads.
pub fn mark() -> Result<()> {
    let id = std::process::id().to_string();
    if std::env::var(RUN_VARIABLE).is_ok_and(|run| run == id) {
        return Ok(());
    }
    let mut words = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    Err(command.args(words).env(RUN_VARIABLE, id).exec())
        .context("starting anew with a marked environment")
}

/// Starts the sweeper of this run.
pub fn start() -> Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("pageferry-bench")
        .args(["sweeper", &std::process::id().to_string()])
        // It is no part of what is swept.
        .env_remove(RUN_VARIABLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting the process that clears up after this one")?;
    // Closed by the end of this process and by nothing else: whoever has the mark then is ended.
    std::mem::forget(child.stdin.take().context("its input was piped")?);
    Ok(())
}

/// The sweeper's whole life: waits for the end of the run with this process id, and clears up after
/// it.
pub fn main(run: u32) -> Result<()> {
    // Nothing is ever written.
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    sweep(run)
}

fn sweep(run: u32) -> Result<()> {
    let deadline = Instant::now() + SWEEP_MAX;
    let processes = end_processes(run, deadline);
    for path in left_behind(run) {
        let _ = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
    }
    if crate::shaped::made_by(run) {
        crate::shaped::sweep()?;
    }
    processes
}

/// Ends everything with the run's mark. Again and again, since one may start another meanwhile.
fn end_processes(run: u32, deadline: Instant) -> Result<()> {
    let mut empty_looks = 0;
    while empty_looks < EMPTY_LOOKS {
        let left = processes_of(run);
        empty_looks = if left.is_empty() { empty_looks + 1 } else { 0 };
        anyhow::ensure!(
            left.is_empty() || Instant::now() < deadline,
            "processes do not end: {left:?}"
        );
        for pid in left {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

fn processes_of(run: u32) -> Vec<Pid> {
    let mark = format!("{RUN_VARIABLE}={run}");
    let has_it = |pid: &Pid| {
        // Of a process that has ended, and waits to be reaped, there is none.
        let environment =
            std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|word| word == mark.as_bytes())
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| pid.as_raw_nonzero().get() != std::process::id().cast_signed())
        .filter(has_it)
        .collect()
}

/// Directories and memory files with the run's name, which is followed by a dash or nothing.
fn left_behind(run: u32) -> Vec<PathBuf> {
    let names = [format!("pageferry-bench-{run}"), format!("pageferry-bench-sweep-{run}")];
    let of_run = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        names.iter().any(|start| {
            name.strip_prefix(start.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        })
    };
    [std::env::temp_dir(), "/dev/shm".into()]
        .iter()
        .filter_map(|directory| std::fs::read_dir(directory).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|path| of_run(path))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No process has it.
    const RUN: u32 = 4_200_000_000;

    #[test]
    fn what_a_run_started_and_left_is_gone_and_nothing_else() {
        let start = |run: u32| {
            Command::new("sleep")
                .arg("600")
                .env(RUN_VARIABLE, run.to_string())
                .process_group(0)
                .spawn()
                .unwrap()
        };
        let (mut ours, mut others) = (start(RUN), start(RUN - 1));
        let file = |run: u32| std::env::temp_dir().join(format!("pageferry-bench-{run}-x"));
        std::fs::create_dir(file(RUN)).unwrap();
        std::fs::write(file(RUN).join("in it"), "").unwrap();
        std::fs::write(file(RUN - 1), "").unwrap();
        sweep(RUN).unwrap();
        assert!(!ours.wait().unwrap().success());
        assert!(others.try_wait().unwrap().is_none(), "another run's goes on");
        assert!(!file(RUN).exists() && file(RUN - 1).exists());
        others.kill().unwrap();
        others.wait().unwrap();
        std::fs::remove_file(file(RUN - 1)).unwrap();
    }
}
