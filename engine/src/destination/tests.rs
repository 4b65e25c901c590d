//! Strangers at the listener while a guest is loaded: they delay neither the deadline nor a signal,
//! and they do not shut out the source that asks again.

use super::*;
use crate::destination::admission::listed;
use crate::guest::{BlockDescription, GuestDescription};
use crate::memory::page::PAGE_BYTES;
use crate::memory::{GuestMemory, SlotSource};
use crate::net::System;
use crate::net::dial::dial;
use crate::net::socket::SocketConnection;
use crate::protocol::Features;
use crate::protocol::control;
use crate::protocol::control::Control;
use crate::protocol::message::{Abort, Hello};
use pageferry_transport::Access;
use pageferry_transport::preamble::{Preamble, Role};
use pageferry_transport::region::MemoryRegion;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

const TOKEN: Token = Token([7; 16]);
/// For what takes milliseconds.
const SOON: Duration = Duration::from_secs(10);
/// More than any of these waits takes; a flood ends after it, and with it the wait that it
/// stretched.
const FLOOD_MAX: Duration = Duration::from_secs(20);

/// A guest that never comes.
struct EmptyGuest {
    memory: Arc<GuestMemory>,
}

impl EmptyGuest {
    fn new() -> Self {
        let bytes = 16 * PAGE_BYTES;
        let file = memfd_create("empty", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        let block = SlotSource {
            name: "ram".into(),
            file: file.into(),
            file_offset: 0,
            bytes,
            backing_page_bytes: PAGE_BYTES,
            process_address: 0,
        };
        Self { memory: Arc::new(GuestMemory::map(vec![block], Access::Write).unwrap()) }
    }
}

impl DestinationGuest for EmptyGuest {
    fn describe(&self) -> GuestDescription {
        let blocks = vec![BlockDescription { name: "ram".into(), bytes: self.memory.bytes() }];
        let (monitor, machine) = ("empty".into(), "none".into());
        GuestDescription {
            monitor,
            machine,
            vcpus: 1,
            blocks,
            images: Vec::new(),
            platform: Vec::new(),
        }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn load(&mut self, _: &MemoryRegion, _: usize) -> Result<()> {
        unreachable!("nothing comes")
    }

    fn seal(&mut self, _: bool) -> Result<()> {
        unreachable!("nothing comes")
    }

    fn run(&mut self, _: bool) -> Result<()> {
        unreachable!("nothing comes")
    }

    fn discard(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A receiver whose session has this token, and where it listens.
fn receiver(commit: Duration) -> (Receiver, SocketAddr) {
    let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
    listener.expect(TOKEN);
    let at = listener.address.tcp().unwrap();
    let patience = Patience { commit, open_afterwards: Duration::from_millis(100) };
    (Receiver::new(listener, LinkChoice::default()).with_patience(patience), at)
}

/// The control connection of a source that is gone.
fn lost() -> Control {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    Control::new(Box::new(SocketConnection::tcp(listener.accept().unwrap().0).unwrap()))
}

/// One stranger after the other that says something, and as many that are silent and stay.
struct Flood {
    ended: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    fn of(at: SocketAddr) -> Self {
        let (ended, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let first = [
            &Preamble { role: Role::Control, token: Token::default() }.encode()[..],
            &control::encode(&Message::Commit).unwrap(),
        ]
        .concat();
        let threads = (0..2).map(|_| {
            let (ended, made, first) = (Arc::clone(&ended), Arc::clone(&made), first.clone());
            std::thread::spawn(move || {
                let (begun, mut silent) = (Instant::now(), VecDeque::new());
                while !ended.load(Ordering::Relaxed) && begun.elapsed() < FLOOD_MAX {
                    let Ok(mut loud) = TcpStream::connect(at) else { continue };
                    let _ = loud.write_all(&first);
                    silent.extend(TcpStream::connect(at));
                    if silent.len() > 100 {
                        silent.pop_front();
                    }
                    made.fetch_add(2, Ordering::Relaxed);
                    // Some 500 a second from each, half of them silent: three times what was seen.
                    std::thread::sleep(Duration::from_millis(4));
                }
            })
        });
        let threads = threads.collect();
        let flood = Self { ended, made, threads };
        while flood.made() < 200 {
            std::thread::yield_now();
        }
        flood
    }

    fn made(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("the flood");
        }
    }
}

/// Waits for Commit as a loaded guest does. Returns how that ended, and when.
fn wait(
    receiver: &Receiver,
    watch: &mut Watch<'_>,
) -> (Result<Option<Box<Control>>>, DestinationPhase, Duration) {
    let guest = EmptyGuest::new();
    let (mut control, mut phase, begun) = (lost(), DestinationPhase::Loaded, Instant::now());
    let ended = receiver.wait_for_commit(&mut control, TOKEN, &guest, &mut phase, watch);
    (ended, phase, begun.elapsed())
}

/// 340 connections a second had stretched 30 s to more than 75.
#[test]
fn a_flood_of_strangers_does_not_stretch_the_deadline_of_commit() {
    let (receiver, at) = receiver(Duration::from_secs(1));
    let flood = Flood::of(at);
    let (ended, phase, took) = wait(&receiver, &mut || Ok(()));
    assert!(matches!(ended, Err(Error::Timeout { .. })), "{ended:?}");
    assert_eq!(phase, DestinationPhase::Discarded);
    assert!(took < Duration::from_secs(6), "{took:?} with {} strangers", flood.made());
}

#[test]
fn a_flood_of_strangers_does_not_keep_a_signal_from_being_heard() {
    let (receiver, at) = receiver(SOON * 6);
    let _flood = Flood::of(at);
    let told = Instant::now() + Duration::from_millis(200);
    let mut watch = || if Instant::now() < told { Ok(()) } else { Err(Error::Cancelled) };
    let (ended, _, took) = wait(&receiver, &mut watch);
    assert!(
        matches!(ended, Err(Error::Cancelled)) && took < Duration::from_secs(6),
        "{ended:?}, {took:?}"
    );
}

#[test]
fn a_flood_of_strangers_does_not_shut_out_the_source_that_asks_again() {
    let (receiver, at) = receiver(SOON * 6);
    let _flood = Flood::of(at);
    let address = at.into();
    let asking = std::thread::spawn(move || {
        let mut control = Control::new(
            dial(&System, &address, Preamble { role: Role::Control, token: TOKEN }).unwrap(),
        );
        control.send(&Message::Commit, Instant::now() + SOON).unwrap();
        control
    });
    let (ended, phase, took) = wait(&receiver, &mut || Ok(()));
    assert!(matches!(ended, Ok(Some(_))), "{ended:?}");
    assert!(took < FLOOD_MAX * 3 / 4, "{took:?}, and the flood ends after {FLOOD_MAX:?}");
    assert_eq!(phase, DestinationPhase::Owner);
    drop(asking.join().unwrap());
}

/// As after a freeze: Commit lies there, and so does the deadline, behind which the operator may
/// have decided.
#[test]
fn a_commit_that_is_found_after_the_deadline_is_not_taken() {
    let (receiver, at) = receiver(Duration::from_millis(100));
    let address = at.into();
    let mut control = Control::new(
        dial(&System, &address, Preamble { role: Role::Control, token: TOKEN }).unwrap(),
    );
    control.send(&Message::Commit, Instant::now() + SOON).unwrap();
    let mut watch = || {
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    };
    let (ended, phase, _) = wait(&receiver, &mut watch);
    assert!(matches!(ended, Err(Error::Timeout { .. })), "{ended:?}");
    assert_eq!(phase, DestinationPhase::Discarded);
}

/// The operator lets the guest run at the source.
#[test]
fn an_abort_on_a_new_connection_ends_the_wait_for_commit() {
    let (receiver, at) = receiver(SOON * 6);
    let mut asking = dialled(at, TOKEN);
    asking.abort("the operator lets it run", Cause::Failed, Instant::now() + SOON);
    let (ended, phase, took) = wait(&receiver, &mut || Ok(()));
    assert!(matches!(ended, Err(Error::PeerAborted { side: "source", .. })), "{ended:?}");
    assert!(phase == DestinationPhase::Discarded && took < SOON, "{phase:?}, {took:?}");
}

fn dialled(at: SocketAddr, token: Token) -> Control {
    Control::new(dial(&System, &at.into(), Preamble { role: Role::Control, token }).unwrap())
}

fn hello(guest: &EmptyGuest) -> Message {
    let (software, guest, features) = ("a test".into(), guest.describe(), Features::ours());
    Message::Hello(Box::new(Hello {
        software,
        lanes: 1,
        guest,
        state_bytes_max: 4096,
        rdma: false,
        features,
    }))
}

/// What a receiver says to this, at once.
fn answer(control: &mut Control) -> Abort {
    match control.receive("an Abort", Instant::now() + SOON).unwrap() {
        Message::Abort(abort) => abort,
        other => panic!("{other:?}"),
    }
}

#[test]
fn sessions_that_come_to_nothing_push_out_no_token_that_may_be_asked_for() {
    let (mut receiver, at) = receiver(SOON);
    let mut guest = EmptyGuest::new();
    for _ in 0..70 {
        let mut control = dialled(at, Token::default());
        control.send(&hello(&guest), Instant::now() + SOON).unwrap();
        let incoming = receiver.listener.next(Instant::now() + SOON).expect("it comes");
        let source =
            std::thread::spawn(move || control.receive("Welcome", Instant::now() + SOON).unwrap());
        let served = receiver.serve(incoming, &mut guest, &mut || Ok(()));
        assert!(matches!(served, Served::Nothing), "{served:?}");
        assert!(matches!(source.join().unwrap(), Message::Welcome(_)), "it came far enough");
    }
    let mut asking = dialled(at, TOKEN);
    asking.send(&Message::Commit, Instant::now() + SOON).unwrap();
    let heard = receiver.listener.next(Instant::now() + SOON);
    assert!(matches!(heard, Some(Incoming::Control { token: TOKEN, .. })), "{heard:?}");
}

#[test]
fn a_receiver_in_doubt_asks_nobody_to_try_again() {
    let (mut receiver, at) = receiver(SOON);
    receiver.doubtful = true;
    let mut control = dialled(at, Token::default());
    control.send(&hello(&EmptyGuest::new()), Instant::now() + SOON).unwrap();
    receiver.turn_away(receiver.listener.next(Instant::now() + SOON).expect("it comes"));
    let said = answer(&mut control);
    assert_eq!(said.cause, Cause::Refused);
    assert!(said.reason.contains("whether it runs"), "{}", said.reason);
}

#[test]
fn a_copy_that_is_discarded_is_no_refusal() {
    let (mut receiver, at) = receiver(SOON);
    let mut asking = dialled(at, TOKEN);
    asking.send(&Message::Commit, Instant::now() + SOON).unwrap();
    let Some(Incoming::Control { mut control, .. }) = receiver.listener.next(Instant::now() + SOON)
    else {
        panic!("it comes")
    };
    let mut guest = EmptyGuest::new();
    let served =
        receiver.discard(TOKEN, &mut guest, &mut control, Error::refused("too late to refuse"));
    assert!(matches!(served, Served::Discarded(_)), "{served:?}");
    let said = answer(&mut asking);
    assert_eq!((said.cause, said.reason.as_str()), (Cause::Failed, "too late to refuse"));
}

#[test]
fn some_minutes_after_the_guest_runs_only_its_source_is_answered() {
    let (mut receiver, at) = receiver(SOON);
    let resuming = Instant::now();
    receiver.completed = Some(Completed { token: TOKEN, resuming, since: Some(resuming) });
    receiver.answer_afterwards();
    let stranger = || {
        let mut stream = TcpStream::connect(at).unwrap();
        let greeting = Preamble { role: Role::Control, token: Token::default() }.encode();
        stream
            .write_all(&[&greeting[..], &control::encode(&Message::Commit).unwrap()].concat())
            .unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer.len()
    };
    let until = Instant::now() + SOON;
    while stranger() > 0 {
        assert!(Instant::now() < until, "strangers are not heard any more");
    }
    let preamble = Preamble { role: Role::Control, token: TOKEN };
    let mut control = Control::new(dial(&System, &at.into(), preamble).unwrap());
    control.send(&Message::Commit, Instant::now() + SOON).unwrap();
    let answer = control.receive("Running", Instant::now() + SOON).unwrap();
    assert!(matches!(answer, Message::Running(_)), "{answer:?}");
}

#[test]
fn a_refusal_names_some_blocks_and_says_how_many_more() {
    let names =
        |count: usize| listed((0..count).map(|i| format!("b{i}")).collect::<Vec<_>>().into_iter());
    assert_eq!([names(0), names(2)], ["none", "b0, b1"]);
    assert_eq!(names(1000), "b0, b1, b2, b3, b4, b5, b6, b7, and 992 more");
}
