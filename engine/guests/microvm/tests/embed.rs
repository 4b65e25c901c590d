//! The example of a monitor of its own that moves its guest: it is built and run.

use pageferry_microvm::machine::open_kvm;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

/// For cargo to build it, where nothing has yet.
const BUILD_MAX: Duration = Duration::from_secs(900);
/// For a guest of 64 pages to be moved, under an emulator of KVM too.
const MOVE_MAX: Duration = Duration::from_secs(120);

/// Whether there is a KVM to test with; says so loudly if not.
fn kvm_is_here(test: &str) -> bool {
    let Err(e) = open_kvm() else { return true };
    let line = format!("NOT RUN: {test}: {}", e.chain());
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("PAGEFERRY_NOT_RUN") {
        let file = std::fs::File::options().append(true).create(true).open(path);
        let _ = file.and_then(|mut file| writeln!(file, "{line}"));
    }
    false
}

/// What it says, if it ends in time.
fn ended(command: &mut Command, within: Duration) -> Output {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("it starts");
    let pid = rustix::process::Pid::from_child(&child);
    let (sender, end) = channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = end.recv_timeout(within) else {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        panic!("{command:?} has not ended within {} s", within.as_secs());
    };
    output.expect("its output can be read")
}

/// Builds the example as `scripts/test` builds everything, so that nothing is built twice.
fn build() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "build",
        "--quiet",
        "--locked",
        "--workspace",
        "--features",
        "pageferry-engine/vm-memory",
    ]);
    command.args(["--example", "embed"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    command
}

/// Where cargo puts it: beside the directory of this test.
fn example() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    test.parent().and_then(Path::parent).expect("target/PROFILE/deps").join("examples/embed")
}

#[test]
fn the_example_of_an_embedder_moves_its_guest_and_its_counters_go_on() {
    if !kvm_is_here("the_example_of_an_embedder_moves_its_guest_and_its_counters_go_on") {
        return;
    }
    let built = ended(&mut build(), BUILD_MAX);
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let moved = ended(&mut Command::new(example()), MOVE_MAX);
    let (said, failed) =
        (String::from_utf8_lossy(&moved.stdout), String::from_utf8_lossy(&moved.stderr));
    assert!(moved.status.success(), "{said}{failed}");
    assert!(
        said.contains("outcome: Completed") && said.contains("the first counter stopped at"),
        "{said}"
    );
}
