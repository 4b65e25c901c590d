//! The listener against strangers: who bears a session's token, or has something to say, comes
//! through.

use super::*;
use crate::net::System;
use crate::net::dial::dial;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

const TOKEN: Token = Token([7; 16]);
const SOON: Duration = Duration::from_secs(10);

fn listener() -> (SessionListener, SocketAddr) {
    let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
    listener.expect(TOKEN);
    let at = listener.address.tcp().unwrap();
    (listener, at)
}

/// Asks as a source does whose Commit got no answer.
fn ask(listener: &SessionListener) -> Control {
    let preamble = Preamble { role: Role::Control, token: TOKEN };
    let mut control = Control::new(dial(&System, &listener.address, preamble).unwrap());
    control.send(&Message::Commit, Instant::now() + SOON).unwrap();
    control
}

fn is_asking(incoming: &Incoming) -> bool {
    matches!(incoming, Incoming::Control { token, first: Message::Commit, .. } if *token == TOKEN)
}

/// The preamble and first message of a stranger, whatever that is.
fn stranger(message: &Message) -> Vec<u8> {
    let preamble = Preamble { role: Role::Control, token: Token::default() };
    [&preamble.encode()[..], &control::encode(message).unwrap()].concat()
}

#[test]
fn garbage_and_silence_at_the_door_do_not_keep_others_out() {
    let (listener, at) = listener();
    let _silent = TcpStream::connect(at).unwrap();
    TcpStream::connect(at).unwrap().write_all(&[0x47; 100]).unwrap();
    let _asking = ask(&listener);
    assert!(is_asking(&listener.next(Instant::now() + SOON).expect("the good one comes through")));
}

/// As they were seen: 64 of them, renewed before each of them is given up.
#[test]
fn silent_connections_shut_out_neither_a_source_nor_one_that_asks_again() {
    let (listener, at) = listener();
    let ended = Arc::new(AtomicBool::new(false));
    let renewing = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            let mut silent: Vec<TcpStream> =
                (0..200).map(|_| TcpStream::connect(at).unwrap()).collect();
            while !ended.load(Ordering::Relaxed) {
                silent.remove(0);
                silent.push(TcpStream::connect(at).unwrap());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    for _ in 0..5 {
        let _asking = ask(&listener);
        assert!(is_asking(
            &listener.next(Instant::now() + SETUP_MAX).expect("one that asks again")
        ));
        let mut source = TcpStream::connect(at).unwrap();
        source.write_all(&stranger(&Message::Commit)).unwrap();
        let incoming = listener.next(Instant::now() + SETUP_MAX).expect("one that opens a session");
        assert!(matches!(incoming, Incoming::Control { token, .. } if token == Token::default()));
    }
    ended.store(true, Ordering::Relaxed);
    renewing.join().unwrap();
}

/// Each took 100 ms of the listener's time, and a line.
#[test]
fn connections_that_are_reset_before_they_are_taken_hold_up_nobody() {
    let (listener, at) = listener();
    for _ in 0..200 {
        let stream = TcpStream::connect(at).unwrap();
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }
    let _asking = ask(&listener);
    assert!(is_asking(&listener.next(Instant::now() + SETUP_MAX).expect("one that asks again")));
}

#[test]
fn who_bears_a_token_goes_before_the_strangers_that_came_first() {
    let (listener, at) = listener();
    let mut strangers = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(&stranger(&Message::Commit)).unwrap();
        strangers.push(stream);
    }
    // They are queued once all three are heard; until then nothing of them is taken.
    let until = Instant::now() + SOON;
    while listener.room.strangers_queued() < 3 {
        assert!(Instant::now() < until, "the strangers are heard");
        std::thread::yield_now();
    }
    let _asking = ask(&listener);
    let mut order = Vec::new();
    while order.len() < 4 {
        // Looked for in this order by `next`; the one that asks may still be saying its words.
        let known = if order.is_empty() { wait_known(&listener) } else { listener.next(until) };
        order.push(is_asking(&known.expect("all come through")));
    }
    assert_eq!(order, [true, false, false, false]);
}

fn wait_known(listener: &SessionListener) -> Option<Incoming> {
    let until = Instant::now() + SOON;
    while listener.room.known_queued() == 0 {
        assert!(Instant::now() < until, "the one that asks is heard");
        std::thread::yield_now();
    }
    listener.next(until)
}

/// A message of 8 MiB from anybody was decoded to 129 MiB.
#[test]
fn a_long_first_message_is_not_waited_for() {
    let (listener, at) = listener();
    let mut stream = TcpStream::connect(at).unwrap();
    let preamble = Preamble { role: Role::Control, token: Token::default() }.encode();
    stream.write_all(&[&preamble[..], &(8u32 << 20).to_le_bytes()].concat()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    // It hangs up long before the deadline for first words.
    let begun = Instant::now();
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert!(begun.elapsed() < SETUP_MAX, "{:?}", begun.elapsed());
    assert!(listener.next(Instant::now()).is_none());
}

#[test]
fn once_it_is_closed_to_strangers_only_a_token_is_heard() {
    let (listener, at) = listener();
    listener.close_to_strangers();
    let mut stream = TcpStream::connect(at).unwrap();
    stream.write_all(&stranger(&Message::Commit)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    assert!(!matches!(stream.read(&mut [0; 1]), Ok(1..)), "it hangs up without a word");
    let _silent: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(at).unwrap()).collect();
    let _asking = ask(&listener);
    assert!(is_asking(&listener.next(Instant::now() + SOON).expect("one that asks again")));
}
