//! Who may come near a guest that moves: other users of the same host, on loopback and at sockets,
//! and connections that say too much.

use pageferry_tests::stage::{BARE, Ended, Stage, Supervisor};
use pageferry_tests::{SOON, not_run};
use pageferry_transport::preamble::{Preamble, Role, Token};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;

/// Somebody else: `nobody`, as most systems have it.
const STRANGER: u32 = 65534;

/// Does this as another user; none if this user may not become another.
fn as_stranger<T: Send + 'static>(
    test: &str,
    act: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let acting = std::thread::spawn(|| {
        let stranger = rustix::process::Uid::from_raw(STRANGER);
        // Of this thread alone: the call is the kernel's, and not that of the C library.
        rustix::thread::set_thread_res_uid(stranger, stranger, stranger).ok()?;
        Some(act())
    });
    let acted = acting.join().expect("what another user does");
    if acted.is_none() {
        not_run(test, "this user may not become another one");
    }
    acted
}

fn migrate(stage: &Stage, to: &str) -> Ended {
    stage
        .start(&["migrate", "src", "--to", to, "--json", "--verify", "--downtime-max", "2s"])
        .end(SOON)
}

/// A figure of a process's memory, in KiB.
fn kib(receiver: &Supervisor, name: &str) -> u64 {
    let text =
        std::fs::read_to_string(format!("/proc/{}/status", receiver.pid())).expect("it lives");
    let line =
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect(name);
    line.trim().trim_end_matches(" kB").parse().expect("KiB")
}

/// What the process has now, in KiB. Its peak ([`kib`] of `VmHWM`) is counted from here (proc(5),
/// `clear_refs`).
fn resident_kib(receiver: &Supervisor) -> u64 {
    std::fs::write(format!("/proc/{}/clear_refs", receiver.pid()), "5")
        .expect("the peak is forgotten");
    kib(receiver, "VmRSS")
}

#[test]
fn a_guest_moves_over_a_local_socket_that_is_its_users_alone() {
    let stage = Stage::new();
    let path = stage.path("ferry.sock");
    let to = format!("unix:{}", path.display());
    let source = stage.run("src", BARE, "");
    let destination = stage.receive_at(&to, "dst", BARE, "", &[]);
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let ended = migrate(&stage, &to);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    // In the report: a quick move is over before the client has asked how it goes.
    assert!(ended.stdout.contains("a local socket"), "{}", ended.stdout);
    destination.wait_guest_runs();
    drop(source);
}

#[test]
fn a_receiver_on_loopback_takes_no_guest_of_another_user() {
    const NAME: &str = "a_receiver_on_loopback_takes_no_guest_of_another_user";
    let stage = Stage::new();
    let destination = stage.receive("dst", BARE, "");
    let (address, qemu) = (destination.address(), destination.qemu());
    let answer = as_stranger(NAME, move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let greeting = Preamble { role: Role::Control, token: Token::default() }.encode();
        // A first message, whatever it says: Commit.
        stream.write_all(&[&greeting[..], &[1, 0, 0, 0, 6]].concat()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    });
    let Some(answer) = answer else { return };
    assert!(
        answer.contains(&format!("user {STRANGER}'s")) && answer.contains("as root"),
        "{answer}"
    );
    destination.words.wait(&format!("user {STRANGER}'s"), SOON);
    assert_eq!(destination.qemu(), qemu, "its QEMU is the same");
}

#[test]
fn a_source_gives_its_guest_to_no_other_user_who_had_the_port_first() {
    const NAME: &str = "a_source_gives_its_guest_to_no_other_user_who_had_the_port_first";
    let stage = Stage::new();
    let source = stage.run("src", BARE, "");
    source.wait_guest_runs();
    let Some(listener) = as_stranger(NAME, || TcpListener::bind("127.0.0.1:0").unwrap()) else {
        return;
    };
    let to = listener.local_addr().unwrap().to_string();
    let ended = migrate(&stage, &to);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("user {STRANGER}'s")), "{}", ended.stderr);
    // It was not told a word.
    let mut said = Vec::new();
    listener.accept().unwrap().0.read_to_end(&mut said).unwrap();
    assert_eq!(said, b"");
    source.wait_guest_runs();
}

/// Seen before: 12 of these took the receiver from 5 to 1544 MiB, and one wrote a line of 44 MiB.
#[test]
fn strangers_with_long_first_messages_take_neither_memory_nor_log() {
    let stage = Stage::new();
    let destination = stage.receive("dst", BARE, "");
    let before_kib = resident_kib(&destination);
    let greeting = Preamble { role: Role::Control, token: Token::default() }.encode();
    // A Hello that says nothing but how many blocks its guest has: four million empty ones.
    let blocks: u32 = 4_000_000;
    let mut hello = vec![0, 0, 1, 4];
    hello.extend(b"qemu");
    hello.extend([2, b'p', b'c', 1]);
    let mut left = blocks;
    while left > 0x7f {
        hello.push(left as u8 | 0x80);
        left >>= 7;
    }
    hello.push(left as u8);
    hello.resize(hello.len() + 2 * blocks as usize, 0);
    hello.extend([0, 0, 0]);
    let message =
        [&greeting[..], &u32::try_from(hello.len()).unwrap().to_le_bytes(), &hello].concat();
    let strangers: Vec<TcpStream> = (0..12)
        .map(|_| {
            let mut stream = TcpStream::connect(destination.address()).unwrap();
            // It hangs up in the middle of it.
            let _ = stream.write_all(&message);
            stream
        })
        .collect();
    for mut stranger in strangers {
        stranger.set_read_timeout(Some(SOON)).unwrap();
        let _ = stranger.read_to_end(&mut Vec::new());
    }
    destination.words.wait("ignored a connection", SOON);
    // At most: what they took is given back when they go.
    let grown_kib = kib(&destination, "VmHWM").saturating_sub(before_kib);
    assert!(grown_kib < 16 << 10, "{grown_kib} KiB more");
    let said = destination.words.text();
    assert!(said.len() < 10_000, "{} bytes said", said.len());
}
