//! What cannot work is refused: exit status 2, one clear line with the fix, and nothing is touched.
//! What was tried and given up ends with 1, and the guest runs on.

use pageferry::supervisor::api::State;
use pageferry_qemu::qmp::Qmp;
use pageferry_tests::look::{self, tracked_mappings};
use pageferry_tests::stage::{BARE, Ended, Stage, monitor_options};
use pageferry_tests::{SOON, eventually, not_run};
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, Role, Token};
use rustix::process::geteuid;
use serde_json::json;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// Where nobody answers (RFC 5737).
const ELSEWHERE: &str = "192.0.2.1:7600";

/// Refused, in one line of pageferry's that holds all these texts.
#[track_caller]
fn refused(ended: &Ended, texts: &[&str]) {
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    let progress = ["going by ", "setting up", "round ", "switching over"];
    let lines: Vec<&str> = ended
        .stderr
        .lines()
        .filter_map(|line| line.strip_prefix("pageferry: "))
        .filter(|line| !progress.iter().any(|p| line.starts_with(p)))
        .collect();
    assert_eq!(lines.len(), 1, "one line: {}", ended.stderr);
    for text in texts {
        assert!(lines[0].contains(text), "{text:?} is not in {:?}", lines[0]);
    }
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
}

/// Tries to move the guest of a stage, which must be refused with these words and leave it alone.
#[track_caller]
fn move_refused(stage: &Stage, to: SocketAddr, more: &[&str], texts: &[&str]) {
    refused(&stage.migrate("src", to, more).end(SOON), texts);
    assert!(
        look::guest_state(&stage.path("src.look")).as_deref() == Some("running"),
        "the guest runs on"
    );
}

#[test]
fn an_unknown_name() {
    let stage = Stage::new();
    for arguments in
        [&["status", "nobody"][..], &["cancel", "nobody"], &["settle", "nobody", "--run"]]
    {
        refused(&stage.done(arguments), &["no guest named nobody", "pageferry list"]);
    }
    refused(&stage.done(&["migrate", "nobody", "--to", "127.0.0.1:1"]), &["no guest named nobody"]);
    refused(
        &stage.done(&["attach", "nobody"]),
        &["no running guest named nobody", "--pid", "--qmp"],
    );
    refused(&stage.done(&["status", "../etc"]), &["cannot be a guest's name", "letters"]);
}

#[test]
fn a_downtime_of_nothing() {
    let stage = Stage::new();
    for time in ["0", "0ms"] {
        let ended = stage.done(&["migrate", "src", "--to", "127.0.0.1:1", "--downtime-max", time]);
        assert_eq!(ended.status, Some(2), "{}", ended.stderr);
        assert!(
            ended.stderr.contains("--downtime-max") && !ended.stderr.contains("panicked"),
            "{}",
            ended.stderr
        );
    }
}

#[test]
fn a_name_in_use() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    let qemu = source.qemu();
    refused(
        &stage.done(&["run", "src", "--", "qemu-system-x86_64"]),
        &["src is supervised already", "another name"],
    );
    refused(
        &stage.done(&["receive", "src", "--listen", "127.0.0.1:0", "--", "qemu-system-x86_64"]),
        &["src is supervised already"],
    );
    refused(&stage.done(&["attach", "src"]), &["src is supervised already"]);
    assert_eq!(source.qemu(), qemu, "the one that is there is not disturbed");
    assert!(source.guest_runs());
}

#[test]
fn a_peer_that_cannot_be_reached_is_silent_or_is_no_receiver() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    move_refused(&stage, nobody, &[], &["connecting to", "pageferry receive"]);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    move_refused(&stage, silent.local_addr().unwrap(), &[], &["Welcome"]);
    for garbage in
        [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0xff; 64], &[0; 64], &[4, 0, 0, 0, 9, 9, 9, 9]]
    {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let talking = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(garbage).unwrap();
            // Until the other side has had enough.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        move_refused(&stage, address, &[], &[]);
        talking.join().unwrap();
    }
    refused(&stage.done(&["migrate", "src", "--to", "no-port"]), &["not an address", "HOST:PORT"]);
    assert_eq!(tracked_mappings(source.qemu()), 0);
}

