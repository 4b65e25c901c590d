//! The first bytes of every TCP connection, by which the receiver tells the control connection from
//! a lane, and both from garbage. Fixed size, so that one read decides. The same bytes are the
//! private data of every queue pair's connection request.
//!
//! ```text
//!   offset 0   magic  "PGFERRY\0"      8 bytes
//!          8   protocol version        u16, little endian
//!         10   role                    u8: 0 control, 1 lane
//!         11   lane index              u8 (0 for control)
//!         12   session token           16 bytes (zero for the first control connection)
//! ```

use std::ops::RangeInclusive;

/// What a connection names: the version of the preamble, of Hello and Welcome, and of all else that
/// the two do not agree on by a feature. A destination does not answer a preamble, so a source never
/// names a version that the release before does not hear: a new one is heard for a release first
/// ([`VERSIONS_HEARD`]), and named by the next.
pub const PROTOCOL_VERSION: u16 = 6;

/// What a destination takes: what the release before names, and this one.
pub const VERSIONS_HEARD: RangeInclusive<u16> = 6..=6;

const _: () = assert!(
    *VERSIONS_HEARD.start() <= PROTOCOL_VERSION && PROTOCOL_VERSION <= *VERSIONS_HEARD.end(),
    "a release hears itself"
);

/// Length of an encoded preamble in bytes.
pub const PREAMBLE_BYTES: usize = 28;

/// A migration may use at most this many lanes.
pub const LANES_MAX: usize = 64;

const MAGIC: [u8; 8] = *b"PGFERRY\0";

/// Ties lanes and later control connections to the session that the destination opened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Token(pub [u8; 16]);

impl std::fmt::Debug for Token {
    /// Not the value: whoever knows it can write the guest's memory, and logs travel.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What a new connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Control messages.
    Control,
    /// Bulk writes, as the lane of this index.
    Lane(u8),
}

/// The decoded first bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What the connection is for.
    pub role: Role,
    /// Which session it belongs to.
    pub token: Token,
}

/// Why the first bytes of a connection were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// The magic is missing.
    #[error("the peer does not speak pageferry")]
    NotPageferry,
    /// A version that is not spoken here. The text reads the same at both ends: the source is told
    /// it, too.
    #[error("the source speaks protocol version {theirs}, the destination {}", heard(*theirs))]
    Version {
        /// The version that the source named.
        theirs: u16,
    },
    /// An unknown role or an impossible lane.
    #[error("the peer opened a connection for an unknown purpose ({role}, {lane})")]
    Role {
        /// The role byte.
        role: u8,
        /// The lane byte.
        lane: u8,
    },
}

/// What is heard here instead of this version, and which end is to be updated.
fn heard(theirs: u16) -> String {
    let (first, last) = (*VERSIONS_HEARD.start(), *VERSIONS_HEARD.end());
    let range = if first == last { first.to_string() } else { format!("{first} to {last}") };
    let end = if theirs < first { "source" } else { "destination" };
    format!("{range}: update pageferry at the {end}")
}

impl Preamble {
    /// The bytes to send first.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let mut out = [0; PREAMBLE_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        (out[10], out[11]) = match self.role {
            Role::Control => (0, 0),
            Role::Lane(lane) => (1, lane),
        };
        out[12..].copy_from_slice(&self.token.0);
        out
    }

    /// Reads what a peer sent.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, PreambleError> {
        if bytes[..8] != MAGIC {
            return Err(PreambleError::NotPageferry);
        }
        let theirs = u16::from_le_bytes([bytes[8], bytes[9]]);
        if !VERSIONS_HEARD.contains(&theirs) {
            return Err(PreambleError::Version { theirs });
        }
        let role = match (bytes[10], bytes[11]) {
            (0, 0) => Role::Control,
            (1, lane) if usize::from(lane) < LANES_MAX => Role::Lane(lane),
            (role, lane) => return Err(PreambleError::Role { role, lane }),
        };
        let mut token = Token::default();
        token.0.copy_from_slice(&bytes[12..]);
        Ok(Self { role, token })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: [u8; PREAMBLE_BYTES]) {
            let _ = Preamble::decode(&bytes);
        }

        #[test]
        fn what_is_encoded_is_decoded(lane in 0..LANES_MAX as u8, control: bool, token: [u8; 16]) {
            let role = if control { Role::Control } else { Role::Lane(lane) };
            let preamble = Preamble { role, token: Token(token) };
            prop_assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
    }

    #[test]
    fn another_version_is_named_with_the_end_to_update() {
        let mut bytes = Preamble { role: Role::Control, token: Token::default() }.encode();
        for theirs in (0..=u16::MAX).filter(|version| !VERSIONS_HEARD.contains(version)) {
            bytes[8..10].copy_from_slice(&theirs.to_le_bytes());
            assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Version { theirs }));
        }
        let said = |theirs| PreambleError::Version { theirs }.to_string();
        let versions = "the source speaks protocol version 5, the destination 6";
        assert_eq!(said(5), format!("{versions}: update pageferry at the source"));
        assert!(said(7).ends_with("update pageferry at the destination"), "{}", said(7));
    }
}
