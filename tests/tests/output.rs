//! No output ends or holds up a process that has a guest in its hands, whatever stands behind its
//! stdout and stderr: a closed pipe, a full disk, a pipe that nobody reads. And a command's exit
//! status tells what it did, whatever became of its words. What others say, a peer above all, is
//! shown and not obeyed.

use pageferry::supervisor::api::State;
use pageferry_engine::guest::GuestDescription;
use pageferry_engine::net::socket::SocketConnection;
use pageferry_engine::protocol::{Cause, Control, Features, Hello, Message};
use pageferry_tests::look;
use pageferry_tests::stage::{BARE, Stage, Supervisor};
use pageferry_tests::{SOON, eventually};
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, Role, Token};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Read, Write, pipe};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::time::Instant;

/// Where an output goes that nobody gets.
#[derive(Debug, Clone, Copy)]
enum Nowhere {
    ClosedPipe,
    FullDisk,
    UnreadPipe,
}

impl Nowhere {
    /// Such an output, and what must be kept for it to stay so.
    fn open(self) -> (Stdio, Option<PipeReader>) {
        match self {
            Self::ClosedPipe => (pipe().expect("a pipe").1.into(), None),
            Self::FullDisk => {
                (File::options().write(true).open("/dev/full").expect("/dev/full").into(), None)
            }
            Self::UnreadPipe => {
                let (reader, mut writer) = pipe().expect("a pipe");
                let flags = fcntl_getfl(&writer).expect("flags");
                fcntl_setfl(&writer, flags | OFlags::NONBLOCK).expect("flags");
                while writer.write(&[b'.'; 4096]).is_ok() {}
                fcntl_setfl(&writer, flags).expect("flags");
                (writer.into(), Some(reader))
            }
        }
    }
}

fn listening(destination: &Supervisor) -> SocketAddr {
    destination.wait_state(State::Waiting);
    destination
        .status()
        .and_then(|status| status.listen)
        .and_then(|at| at.parse().ok())
        .expect("an address")
}

/// Moves a guest between two supervisors whose stderr goes there. The guest arrives, is known to
/// `list`, and is found again when its supervisor has died.
fn a_guest_is_moved_with_stderr_at(nowhere: Nowhere) {
    let stage = Stage::new();
    let ((out, _kept), (out_too, _kept_too)) = (nowhere.open(), nowhere.open());
    let mut source = stage.supervise_into("src", &["run", "src"], Some(BARE), "", out);
    source.wait_state(State::Hosting);
    let receive = ["receive", "dst", "--listen", "127.0.0.1:0"];
    let mut destination = stage.supervise_into("dst", &receive, Some(BARE), "", out_too);
    let address = listening(&destination);
    source.wait_guest_runs();
    let ended = stage.migrate("src", address, &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0), "the source's supervisor ends as after any move");
    destination.wait_state(State::Hosting);
    assert!(destination.guest_runs());
    let known = stage.done(&["list"]).stdout;
    assert!(known.starts_with("dst ") && known.contains("here (QEMU pid"), "{known}");
    destination.kill();
    let found = stage.attach("dst", &[]);
    assert!(found.guest_runs());
}

#[test]
fn a_guest_is_moved_and_known_where_stderr_is_a_closed_pipe() {
    a_guest_is_moved_with_stderr_at(Nowhere::ClosedPipe);
}

#[test]
fn a_guest_is_moved_and_known_where_stderr_is_on_a_full_disk() {
    a_guest_is_moved_with_stderr_at(Nowhere::FullDisk);
}

#[test]
fn a_guest_is_moved_and_known_where_nobody_reads_stderr() {
    a_guest_is_moved_with_stderr_at(Nowhere::UnreadPipe);
}

/// Reads this stderr until the supervisor is held, and closes it then.
fn read_until_held(reader: PipeReader, point: &str) {
    let mut lines = BufReader::new(reader).lines().map_while(Result::ok);
    let held = format!("held at {point} ");
    assert!(lines.any(|line| line.contains(&held)), "it ended and was not {held}");
}

#[test]
fn a_guardian_without_stderr_lets_a_paused_guest_go_on() {
    let stage = Stage::new();
    let (reader, writer) = pipe().expect("a pipe");
    let mut source = stage.supervise_into("src", &["run", "src"], Some(BARE), "switchover", writer);
    source.wait_guest_runs();
    let destination = stage.receive("dst", BARE, "");
    let _moving = stage.migrate("src", destination.address(), &[]);
    read_until_held(reader, "switchover");
    source.kill();
    source.wait_guest_runs();
    eventually("the guardian ends", SOON, || source.guardians().is_empty().then_some(()));
}

#[test]
fn a_guardian_without_stderr_takes_a_guest_in_after_commit() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let (reader, writer) = pipe().expect("a pipe");
    let receive = ["receive", "dst", "--listen", "127.0.0.1:0"];
    let mut destination = stage.supervise_into("dst", &receive, Some(BARE), "owner", writer);
    let moving = stage.migrate("src", listening(&destination), &[]);
    read_until_held(reader, "owner");
    destination.kill();
    destination.wait_guest_runs();
    drop(moving);
    assert!(!source.guest_runs(), "it runs at one place");
}

