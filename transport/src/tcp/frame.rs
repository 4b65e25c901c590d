//! The wire format of a lane, pure code. All integers are little endian.
//!
//! ```text
//!   header, 16 bytes             write frame             fence    fence ack (target to initiator)    last fence
//!     0  magic   u16 "PF"
//!     2  kind    u8              1                       2        3                                  4
//!     3  zero    u8
//!     4  value   u32             number of descriptors   tag      tag                                tag
//!     8  length  u64             bytes of payload        0        0                                  0
//!
//!   write frame:  header | descriptors, 16 bytes each | payload, back to back in their order
//!   descriptor:   key u32 | length u32 | address u64
//! ```
//!
//! A last fence is not acknowledged: the target reads nothing behind it.

use crate::stripe::STRIPE_BYTES;
use crate::work::FenceTag;

/// Length of an encoded header in bytes.
pub(super) const HEADER_BYTES: usize = 16;

/// Length of an encoded descriptor in bytes.
pub(super) const DESCRIPTOR_BYTES: usize = 16;

/// Descriptors of one write frame: 1 MiB of scattered 4 KiB pages, well below the kernel's limit of
/// 1024 pieces for one message (`UIO_MAXIOV`).
pub(super) const DESCRIPTORS_MAX: usize = 256;

/// Payload of one write frame at most: the largest single write there is.
pub(super) const PAYLOAD_BYTES_MAX: u64 = STRIPE_BYTES;

const MAGIC: [u8; 2] = *b"PF";
const KIND_WRITE: u8 = 1;
const KIND_FENCE: u8 = 2;
const KIND_FENCE_ACK: u8 = 3;
const KIND_LAST_FENCE: u8 = 4;

/// What a frame begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Header {
    /// Descriptors and payload follow.
    Write { descriptors: usize, payload_bytes: u64 },
    /// Everything before it on this lane has been sent.
    Fence(FenceTag),
    /// The fence has come.
    FenceAck(FenceTag),
    /// As a fence, and nothing comes behind it.
    LastFence(FenceTag),
}

/// Where a piece of the payload goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) key: u32,
    pub(super) len: u32,
    pub(super) addr: u64,
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER_BYTES] {
        let (kind, value, length) = match self {
            Self::Write { descriptors, payload_bytes } => {
                let descriptors = u32::try_from(descriptors).expect("bounded by DESCRIPTORS_MAX");
                (KIND_WRITE, descriptors, payload_bytes)
            }
            Self::Fence(tag) => (KIND_FENCE, tag.0, 0),
            Self::FenceAck(tag) => (KIND_FENCE_ACK, tag.0, 0),
            Self::LastFence(tag) => (KIND_LAST_FENCE, tag.0, 0),
        };
        let mut out = [0; HEADER_BYTES];
        out[..2].copy_from_slice(&MAGIC);
        out[2] = kind;
        out[4..8].copy_from_slice(&value.to_le_bytes());
        out[8..].copy_from_slice(&length.to_le_bytes());
        out
    }

    /// Reads what a peer sent, or says what is wrong with it.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, String> {
        let [m0, m1, kind, zero, v0, v1, v2, v3, length @ ..] = *bytes;
        let (value, length) = (u32::from_le_bytes([v0, v1, v2, v3]), u64::from_le_bytes(length));
        if [m0, m1] != MAGIC || zero != 0 {
            return Err("a frame without the magic".into());
        }
        match (kind, length) {
            (KIND_WRITE, _) => {
                let descriptors = value as usize;
                if descriptors == 0 || descriptors > DESCRIPTORS_MAX {
                    return Err(format!(
                        "a frame of {descriptors} descriptors (1 to {DESCRIPTORS_MAX} are allowed)"
                    ));
                }
                if length == 0 || length > PAYLOAD_BYTES_MAX {
                    return Err(format!(
                        "a frame of {length} bytes (1 to {PAYLOAD_BYTES_MAX} are allowed)"
                    ));
                }
                Ok(Self::Write { descriptors, payload_bytes: length })
            }
            (KIND_FENCE, 0) => Ok(Self::Fence(FenceTag(value))),
            (KIND_FENCE_ACK, 0) => Ok(Self::FenceAck(FenceTag(value))),
            (KIND_LAST_FENCE, 0) => Ok(Self::LastFence(FenceTag(value))),
            (kind, length) => Err(format!("a frame of unknown kind {kind} and length {length}")),
        }
    }
}

