//! Conversations between two pageferries of one protocol version, kept as the bytes that went over
//! their connections: `tests/recorded/vVERSION/NAME.bin`, back to back, with an index beside them. A
//! release that adds features without a new version has a directory `vVERSION-WORD`.
//!
//! ```text
//!   recorder   stands between a real source and a real destination, and writes them down
//!   player     plays one end from a record, against the other end as it is today
//!   moves      the moves that are recorded
//! ```
//!
//! A line of the index: who sent it, over which connection, how many bytes, and what it is:
//! `preamble`, `frames` of a lane, or the message as it was decoded. What lanes carried stands
//! behind Accept, wherever it came.

pub mod moves;
pub mod player;
pub mod recorder;

use pageferry_engine::net::Address;
use pageferry_engine::protocol::{Message, control};
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

/// An end of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The one that connects.
    Source,
    /// The one that listens.
    Destination,
}

/// What some bytes are.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// What a connection begins with.
    Preamble,
    /// A message, behind its length.
    Message(Message),
    /// All that went one way over a lane.
    Frames,
}

/// Some bytes of one end, over one connection: `control`, `again` (to ask again after Commit) or
/// `laneN`.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Who sent it.
    pub who: Who,
    /// Over which connection.
    pub connection: String,
    /// What it is.
    pub what: What,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Entry {
    /// Its line in the index.
    #[must_use]
    pub fn line(&self) -> String {
        let who = match self.who {
            Who::Source => "source",
            Who::Destination => "destination",
        };
        let what = match &self.what {
            What::Preamble => "preamble".into(),
            What::Frames => "frames".into(),
            What::Message(message) => format!("{message:?}"),
        };
        format!("{who} {} {} {what}", self.connection, self.bytes.len())
    }

    fn read(line: &str, rest: &mut &[u8]) -> Self {
        let mut words = line.splitn(4, ' ');
        let mut word = || words.next().unwrap_or_else(|| panic!("a short line: {line}"));
        let who = if word() == "source" { Who::Source } else { Who::Destination };
        let connection = word().to_owned();
        let (bytes, after) = rest.split_at(word().parse().expect("a number of bytes"));
        *rest = after;
        let what = match word() {
            "preamble" => What::Preamble,
            "frames" => What::Frames,
            _ => What::Message(control::decode(&bytes[4..]).unwrap_or_else(|e| {
                panic!("a recorded message cannot be read any more: {}: {line}", e.chain())
            })),
        };
        Self { who, connection, what, bytes: bytes.into() }
    }
}

/// One conversation, in the order of what was said.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation(pub Vec<Entry>);

/// Where the records are.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("recorded")
}

/// The names of all directories with records, with their protocol versions.
///
/// # Panics
/// If there are others.
#[must_use]
pub fn directories() -> Vec<(String, u16)> {
    let version = |name: &str| name.strip_prefix('v')?.split('-').next()?.parse().ok();
    let entries = std::fs::read_dir(root()).expect("the records").map(|entry| {
        let name = entry.expect("an entry").file_name().into_string().expect("a name");
        let version = version(&name).unwrap_or_else(|| panic!("{name} names no version"));
        (name, version)
    });
    entries.collect()
}

/// Makes a directory for new records.
///
/// # Panics
/// If it is there: a record is what a release in the field says, and stays.
pub fn make_directory(name: &str) {
    let path = root().join(name);
    std::fs::create_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

impl Conversation {
    /// Reads a record, with the lines of its index.
    ///
    /// # Panics
    /// If it is not there, or cannot be understood any more.
    #[must_use]
    pub fn load(directory: &str, name: &str) -> (Self, Vec<String>) {
        let path = root().join(directory).join(name);
        let index = std::fs::read_to_string(path.with_extension("txt"))
            .unwrap_or_else(|e| panic!("{}.txt: {e}", path.display()));
        let bytes = std::fs::read(path.with_extension("bin")).expect("the bytes of it");
        let (lines, mut rest): (Vec<_>, _) = (index.lines().map(str::to_owned).collect(), &*bytes);
        let entries = lines.iter().map(|line| Entry::read(line, &mut rest)).collect();
        assert!(rest.is_empty(), "{name}: {} bytes that no line is about", rest.len());
        (Self(entries), lines)
    }

    /// Writes it down, with its index.
    ///
    /// # Panics
    /// If that fails.
    pub fn save(&self, directory: &str, name: &str) {
        let path = root().join(directory).join(name);
        let index: String = self.0.iter().map(|entry| entry.line() + "\n").collect();
        let bytes: Vec<u8> = self.0.iter().flat_map(|entry| entry.bytes.clone()).collect();
        std::fs::write(path.with_extension("txt"), index).expect("the index written");
        std::fs::write(path.with_extension("bin"), bytes).expect("the bytes written");
    }

    /// The same with other messages, as another release would have sent them.
    ///
    /// # Panics
    /// If one cannot be encoded.
    #[must_use]
    pub fn edited(mut self, edit: impl Fn(&mut Message)) -> Self {
        for entry in &mut self.0 {
            if let What::Message(message) = &mut entry.what {
                edit(message);
                entry.bytes = control::encode(message).expect("it can be encoded");
            }
        }
        self
    }

    /// Who said which messages.
    #[must_use]
    pub fn messages(&self) -> Vec<(Who, &'static str)> {
        let message = |entry: &Entry| match &entry.what {
            What::Message(message) => Some((entry.who, message.name())),
            _ => None,
        };
        self.0.iter().filter_map(message).collect()
    }
}

/// A listening socket.
#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listening {
    fn at(address: &Address) -> Self {
        match address {
            Address::Tcp(at) => Self::Tcp(TcpListener::bind(at).expect("a free port")),
            Address::Unix(path) => Self::Unix(UnixListener::bind(path).expect("a local socket")),
        }
    }

    /// Where it listens, given where it was asked to.
    fn address(&self, asked: &Address) -> Address {
        match self {
            Self::Tcp(listener) => listener.local_addr().expect("its address").into(),
            Self::Unix(_) => asked.clone(),
        }
    }

    fn accept(&self) -> File {
        match self {
            Self::Tcp(listener) => tcp(listener.accept().expect("a connection").0),
            Self::Unix(listener) => unix(listener.accept().expect("a connection").0),
        }
    }
}

fn connect(to: &Address) -> File {
    match to {
        Address::Tcp(at) => tcp(TcpStream::connect(at).expect("a connection")),
        Address::Unix(path) => unix(UnixStream::connect(path).expect("a connection")),
    }
}

/// Whatever it is, it is read and written, and no read waits for ever.
fn tcp(stream: TcpStream) -> File {
    stream.set_nodelay(true).expect("small messages go at once");
    stream.set_read_timeout(Some(crate::SOON)).expect("a deadline");
    OwnedFd::from(stream).into()
}

fn unix(stream: UnixStream) -> File {
    stream.set_read_timeout(Some(crate::SOON)).expect("a deadline");
    OwnedFd::from(stream).into()
}

/// A message with its length before it; none once the other end has closed.
fn read_message(from: &mut impl std::io::Read) -> Option<Vec<u8>> {
    let mut frame = vec![0; 4];
    from.read_exact(&mut frame).ok()?;
    let bytes = u32::from_le_bytes(frame[..4].try_into().expect("four bytes")) as usize;
    frame.resize(4 + bytes, 0);
    from.read_exact(&mut frame[4..]).ok()?;
    Some(frame)
}
