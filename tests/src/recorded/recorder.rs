//! Passes on what a source and a destination say to each other, and writes it down.

use super::{Conversation, Entry, Listening, What, Who, connect, read_message};
use pageferry_engine::net::Address;
use pageferry_engine::protocol::{Message, control};
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, Role};
use rustix::net::{Shutdown, shutdown};
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// See the [module](self).
#[derive(Debug)]
pub struct Recorder {
    /// Where the source is to connect.
    pub address: Address,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: Address,
    /// The first Running is lost, and its connection with it.
    loses_running: bool,
    ended: AtomicBool,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    entries: Vec<Entry>,
    frames: Vec<Entry>,
    threads: Vec<JoinHandle<()>>,
}

impl Recorder {
    /// Listens there (port 0 is any), and passes everything on to `target`.
    #[must_use]
    pub fn between(at: &Address, target: Address, loses_running: bool) -> Self {
        let listening = Listening::at(at);
        let address = listening.address(at);
        let (ended, said) = (AtomicBool::new(false), Mutex::default());
        let shared = Arc::new(Shared { target, loses_running, ended, said });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut controls = 0;
            loop {
                let source = listening.accept();
                if accepting.ended.load(Ordering::Acquire) {
                    return;
                }
                accepting.carry(source, &mut controls);
            }
        });
        Self { address, shared }
    }

    /// What was said, once all connections have ended.
    ///
    /// # Panics
    /// If a thread of it has.
    #[must_use]
    pub fn finish(self) -> Conversation {
        self.shared.ended.store(true, Ordering::Release);
        drop(connect(&self.address));
        let threads = std::mem::take(&mut self.shared.said().threads);
        threads.into_iter().for_each(|thread| thread.join().expect("it passed all on"));
        let mut said = self.shared.said();
        let (mut entries, frames) =
            (std::mem::take(&mut said.entries), std::mem::take(&mut said.frames));
        let is_accept = |entry: &Entry| matches!(entry.what, What::Message(Message::Accept(_)));
        let place = entries.iter().position(is_accept).map_or(entries.len(), |at| at + 1);
        // The source's first: what the destination says on a lane answers it.
        let (mut source, destination): (Vec<_>, Vec<_>) =
            frames.into_iter().partition(|entry| entry.who == Who::Source);
        source.extend(destination);
        entries.splice(place..place, source.into_iter().filter(|entry| !entry.bytes.is_empty()));
        Conversation(entries)
    }
}

impl Shared {
    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(self: &Arc<Self>, mut source: File, controls: &mut u32) {
        let mut bytes = vec![0; PREAMBLE_BYTES];
        source.read_exact(&mut bytes).expect("a preamble");
        let first = bytes.as_slice().try_into().expect("its length");
        let connection = match Preamble::decode(first).expect("a good one").role {
            Role::Lane(lane) => format!("lane{lane}"),
            Role::Control => {
                *controls += 1;
                if *controls == 1 { "control".into() } else { "again".into() }
            }
        };
        let mut target = connect(&self.target);
        let preamble =
            Entry { who: Who::Source, connection: connection.clone(), what: What::Preamble, bytes };
        target.write_all(&preamble.bytes).expect("the destination lives");
        self.said().entries.push(preamble);
        let again = (target.try_clone().expect("a socket"), source.try_clone().expect("a socket"));
        for (who, from, to) in [(Who::Source, source, target), (Who::Destination, again.0, again.1)]
        {
            let (shared, connection) = (Arc::clone(self), connection.clone());
            let passing = std::thread::spawn(move || {
                if connection.starts_with("lane") {
                    shared.pass_frames(who, connection, from, to);
                } else {
                    shared.pass_messages(who, &connection, from, to);
                }
            });
            self.said().threads.push(passing);
        }
    }

    fn pass_messages(&self, who: Who, connection: &str, mut from: File, mut to: File) {
        while let Some(bytes) = read_message(&mut from) {
            let message = control::decode(&bytes[4..]).expect("a message");
            if self.loses_running
                && connection == "control"
                && matches!(message, Message::Running(_))
            {
                let _ = (shutdown(&from, Shutdown::Both), shutdown(&to, Shutdown::Both));
                break;
            }
            // Written down before it is passed on, and so before its answer is.
            let (what, connection) = (What::Message(message), connection.into());
            let entry = Entry { who, connection, what, bytes };
            self.said().entries.push(entry.clone());
            if to.write_all(&entry.bytes).is_err() {
                break;
            }
        }
        // The other way goes on: an Abort may answer an Abort.
        let _ = shutdown(&to, Shutdown::Write);
    }

    fn pass_frames(&self, who: Who, connection: String, mut from: File, mut to: File) {
        let (mut bytes, mut piece) = (Vec::new(), vec![0; 1 << 16]);
        while let Ok(n @ 1..) = from.read(&mut piece) {
            bytes.extend_from_slice(&piece[..n]);
            if to.write_all(&piece[..n]).is_err() {
                break;
            }
        }
        let _ = shutdown(&to, Shutdown::Write);
        self.said().frames.push(Entry { who, connection, what: What::Frames, bytes });
    }
}