impl Descriptor {
    pub(super) fn encode(self) -> [u8; DESCRIPTOR_BYTES] {
        let mut out = [0; DESCRIPTOR_BYTES];
        out[..4].copy_from_slice(&self.key.to_le_bytes());
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..].copy_from_slice(&self.addr.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8; DESCRIPTOR_BYTES]) -> Self {
        let [k0, k1, k2, k3, l0, l1, l2, l3, addr @ ..] = *bytes;
        Self {
            key: u32::from_le_bytes([k0, k1, k2, k3]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            addr: u64::from_le_bytes(addr),
        }
    }

    /// Reads the descriptors of a write frame. Their lengths must be nonzero and add up to the
    /// payload that the header announced, or the stream would lose its step.
    pub(super) fn decode_all(bytes: &[u8], payload_bytes: u64) -> Result<Vec<Self>, String> {
        let (descriptors, rest) = bytes.as_chunks::<DESCRIPTOR_BYTES>();
        if !rest.is_empty() {
            return Err("a descriptor that is cut short".into());
        }
        let descriptors: Vec<_> = descriptors.iter().map(Self::decode).collect();
        if descriptors.iter().any(|descriptor| descriptor.len == 0) {
            return Err("a descriptor of zero bytes".into());
        }
        // No overflow: at most DESCRIPTORS_MAX lengths of 32 bits each.
        let total: u64 = descriptors.iter().map(|descriptor| u64::from(descriptor.len)).sum();
        if total != payload_bytes {
            return Err(format!("descriptors of {total} bytes for a payload of {payload_bytes}"));
        }
        Ok(descriptors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_header() -> impl Strategy<Value = Header> {
        prop_oneof![
            (1..=DESCRIPTORS_MAX, 1..=PAYLOAD_BYTES_MAX).prop_map(
                |(descriptors, payload_bytes)| Header::Write { descriptors, payload_bytes }
            ),
            any::<u32>().prop_map(|tag| Header::Fence(FenceTag(tag))),
            any::<u32>().prop_map(|tag| Header::FenceAck(FenceTag(tag))),
            any::<u32>().prop_map(|tag| Header::LastFence(FenceTag(tag))),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(header in any_header(), key: u32, len: u32, addr: u64) {
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
            let descriptor = Descriptor { key, len, addr };
            prop_assert_eq!(Descriptor::decode(&descriptor.encode()), descriptor);
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_never_exceed_the_limits(
            mut bytes: [u8; HEADER_BYTES], kind in 0u8..6, value in 0u32..600, table: Vec<u8>, payload: u64,
        ) {
            let _ = Header::decode(&bytes);
            bytes[..4].copy_from_slice(&[b'P', b'F', kind, 0]);
            bytes[4..8].copy_from_slice(&value.to_le_bytes());
            if let Ok(Header::Write { descriptors, payload_bytes }) = Header::decode(&bytes) {
                prop_assert!((1..=DESCRIPTORS_MAX).contains(&descriptors));
                prop_assert!((1..=PAYLOAD_BYTES_MAX).contains(&payload_bytes));
            }
            let _ = Descriptor::decode_all(&table, payload);
        }

        #[test]
        fn one_flipped_bit_of_magic_is_refused(header in any_header(), bit in 0usize..16) {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }

    #[test]
    fn descriptors_that_do_not_add_up_are_refused() {
        let one = Descriptor { key: 0, len: u32::MAX, addr: 0 }.encode();
        let table = [one; DESCRIPTORS_MAX].concat();
        assert!(Descriptor::decode_all(&table, 4096).is_err());
        assert!(Descriptor::decode_all(&one, u64::from(u32::MAX)).is_ok());
        assert!(Descriptor::decode_all(&[0; DESCRIPTOR_BYTES], 0).is_err());
        assert!(Descriptor::decode_all(&one[1..], 1).is_err());
    }
}
