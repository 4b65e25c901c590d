//! Framing of control messages: a length (u32, little endian) and a postcard body, both bounded,
//! and every read and write with a deadline.

use super::bounded::cut;
use super::message::{Abort, Cause, Message, REASON_BYTES_MAX};
use crate::clock;
use crate::error::{Error, Result};
use crate::net::Connection;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Longest body of any message but an Offer: of what anybody may say first, above all. The largest
/// of them are the Hello of a guest with hundreds of memory blocks and a Prepare with all staged
/// pages, some 30 KiB.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// Longest body of an Offer, which a session's source alone may send: that of a fragmented guest
/// has a few MiB.
pub const OFFER_BYTES_MAX: usize = 8 << 20;

/// How often a watched wait looks up.
pub(crate) const WATCH_EVERY: Duration = Duration::from_millis(50);

/// One control connection, and the count of what went over it.
#[derive(Debug)]
pub struct Control {
    connection: Box<dyn Connection>,
    messages: u64,
    /// A message was begun and not received to its end: what follows makes no sense.
    torn: bool,
}

/// The bytes of a message, length first.
pub fn encode(message: &Message) -> Result<Vec<u8>> {
    let body = postcard::to_stdvec(message)
        .map_err(|e| Error::Protocol(format!("{} cannot be encoded: {e}", message.name())))?;
    let bytes_max =
        if matches!(message, Message::Offer(_)) { OFFER_BYTES_MAX } else { BODY_BYTES_MAX };
    if body.len() > bytes_max {
        return Err(Error::Protocol(format!(
            "{} of {} bytes is too long",
            message.name(),
            body.len()
        )));
    }
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&u32::try_from(body.len()).expect("bounded above").to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// The length of a body, as it stands before it.
pub(crate) fn body_bytes(length: [u8; 4], bytes_max: usize, expected: &str) -> Result<usize> {
    match u32::from_le_bytes(length) as usize {
        length if length <= bytes_max => Ok(length),
        length => Err(Error::Protocol(format!(
            "a control message of {length} bytes while {expected} was expected"
        ))),
    }
}

/// A message from the body of a frame; the whole body must be used.
pub fn decode(body: &[u8]) -> Result<Message> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((message, rest)) => {
            let message: Message = message;
            Err(Error::Protocol(format!("{} with {} bytes too many", message.name(), rest.len())))
        }
        Err(e) => Err(Error::Protocol(format!("a control message that cannot be read: {e}"))),
    }
}

impl Control {
    /// Takes over a connection whose preamble has been exchanged.
    #[must_use]
    pub fn new(connection: Box<dyn Connection>) -> Self {
        Self { connection, messages: 0, torn: false }
    }