#[test]
fn garbage_on_the_receivers_port_does_not_end_its_wait() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    let destination = stage.receive("dst", BARE, "");
    let (address, qemu) = (destination.address(), destination.qemu());
    let greeting = Preamble { role: Role::Control, token: Token::default() }.encode();
    let stray_lane = Preamble { role: Role::Lane(0), token: Token([9; 16]) }.encode();
    let with = |tail: &[u8]| [&greeting[..], tail].concat();
    for garbage in [
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        vec![],
        greeting[..PREAMBLE_BYTES / 2].to_vec(),
        with(&[0xff; 4]),
        with(&[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        with(&[0, 0, 0, 0]),
        stray_lane.to_vec(),
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&garbage).unwrap();
        // It may have hung up already.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        stream.set_read_timeout(Some(SOON)).unwrap();
        // It hangs up; with a reset where it did not read all of it.
        let _ = stream.read_to_end(&mut answer);
    }
    // One that says nothing and stays.
    let _silent = TcpStream::connect(address).unwrap();
    assert_eq!(destination.qemu(), qemu, "its QEMU is the same");
    let ended = stage.migrate("src", address, &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    destination.wait_guest_runs();
    drop(source);
}

#[test]
fn another_protocol_version_is_named_on_both_sides() {
    let stage = Stage::new();
    let destination = stage.receive("dst", BARE, "");
    let mut greeting = Preamble { role: Role::Control, token: Token::default() }.encode();
    greeting[8..10].copy_from_slice(&9u16.to_le_bytes());
    let mut stream = TcpStream::connect(destination.address()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(&greeting).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.contains("protocol version 9")
            && answer.contains("update pageferry at the destination"),
        "{answer}"
    );
    destination.words.wait("protocol version 9", SOON);
    destination.wait_state(State::Waiting);
}

#[test]
fn a_destination_that_differs() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let q35 = "qemu-system-x86_64 -accel tcg -nodefaults -display none -machine q35";
    let differing = [
        (format!("{q35} -m 96"), ["pageferry.ram of 64 MiB", "pageferry.ram of 96 MiB"]),
        (BARE.replace("q35", "pc"), ["machine type pc-q35", "pc-i440fx"]),
        (format!("{q35} -m 64 -smp 2"), ["a vCPU count of 1", "this receiver 2"]),
        (
            format!("{q35},memory-backend=own -m 64 -object memory-backend-ram,id=own,size=64M"),
            ["pageferry.ram of 64 MiB", "own of 64 MiB"],
        ),
    ];
    for (index, (qemu, texts)) in differing.iter().enumerate() {
        let destination = stage.receive(&format!("dst{index}"), qemu, "");
        let before = destination.qemu();
        move_refused(&stage, destination.address(), &[], &[texts[0], texts[1], "same options"]);
        destination.wait_state(State::Waiting);
        assert_eq!(destination.qemu(), before, "its QEMU was not touched");
    }
    assert_eq!(tracked_mappings(source.qemu()), 0);
    // It still moves to where it fits.
    let destination = stage.receive("dst", BARE, "");
    assert_eq!(stage.migrate("src", destination.address(), &[]).end(SOON).status, Some(0));
}

#[test]
fn a_guest_larger_than_this_host_moves_if_it_touched_little() {
    let stage = Stage::new();
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total_mib = total.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10;
    let qemu = format!("{BARE} -m {}", total_mib + 4096);
    let source = stage.run("src", &qemu, "");
    source.wait_guest_runs();
    let destination = stage.receive("dst", &qemu, "");
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    destination.wait_guest_runs();
}

