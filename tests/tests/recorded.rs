//! What another release says is understood: conversations that were recorded with each protocol
//! version that is still spoken (see [`pageferry_tests::recorded`]), read, and played to the source
//! and the destination of today.
//!
//!     PAGEFERRY_RECORD=v7 cargo test -p pageferry-tests --test recorded -- --ignored     new records
//!
//! A record is never made anew to make a test pass: it is what a release in the field says.

use pageferry_engine::destination::Served;
use pageferry_engine::error::Error;
use pageferry_engine::protocol::features::{Features, VERIFY};
use pageferry_engine::protocol::{Cause, Message, control};
use pageferry_engine::report::{MigrationReport, Outcome};
use pageferry_synthetic::SyntheticSource;
use pageferry_tests::recorded::moves::{Destination, Move, start_guest};
use pageferry_tests::recorded::player::{Played, check_preamble, play_source};
use pageferry_tests::recorded::recorder::Recorder;
use pageferry_tests::recorded::{Conversation, What, Who, directories, make_directory};
use pageferry_transport::preamble::{PROTOCOL_VERSION, VERSIONS_HEARD};
use std::collections::BTreeSet;

/// What is played with other messages than it has: the newest of this version.
const NEWEST: &str = "v6";

#[test]
#[ignore = "writes tests/recorded/$PAGEFERRY_RECORD, a new directory"]
fn record() {
    let name = std::env::var("PAGEFERRY_RECORD").expect("PAGEFERRY_RECORD is vVERSION or more");
    make_directory(&name);
    for a_move in Move::ALL {
        let directory = tempfile::tempdir().unwrap();
        let destination = Destination::of(a_move, a_move.listen_at(directory.path(), "real"));
        let recorder = Recorder::between(
            &a_move.listen_at(directory.path(), "recorder"),
            destination.address.clone(),
            a_move == Move::AskedAgain,
        );
        let to = recorder.address.clone();
        let serving = std::thread::spawn(move || destination.serve());
        let mut guest = start_guest();
        let report = a_move.migrate(&mut guest, &to);
        let (served, moved) = serving.join().unwrap();
        assert_eq!(report.outcome == Outcome::Completed, a_move.moves(), "{:?}", report.reason);
        assert_eq!(moved.is_some(), a_move.moves(), "{served:?}");
        recorder.finish().save(&name, a_move.name());
    }
}

fn every_record(mut check: impl FnMut(u16, Move, Conversation, Vec<String>)) {
    for (directory, version) in directories() {
        for a_move in Move::ALL {
            let (conversation, lines) = Conversation::load(&directory, a_move.name());
            check(version, a_move, conversation, lines);
        }
    }
}

#[test]
fn there_are_records_of_every_version_that_is_heard_and_of_no_other() {
    let recorded: BTreeSet<_> = directories().into_iter().map(|(_, version)| version).collect();
    assert_eq!(recorded, VERSIONS_HEARD.collect());
    assert!(NEWEST.starts_with(&format!("v{PROTOCOL_VERSION}")), "{NEWEST}");
}

#[test]
fn every_recorded_message_is_what_its_index_says_and_is_encoded_to_the_same_bytes() {
    every_record(|version, a_move, conversation, lines| {
        for (entry, line) in conversation.0.iter().zip(lines) {
            assert_eq!(entry.line(), line, "v{version}, {}", a_move.name());
            match &entry.what {
                What::Message(message) => {
                    assert_eq!(control::encode(message).unwrap(), entry.bytes, "{line}");
                }
                What::Preamble => {
                    let preamble = check_preamble(&entry.bytes).unwrap();
                    let mut again = preamble.encode();
                    again[8..10].copy_from_slice(&version.to_le_bytes());
                    assert_eq!(again.as_slice(), entry.bytes, "{line}");
                }
                What::Frames => assert!(entry.connection.starts_with("lane")),
            }
        }
    });
}

