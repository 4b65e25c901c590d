//! What the two ends tell each other in band, by SEND on lane 0: which memory is pinned, which is
//! wanted, and how far the initiator is. Pure code, no I/O; all integers little endian.
//!
//! ```text
//!   offset 0  kind     u8: 1 ready, 2 want, 3 progress
//!          1  entries  u8: 1 to READY_MAX for ready, 1 otherwise
//!          2  zero     u16
//!   ready     4 + 20 i  first stripe u64, region u32, stripes u32, key u32   target -> initiator
//!   want      4         first stripe u64, region u32, stripes u32            initiator -> target
//!   progress  4         bytes u64                                            initiator -> target
//! ```
//!
//! A stripe is counted from address zero: address / [`STRIPE_BYTES`](crate::STRIPE_BYTES).

/// Size of a receive buffer, and so of the longest message.
pub(crate) const MESSAGE_BYTES: usize = 256;

/// Entries of one `ready`.
pub(crate) const READY_MAX: usize = (MESSAGE_BYTES - HEADER_BYTES) / READY_BYTES;

const HEADER_BYTES: usize = 4;
const READY_BYTES: usize = 20;
const WANT_BYTES: usize = 16;
const PROGRESS_BYTES: usize = 8;

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
}

impl Message {
    /// Writes the message and returns its length.
    pub(crate) fn encode(&self, out: &mut [u8; MESSAGE_BYTES]) -> usize {
        let mut writer = Writer { out, at: 0 };
        match self {
            Self::Ready(grants) => {
                assert!((1..=READY_MAX).contains(&grants.len()), "the sender cuts its grants");
                writer.put(&[1, u8::try_from(grants.len()).expect("READY_MAX fits"), 0, 0]);
                for grant in grants {
                    writer.stripes(grant.stripes);
                    writer.put(&grant.key.to_le_bytes());
                }
            }
            Self::Want(stripes) => {
                writer.put(&[2, 1, 0, 0]);
                writer.stripes(*stripes);
            }
            Self::Progress(bytes) => {
                writer.put(&[3, 1, 0, 0]);
                writer.put(&bytes.to_le_bytes());
            }
        }
        writer.at
    }

    /// Reads what a peer sent, or says what is wrong with it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let malformed = || format!("a message of {} bytes that makes no sense", bytes.len());
        let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or_else(malformed)?;
        let entries = usize::from(header[1]);
        if header[2..] != [0, 0] {
            return Err(malformed());
        }
        match (header[0], entries, body.len()) {
            (1, 1..=READY_MAX, len) if len == entries * READY_BYTES => Ok(Self::Ready(
                body.chunks_exact(READY_BYTES)
                    .map(|entry| Grant { stripes: stripes(entry), key: u32_at(entry, WANT_BYTES) })
                    .collect(),
            )),
            (2, 1, WANT_BYTES) => Ok(Self::Want(stripes(body))),
            (3, 1, PROGRESS_BYTES) => Ok(Self::Progress(u64_at(body, 0))),
            (kind, ..) => Err(format!("a message of an unknown kind or size ({kind}, {})", bytes.len())),
        }
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
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_and_nothing_shorter_is(message in any_message()) {
            let mut bytes = [0xff; MESSAGE_BYTES];
            let len = message.encode(&mut bytes);
            prop_assert_eq!(Message::decode(&bytes[..len]), Ok(message));
            for shorter in 0..len {
                prop_assert!(Message::decode(&bytes[..shorter]).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 0u8..5) {
            let _ = Message::decode(&bytes);
            if bytes.len() >= 4 {
                (bytes[0], bytes[2], bytes[3]) = (kind, 0, 0);
                let _ = Message::decode(&bytes);
            }
        }
    }
}