#[test]
fn no_room_for_the_memory() {
    const NAME: &str = "no_room_for_the_memory";
    if !geteuid().is_root() {
        return not_run(NAME, "it needs root, to show the receiver another /proc/meminfo");
    }
    let there = Stage::new();
    let meminfo = there.path("meminfo");
    std::fs::write(&meminfo, "MemTotal: 65536 kB\nMemAvailable: 16 kB\n").unwrap();
    let there = there.behind(&format!("mount --bind {} /proc/meminfo", meminfo.display()));
    let destination = there.receive("dst", BARE, "");
    let here = Stage::new();
    let source = here.run("src", BARE, "");
    source.wait_guest_runs();
    move_refused(&here, destination.address(), &[], &["no room for the guest", "0 MiB available"]);
    assert_eq!(tracked_mappings(source.qemu()), 0);
    destination.wait_state(State::Waiting);
}

#[test]
fn a_guest_that_is_moved_already_is_not_moved_twice() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "rounds");
    let other = stage.run("other", BARE, "");
    let destination = stage.receive("dst", BARE, "");
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    let again = stage.migrate("src", destination.address(), &[]).end(SOON);
    refused(&again, &["under way already", "pageferry cancel"]);
    // The receiver is busy in its turn.
    let busy = stage.migrate("other", destination.address(), &[]).end(SOON);
    refused(&busy, &["another migration to this receiver is under way", "try again"]);
    let waiting = stage.done(&["migrate", "dst", "--to", "127.0.0.1:1"]);
    refused(&waiting, &["receiver that has no guest yet"]);
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    // And it stays busy: it has its guest.
    let full = stage.migrate("other", destination.address(), &[]).end(SOON);
    refused(&full, &["taken in its guest already", "pageferry receive"]);
    assert!(other.guest_runs());
}

#[test]
fn a_migration_of_qemus_own_stands_against_it() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let destination = stage.receive("dst", BARE, "");
    // Into a socket that nobody reads.
    let path = stage.path("own");
    let _listener = UnixListener::bind(&path).unwrap();
    let uri = json!({ "uri": format!("unix:{}", path.display()) });
    look::ask(&source.monitor, "migrate-set-parameters", json!({ "max-bandwidth": 4096 }))
        .expect("slow");
    look::ask(&source.monitor, "migrate", uri).expect("QEMU takes the command");
    eventually("QEMU's own migration is active", SOON, || {
        let status = look::ask(&source.monitor, "query-migrate", json!({}))?;
        (status["status"] == "active").then_some(())
    });
    move_refused(&stage, destination.address(), &[], &["migration of its own", "migrate_cancel"]);
    let _ = look::ask(&source.monitor, "migrate_cancel", json!({}));
    eventually("QEMU's own migration has ended", SOON, || {
        let status = look::ask(&source.monitor, "query-migrate", json!({}))?;
        (status["status"] == "cancelled").then_some(())
    });
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

#[test]
fn off_loopback_needs_insecure() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let words = ["neither encrypted nor authenticated", "--insecure"];
    move_refused(&stage, ELSEWHERE.parse().unwrap(), &[], &words);
    let receive = ["receive", "dst", "--listen", ELSEWHERE, "--", "qemu-system-x86_64", "-m", "64"];
    refused(&stage.done(&receive), &words);
    assert!(!stage.path("dst.lock").exists(), "nothing was touched");
}

#[test]
fn options_that_make_no_sense() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let to = "127.0.0.1:1".parse().unwrap();
    for (option, value, fix) in [
        ("--downtime-max", "10", "10ms"),
        ("--downtime-max", "soon", "10ms"),
        ("--downtime-max", "-1ms", ""),
        ("--bandwidth-max", "10", "10Gbit"),
        ("--bandwidth-max", "0GB", "10Gbit"),
        ("--bandwidth-max", "fast", "10Gbit"),
        ("--lanes", "0", "1..=64"),
        ("--lanes", "65", "1..=64"),
        ("--rounds-max", "0", ""),
        ("--when-stuck", "pray", "switchover"),
        ("--transport", "pigeon", "tcp"),
        ("--rdma-port", "0", "1..=255"),
        ("--rdma-gid-index", "256", "0..=255"),
    ] {
        let ended = stage.migrate("src", to, &[option, value]).end(SOON);
        assert_eq!(ended.status, Some(2), "{option} {value}: {}", ended.stderr);
        assert!(ended.stderr.contains(fix), "{option} {value}: {}", ended.stderr);
    }
    assert!(source.guest_runs());
}

