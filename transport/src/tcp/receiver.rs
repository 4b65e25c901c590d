//! The thread of one lane at the target: reads a frame, checks every address in it against the
//! exposed regions, and has the kernel place the payload there. One operation at a time.

use super::DRAIN_PATIENCE;
use super::frame::{DESCRIPTOR_BYTES, DESCRIPTORS_MAX, Descriptor, HEADER_BYTES, Header};
use super::placement::Shared;
use super::ring::{Done, Ring};
use super::socket::Socket;
use super::vector::Vector;
use crate::failure::LaneFailure;
use crate::work::FenceTag;
use crossbeam_channel::{Receiver as Channel, Sender};
use io_uring::{opcode, squeue, types};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What is said where it fails.
const RECEIVING: &str = "receiving";
const NO_PAGE: &str = "placing bytes in memory (is the file system behind it, a pool of huge pages, or a memory cgroup full?)";

/// Everything the thread owns. Buffers that the kernel fills are boxed, so that they stay where
/// they are.
pub(super) struct Receiver {
    /// First, so that it is dropped before the buffers it may still use.
    ring: Ring,
    lane: usize,
    stream: Arc<Socket>,
    shared: Arc<Shared>,
    header: Box<[u8; HEADER_BYTES]>,
    table: Box<[u8; DESCRIPTORS_MAX * DESCRIPTOR_BYTES]>,
    ack: Box<[u8; HEADER_BYTES]>,
    vector: Vector,
}

impl Receiver {
    pub(super) fn new(lane: usize, ring: Ring, stream: Arc<Socket>, shared: Arc<Shared>) -> Self {
        Self {
            lane,
            ring,
            stream,
            shared,
            header: Box::default(),
            table: Box::new([0; DESCRIPTORS_MAX * DESCRIPTOR_BYTES]),
            ack: Box::default(),
            vector: Vector::with_capacity(DESCRIPTORS_MAX + 1),
        }
    }

    /// Runs until the last fence, or until the lane breaks or is shut down by its owner, and tells
    /// then whether the kernel has let go of all memory; that it may still be placing bytes no
    /// socket that is shut down should allow. The ring, which takes longer to go, is kept until
    /// `release` is dropped: a guest may be paused.
    pub(super) fn run(mut self, tell: &Sender<bool>, release: &Channel<()>) {
        match self.drive() {
            Ok(last) => {
                // Nothing is under way, and nothing more will be begun. Told first: whoever has
                // seen the fence on every lane finds every lane ended.
                let _ = tell.send(true);
                if !self.shared.arrive(self.lane, last) {
                    self.shared.fail(self.out_of_order(last));
                }
            }
            Err(failure) => {
                tracing::debug!(lane = self.lane, ?failure, "lane ends");
                self.shared.fail(failure);
                // The peer learns of it too, and an operation that is still under way ends.
                self.stream.shutdown();
                let settled = self.ring.drain(DRAIN_PATIENCE);
                // Nobody listens if the link was never finished.
                let _ = tell.send(settled);
                if !settled {
                    tracing::error!(
                        lane = self.lane,
                        "the kernel does not let go of a lane's buffers: leaking them"
                    );
                    std::mem::forget(self);
                    return;
                }
            }
        }
        let _ = release.recv();
        self.stream.shutdown();
    }

    /// Returns the last fence's tag.
    fn drive(&mut self) -> Result<FenceTag, LaneFailure> {
        self.ring.enable().map_err(|e| self.broken("enabling its io_uring", &e))?;
        self.vector.clear();
        self.expect_header();
        self.fill(0)?;
        loop {
            match Header::decode(&self.header).map_err(|what| self.protocol(what))? {
                Header::Write { descriptors, payload_bytes } => {
                    self.place(descriptors, payload_bytes)?
                }
                Header::Fence(tag) => self.fence(tag)?,
                Header::LastFence(tag) => return Ok(tag),
                Header::FenceAck(_) => {
                    return Err(self.protocol("an answer to a fence at the target".into()));
                }
            }
        }
    }