#[test]
fn a_client_whose_reader_has_gone_ends_quietly() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    let closed = || pipe().expect("a pipe").1;
    for arguments in [
        &["list"][..],
        &["list", "--json"],
        &["status", "src"],
        &["status", "src", "--json"],
        &["completions", "bash"],
        &["--help"],
        &["migrate", "--help"],
        &["--version"],
    ] {
        let ended = stage.start_into(arguments, closed()).end(SOON);
        assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
    // What a host lacks is its status; the words are lost without a trace.
    let (with, without) =
        (stage.done(&["doctor"]), stage.start_into(&["doctor"], closed()).end(SOON));
    assert_eq!((without.status, without.stderr.as_str()), (with.status, ""));
    assert!(source.guest_runs());
}

#[test]
fn a_client_that_cannot_write_its_answer_says_so() {
    let stage = Stage::new();
    let _source = stage.run("src", BARE, "");
    for arguments in
        [&["list"][..], &["status", "src", "--json"], &["completions", "bash"], &["doctor"]]
    {
        let (full, _) = Nowhere::FullDisk.open();
        let ended = stage.start_into(arguments, full).end(SOON);
        assert_eq!(ended.status, Some(1), "{arguments:?}");
        assert_eq!(
            ended.stderr,
            "pageferry: writing to stdout: No space left on device (os error 28)"
        );
    }
}

#[test]
fn the_exit_status_of_a_migration_is_its_outcome_whatever_becomes_of_the_report() {
    for nowhere in [Nowhere::FullDisk, Nowhere::ClosedPipe] {
        let stage = Stage::new();
        let source = stage.run("src", BARE, "");
        let destination = stage.receive("dst", BARE, "");
        source.wait_guest_runs();
        let (out, _kept) = nowhere.open();
        let to = destination.address().to_string();
        let arguments = ["migrate", "src", "--to", &to, "--json", "--downtime-max", "2s"];
        let ended = stage.start_into(&arguments, out).end(SOON);
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let told = ended
            .stderr
            .contains("the result could not be printed: writing to stdout: No space left");
        assert_eq!(told, matches!(nowhere, Nowhere::FullDisk), "{}", ended.stderr);
        destination.wait_guest_runs();
        look::wait_gone(source.pid());
    }
}

/// What a stranger would like to have on the operator's terminal and in the log, and what is shown
/// of it.
const THEIRS: &str = "\x1b]0;x\x07\x1b[2J\npageferry: src has moved\r\u{9b}1m";
const SHOWN: &str = r"\u{1b}]0;x\u{7}\u{1b}[2J\npageferry: src has moved\r\u{9b}1m";

/// Every line is one of pageferry's own, and has nothing in it that a terminal obeys.
#[track_caller]
fn assert_harmless(text: &str) {
    assert!(!text.lines().any(|line| line.chars().any(char::is_control)), "{text:?}");
    assert!(!text.lines().any(|line| line.starts_with("pageferry: src has moved")), "{text}");
}

#[test]
fn a_destinations_words_are_shown_and_not_obeyed() {
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let destination = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; PREAMBLE_BYTES]).unwrap();
        let mut control = Control::new(Box::new(SocketConnection::tcp(stream).unwrap()));
        control.receive("Hello", Instant::now() + SOON).unwrap();
        control.abort(&THEIRS.repeat(1000), Cause::Failed, Instant::now() + SOON);
    });
    let ended = stage.migrate("src", address, &[]).end(SOON);
    destination.join().unwrap();
    assert_eq!(ended.status, Some(2), "nothing was touched: {}", ended.stderr);
    let status = stage.done(&["status", "src"]).stdout;
    for text in [&ended.stderr, &ended.stdout, &source.words.wait("was not moved", SOON), &status] {
        assert_harmless(text);
        assert!(text.len() < 100_000, "cut: {} bytes", text.len());
    }
    assert!(ended.stderr.contains(SHOWN), "{}", ended.stderr);
    // Of the report, too, whose reader may print it.
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    let reason = report["reason"].as_str().unwrap();
    assert!(reason.contains(SHOWN), "{reason}");
    assert_harmless(reason);
}

#[test]
fn a_sources_words_are_shown_and_not_obeyed() {
    let stage = Stage::new();
    let destination = stage.receive("dst", BARE, "");
    let preamble = Preamble { role: Role::Control, token: Token::default() };
    let mut stream = TcpStream::connect(destination.address()).unwrap();
    stream.write_all(&preamble.encode()).unwrap();
    let mut control = Control::new(Box::new(SocketConnection::tcp(stream).unwrap()));
    let guest = GuestDescription {
        monitor: "qemu".into(),
        machine: THEIRS.into(),
        vcpus: 1,
        blocks: Vec::new(),
        images: Vec::new(),
        platform: Vec::new(),
    };
    let hello = Hello {
        software: THEIRS.into(),
        lanes: 1,
        guest,
        state_bytes_max: 1 << 20,
        rdma: false,
        features: Features::default().with(THEIRS, Vec::new()),
    };
    control.send(&Message::Hello(hello.into()), Instant::now() + SOON).unwrap();
    let answer = control.receive("Abort", Instant::now() + SOON).unwrap();
    assert!(matches!(answer, Message::Abort(_)), "{answer:?}");
    let line = destination.words.wait("refused the guest of", SOON);
    assert!(line.contains(SHOWN), "{line}");
    assert_harmless(&destination.words.text());
}