#[test]
fn qemu_commands_that_cannot_be_moved() {
    let stage = Stage::new();
    for (command, texts) in [
        ("qemu-system-x86_64 -daemonize", ["background", ""]),
        ("qemu-system-x86_64 -incoming defer", ["pageferry receive", ""]),
        (
            "qemu-system-x86_64 -object memory-backend-file,id=x,size=64M,mem-path=/dev/shm/x",
            ["share=on", ""],
        ),
        ("qemu-system-x86_64 -m lots", ["not a size", "512M"]),
        ("no-such-qemu -m 64", ["no-such-qemu", "PATH"]),
    ] {
        let mut words = vec!["run", "vm", "--"];
        words.extend(command.split(' '));
        refused(&stage.done(&words), &texts);
    }
    // QEMU's own complaint is passed on by its own line.
    let ended = stage.done(&["run", "vm", "--", "qemu-system-x86_64", "-machine", "abacus"]);
    refused(&ended, &["ended while it started"]);
    assert!(ended.stderr.contains("abacus"), "{}", ended.stderr);
    assert!(
        look::processes_with(&["qemu-system", &stage.path("vm").display().to_string()]).is_empty()
    );
}

/// A QEMU that somebody else started.
struct Foreign {
    child: Child,
    qmp: PathBuf,
    look: PathBuf,
}

impl Foreign {
    fn start(stage: &Stage, options: &str) -> Self {
        let (qmp, look) = (stage.path("foreign.qmp"), stage.path("foreign.look"));
        let socket = format!("unix:{},server=on,wait=off", qmp.display());
        let mut command = Command::new("qemu-system-x86_64");
        command.args("-accel tcg -nodefaults -display none".split(' ')).args(options.split(' '));
        command.args(["-qmp", &socket]).args(monitor_options(&look));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("QEMU starts: run scripts/setup");
        let foreign = Self { child, qmp, look };
        eventually("QEMU runs", SOON, || foreign.runs().then_some(()));
        foreign
    }

    fn runs(&self) -> bool {
        look::guest_state(&self.look).as_deref() == Some("running")
    }

