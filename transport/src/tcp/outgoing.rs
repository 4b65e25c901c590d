//! A message on its way out: frame header, descriptors and a fence in a buffer of ours, payload
//! straight from registered memory, all in one vector for one `sendmsg`.

use super::frame::{
    DESCRIPTOR_BYTES, DESCRIPTORS_MAX, Descriptor, HEADER_BYTES, Header, PAYLOAD_BYTES_MAX,
};
use super::vector::Vector;
use crate::work::{FenceTag, WorkId, WorkRequest};
use std::collections::VecDeque;

/// A frame is closed when its payload would pass this: large enough that the cost of a frame does
/// not show, small enough that completions and credits flow steadily.
const PAYLOAD_BYTES_TARGET: u64 = 1 << 20;

const _: () = assert!(PAYLOAD_BYTES_TARGET <= PAYLOAD_BYTES_MAX);

/// What a lane is asked to carry.
#[derive(Debug, Clone, Copy)]
pub(super) enum Item {
    /// One write; its memory belongs to a registered region.
    Write(Piece),
    /// A fence behind all writes before it.
    Fence(FenceTag),
    /// The same, and nothing comes behind it.
    LastFence(FenceTag),
}

/// A write without its reference count: the link keeps registered regions mapped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    id: WorkId,
    local: usize,
    remote: Descriptor,
}

impl Piece {
    /// The request must have passed its check, so that its length fits.
    pub(super) fn of(request: &WorkRequest) -> Self {
        let len = u32::try_from(request.local.len()).expect("a write is no longer than a stripe");
        let remote = Descriptor { key: request.remote.key.0, len, addr: request.remote.addr };
        Self { id: request.id, local: request.local.as_ptr().expose_provenance(), remote }
    }
}

/// One message: a write frame, a fence, or one behind the other.
#[derive(Debug)]
pub(crate) struct Message {
    /// Header, descriptors and fence: only the vector looks at them.
    _head: Vec<u8>,
    pub(super) vector: Vector,
    /// The writes it carries.
    pub(super) ids: Vec<WorkId>,
    pub(super) payload_bytes: u64,
    /// The fence behind them, if the peer will acknowledge it.
    pub(super) fence: Option<FenceTag>,
    /// Zero-copy sends whose memory the kernel still holds.
    pub(super) unreleased: usize,
}

impl Message {
    /// Takes from the front of `items` what fits one message; `None` if there is nothing.
    pub(super) fn build(items: &mut VecDeque<Item>) -> Option<Self> {
        let mut descriptors: Vec<Descriptor> = Vec::new();
        let mut pieces: Vec<(usize, usize)> = Vec::new();
        let (mut ids, mut payload_bytes, mut tail) = (Vec::new(), 0, None);
        while let Some(&item) = items.front() {
            let Piece { id, local, remote } = match item {
                Item::Write(piece) => piece,
                Item::Fence(tag) => {
                    tail = Some(Header::Fence(tag));
                    items.pop_front();
                    break;
                }
                Item::LastFence(tag) => {
                    tail = Some(Header::LastFence(tag));
                    items.pop_front();
                    break;
                }
            };
            let bytes = u64::from(remote.len);
            // Pieces are bounded too: what is one run on the other side may be many on this one.
            let full = payload_bytes + bytes > PAYLOAD_BYTES_TARGET
                || descriptors.len().max(pieces.len()) == DESCRIPTORS_MAX;
            if full && !ids.is_empty() {
                break;
            }
            items.pop_front();
            ids.push(id);
            payload_bytes += bytes;
            match descriptors.last_mut() {
                Some(last)
                    if last.key == remote.key
                        && last.addr.checked_add(u64::from(last.len)) == Some(remote.addr) =>
                {
                    last.len += remote.len;
                }
                _ => descriptors.push(remote),
            }
            match pieces.last_mut() {
                Some((start, len)) if *start + *len == local => *len += remote.len as usize,
                _ => pieces.push((local, remote.len as usize)),
            }
        }
        if ids.is_empty() && tail.is_none() {
            return None;
        }

        let mut head = Vec::with_capacity(2 * HEADER_BYTES + descriptors.len() * DESCRIPTOR_BYTES);
        if !ids.is_empty() {
            head.extend(Header::Write { descriptors: descriptors.len(), payload_bytes }.encode());
            descriptors.iter().for_each(|descriptor| head.extend(descriptor.encode()));
        }
        let tail_at = head.len();
        tail.iter().for_each(|header| head.extend(header.encode()));
        let start = head.as_ptr().expose_provenance();
        let mut vector = Vector::with_capacity(pieces.len() + 2);
        vector.push(start, tail_at);
        pieces.iter().for_each(|&(local, len)| vector.push(local, len));
        vector.push(start + tail_at, head.len() - tail_at);
        let fence = match tail {
            Some(Header::Fence(tag)) => Some(tag),
            _ => None,
        };
        Some(Self { _head: head, vector, ids, payload_bytes, fence, unreleased: 0 })
    }

    /// Touches what remains to be sent. True if memory was lost there, and is replaced now.
    pub(super) fn touch_rest(&self) -> bool {
        // SAFETY: `build` put the message's own head and pieces of registered regions there, which
        // stay mapped.
        self.vector.rest().fold(
            false,
            |lost, (address, len)| unsafe { crate::region::touch(address, len) } | lost,
        )
    }
}
