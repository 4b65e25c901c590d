//! Where a destination listens: hears the first words of every connection, and passes on what makes
//! sense.
//!
//! ```text
//!   accept --> greeting (a thread) --- a known token --------------> known ------+
//!              preamble, first message                                           +--> next
//!              a place, bounded a peer  --- no token, and still open --> strangers --+
//!                                       --- anything else: closed
//! ```
//!
//! Nobody who does not know a session's token can keep out who does, nor have more than a bounded
//! memory and a bounded number of lines spent on it.

mod room;
mod visitors;

use crate::clock;
use crate::error::{Error, Result};
use crate::limits::SETUP_MAX;
use crate::net::{Address, Connection, Listener, System};
use crate::protocol::{Cause, Control, Message, control};
use crossbeam_channel::Receiver;
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, PreambleError, Role, Token};
use room::{Place, Room};
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};
use visitors::Origin;

/// For a preamble once only a session's own source is expected: it sends it with the connection.
const PREAMBLE_CLOSED_MAX: Duration = Duration::from_secs(1);

/// How often the listener looks for a place while all are taken. Those who were hurried leave
/// within
/// [`HURRY_EVERY`] or twice that.
const PLACE_EVERY: Duration = Duration::from_millis(5);

/// How often a greeting looks whether it is to make room for others, and for how long it then goes
/// on with what has come.
const HURRY_EVERY: Duration = Duration::from_millis(50);

/// A connection that has said its first words.
#[derive(Debug)]
pub enum Incoming {
    /// A control connection and its first message: Hello with no token, Commit with one.
    Control {
        /// The session, or none yet.
        token: Token,
        /// The connection.
        control: Box<Control>,
        /// What it said first.
        first: Message,
        /// Who it is.
        peer: Address,
    },
    /// A lane.
    Lane {
        /// The session.
        token: Token,
        /// Index of the lane.
        index: u8,
        /// The connection.
        connection: Box<dyn Connection>,
    },
}

/// Listens, hears first words, and passes on what makes sense. Garbage and silence cost a log line.
#[derive(Debug)]
pub struct SessionListener {
    /// Where it listens, with the port that the kernel chose if zero was asked for.
    pub address: Address,
    room: Arc<Room>,
    bell: Receiver<()>,
}

impl SessionListener {
    /// Starts to listen.
    pub fn open(address: Address) -> Result<Self> {
        Self::behind(System.listen(&address)?)
    }

    /// Takes connections from this listener.
    pub fn behind(listener: impl Listener + 'static) -> Result<Self> {
        let address = listener.address().clone();
        let (room, bell) = Room::new();
        let room = Arc::new(room);
        let greeting = Arc::clone(&room);
        clock::spawn("listener", move || greet_all(&listener, &greeting))
            .map_err(|e| Error::os("starting the listening thread", e))?;
        Ok(Self { address, room, bell })
    }

    /// The next connection, or none before the deadline. Those that bear the token of a session go
    /// before all others.
    #[must_use]
    pub fn next(&self, deadline: Instant) -> Option<Incoming> {
        loop {
            if let Some(incoming) = self.known().or_else(|| self.stranger()) {
                return Some(incoming);
            }
            if clock::receive(&self.bell, deadline).is_err() {
                return None;
            }
        }
    }

    /// The next connection, whenever it comes; none once nobody listens any more.
    #[must_use]
    pub fn wait(&self) -> Option<Incoming> {
        loop {
            if let Some(incoming) = self.known().or_else(|| self.stranger()) {
                return Some(incoming);
            }
            if clock::receive_any_time(&self.bell).is_err() {
                return None;
            }
        }
    }

    /// A connection that is there already and bears the token of a session.
    #[must_use]
    pub fn known(&self) -> Option<Incoming> {
        self.room.known()
    }

    /// A connection that is there already and bears none.
    #[must_use]
    pub fn stranger(&self) -> Option<Incoming> {
        self.room.stranger()
    }

    /// Rings when a connection has come, to wait for that together with other things. It may ring
    /// for one that was taken already.
    #[must_use]
    pub fn bell(&self) -> &Receiver<()> {
        &self.bell
    }

    /// A line for the operator about who bears no token: of many only the first are said, and then
    /// how many.
    pub fn say_of_stranger(&self, line: &str) {
        self.room.say_of_stranger(line);
    }

    /// Who bears this token is heard from now on, before all others.
    pub fn expect(&self, token: Token) {
        self.room.expect(token);
    }

    /// Who bears this token is not known any more.
    pub fn forget(&self, token: Token) {
        self.room.forget(token);
    }

    /// Who bears no known token is not heard any more: its connection is closed without a word.
    pub fn close_to_strangers(&self) {
        self.room.close();
    }
}