    fn attach(&self, stage: &Stage) -> Ended {
        let (pid, qmp) = (self.child.id().to_string(), self.qmp.display().to_string());
        stage.done(&["attach", "foreign", "--pid", &pid, "--qmp", &qmp])
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn attach_to_memory_that_is_not_shared_names_the_option_that_makes_it_so() {
    let stage = Stage::new();
    for options in [
        "-machine q35 -m 64",
        "-machine q35,memory-backend=m -m 64 -object memory-backend-ram,id=m,size=64M",
        "-machine q35,memory-backend=m -m 64 -object memory-backend-memfd,id=m,size=64M,share=on",
    ] {
        let foreign = Foreign::start(&stage, options);
        refused(&foreign.attach(&stage), &["memory-backend-file", "share=on"]);
        assert!(foreign.runs(), "{options}");
    }
}

#[test]
fn attach_takes_up_a_qemu_that_somebody_else_started_and_moves_it() {
    let stage = Stage::new();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let options = |file: &str| {
        format!(
            "-machine q35,memory-backend=m -m 64 -object memory-backend-file,id=m,size=64M,mem-path={},share=on",
            memory.path().join(file).display()
        )
    };
    let foreign = Foreign::start(&stage, &options("1"));
    let (pid, qmp) = (foreign.child.id().to_string(), foreign.qmp.display().to_string());
    let mut source = stage.attach("foreign", &["--pid", &pid, "--qmp", &qmp]);
    let destination = stage.receive(
        "dst",
        &format!("qemu-system-x86_64 -accel tcg -nodefaults -display none {}", options("2")),
        "",
    );
    let ended = stage.migrate("foreign", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    destination.wait_guest_runs();
    assert_eq!(source.end(), Some(0));
}

#[test]
fn attach_to_what_is_no_qemu() {
    let stage = Stage::new();
    let foreign = Foreign::start(&stage, "-machine q35 -m 64");
    let qmp = foreign.qmp.display().to_string();
    let nowhere = stage.path("nothing").display().to_string();
    let attach = |pid: &str, qmp: &str| stage.done(&["attach", "x", "--pid", pid, "--qmp", qmp]);
    // The largest pid that Linux can ever give is 2^22.
    refused(&attach("4194305", &qmp), &["no process 4194305", "--pid"]);
    refused(&attach("0", &qmp), &["not a process id"]);
    refused(&attach(&foreign.child.id().to_string(), &nowhere), &[&nowhere]);
    let mut sleeper = Command::new("sleep").arg("600").spawn().unwrap();
    let another = attach(&sleeper.id().to_string(), &qmp);
    let _ = sleeper.kill();
    let _ = sleeper.wait();
    refused(&another, &[]);
    assert!(foreign.runs());
}

#[test]
fn attach_without_the_permission_to_trace() {
    const NAME: &str = "attach_without_the_permission_to_trace";
    if !geteuid().is_root() {
        return not_run(NAME, "it needs root, to start a QEMU and try to take it up as nobody");
    }
    if Command::new("setpriv").arg("--version").stdout(Stdio::null()).status().is_err() {
        return not_run(NAME, "setpriv (util-linux) is not installed");
    }
    let stage = Stage::new();
    let memory = stage.path("ram");
    let foreign = Foreign::start(
        &stage,
        &format!(
            "-machine q35,memory-backend=m -m 64 -object memory-backend-file,id=m,size=64M,mem-path={},share=on",
            memory.display()
        ),
    );
    // Nobody may reach the socket and the binary, and still not the process.
    let open = |path: &Path, mode: &str| {
        assert!(Command::new("chmod").arg(mode).arg(path).status().unwrap().success())
    };
    let public = tempfile::tempdir().unwrap();
    let binary = public.path().join("pageferry");
    std::fs::copy(pageferry_tests::binary(), &binary).unwrap();
    let runtime = public.path().join("run");
    for (path, mode) in
        [(public.path(), "777"), (&binary, "755"), (stage.path("").as_path(), "711")]
    {
        open(path, mode);
    }
    open(&foreign.qmp, "777");
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .arg(&binary)
        .args(["attach", "x", "--pid", &foreign.child.id().to_string(), "--qmp"])
        .arg(&foreign.qmp)
        .env("PAGEFERRY_RUNTIME_DIR", &runtime)
        .output()
        .unwrap();
    let ended = Ended {
        status: output.status.code(),
        stdout: String::new(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    };
    refused(&ended, &["root"]);
    assert!(foreign.runs());
}

#[test]
fn a_runtime_directory_that_cannot_serve() {
    let stage = Stage::new();
    let run = |directory: &Path| {
        let output = stage
            .command(&["run", "vm", "--"])
            .args(BARE.split(' '))
            .env("PAGEFERRY_RUNTIME_DIR", directory)
            .output()
            .expect("the binary starts");
        let stderr = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        Ended { status: output.status.code(), stdout: String::new(), stderr }
    };
    refused(&run(Path::new("")), &["PAGEFERRY_RUNTIME_DIR is set and empty"]);
    let open = stage.path("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
    refused(&run(&open), &["not yours alone", "mode 755", "chmod 700"]);
    assert_eq!(std::fs::read_dir(&open).unwrap().count(), 0, "nothing was made in it");
    refused(
        &run(&stage.path(&"long".repeat(25))),
        &["is too long", "107", "PAGEFERRY_RUNTIME_DIR"],
    );
}

#[test]
fn a_runtime_directory_that_is_full() {
    if !geteuid().is_root() {
        not_run("a_runtime_directory_that_is_full", "only root can mount a small file system");
        return;
    }
    let outer = Stage::new();
    let small = outer.path("small");
    std::fs::create_dir(&small).unwrap();
    // No room for one more file: tmpfs counts the directory, too.
    let mount = format!("mount -t tmpfs -o mode=700,nr_inodes=1 none {}", small.display());
    let stage = Stage::new().behind(&mount);
    let mut command = stage.command(&["run", "vm", "--"]);
    let output = command
        .args(BARE.split(' '))
        .env("PAGEFERRY_RUNTIME_DIR", &small)
        .output()
        .expect("the binary starts");
    let stderr = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    let ended = Ended { status: output.status.code(), stdout: String::new(), stderr };
    refused(&ended, &["No space left", "its file system is full", "PAGEFERRY_RUNTIME_DIR"]);
}

#[test]
fn sockets_and_files_are_their_owners_alone_whatever_the_umask() {
    let stage = Stage::new().behind("umask 0");
    let source = stage.run("src", BARE, "");
    let destination = stage.receive("dst", BARE, "");
    for name in ["src", "dst"] {
        for kind in ["lock", "sock", "qmp", "json"] {
            let file = stage.path(&format!("{name}.{kind}"));
            let mode = std::fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", file.display());
        }
    }
    // QEMU's own is the user's affair.
    let status = std::fs::read_to_string(format!("/proc/{}/status", source.qemu())).unwrap();
    assert!(status.lines().any(|line| line == "Umask:\t0000"), "{status}");
    let moving = stage.migrate("src", destination.address(), &[]);
    assert_eq!(moving.end(SOON).status, Some(0));
}

#[test]
fn a_receiver_short_of_descriptors() {
    let stage = Stage::new().behind("ulimit -n 60");
    refused(
        &stage.done(&["receive", "dst", "--listen", "127.0.0.1:0", "--", "qemu-system-x86_64"]),
        &["too few descriptors", "may have 60", "ulimit -n 1024"],
    );
}

#[test]
fn a_receiver_short_of_descriptors_for_the_lanes_tells_the_source() {
    let source_stage = Stage::new();
    let source = source_stage.run("src", BARE, "");
    source.wait_guest_runs();
    // Enough to wait for a guest, and not for 64 lanes.
    let stage = Stage::new().behind("ulimit -n 120");
    let destination = stage.receive("dst", BARE, "");
    move_refused(
        &source_stage,
        destination.address(),
        &["--lanes", "64"],
        &["the destination refuses", "too few descriptors", "64 lanes", "ulimit -n"],
    );
    // It waits on, for one that wants less.
    let moving = source_stage.migrate("src", destination.address(), &["--lanes", "2"]);
    assert_eq!(moving.end(SOON).status, Some(0));
}

/// A program that forbids io_uring to the command behind it, as a container's seccomp filter does.
const WITHOUT_IO_URING: &str = r"
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int count, char **words) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof code / sizeof code[0], code };
    if (count < 2 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return 99;
    execvp(words[1], words + 1);
    return 98;
}
";

#[test]
fn a_receiver_that_may_not_use_io_uring() {
    let source_stage = Stage::new();
    let source = source_stage.run("src", BARE, "");
    source.wait_guest_runs();
    let (text, filter) = (source_stage.path("filter.c"), source_stage.path("filter"));
    std::fs::write(&text, WITHOUT_IO_URING).unwrap();
    assert!(Command::new("cc").arg("-o").args([&filter, &text]).status().unwrap().success());
    let binary = pageferry_tests::binary();
    let stage =
        Stage::new().behind(&format!("exec {} {} \"$@\"", filter.display(), binary.display()));
    let receive = [
        "receive",
        "dst",
        "--listen",
        "127.0.0.1:0",
        "--transport",
        "tcp",
        "--",
        "qemu-system-x86_64",
    ];
    refused(&stage.done(&receive), &["io_uring is forbidden", "seccomp", "io_uring_setup"]);
    // One that may get a guest by RDMA waits, says so, and tells a source that cannot.
    let destination = stage.receive("dst", BARE, "");
    assert!(destination.words.text().contains("by RDMA alone: io_uring is forbidden"));
    let texts = ["the destination refuses", "io_uring is forbidden", "seccomp"];
    move_refused(&source_stage, destination.address(), &[], &texts);
}

#[test]
fn a_guest_that_has_moved_is_not_said_to_be_here() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    let destination = stage.receive("dst", BARE, "");
    source.wait_guest_runs();
    assert_eq!(stage.migrate("src", destination.address(), &[]).end(SOON).status, Some(0));
    // What is left of it is taken away a moment later.
    while let Some(status) = source.status() {
        assert_eq!(status.state, State::Moved);
    }
}

/// The least that a vhost-user back end must answer for QEMU to take it: one message of the
/// protocol (QEMU, docs/interop/vhost-user.rst). Its only feature is VIRTIO_F_VERSION_1.
fn answer_vhost_user(peer: &mut UnixStream) -> std::io::Result<()> {
    let mut header = [0; 12];
    peer.read_exact(&mut header)?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let (request, flags, bytes) = (word(0), word(4), word(8));
    std::io::copy(&mut Read::take(&mut *peer, bytes.into()), &mut std::io::sink())?;
    let value: u64 = match request {
        1 => 1 << 32,             // GET_FEATURES
        11 | 15 | 17 => 0,        // GET_VRING_BASE, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM
        _ if flags & 8 != 0 => 0, // an answer is asked for
        _ => return Ok(()),
    };
    // Version 1, and that it is an answer.
    let mut answer = [request, 1 | 4, 8].map(u32::to_le_bytes).concat();
    answer.extend(value.to_le_bytes());
    peer.write_all(&answer)
}

#[test]
fn devices_that_write_memory_from_outside_are_refused() {
    let stage = Stage::new();
    let path = stage.path("vhost");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for mut peer in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || while answer_vhost_user(&mut peer).is_ok() {});
        }
    });
    let qemu = format!(
        "{BARE} -chardev socket,id=vu,path={} -netdev vhost-user,id=net0,chardev=vu",
        path.display()
    );
    let supervisor = stage.run("src", &qemu, "");
    supervisor.wait_guest_runs();
    let destination = stage.receive("dst", BARE, "");
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    refused(
        &ended,
        &["vhost-user", "outside QEMU's process", "Unplug", "--allow-device vhost-user"],
    );
    assert!(supervisor.guest_runs());
}