#[test]
fn the_records_are_of_what_they_are_named_for() {
    const SESSION: [&str; 4] = ["Hello", "Welcome", "Offer", "Accept"];
    const SWITCHOVER: [&str; 4] = ["Prepare", "Ready", "Commit", "Running"];
    every_record(|_, a_move, conversation, _| {
        let said: Vec<_> = conversation.messages().into_iter().map(|(_, name)| name).collect();
        let wanted = match a_move {
            Move::Tcp | Move::Local => [SESSION, SWITCHOVER].concat(),
            Move::Refused => vec!["Hello", "Abort"],
            Move::Aborted => [&SESSION[..], &["Abort", "Abort"]].concat(),
            Move::AskedAgain => [&SESSION[..], &SWITCHOVER[..3], &["Commit", "Running"]].concat(),
        };
        assert_eq!(said, wanted);
        let bytes: usize = conversation.0.iter().map(|entry| entry.bytes.len()).sum();
        assert!(bytes < 256 << 10, "{bytes} bytes are no small file");
    });
}

/// A recorded source against the destination of today.
fn to_this_destination(
    a_move: Move,
    conversation: &Conversation,
) -> (Vec<Message>, Served, Option<SyntheticSource>) {
    let directory = tempfile::tempdir().unwrap();
    let destination = Destination::of(a_move, a_move.listen_at(directory.path(), "real"));
    let to = destination.address.clone();
    let serving = std::thread::spawn(move || destination.serve());
    let heard = play_source(conversation, &to);
    let (served, guest) = serving.join().unwrap();
    (heard, served, guest)
}

/// The source of today against a recorded destination.
fn from_this_source(a_move: Move, conversation: &Conversation) -> (Vec<Message>, MigrationReport) {
    let directory = tempfile::tempdir().unwrap();
    let played = Played::at(&a_move.listen_at(directory.path(), "played"));
    let to = played.address.clone();
    let conversation = conversation.clone();
    let playing = std::thread::spawn(move || played.play(&conversation));
    let mut guest = start_guest();
    let report = a_move.migrate(&mut guest, &to);
    (playing.join().unwrap(), report)
}

#[test]
fn a_recorded_source_comes_to_the_same_end_at_the_destination_of_today() {
    every_record(|version, a_move, conversation, _| {
        let (_, served, guest) = to_this_destination(a_move, &conversation);
        let told = format!("v{version}, {}: {served:?}", a_move.name());
        match a_move {
            Move::Refused => assert!(matches!(served, Served::Nothing), "{told}"),
            Move::Aborted => {
                assert!(matches!(served, Served::Discarded(Error::PeerAborted { .. })), "{told}");
            }
            _ => assert!(matches!(served, Served::Received(_)), "{told}"),
        }
        assert_eq!(guest.is_some(), a_move.moves());
        if let Some(mut guest) = guest {
            assert!(guest.generations().unwrap() > 0, "it has written");
            guest.check().expect("its memory is what its ledger says");
        }
    });
}

#[test]
fn the_source_of_today_comes_to_the_same_end_at_a_recorded_destination() {
    every_record(|version, a_move, conversation, _| {
        let (_, report) = from_this_source(a_move, &conversation);
        let told = format!("v{version}, {}: {:?}", a_move.name(), report.reason);
        let outcome = if a_move.moves() { Outcome::Completed } else { Outcome::Aborted };
        assert_eq!(report.outcome, outcome, "{told}");
        assert_eq!(report.refused, a_move == Move::Refused, "{told}");
        assert_eq!(report.verified, (a_move == Move::Tcp).then_some(true));
    });
}

