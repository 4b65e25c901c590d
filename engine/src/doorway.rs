//! Where a destination listens: hears the first words of every connection, and passes on what makes sense.

use crate::error::{Error, Result};
use crate::protocol::{Cause, Control, Message};
use crate::session::{SETUP_MAX, detect_dead_peers};
use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, Role, Token};
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
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
        peer: SocketAddr,
    },
    /// A lane.
    Lane {
        /// The session.
        token: Token,
        /// Index of the lane.
        index: u8,
        /// The connection.
        stream: TcpStream,
    },
}

/// Listens, hears first words, and passes on what makes sense. Garbage and silence cost a log line.
#[derive(Debug)]
pub struct Doorway {
    /// Where it listens, with the port that the kernel chose if zero was asked for.
    pub address: SocketAddr,
    incoming: Receiver<Incoming>,
}

impl Doorway {
    /// Starts to listen.
    pub fn open(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|e| {
            Error::refused(format!(
                "cannot listen on {address}: {e}; choose another address or port with --listen"
            ))
        })?;
        let address = listener.local_addr().map_err(|e| Error::os("asking for the listening address", e))?;
        let (sender, incoming) = bounded(GREETINGS_MAX);
        std::thread::Builder::new()
            .name("doorway".into())
            .spawn(move || greet_all(&listener, &sender))
            .map_err(|e| Error::os("starting the listening thread", e))?;
        Ok(Self { address, incoming })
    }

    /// The next connection, or none before the deadline.
    #[must_use]
    pub fn next(&self, deadline: Instant) -> Option<Incoming> {
        self.incoming.recv_deadline(deadline).ok()
    }

    /// The connections, to wait on together with other things.
    #[must_use]
    pub fn incoming(&self) -> &Receiver<Incoming> {
        &self.incoming
    }
}

fn greet_all(listener: &TcpListener, sender: &Sender<Incoming>) {
    let greetings = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be accepted");
                // Out of descriptors, most likely: give others the time to end.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if greetings.load(Ordering::Relaxed) >= GREETINGS_MAX {
            tracing::warn!(%peer, "too many connections at once; closed");
            continue;
        }
        greetings.fetch_add(1, Ordering::Relaxed);
        let (sender, counted) = (sender.clone(), Arc::clone(&greetings));
        let spawned = std::thread::Builder::new().name("greeting".into()).spawn(move || {
            match hear(stream, peer) {
                Ok(incoming) => {
                    // Nobody takes it off the queue: the receiver is busy or ending.
                    let _ = sender.send_timeout(incoming, SETUP_MAX);
                }
                Err(e) => eprintln!("pageferry: ignored a connection from {peer}: {}", e.chain()),
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
fn hear(stream: TcpStream, peer: SocketAddr) -> Result<Incoming> {
    let (preamble, stream) = hear_preamble(stream)?;
    let token = preamble.token;
    match preamble.role {
        Role::Lane(index) => Ok(Incoming::Lane { token, index, stream }),
        Role::Control => {
            let mut control = Box::new(Control::new(stream)?);
            let first = control.receive("its first message", Instant::now() + SETUP_MAX)?;
            Ok(Incoming::Control { token, control, first, peer })
        }
    }
}

/// Reads the preamble, within a deadline for the whole of it.
fn hear_preamble(mut stream: TcpStream) -> Result<(Preamble, TcpStream)> {
    let deadline = Instant::now() + SETUP_MAX;
    let mut bytes = [0; PREAMBLE_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Timeout { what: "waiting for its first words".into() });
        }
        stream.set_read_timeout(Some(left)).map_err(|e| Error::os("setting up a connection", e))?;
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(Error::Protocol("it closed without a word".into())),
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::os("waiting for its first words", e)),
        }
    }
    let preamble = Preamble::decode(&bytes).map_err(|e| {
        // A pageferry of another version reads an Abort of this shape since version 1.
        if matches!(e, pageferry_transport::preamble::PreambleError::Version { .. })
            && let Ok(clone) = stream.try_clone()
            && let Ok(mut control) = Control::new(clone)
        {
            control.abort(&e.to_string(), Cause::Refused, deadline);
        }
        Error::Protocol(e.to_string())
    })?;
    detect_dead_peers(&stream)?;
    Ok((preamble, stream))
}

/// The TCP lanes of one session, as they come.
#[derive(Debug)]
pub struct LaneCollector {
    token: Token,
    lanes: Vec<Option<TcpStream>>,
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
            Incoming::Lane { index, token, stream } if token == self.token => {
                match self.lanes.get_mut(usize::from(index)) {
                    Some(lane @ None) => *lane = Some(stream),
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
    ) -> Result<Vec<TcpStream>> {
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
    use crate::session::dial;
    use std::io::Write;

    #[test]
    fn garbage_and_silence_at_the_door_do_not_keep_others_out() {
        let doorway = Doorway::open("127.0.0.1:0".parse().unwrap()).unwrap();
        let _silent = TcpStream::connect(doorway.address).unwrap();
        TcpStream::connect(doorway.address).unwrap().write_all(&[0x47; 100]).unwrap();
        let token = Token([7; 16]);
        let good = dial(doorway.address, Preamble { role: Role::Control, token }).unwrap();
        let mut good = Control::new(good).unwrap();
        good.send(&Message::Commit, Instant::now() + SETUP_MAX).unwrap();
        let incoming = doorway.next(Instant::now() + SETUP_MAX).expect("the good one comes through");
        assert!(matches!(incoming, Incoming::Control { token: t, first: Message::Commit, .. } if t == token));
    }
}