#[test]
fn cancel_ends_a_migration_under_way_and_the_guest_runs_on() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "rounds");
    let destination = stage.receive("dst", BARE, "");
    refused(&stage.done(&["cancel", "src"]), &["no migration is under way"]);
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    let cancelled = stage.done(&["cancel", "src"]);
    assert_eq!(cancelled.status, Some(0), "{}", cancelled.stderr);
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("cancelled by the operator"), "{}", ended.stderr);
    assert!(ended.stdout.contains("\"aborted\""), "{}", ended.stdout);
    assert!(source.guest_runs());
    assert_eq!(tracked_mappings(source.qemu()), 0);
    destination.wait_state(State::Waiting);
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

#[test]
fn a_signal_to_migrate_cancels_too() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "rounds");
    let destination = stage.receive("dst", BARE, "");
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    look::signal(moving.pid(), rustix::process::Signal::INT);
    moving.stderr.wait("cancelling", SOON);
    stage.release();
    assert_eq!(moving.end(SOON).status, Some(1));
    assert!(source.guest_runs());
}

#[test]
fn a_downtime_below_the_floor_is_given_up_with_a_clear_reason() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let destination = stage.receive("dst", BARE, "");
    let ended = stage.migrate("src", destination.address(), &["--downtime-max", "0.5ms"]).end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    for text in ["cannot be reached", "--downtime-max"] {
        assert!(ended.stderr.contains(text), "{}", ended.stderr);
    }
    assert!(source.guest_runs());
    assert_eq!(tracked_mappings(source.qemu()), 0);
}