/// With features that nobody here knows, wherever they may stand.
fn of_a_later_release(message: &mut Message) {
    let features = match message {
        Message::Hello(hello) => &mut hello.features,
        Message::Welcome(welcome) => &mut welcome.features,
        Message::Offer(offer) => &mut offer.features,
        Message::Prepare(prepare) => &mut prepare.features,
        Message::Ready(ready) => &mut ready.features,
        Message::Running(running) => &mut running.features,
        // Compared with that of today, whose addresses count.
        Message::Accept(_) | Message::Commit | Message::Abort(_) => return,
    };
    *features = std::mem::take(features).with("later", vec![0xff; 100]).with("\u{1b}[2J", vec![]);
}

#[test]
fn features_that_nobody_here_knows_are_ignored_at_both_ends() {
    let (conversation, _) = Conversation::load(NEWEST, Move::Tcp.name());
    let later = conversation.edited(of_a_later_release);
    assert!(later.0.iter().any(|entry| entry.line().contains("later")));
    let (heard, served, guest) = to_this_destination(Move::Tcp, &later);
    assert!(matches!(served, Served::Received(_)), "{served:?}");
    guest.expect("it runs there").check().unwrap();
    assert!(!format!("{heard:?}").contains("later"), "it answers with its own alone");
    let (_, report) = from_this_source(Move::Tcp, &later);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
}

/// As an older release would, that cannot verify.
fn of_an_older_release(message: &mut Message) {
    match message {
        Message::Hello(hello) => hello.features = Features::default(),
        Message::Welcome(welcome) => welcome.features = Features::default(),
        _ => {}
    }
}

#[test]
fn an_older_release_is_spoken_to_without_what_it_does_not_know() {
    let (conversation, _) = Conversation::load(NEWEST, Move::Local.name());
    let older = conversation.edited(of_an_older_release);
    let (_, served, guest) = to_this_destination(Move::Local, &older);
    assert!(matches!(served, Served::Received(_)), "{served:?}");
    guest.expect("it runs there").check().unwrap();
    let (_, report) = from_this_source(Move::Local, &older);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
}

#[test]
fn a_destination_that_lacks_what_is_needed_is_named_and_told() {
    let (conversation, _) = Conversation::load(NEWEST, Move::Tcp.name());
    let mut older = conversation.edited(of_an_older_release);
    // Up to Welcome; then the source says why not.
    let welcome = |what: &What| matches!(what, What::Message(Message::Welcome(_)));
    let after = older.0.iter().position(|entry| welcome(&entry.what)).unwrap() + 1;
    older.0.truncate(after);
    let (refused, _) = Conversation::load(NEWEST, Move::Refused.name());
    let mut abort = refused.0.last().unwrap().clone();
    abort.who = Who::Source;
    older.0.push(abort);
    let (heard, report) = from_this_source(Move::Tcp, &older);
    let reason =
        "the destination does not know verify: update pageferry there, or do without --verify";
    assert_eq!(report.reason.as_deref(), Some(reason));
    assert!(report.refused);
    let Some(Message::Abort(abort)) = heard.last() else { panic!("{heard:?}") };
    assert_eq!((abort.cause, abort.reason.as_str()), (Cause::Refused, reason));
}

#[test]
fn a_source_that_uses_what_was_not_agreed_on_gets_no_session() {
    let (conversation, _) = Conversation::load(NEWEST, Move::Tcp.name());
    let mut wrong = conversation.edited(of_an_older_release);
    let offer = |what: &What| matches!(what, What::Message(Message::Offer(_)));
    let after = wrong.0.iter().position(|entry| offer(&entry.what)).unwrap() + 1;
    wrong.0.truncate(after);
    let (refused, _) = Conversation::load(NEWEST, Move::Refused.name());
    wrong.0.push(refused.0.last().unwrap().clone());
    let (heard, served, _) = to_this_destination(Move::Tcp, &wrong);
    assert!(matches!(served, Served::Nothing), "{served:?}");
    let Some(Message::Abort(abort)) = heard.last() else { panic!("{heard:?}") };
    assert!(abort.reason.contains(VERIFY), "{}", abort.reason);
}
