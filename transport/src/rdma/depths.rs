//! How deep queues are, and how memory is cut for registration.

use crate::fences::FENCES_MAX;
use crate::rdma::lane;
use crate::rdma::lane::{MESSAGES_MAX, RESERVED, WRITES_MIN};
use crate::rdma::verbs::queue_pair::Depths;
use crate::stripe::STRIPE_BYTES;

/// Receives of the target on each lane, if the device lets it. Each fence and each message takes
/// one; they go back as soon as the service thread sees a completion.
const TARGET_RECEIVES: usize = 1024;

/// What they must be at least: nobody sends more at a time.
const TARGET_RECEIVES_MIN: usize = FENCES_MAX + lane::flow::RECEIVES;

// A device with shallower queues is refused.
const _: () =
    assert!(TARGET_RECEIVES_MIN <= RESERVED + WRITES_MIN && TARGET_RECEIVES_MIN <= TARGET_RECEIVES);

pub(crate) const TARGET_DEPTHS: Depths =
    Depths { sends: MESSAGES_MAX, receives: TARGET_RECEIVES, messages: MESSAGES_MAX };

pub(crate) fn initiator_depths(writes: usize) -> Depths {
    Depths { sends: writes + RESERVED, receives: lane::flow::RECEIVES, messages: RESERVED }
}

/// Stripes of one registration.
pub(crate) fn chunk_stripes(chunk_bytes: usize) -> usize {
    (chunk_bytes / STRIPE_BYTES as usize).max(1)
}
