//! What the two ends tell each other in band, by SEND: fences on every lane, on lane 0 which memory
//! is pinned, which is wanted, and how far the other is. Pure code, no I/O; all integers little
//! endian.
//!
//! ```text
//!   offset 0  kind     u8: 1 ready, 2 want, 3 progress, 4 fence, 5 reached, 6 taken, 7 shift, 8 last fence
//!          1  entries  u8: 1 to READY_MAX for ready, 1 otherwise
//!          2  taken    u16: messages that the sender has taken of the receiver's, see flow.rs
//!   ready     4 + 20 i  first stripe u64, region u32, stripes u32, key u32   target -> initiator
//!   want      4         first stripe u64, region u32, stripes u32            initiator -> target
//!   progress  4         bytes u64                                            initiator -> target
//!   fence     4         bytes u64, tag u32                                   initiator -> target, on every lane
//!   last fence          as a fence; nothing comes behind it
//!   reached   4         tag u32                                              target -> initiator
//!   taken     4                                                              either way
//!   shift     4         by u64, region u32                                   target -> initiator
//! ```
//!
//! A stripe is counted from address zero: address / [`STRIPE_BYTES`](crate::STRIPE_BYTES).

use crate::work::FenceTag;

/// Size of a receive buffer, and so of the longest message.
pub(crate) const MESSAGE_BYTES: usize = 256;

/// Entries of one `ready`.
pub(crate) const READY_MAX: usize = (MESSAGE_BYTES - HEADER_BYTES) / READY_BYTES;

const HEADER_BYTES: usize = 4;
const READY_BYTES: usize = 20;
const WANT_BYTES: usize = 16;
const PROGRESS_BYTES: usize = 8;
const FENCE_BYTES: usize = 12;
const REACHED_BYTES: usize = 4;
const SHIFT_BYTES: usize = 12;

const _: () = assert!(READY_MAX >= 1 && READY_MAX <= u8::MAX as usize);

/// Stripes of one exposed region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stripes {
    /// The region's key in the contract: its index.
    pub(crate) region: u32,
    pub(crate) first: u64,
    pub(crate) count: u32,
}

/// Stripes that may be written now, and the NIC's key for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) stripes: Stripes,
    pub(crate) key: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// At most [`READY_MAX`] grants.
    Ready(Vec<Grant>),
    /// Pin these, please: somebody wants to write there and nobody said so before.
    Want(Stripes),
    /// So many bytes have been written so far.
    Progress(u64),
    /// Everything that was posted before it on this lane lies before it: so many bytes on all lanes
    /// together.
    Fence { tag: FenceTag, bytes: u64, is_last: bool },
    /// This fence has come on every lane, and this host's processor sees what was written before
    /// it.
    Reached(FenceTag),
    /// Nothing but what every message says of those that were taken.
    Taken,
    /// The device knows this region by other addresses than the contract: this must be added,
    /// modulo 2^64. Comes before any key of that region.
    Shift { region: u32, by: u64 },
}

impl Message {
    /// Whether the receiver counts it among those that it has taken ([`super::flow`]).
    pub(crate) fn counts(&self) -> bool {
        !matches!(self, Self::Fence { .. } | Self::Taken)
    }

    /// Writes the message and returns its length.
    pub(crate) fn encode(&self, taken: u16, out: &mut [u8; MESSAGE_BYTES]) -> usize {
        let mut writer = Writer { out, at: 0 };
        let [low, high] = taken.to_le_bytes();
        match self {
            Self::Ready(grants) => {
                assert!((1..=READY_MAX).contains(&grants.len()), "the sender cuts its grants");
                writer.put(&[1, u8::try_from(grants.len()).expect("READY_MAX fits"), low, high]);
                for grant in grants {
                    writer.stripes(grant.stripes);
                    writer.put(&grant.key.to_le_bytes());
                }
            }
            Self::Want(stripes) => {
                writer.put(&[2, 1, low, high]);
                writer.stripes(*stripes);
            }
            Self::Progress(bytes) => {
                writer.put(&[3, 1, low, high]);
                writer.put(&bytes.to_le_bytes());
            }
            Self::Fence { tag, bytes, is_last } => {
                writer.put(&[if *is_last { 8 } else { 4 }, 1, low, high]);
                writer.put(&bytes.to_le_bytes());
                writer.put(&tag.0.to_le_bytes());
            }
            Self::Reached(tag) => {
                writer.put(&[5, 1, low, high]);
                writer.put(&tag.0.to_le_bytes());
            }
            Self::Taken => writer.put(&[6, 1, low, high]),
            Self::Shift { region, by } => {
                writer.put(&[7, 1, low, high]);
                writer.put(&by.to_le_bytes());
                writer.put(&region.to_le_bytes());
            }
        }
        writer.at
    }

