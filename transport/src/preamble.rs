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

/// Version of everything that travels between two pageferries: preamble, control messages, frames.
pub const PROTOCOL_VERSION: u16 = 5;

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
    /// Another version.
    #[error(
        "the peer speaks protocol version {theirs}, this side {PROTOCOL_VERSION}: use the same pageferry release on both hosts"
    )]
    Version {
        /// The version that the peer named.
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
        if theirs != PROTOCOL_VERSION {
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
    fn another_version_is_named() {
        let mut bytes = Preamble { role: Role::Control, token: Token::default() }.encode();
        bytes[8] = 9;
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Version { theirs: 9 }));
    }
}
