//! Where a destination listens: hears the first words of every connection, and passes on what makes sense.

use crate::clock;
use crate::error::{Error, Result};
use crate::net::tcp::TcpListening;
use crate::net::{Address, Connection, Listener};
use crate::output::say;
use crate::protocol::{Cause, Control, Message};
use crate::session::SETUP_MAX;
use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, PreambleError, Role, Token};
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Connections that may be saying their first words at once; more are closed unheard.
const GREETINGS_MAX: usize = 64;

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
pub struct Doorway {
    /// Where it listens, with the port that the kernel chose if zero was asked for.
    pub address: Address,
    incoming: Receiver<Incoming>,
}

impl Doorway {
    /// Starts to listen.
    pub fn open(address: Address) -> Result<Self> {
        let Address::Tcp(address) = address;
        Self::behind(TcpListening::bind(address)?)
    }

    /// Takes connections from this listener.
    pub fn behind(listener: impl Listener + 'static) -> Result<Self> {
        let address = listener.address().clone();
        let (sender, incoming) = bounded(GREETINGS_MAX);
        clock::spawn("doorway", move || greet_all(&listener, &sender))
            .map_err(|e| Error::os("starting the listening thread", e))?;
        Ok(Self { address, incoming })
    }

    /// The next connection, or none before the deadline.
    #[must_use]
    pub fn next(&self, deadline: Instant) -> Option<Incoming> {
        clock::receive(&self.incoming, deadline).ok()
    }

    /// The next connection, whenever it comes; none once nobody listens any more.
    #[must_use]
    pub fn wait(&self) -> Option<Incoming> {
        clock::receive_any_time(&self.incoming).ok()
    }

    /// The connections, to wait on together with other things.
    #[must_use]
    pub fn incoming(&self) -> &Receiver<Incoming> {
        &self.incoming
    }
}

fn greet_all(listener: &dyn Listener, sender: &Sender<Incoming>) {
    let greetings = Arc::new(AtomicUsize::new(0));
    loop {
        let (connection, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be accepted");
                // Out of descriptors, most likely: give others the time to end.
                clock::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if greetings.load(Ordering::Relaxed) >= GREETINGS_MAX {
            tracing::warn!(%peer, "too many connections at once; closed");
            continue;
        }
        greetings.fetch_add(1, Ordering::Relaxed);
        let (sender, counted) = (sender.clone(), Arc::clone(&greetings));
        let spawned = clock::spawn("greeting", move || {
            match hear(connection, &peer) {
                Ok(incoming) => {
                    // Nobody takes it off the queue: the receiver is busy or ending.
                    let _ = clock::send(&sender, incoming, SETUP_MAX);
                }
                Err(e) => say(&format!("ignored a connection from {peer}: {}", e.chain())),
            }
            counted.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(e) = spawned {
            greetings.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(error = %e, "no thread for a new connection");
        }
    }
}

/// Reads the preamble and, of a control connection, the first message, so that a silent stranger keeps
/// nobody waiting but this thread.
fn hear(connection: Box<dyn Connection>, peer: &Address) -> Result<Incoming> {
    let (preamble, connection) = hear_preamble(connection)?;
    let token = preamble.token;
    match preamble.role {
        Role::Lane(index) => Ok(Incoming::Lane { token, index, connection }),
        Role::Control => {
            let mut control = Box::new(Control::new(connection));
            let first = control.receive("its first message", clock::now() + SETUP_MAX)?;
            Ok(Incoming::Control { token, control, first, peer: peer.clone() })
        }
    }
}

/// Reads the preamble, within a deadline for the whole of it.
fn hear_preamble(mut connection: Box<dyn Connection>) -> Result<(Preamble, Box<dyn Connection>)> {
    let deadline = clock::now() + SETUP_MAX;
    let mut bytes = [0; PREAMBLE_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        match connection.read(&mut bytes[filled..], deadline) {
            Ok(0) => return Err(Error::Protocol("it closed without a word".into())),
            Ok(n) => filled += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::TimedOut => {
                return Err(Error::Timeout { what: "waiting for its first words".into() });
            }
            Err(e) => return Err(Error::os("waiting for its first words", e)),
        }
    }
    match Preamble::decode(&bytes) {
        Ok(preamble) => Ok((preamble, connection)),
        Err(e) => {
            // A pageferry of another version reads an Abort of this shape since version 1.
            if matches!(e, PreambleError::Version { .. }) {
                Control::new(connection).abort(&e.to_string(), Cause::Refused, deadline);
            }
            Err(Error::Protocol(e.to_string()))
        }
    }
}

/// The lanes of one session that are connections, as they come.
#[derive(Debug)]
pub struct LaneCollector {
    token: Token,
    lanes: Vec<Option<Box<dyn Connection>>>,
}

impl LaneCollector {
    /// For this many lanes that know the token.
    #[must_use]
    pub fn new(token: Token, lanes: u8) -> Self {
        Self { token, lanes: (0..lanes).map(|_| None).collect() }
    }

    /// Takes a connection if it is one of these lanes; gives it back if it is anything else.
    pub fn take(&mut self, incoming: Incoming) -> Result<Option<Incoming>> {
        match incoming {
            Incoming::Lane { index, token, connection } if token == self.token => {
                match self.lanes.get_mut(usize::from(index)) {
                    Some(lane @ None) => *lane = Some(connection),
                    _ => {
                        return Err(Error::Protocol(format!(
                            "lane {index} was opened twice or not agreed on"
                        )));
                    }
                }
                Ok(None)
            }
            other => Ok(Some(other)),
        }
    }

    /// Waits for those that are missing; other connections meanwhile are answered by `others`.
    pub fn wait(
        mut self,
        doorway: &Doorway,
        mut others: impl FnMut(Incoming),
        deadline: Instant,
    ) -> Result<Vec<Box<dyn Connection>>> {
        while self.lanes.iter().any(Option::is_none) {
            let incoming = doorway
                .next(deadline)
                .ok_or_else(|| Error::Timeout { what: "waiting for the source to open its lanes".into() })?;
            if let Some(other) = self.take(incoming)? {
                others(other);
            }
        }
        Ok(self.lanes.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::System;
    use crate::session::dial;
    use std::io::Write;
    use std::net::TcpStream;

    #[test]
    fn garbage_and_silence_at_the_door_do_not_keep_others_out() {
        let doorway = Doorway::open("127.0.0.1:0".parse().unwrap()).unwrap();
        let at = doorway.address.tcp().unwrap();
        let _silent = TcpStream::connect(at).unwrap();
        TcpStream::connect(at).unwrap().write_all(&[0x47; 100]).unwrap();
        let token = Token([7; 16]);
        let good = dial(&System, &doorway.address, Preamble { role: Role::Control, token }).unwrap();
        let mut good = Control::new(good);
        good.send(&Message::Commit, Instant::now() + SETUP_MAX).unwrap();
        let incoming = doorway.next(Instant::now() + SETUP_MAX).expect("the good one comes through");
        assert!(matches!(incoming, Incoming::Control { token: t, first: Message::Commit, .. } if t == token));
    }
}