    /// Places one frame, and reads the header of the next behind it in the same call.
    fn place(&mut self, descriptors: usize, payload_bytes: u64) -> Result<(), LaneFailure> {
        let table_bytes = descriptors * DESCRIPTOR_BYTES;
        self.vector.clear();
        self.vector.push(self.table.as_mut_ptr().expose_provenance(), table_bytes);
        self.fill(0)?;
        let descriptors = Descriptor::decode_all(&self.table[..table_bytes], payload_bytes)
            .map_err(|what| self.protocol(what))?;

        self.vector.clear();
        let exposed = self.shared.exposed();
        for Descriptor { key, len, addr } in descriptors {
            let (region, offset) =
                exposed.place(key, addr, len).map_err(|what| self.protocol(what))?;
            // Inside its mapping, so the sum cannot wrap.
            self.vector.push(region.as_ptr().expose_provenance() + offset, len as usize);
        }
        drop(exposed);
        self.expect_header();
        self.fill(usize::try_from(payload_bytes).expect("bounded by PAYLOAD_BYTES_MAX"))
    }

    /// Every byte before a fence has been placed when its header is read.
    fn fence(&mut self, tag: FenceTag) -> Result<(), LaneFailure> {
        if !self.shared.arrive(self.lane, tag) {
            return Err(self.out_of_order(tag));
        }
        *self.ack = Header::FenceAck(tag).encode();
        let mut sent = 0;
        while sent < HEADER_BYTES {
            let rest = &self.ack[sent..];
            let entry = opcode::Send::new(
                types::Fd(self.stream.as_raw_fd()),
                rest.as_ptr(),
                rest.len() as u32,
            )
            .flags(libc::MSG_NOSIGNAL)
            .build();
            sent += self.run_one("acknowledging a fence", entry)?;
        }
        self.vector.clear();
        self.expect_header();
        self.fill(0)
    }

    fn expect_header(&mut self) {
        self.vector.push(self.header.as_mut_ptr().expose_provenance(), HEADER_BYTES);
    }

    /// Receives until the vector is full; its first `payload_bytes` are counted as placed.
    fn fill(&mut self, mut payload_bytes: usize) -> Result<(), LaneFailure> {
        while !self.vector.is_empty() {
            let fd = types::Fd(self.stream.as_raw_fd());
            // Not MSG_WAITALL: it is no faster here, and a slow peer's progress would not show
            // before a whole frame has come.
            let entry = opcode::RecvMsg::new(fd, self.vector.message()).build();
            let bytes = self.run_one(RECEIVING, entry)?;
            self.vector.advance(bytes);
            let placed = bytes.min(payload_bytes);
            payload_bytes -= placed;
            self.shared.placed_bytes.fetch_add(placed as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Runs one operation to its end and returns the bytes it moved, at least one.
    ///
    /// Private, and called with operations on this thread's own buffers, its own vector and exposed
    /// regions only.
    fn run_one(
        &mut self,
        operation: &'static str,
        entry: squeue::Entry,
    ) -> Result<usize, LaneFailure> {
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Err(LaneFailure::Closed { lane: self.lane });
        }
        // SAFETY: the buffers are boxed and owned by `self`; exposed regions stay mapped until the
        // target has heard that this lane has ended; and this function returns only when the
        // operation is done. Should the ring itself fail, `run` waits for the operation or leaks
        // `self` and with it the buffers and, through `shared`, the regions.
        unsafe { self.ring.push(entry) };
        loop {
            self.ring.wait().map_err(|e| self.broken("waiting in its io_uring", &e))?;
            if let Some(Done::Operation { result, .. }) = self.ring.next() {
                return match result {
                    Ok(0) => Err(LaneFailure::Closed { lane: self.lane }),
                    Ok(bytes) => Ok(bytes),
                    // The buffers are mapped, so it is their pages that cannot be had.
                    Err(e) if operation == RECEIVING && e.raw_os_error() == Some(libc::EFAULT) => {
                        Err(self.broken(NO_PAGE, &e))
                    }
                    Err(e) => Err(self.broken(operation, &e)),
                };
            }
        }
    }

    fn broken(&self, operation: &'static str, error: &io::Error) -> LaneFailure {
        LaneFailure::os(self.lane, operation, error)
    }

    fn out_of_order(&self, tag: FenceTag) -> LaneFailure {
        self.protocol(format!("the fence {} again, or out of order", tag.0))
    }

    fn protocol(&self, what: String) -> LaneFailure {
        LaneFailure::Protocol { lane: self.lane, what }
    }
}