fn greet_all(listener: &dyn Listener, room: &Arc<Room>) {
    loop {
        let (connection, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            // It was reset before it was taken. Strangers can have many of these, and none may cost
            // time or a line.
            Err(e) if is_gone(e.kind()) => continue,
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be accepted");
                // Out of descriptors, most likely: give others the time to end.
                clock::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let origin = Origin::of(&peer);
        let place = loop {
            match room.admit(origin) {
                Some(place) => break place,
                // Those who come meanwhile wait in the kernel's queue, and none is lost.
                None => clock::sleep(PLACE_EVERY),
            }
        };
        let room = Arc::clone(room);
        let spawned =
            clock::spawn("greeting", move || match hear(connection, &peer, &place, &room) {
                Ok(Heard::Known(incoming)) => room.queue_known(incoming),
                Ok(Heard::Stranger(incoming)) => room.queue_stranger(origin, incoming),
                Err(e) => room.ignored(&peer, &e),
            });
        if let Err(e) = spawned {
            tracing::warn!(error = %e, "no thread for a new connection");
        }
    }
}

/// Whether accepting failed for the connection alone.
fn is_gone(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotConnected
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::Interrupted
    )
}

/// Who a connection comes from.
enum Heard {
    /// One that bears the token of a session.
    Known(Incoming),
    /// One that may open a session.
    Stranger(Incoming),
}

/// Reads the preamble and, of a control connection, the first message, so that a silent stranger
/// keeps nobody waiting but this thread.
fn hear(
    mut connection: Box<dyn Connection>,
    peer: &Address,
    place: &Place,
    room: &Room,
) -> Result<Heard> {
    let open = room.is_open();
    // Asked first, as nobody can be asked about who has gone again; said once it has said what it
    // wants.
    let trusted = connection.check_peer();
    let mut patience = Patience::new(place, if open { SETUP_MAX } else { PREAMBLE_CLOSED_MAX });
    let mut preamble = [0; PREAMBLE_BYTES];
    patience.read(connection.as_mut(), &mut preamble)?;
    let Preamble { role, token } = match Preamble::decode(&preamble) {
        Ok(preamble) => preamble,
        Err(e) => {
            // A pageferry of another version reads an Abort of this shape since version 1.
            if open && matches!(e, PreambleError::Version { .. }) {
                Control::new(connection).abort(&e.to_string(), Cause::Refused, patience.deadline);
            }
            return Err(Error::Protocol(e.to_string()));
        }
    };
    let known = room.knows(token);
    if known && trusted.is_ok() {
        place.leave();
    } else if !known && (token != Token::default() || !open) {
        // No answer: its session may have been another receiver's, whose guest runs.
        return Err(Error::Protocol("a connection of a session that is not known here".into()));
    }
    let incoming = match role {
        Role::Lane(_) if !known => return Err(Error::Protocol("a lane of no session".into())),
        Role::Lane(index) => {
            trusted?;
            Incoming::Lane { token, index, connection }
        }
        Role::Control => {
            let mut patience = Patience::new(place, SETUP_MAX);
            let mut length = [0; 4];
            patience.read(connection.as_mut(), &mut length)?;
            let mut body =
                vec![0; control::body_bytes(length, control::BODY_BYTES_MAX, "its first message")?];
            patience.read(connection.as_mut(), &mut body)?;
            let first = control::decode(&body)?;
            let mut control = Box::new(Control::new(connection));
            if let Err(e) = trusted {
                control.abort(&e.chain(), Cause::Refused, patience.deadline);
                return Err(e);
            }
            Incoming::Control { token, control, first, peer: peer.clone() }
        }
    };
    Ok(if known { Heard::Known(incoming) } else { Heard::Stranger(incoming) })
}

/// How long a connection's first words are waited for.
struct Patience<'p> {
    place: &'p Place,
    deadline: Instant,
    hurried: bool,
}

impl<'p> Patience<'p> {
    fn new(place: &'p Place, time: Duration) -> Self {
        Self { place, deadline: clock::now() + time, hurried: false }
    }

    /// Fills the buffer, within the deadline for all of it.
    fn read(&mut self, connection: &mut dyn Connection, mut buffer: &mut [u8]) -> Result<()> {
        const WHAT: &str = "waiting for its first words";
        while !buffer.is_empty() {
            if !self.hurried && self.place.is_hurried() {
                (self.hurried, self.deadline) =
                    (true, self.deadline.min(clock::now() + HURRY_EVERY));
            }
            let until = self.deadline.min(clock::now() + HURRY_EVERY);
            if !connection.readable(until).map_err(|e| Error::os(WHAT, e))? {
                if clock::now() >= self.deadline {
                    return Err(Error::Timeout { what: WHAT.into() });
                }
                continue;
            }
            match connection.read(buffer, self.deadline) {
                Ok(0) => return Err(Error::Protocol("it closed without a word".into())),
                Ok(n) => buffer = &mut buffer[n..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::TimedOut => {
                    return Err(Error::Timeout { what: WHAT.into() });
                }
                Err(e) => return Err(Error::os(WHAT, e)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
