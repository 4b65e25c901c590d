//! Deadlines and sizes that both ends keep.

use std::time::Duration;

/// For a connection to be made, and for a peer to say its first words. A live host on any network
/// answers within one or two retransmissions.
pub const SETUP_MAX: Duration = Duration::from_secs(5);

/// The beginning of the state region is populated ahead at both ends: no first touch in the
/// downtime. A QEMU without a video card stays below it.
pub const STATE_WARM_BYTES: usize = 1 << 20;
