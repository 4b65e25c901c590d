//! All of a KVM machine's state besides its memory, and its form on the wire.
//!
//! ```text
//!   blob:  magic (8)   version (4)   body length (4)   digest of the body (8)   body (postcard)
//! ```
//!
//! The digest finds accidents, not attackers; whoever can alter the blob can alter the guest's
//! memory too.

pub mod vcpu;
pub mod vm;

use pageferry_engine::error::{Error, Result};
use serde::{Deserialize, Serialize};
use vcpu::VcpuState;
use vm::{ClockState, VmState};
use xxhash_rust::xxh3::xxh3_64;

/// What a blob begins with.
const MAGIC: [u8; 8] = *b"PGFRYKVM";
/// Raised with every change of what a blob holds.
pub const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;

/// The state of a machine that is paused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// Interrupt controllers and interval timer.
    pub vm: VmState,
    /// What time it was in the guest.
    pub clock: ClockState,
    /// The vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// The serial port.
    pub serial: crate::console::serial::SerialState,
    /// What the payload guest's ledger is checked by, if that is what runs.
    pub payload: Option<super::payload::PayloadOptions>,
}

impl MachineState {
    /// Its form on the wire.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let body = postcard::to_stdvec(self)
            .map_err(|e| Error::Guest(format!("the machine's state cannot be encoded: {e}")))?;
        let len = u32::try_from(body.len()).map_err(|_| {
            Error::Guest(format!("a machine's state of {} bytes is too long", body.len()))
        })?;
        let mut blob = Vec::with_capacity(HEADER_BYTES + body.len());
        blob.extend(MAGIC);
        blob.extend(VERSION.to_le_bytes());
        blob.extend(len.to_le_bytes());
        blob.extend(xxh3_64(&body).to_le_bytes());
        blob.extend(body);
        Ok(blob)
    }

    /// Reads a blob; says what is wrong with one that it cannot take.
    pub fn decode(blob: &[u8]) -> Result<Self> {
        let wrong = |what: String| Error::Guest(format!("the device state that arrived {what}"));
        let cut = || wrong(format!("is cut short, at {} bytes", blob.len()));
        let (header, body) = blob.split_at_checked(HEADER_BYTES).ok_or_else(cut)?;
        let field = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if header[..8] != MAGIC {
            return Err(wrong("is not that of a KVM machine of pageferry".into()));
        }
        if field(8) != VERSION {
            return Err(wrong(format!(
                "is of version {}, and this pageferry knows version {VERSION}: use the same release on both hosts",
                field(8)
            )));
        }
        let body = match body.len().cmp(&(field(12) as usize)) {
            std::cmp::Ordering::Less => return Err(cut()),
            std::cmp::Ordering::Equal => body,
            std::cmp::Ordering::Greater => return Err(wrong("is longer than it says".into())),
        };
        let digest = u64::from(field(16)) | u64::from(field(20)) << 32;
        if xxh3_64(body) != digest {
            return Err(wrong("was altered on the way: its digest does not match".into()));
        }
        match postcard::take_from_bytes(body) {
            Ok((state, [])) => Ok(state),
            Ok(_) => Err(wrong("has bytes left over".into())),
            Err(e) => Err(wrong(format!("cannot be read: {e}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> MachineState {
        MachineState {
            vm: VmState::default(),
            clock: ClockState::default(),
            vcpus: vec![VcpuState::default(), VcpuState::default()],
            serial: Default::default(),
            payload: None,
        }
    }

    #[test]
    fn a_blob_is_read_as_it_was_written() {
        let blob = state().encode().unwrap();
        assert_eq!(MachineState::decode(&blob).unwrap(), state());
    }

    #[test]
    fn another_version_is_named() {
        let mut blob = state().encode().unwrap();
        blob[8] = 9;
        let error = MachineState::decode(&blob).unwrap_err().chain();
        assert!(error.contains("version 9"), "{error}");
    }

    proptest! {
        #[test]
        fn a_blob_that_was_cut_or_altered_is_refused(cut in any::<prop::sample::Index>(), flip in any::<prop::sample::Index>(), bit in 0u8..8) {
            let blob = state().encode().unwrap();
            prop_assert!(MachineState::decode(&blob[..cut.index(blob.len())]).is_err());
            let mut altered = blob.clone();
            altered[flip.index(blob.len())] ^= 1 << bit;
            prop_assert!(MachineState::decode(&altered).is_err());
        }

        #[test]
        fn garbage_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(MachineState::decode(&bytes).is_err());
        }
    }
}