    /// Reads what a peer sent and how many messages it has taken, or says what is wrong with it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, u16), String> {
        let malformed = || format!("a message of {} bytes that makes no sense", bytes.len());
        let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or_else(malformed)?;
        let entries = usize::from(header[1]);
        let taken = u16::from_le_bytes([header[2], header[3]]);
        let message = match (header[0], entries, body.len()) {
            (1, 1..=READY_MAX, len) if len == entries * READY_BYTES => Self::Ready(
                body.chunks_exact(READY_BYTES)
                    .map(|entry| Grant { stripes: stripes(entry), key: u32_at(entry, WANT_BYTES) })
                    .collect(),
            ),
            (2, 1, WANT_BYTES) => Self::Want(stripes(body)),
            (3, 1, PROGRESS_BYTES) => Self::Progress(u64_at(body, 0)),
            (kind @ (4 | 8), 1, FENCE_BYTES) => Self::Fence {
                tag: FenceTag(u32_at(body, PROGRESS_BYTES)),
                bytes: u64_at(body, 0),
                is_last: kind == 8,
            },
            (5, 1, REACHED_BYTES) => Self::Reached(FenceTag(u32_at(body, 0))),
            (6, 1, 0) => Self::Taken,
            (7, 1, SHIFT_BYTES) => {
                Self::Shift { region: u32_at(body, PROGRESS_BYTES), by: u64_at(body, 0) }
            }
            (kind, ..) => {
                return Err(format!(
                    "a message of an unknown kind or size ({kind}, {})",
                    bytes.len()
                ));
            }
        };
        Ok((message, taken))
    }
}

struct Writer<'a> {
    out: &'a mut [u8; MESSAGE_BYTES],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn stripes(&mut self, stripes: Stripes) {
        self.put(&stripes.first.to_le_bytes());
        self.put(&stripes.region.to_le_bytes());
        self.put(&stripes.count.to_le_bytes());
    }
}

/// The stripes at the beginning of an entry, whose length the caller has checked.
fn stripes(entry: &[u8]) -> Stripes {
    Stripes { first: u64_at(entry, 0), region: u32_at(entry, 8), count: u32_at(entry, 12) }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_stripes() -> impl Strategy<Value = Stripes> {
        any::<(u32, u64, u32)>().prop_map(|(region, first, count)| Stripes { region, first, count })
    }

    fn any_message() -> impl Strategy<Value = Message> {
        let grant = (any_stripes(), any::<u32>()).prop_map(|(stripes, key)| Grant { stripes, key });
        prop_oneof![
            prop::collection::vec(grant, 1..=READY_MAX).prop_map(Message::Ready),
            any_stripes().prop_map(Message::Want),
            any::<u64>().prop_map(Message::Progress),
            any::<(u32, u64, bool)>().prop_map(|(tag, bytes, is_last)| Message::Fence {
                tag: FenceTag(tag),
                bytes,
                is_last
            }),
            any::<u32>().prop_map(|tag| Message::Reached(FenceTag(tag))),
            Just(Message::Taken),
            any::<(u32, u64)>().prop_map(|(region, by)| Message::Shift { region, by }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_and_nothing_shorter_is(message in any_message(), taken: u16) {
            let mut bytes = [0xff; MESSAGE_BYTES];
            let len = message.encode(taken, &mut bytes);
            prop_assert_eq!(Message::decode(&bytes[..len]), Ok((message, taken)));
            for shorter in 0..len {
                prop_assert!(Message::decode(&bytes[..shorter]).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 0u8..9) {
            let _ = Message::decode(&bytes);
            if bytes.len() >= 4 {
                bytes[0] = kind;
                let _ = Message::decode(&bytes);
            }
        }
    }
}