    /// Messages sent and received so far.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.messages
    }

    /// Whether a message was begun here and not received to its end, so that nothing can be
    /// received any more.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// This side's address of the connection, if it goes over IP.
    pub fn local_ip(&self) -> Result<Option<IpAddr>> {
        let address = self.connection.local_ip();
        address.map_err(|e| Error::os("asking for the address of the control connection", e))
    }

    /// Sends one message.
    pub fn send(&mut self, message: &Message, deadline: Instant) -> Result<()> {
        let frame = encode(message)?;
        let what = || format!("sending {} to the peer", message.name());
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            match self.connection.write(rest, deadline) {
                Ok(0) => return Err(Error::os(what(), std::io::Error::from(ErrorKind::WriteZero))),
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(timeout_or(e, what())),
            }
        }
        self.messages += 1;
        tracing::debug!(message = message.name(), bytes = frame.len(), "sent");
        Ok(())
    }

    /// Receives the next message; `expected` says in the error what did not come. An Abort is
    /// returned as a message like any other.
    pub fn receive(&mut self, expected: &'static str, deadline: Instant) -> Result<Message> {
        self.receive_bounded(expected, BODY_BYTES_MAX, deadline)
    }

    /// Like [`Self::receive`], where an Offer may come.
    pub fn receive_offer(&mut self, deadline: Instant) -> Result<Message> {
        self.receive_bounded("Offer", OFFER_BYTES_MAX, deadline)
    }

    fn receive_bounded(
        &mut self,
        expected: &'static str,
        bytes_max: usize,
        deadline: Instant,
    ) -> Result<Message> {
        let mut length = [0; 4];
        self.read_exact(&mut length, expected, deadline)?;
        let mut body = vec![0; body_bytes(length, bytes_max, expected)?];
        self.read_exact(&mut body, expected, deadline)?;
        self.torn = false;
        let mut message = decode(&body)?;
        message.escape_words();
        self.messages += 1;
        tracing::debug!(message = message.name(), bytes = body.len(), "received");
        Ok(message)
    }

    /// Whether something can be read, or the connection has ended, within this time.
    pub fn readable(&self, wait: Duration) -> Result<bool> {
        let readable = self.connection.readable(clock::now() + wait);
        readable.map_err(|e| Error::os("waiting at the control connection", e))
    }

    /// Like [`Self::receive`], and asks `watch` every 50 ms whether to go on.
    pub fn receive_watched(
        &mut self,
        expected: &'static str,
        deadline: Instant,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Message> {
        while !self.readable(WATCH_EVERY.min(deadline.saturating_duration_since(clock::now())))? {
            watch()?;
            if clock::now() >= deadline {
                return Err(Error::Timeout {
                    what: format!("waiting for {expected} from the peer"),
                });
            }
        }
        self.receive(expected, deadline)
    }

    /// Says why this side gives up, as far as the connection still carries it.
    pub fn abort(&mut self, reason: &str, cause: Cause, deadline: Instant) {
        let reason = cut(reason, REASON_BYTES_MAX).into();
        let message = Message::Abort(Abort { reason, cause });
        if let Err(e) = self.send(&message, deadline) {
            tracing::debug!(error = %e.chain(), "the peer could not be told of the abort");
        }
    }

    fn read_exact(
        &mut self,
        mut buffer: &mut [u8],
        expected: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let what = || format!("waiting for {expected} from the peer");
        while !buffer.is_empty() {
            match self.connection.read(buffer, deadline) {
                Ok(0) => {
                    return Err(Error::os(
                        what(),
                        std::io::Error::from(ErrorKind::ConnectionAborted),
                    ));
                }
                Ok(n) => {
                    self.torn = true;
                    buffer = &mut buffer[n..];
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(timeout_or(e, what())),
            }
        }
        Ok(())
    }
}

fn timeout_or(error: std::io::Error, what: String) -> Error {
    if error.kind() == ErrorKind::TimedOut {
        Error::Timeout { what }
    } else {
        Error::os(what, error)
    }
}

#[cfg(test)]
mod tests {
    use super::super::features::Features;
    use super::super::message::*;
    use super::*;
    use crate::guest::{BlockDescription, GuestDescription, ImageDescription};
    use proptest::prelude::*;
    use std::io::Write;
    use std::net::TcpStream;

    fn guest() -> impl Strategy<Value = GuestDescription> {
        let blocks = prop::collection::vec((any::<String>(), any::<u64>()), 0..4);
        let images = prop::collection::vec((any::<String>(), any::<u64>(), any::<u128>()), 0..4);
        let image = |(name, bytes, digest)| ImageDescription { name, bytes, digest };
        (any::<String>(), any::<u32>(), blocks, images, any::<Vec<u8>>()).prop_map(
            move |(machine, vcpus, blocks, images, platform)| GuestDescription {
                monitor: "qemu".into(),
                machine,
                vcpus,
                blocks: blocks
                    .into_iter()
                    .map(|(name, bytes)| BlockDescription { name, bytes })
                    .collect(),
                images: images.into_iter().map(image).collect(),
                platform,
            },
        )
    }

    fn exposed() -> impl Strategy<Value = Exposed> {
        any::<(u64, u64, u32)>().prop_map(|(base, bytes, key)| Exposed { base, bytes, key })
    }

    fn rdma() -> impl Strategy<Value = RdmaAnswer> {
        prop_oneof![
            any::<u16>().prop_map(RdmaAnswer::Port),
            any::<String>().prop_map(RdmaAnswer::No)
        ]
    }

    fn features() -> impl Strategy<Value = Features> {
        prop::collection::btree_map("[a-z\u{1b}]{1,16}", any::<Vec<u8>>(), 0..4).prop_map(|list| {
            list.into_iter()
                .fold(Features::default(), |all, (name, payload)| all.with(&name, payload))
        })
    }

    fn cause() -> impl Strategy<Value = Cause> {
        prop_oneof![
            Just(Cause::Refused),
            Just(Cause::Busy),
            Just(Cause::Lanes),
            Just(Cause::Failed)
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            (any::<u8>(), guest(), any::<u64>(), any::<bool>(), features()).prop_map(
                |(lanes, guest, state_bytes_max, rdma, features)| {
                    Message::Hello(Box::new(Hello {
                        software: "x".into(),
                        lanes,
                        guest,
                        state_bytes_max,
                        rdma,
                        features,
                    }))
                }
            ),
            (any::<([u8; 16], u8)>(), rdma(), features()).prop_map(
                |((token, lanes), rdma, features)| {
                    let software = "y".into();
                    Message::Welcome(Welcome { software, token, lanes, rdma, features })
                }
            ),
            (any::<(Vec<(u64, u64)>, bool, bool)>(), features()).prop_map(
                |((touched, verify, rdma), features)| {
                    let lanes = if rdma { Lanes::Rdma } else { Lanes::Tcp };
                    Message::Offer(Offer { touched, verify, lanes, features })
                }
            ),
            (prop::collection::vec(exposed(), 0..4), exposed(), exposed(), features()).prop_map(
                |(slots, state, staging, features)| Message::Accept(Accept {
                    slots,
                    state,
                    staging,
                    features
                })
            ),
            (any::<(u32, u64, bool, Vec<(u64, u32)>, Option<u128>)>(), features()).prop_map(
                |((fence, state_bytes, was_running, staged, digest), features)| {
                    Message::Prepare(Prepare {
                        fence,
                        state_bytes,
                        was_running,
                        staged,
                        digest,
                        features,
                    })
                }
            ),
            (any::<(u64, u64, u64)>(), features()).prop_map(
                |((load_us, fence_us, verify_us), features)| {
                    Message::Ready(Ready { load_us, fence_us, verify_us, features })
                }
            ),
            Just(Message::Commit),
            (any::<(u64, u64)>(), features()).prop_map(|((resume_us, running_us), features)| {
                Message::Running(Running { resume_us, running_us, features })
            }),
            (any::<String>(), cause())
                .prop_map(|(reason, cause)| Message::Abort(Abort { reason, cause })),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(message in message()) {
            let frame = encode(&message).unwrap();
            prop_assert_eq!(frame.len() - 4, u32::from_le_bytes(frame[..4].try_into().unwrap()) as usize);
            prop_assert_eq!(decode(&frame[4..]).unwrap(), message);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_truncated_message_is_an_error(message in message(), cut in any::<prop::sample::Index>()) {
            let frame = encode(&message).unwrap();
            let body = &frame[4..];
            prop_assert!(decode(&body[..cut.index(body.len())]).is_err());
        }
    }

    /// Two ends of a control connection; the first one raw.
    fn connected() -> (TcpStream, Control) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let raw = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (raw, control(listener.accept().unwrap().0))
    }

    fn control(stream: TcpStream) -> Control {
        Control::new(Box::new(crate::net::socket::SocketConnection::tcp(stream).unwrap()))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    /// A guest of this many blocks, all of the same name.
    fn hello(blocks: usize, name: &str) -> Message {
        let block = BlockDescription { name: name.into(), bytes: 0 };
        let guest = GuestDescription {
            monitor: "qemu".into(),
            machine: "pc".into(),
            vcpus: 1,
            blocks: vec![block; blocks],
            images: Vec::new(),
            platform: Vec::new(),
        };
        Message::Hello(Box::new(Hello {
            software: String::new(),
            lanes: 1,
            guest,
            state_bytes_max: 0,
            rdma: false,
            features: Features::ours(),
        }))
    }

    #[test]
    fn only_an_offer_may_be_long_and_its_length_is_looked_at_before_its_bytes_come() {
        for (length, offer, refused) in [
            (BODY_BYTES_MAX + 1, false, true),
            (BODY_BYTES_MAX + 1, true, false),
            (OFFER_BYTES_MAX + 1, true, true),
        ] {
            let (mut raw, mut theirs) = connected();
            raw.write_all(&u32::try_from(length).unwrap().to_le_bytes()).unwrap();
            let mut receive = |wait| {
                let deadline = Instant::now() + wait;
                if offer {
                    theirs.receive_offer(deadline)
                } else {
                    theirs.receive("Hello", deadline)
                }
            };
            if refused {
                let error = receive(Duration::from_secs(10)).unwrap_err();
                assert!(matches!(error, Error::Protocol(_)), "{length}, {offer}: {error}");
            } else {
                let error = receive(Duration::from_millis(50)).unwrap_err();
                assert!(matches!(error, Error::Timeout { .. }), "{length}, {offer}: {error}");
            }
        }
    }

    #[test]
    fn a_guest_of_more_blocks_than_any_has_is_refused_while_it_is_decoded() {
        use crate::guest::BLOCKS_MAX;
        let body = |blocks| encode(&hello(blocks, "")).unwrap().split_off(4);
        assert_eq!(decode(&body(BLOCKS_MAX)).unwrap(), hello(BLOCKS_MAX, ""));
        let error = decode(&body(BLOCKS_MAX + 1)).unwrap_err();
        assert!(matches!(error, Error::Protocol(_)), "{error}");
        // What a stranger was seen to send: as many as a frame of 8 MiB held.
        let error = encode(&hello(4_000_000, "")).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }

    #[test]
    fn the_longest_honest_messages_fit() {
        let mut dimms = hello(260, "pageferry.dimm.some.longer.name");
        let Message::Hello(hello) = &mut dimms else { unreachable!("it is one") };
        hello.guest.platform = vec![0xff; crate::guest::PLATFORM_BYTES_MAX];
        assert_eq!(decode(&encode(&dimms).unwrap()[4..]).unwrap(), dimms);
        let staged = (0..crate::memory::staging::STAGED_PAGES_MAX as u64)
            .map(|i| (u64::MAX - i, u32::MAX))
            .collect();
        let prepare = Message::Prepare(Prepare {
            fence: u32::MAX,
            state_bytes: u64::MAX,
            was_running: true,
            staged,
            digest: Some(u128::MAX),
            features: Features::default(),
        });
        assert_eq!(decode(&encode(&prepare).unwrap()[4..]).unwrap(), prepare);
        let exposed = Exposed { base: u64::MAX, bytes: u64::MAX, key: u32::MAX };
        let slots = vec![exposed; crate::guest::BLOCKS_MAX];
        let (state, staging, features) = (exposed, exposed, Features::default());
        let accept = Message::Accept(Accept { slots, state, staging, features });
        assert_eq!(decode(&encode(&accept).unwrap()[4..]).unwrap(), accept);
    }

    #[test]
    fn a_long_reason_is_cut_and_arrives() {
        let (raw, mut theirs) = connected();
        let mut ours = control(raw);
        ours.abort(&"ü".repeat(100_000), Cause::Failed, soon());
        match theirs.receive("anything", soon()).unwrap() {
            // What is shown of it is shorter yet.
            Message::Abort(abort) => {
                let sent = "ü".repeat(REASON_BYTES_MAX / 2);
                assert_eq!(abort.reason, crate::text::reason(&sent));
            }
            other => panic!("{other:?}"),
        }
    }
}
