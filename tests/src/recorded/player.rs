//! Plays one end of a recorded conversation, against the other end as it is today. What an end says
//! is always what was recorded; what it hears must be the same kind of message.

use super::{Conversation, Entry, Listening, What, Who, connect, read_message};
use pageferry_engine::net::Address;
use pageferry_engine::protocol::{Message, control};
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, Token};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};

/// Where the token lies in a preamble.
const TOKEN_AT: usize = 12;

/// Plays the source, to a destination that listens there. Returns what that said.
///
/// # Panics
/// If the destination says anything else than the recorded one did.
#[must_use]
pub fn play_source(conversation: &Conversation, to: &Address) -> Vec<Message> {
    let (mut open, mut token, mut heard) = (HashMap::new(), Token::default(), Vec::new());
    for entry in &conversation.0 {
        match (entry.who, &entry.what) {
            (Who::Source, What::Preamble) => {
                let mut preamble = entry.bytes.clone();
                // The token is the destination's of today.
                preamble[TOKEN_AT..].copy_from_slice(&token.0);
                close_the_old(&mut open, entry);
                let mut connection = connect(to);
                connection.write_all(&preamble).expect("the destination lives");
                open.insert(entry.connection.as_str(), connection);
            }
            (Who::Source, _) => {
                connection(&mut open, entry).write_all(&entry.bytes).expect("it is read");
            }
            (Who::Destination, What::Message(recorded)) => {
                let message = hear(connection(&mut open, entry), recorded);
                match &message {
                    Message::Welcome(welcome) => token = Token(welcome.token),
                    // The frames bear the addresses that it names.
                    Message::Accept(_) => assert_eq!(&message, recorded),
                    _ => {}
                }
                heard.push(message);
            }
            (Who::Destination, _) => {
                let mut frames = vec![0; entry.bytes.len()];
                connection(&mut open, entry).read_exact(&mut frames).expect("it answers");
                assert_eq!(frames, entry.bytes, "the fences that it acknowledges");
            }
        }
    }
    heard
}

/// A destination that waits for a source, to play a record to it.
#[derive(Debug)]
pub struct Played {
    /// Where it listens.
    pub address: Address,
    listening: Listening,
}

impl Played {
    /// Listens there (port 0 is any).
    #[must_use]
    pub fn at(address: &Address) -> Self {
        let listening = Listening::at(address);
        Self { address: listening.address(address), listening }
    }

    /// Plays the destination. Returns what the source said.
    ///
    /// # Panics
    /// If the source says anything else than the recorded one did.
    #[must_use]
    pub fn play(&self, conversation: &Conversation) -> Vec<Message> {
        let (mut open, mut heard) = (HashMap::new(), Vec::new());
        for entry in &conversation.0 {
            match (entry.who, &entry.what) {
                (Who::Source, What::Preamble) => {
                    close_the_old(&mut open, entry);
                    let mut connection = self.listening.accept();
                    let mut bytes = [0; PREAMBLE_BYTES];
                    connection.read_exact(&mut bytes).expect("a preamble");
                    assert_eq!(bytes.as_slice(), entry.bytes, "role and token are as recorded");
                    if entry.connection.starts_with("lane") {
                        let lane = connection.try_clone().expect("a socket");
                        std::thread::spawn(move || acknowledge_fences(lane));
                    }
                    open.insert(entry.connection.as_str(), connection);
                }
                (Who::Source, What::Message(recorded)) => {
                    heard.push(hear(connection(&mut open, entry), recorded));
                }
                (Who::Destination, What::Message(_)) => {
                    connection(&mut open, entry).write_all(&entry.bytes).expect("it is read");
                }
                // Its fences are answered as they come.
                _ => {}
            }
        }
        heard
    }
}

/// A source asks again once its first connection is lost.
fn close_the_old(open: &mut HashMap<&str, File>, entry: &Entry) {
    if entry.connection == "again" {
        let _ = open.remove("control");
    }
}

fn connection<'o>(open: &'o mut HashMap<&str, File>, entry: &Entry) -> &'o mut File {
    open.get_mut(entry.connection.as_str()).expect("it began with a preamble")
}

/// The next message, which is of the same kind as the recorded one.
fn hear(from: &mut File, recorded: &Message) -> Message {
    let bytes = read_message(from)
        .unwrap_or_else(|| panic!("the connection ended instead of {}", recorded.name()));
    let message = control::decode(&bytes[4..]).expect("a message");
    assert_eq!(message.name(), recorded.name(), "{message:?} instead of {recorded:?}");
    message
}

/// A destination's end of a lane, as docs/protocol.md tells the frames: takes what is written, and
/// acknowledges every fence but the last.
fn acknowledge_fences(mut lane: File) {
    let mut header = [0; 16];
    while lane.read_exact(&mut header).is_ok() {
        let value = u32::from_le_bytes(header[4..8].try_into().expect("four bytes"));
        let payload = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        match header[2] {
            1 => {
                let frame = u64::from(value) * 16 + payload;
                let read = std::io::copy(&mut (&mut lane).take(frame), &mut std::io::sink());
                if read.ok() != Some(frame) {
                    return;
                }
            }
            2 => {
                header[2] = 3;
                if lane.write_all(&header).is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

/// Whether what went over a connection begins as it should.
///
/// # Errors
/// What is wrong with the preamble.
pub fn check_preamble(bytes: &[u8]) -> Result<Preamble, String> {
    let bytes = bytes.try_into().map_err(|_| "a preamble of another length".to_owned())?;
    Preamble::decode(bytes).map_err(|e| e.to_string())
}
