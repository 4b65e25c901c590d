//! The thread of one lane at the initiator: takes items from its inbox, sends messages one after
//! the other (io_uring keeps no order between two), and reads acknowledgements meanwhile.
//!
//! ```text
//!   inbox --> queue --> Message --sendmsg--> sent --(zero-copy: released)--> Event::Written
//!                                            acks <--recv-- peer        --> Event::FenceAcked
//! ```

use super::frame::{HEADER_BYTES, Header};
use super::inbox::Inbox;
use super::outgoing::{Item, Message};
use super::ring::{Done, IORING_SEND_ZC_REPORT_USAGE, Ring};
use super::socket::Socket;
use super::zero_copy::Choice;
use super::{DRAIN_PATIENCE, Regions};
use crate::failure::LaneFailure;
use crate::work::{FenceTag, WorkId};
use crossbeam_channel::Sender as Channel;
use io_uring::{opcode, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a lane tells the initiator.
#[derive(Debug)]
pub(super) enum Event {
    /// The memory of these writes is no longer used.
    Written { lane: usize, ids: Vec<WorkId>, bytes: u64 },
    /// The peer has the next fence.
    FenceAcked { lane: usize },
    /// Nothing more will come from this lane.
    Broken(LaneFailure),
}

/// Why the thread ends.
enum End {
    Asked,
    Broken(LaneFailure),
}

const WAKE: u64 = 0;
const ACK: u64 = 1;
/// Messages are numbered from here.
const MESSAGE: u64 = 2;

/// How long a lane that ends leaves a peer to acknowledge what was sent with zero-copy.
const SEND_PATIENCE: Duration = Duration::from_millis(100);

/// Everything the thread owns. Buffers that the kernel reads or writes are boxed, so that they stay
/// where they are.
pub(super) struct Sender {
    /// First, so that it is dropped before the buffers it may still use.
    ring: Ring,
    lane: usize,
    stream: Arc<Socket>,
    inbox: Arc<Inbox>,
    events: Channel<Event>,
    wire_bytes: Arc<AtomicU64>,
    choice: Choice,
    queue: VecDeque<Item>,
    /// Messages by number; `None` is a free number. One is being sent, the others wait for release.
    messages: Vec<Option<Message>>,
    sending: Option<usize>,
    /// Fences sent and not acknowledged, in order; as few as the initiator allows on their way.
    unacked: VecDeque<FenceTag>,
    ack: Box<[u8; HEADER_BYTES]>,
    ack_filled: usize,
    wakes: Box<[u8; 8]>,
    /// Keeps mapped what the messages point to.
    _regions: Arc<Regions>,
}

impl Sender {
    #[expect(clippy::too_many_arguments, reason = "the one place that puts a lane together")]
    pub(super) fn new(
        lane: usize,
        ring: Ring,
        stream: Arc<Socket>,
        inbox: Arc<Inbox>,
        events: Channel<Event>,
        wire_bytes: Arc<AtomicU64>,
        choice: Choice,
        regions: Arc<Regions>,
    ) -> Self {
        Self {
            lane,
            ring,
            stream,
            inbox,
            events,
            wire_bytes,
            choice,
            queue: VecDeque::new(),
            messages: Vec::new(),
            sending: None,
            unacked: VecDeque::new(),
            ack: Box::default(),
            ack_filled: 0,
            wakes: Box::default(),
            _regions: regions,
        }
    }

    /// Runs until the lane breaks or its owner says stop.
    pub(super) fn run(mut self) {
        if let Err(End::Broken(failure)) = self.drive() {
            tracing::debug!(lane = self.lane, ?failure, "lane ends");
            // Nobody listens only if the initiator is gone, and then nobody needs to know.
            let _ = self.events.send(Event::Broken(failure));
        }
        // Ends every operation on the socket at once; the peer learns of it too. Errors mean that
        // the socket is dead already.
        self.stream.shutdown();
        self.inbox.ring();
        if self.ring.drain(SEND_PATIENCE) {
            return;
        }
        // Zero-copy memory is held until the peer acknowledges it, which may be never:
        // disconnecting (connect(2), AF_UNSPEC) throws the send queue away.
        let _ = rustix::net::connect_unspec(&*self.stream);
        if !self.ring.drain(DRAIN_PATIENCE) {
            tracing::error!(
                lane = self.lane,
                "the kernel does not let go of a lane's buffers: leaking them"
            );
            std::mem::forget(self);
        }
    }

    fn drive(&mut self) -> Result<(), End> {
        self.ring.enable().map_err(|e| self.broken("enabling its io_uring", &e))?;
        self.listen_for_wake();
        self.listen_for_ack();
        loop {
            if !self.inbox.take(&mut self.queue, self.sending.is_none()) {
                return Err(End::Asked);
            }
            if self.sending.is_none()
                && let Some(message) = Message::build(&mut self.queue)
            {
                self.begin(message);
            }
            self.ring.wait().map_err(|e| self.broken("waiting in its io_uring", &e))?;
            while let Some(done) = self.ring.next() {
                self.handle(done)?;
            }
        }
    }

    fn handle(&mut self, done: Done) -> Result<(), End> {
        match done {
            Done::Operation { user_data: WAKE, result, .. } => {
                result.map_err(|e| self.broken("reading its wake-up", &e))?;
                self.listen_for_wake();
            }
            Done::Operation { user_data: ACK, result, .. } => {
                let bytes = result.map_err(|e| self.broken("receiving", &e))?;
                self.acked(bytes)?;
            }
            Done::Operation { user_data, result, more } => {
                self.sent(number(user_data), result, more)?
            }
            Done::Released { user_data, copied } => {
                self.choice.reported(copied);
                let number = number(user_data);
                self.message(number).unreleased -= 1;
                self.finish(number);
            }
        }
        Ok(())
    }

    fn begin(&mut self, message: Message) {
        let number = match self.messages.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.messages.push(None);
                self.messages.len() - 1
            }
        };
        if let Some(tag) = message.fence {
            self.unacked.push_back(tag);
        }
        self.messages[number] = Some(message);
        self.sending = Some(number);
        self.send(number);
    }

    /// Sends what remains of a message.
    fn send(&mut self, number: usize) {
        let fd = types::Fd(self.stream.as_raw_fd());
        let message = self.messages[number].as_mut().expect("it is being sent");
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let header = message.vector.message();
        let entry = if self.choice.for_frame(message.payload_bytes) {
            opcode::SendMsgZc::new(fd, header)
                .ioprio(IORING_SEND_ZC_REPORT_USAGE)
                .flags(flags.cast_unsigned())
                .build()
        } else {
            opcode::SendMsg::new(fd, header).flags(flags.cast_unsigned()).build()
        };
        // SAFETY: the header and its vector are on the heap and stay untouched until this operation
        // is done (`sent`); what the vector points to is the message's own `head` and registered
        // regions, and the message stays in `messages`, the regions in `self._regions`, until the
        // kernel has released both. If it never does, `run` leaks them.
        unsafe { self.ring.push(entry.user_data(MESSAGE + number as u64)) };
    }

    fn sent(&mut self, number: usize, result: io::Result<usize>, more: bool) -> Result<(), End> {
        let message = self.message(number);
        message.unreleased += usize::from(more);
        match result {
            Ok(0) => return Err(End::Broken(LaneFailure::Closed { lane: self.lane })),
            Ok(bytes) => {
                message.vector.advance(bytes);
                self.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            }
            // A kernel without the report (6.1), or no room to pin: the plain way always works.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOMEM | libc::ENOBUFS)
                ) && self.choice.refused() => {}
            // Memory that went away since it was looked at: once it is replaced by zeros, the rest
            // goes. Whoever posted it hears of it from the region.
            Err(e)
                if e.raw_os_error() == Some(libc::EFAULT) && self.message(number).touch_rest() => {}
            Err(e) => return Err(self.broken("sending", &e)),
        }
        if self.message(number).vector.is_empty() {
            self.sending = None;
            self.finish(number);
        } else {
            self.send(number);
        }
        Ok(())
    }

    /// Reports a message whose last byte is sent and whose memory is free again.
    fn finish(&mut self, number: usize) {
        if self.sending == Some(number) || self.message(number).unreleased > 0 {
            return;
        }
        let message = self.messages[number].take().expect("finished once");
        if !message.ids.is_empty() {
            let (ids, bytes) = (message.ids, message.payload_bytes);
            // As above: nobody listens only if nobody needs to know.
            let _ = self.events.send(Event::Written { lane: self.lane, ids, bytes });
        }
    }

    fn acked(&mut self, bytes: usize) -> Result<(), End> {
        if bytes == 0 {
            return Err(End::Broken(LaneFailure::Closed { lane: self.lane }));
        }
        self.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.ack_filled += bytes;
        if self.ack_filled == HEADER_BYTES {
            self.ack_filled = 0;
            match Header::decode(&self.ack) {
                Ok(Header::FenceAck(tag)) if self.unacked.front() == Some(&tag) => {
                    self.unacked.pop_front();
                    let _ = self.events.send(Event::FenceAcked { lane: self.lane });
                }
                Ok(other) => {
                    return Err(
                        self.protocol(format!("an answer that nothing asked for: {other:?}"))
                    );
                }
                Err(what) => return Err(self.protocol(what)),
            }
        }
        self.listen_for_ack();
        Ok(())
    }

    fn listen_for_wake(&mut self) {
        let (buffer, len) = (self.wakes.as_mut_ptr(), self.wakes.len() as u32);
        let entry = opcode::Read::new(types::Fd(self.inbox.bell()), buffer, len).build();
        // SAFETY: the buffer is boxed, owned by `self` and touched by nobody else; `run` waits for
        // the operation before it drops it.
        unsafe { self.ring.push(entry.user_data(WAKE)) };
    }

    fn listen_for_ack(&mut self) {
        let rest = &mut self.ack[self.ack_filled..];
        let (buffer, len) = (rest.as_mut_ptr(), rest.len() as u32);
        let entry = opcode::Recv::new(types::Fd(self.stream.as_raw_fd()), buffer, len).build();
        // SAFETY: as above; `acked` reads the buffer only while no operation fills it.
        unsafe { self.ring.push(entry.user_data(ACK)) };
    }

    fn message(&mut self, number: usize) -> &mut Message {
        self.messages[number].as_mut().expect("the kernel answers for messages that it holds")
    }

    fn broken(&self, operation: &'static str, error: &io::Error) -> End {
        End::Broken(LaneFailure::os(self.lane, operation, error))
    }

    fn protocol(&self, what: String) -> End {
        End::Broken(LaneFailure::Protocol { lane: self.lane, what })
    }
}

fn number(user_data: u64) -> usize {
    usize::try_from(user_data - MESSAGE).expect("a number that we gave")
}