#[test]
fn the_operator_may_vouch_for_a_device_by_its_type() {
    let stage = Stage::new();
    // A 9p share that nobody has mounted.
    let share = stage.path("share");
    std::fs::create_dir(&share).unwrap();
    let qemu = format!(
        "{BARE} -fsdev local,id=fs,path={},security_model=none -device virtio-9p-pci,id=share,fsdev=fs,mount_tag=t",
        share.display()
    );
    let source = stage.run("src", &qemu, "");
    source.wait_guest_runs();
    let destination = stage.receive("dst", &qemu, "");
    let words = [
        "virtio-9p-pci (share)",
        "QEMU does not wait for its reads",
        "--allow-device virtio-9p-pci",
    ];
    move_refused(&stage, destination.address(), &[], &words);
    move_refused(&stage, destination.address(), &["--allow-device", "virtio-9p"], &words);
    assert_eq!(tracked_mappings(source.qemu()), 0);
    let ended =
        stage.migrate("src", destination.address(), &["--allow-device", "virtio-9p-pci"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

#[test]
fn a_device_that_comes_and_goes_in_the_rounds_aborts_before_the_pause() {
    let stage = Stage::new();
    let qemu = format!("{BARE} -device qemu-xhci,id=usb");
    let source = stage.run("src", &qemu, "rounds");
    source.wait_guest_runs();
    let destination = stage.receive("dst", &qemu, "");
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    // Plugged out at once, as no driver of the guest has a say: the list of devices is what it was.
    let deadline = Instant::now() + SOON;
    let mut qmp = Qmp::connect(&source.monitor, deadline).unwrap();
    let stick = json!({ "driver": "usb-tablet", "id": "stick", "bus": "usb.0" });
    qmp.execute("device_add", stick, deadline).unwrap();
    qmp.execute("device_del", json!({ "id": "stick" }), deadline).unwrap();
    qmp.wait_event(deadline, |event| {
        event.name == "DEVICE_DELETED" && event.data["device"] == "stick"
    })
    .unwrap();
    drop(qmp);
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("stick was unplugged"), "{}", ended.stderr);
    assert!(source.guest_runs());
    // And it moves when nothing is plugged.
    destination.wait_state(State::Waiting);
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

#[test]
fn a_device_that_came_in_the_rounds_aborts_before_the_pause() {
    let stage = Stage::new();
    let qemu = format!("{BARE} -device qemu-xhci,id=usb");
    let source = stage.run("src", &qemu, "rounds");
    source.wait_guest_runs();
    let destination = stage.receive("dst", &qemu, "");
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    let stick = json!({ "driver": "usb-tablet", "id": "stick", "bus": "usb.0" });
    look::ask(&source.monitor, "device_add", stick).expect("QEMU takes it");
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("usb-tablet (stick) came"), "{}", ended.stderr);
    assert!(source.guest_runs());
}

#[test]
fn block_jobs_and_exports_are_refused_with_what_ends_them() {
    let stage = Stage::new();
    let disk = |name: &str| format!("-blockdev driver=null-co,read-zeroes=on,node-name={name}");
    let qemu = format!("{BARE} {} {}", disk("a"), disk("b"));
    let source = stage.run("src", &qemu, "");
    source.wait_guest_runs();
    let destination = stage.receive("dst", &qemu, "");
    let do_it = |command, arguments| look::ask(&source.monitor, command, arguments).expect(command);
    do_it(
        "blockdev-mirror",
        json!({ "job-id": "m", "device": "a", "target": "b", "sync": "none" }),
    );
    move_refused(&stage, destination.address(), &[], &["the block job m (mirror)", "job-cancel"]);
    do_it("job-cancel", json!({ "id": "m" }));
    eventually("the job is over", SOON, || {
        look::ask(&source.monitor, "query-jobs", json!({}))?.as_array()?.is_empty().then_some(())
    });
    let path = stage.path("nbd").display().to_string();
    do_it("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": path } } }));
    let export = json!({ "type": "nbd", "id": "e", "node-name": "a", "writable": true });
    do_it("block-export-add", export);
    move_refused(
        &stage,
        destination.address(),
        &[],
        &["the disk a is exported by nbd", "block-export-del"],
    );
    do_it("block-export-del", json!({ "id": "e" }));
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}
