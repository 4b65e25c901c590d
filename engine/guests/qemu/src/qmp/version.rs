//! The version of a QEMU.

use serde::Deserialize;
use std::fmt;

/// QEMU's version, from its greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// 10 in 10.0.2.
    pub major: u32,
    /// 0 in 10.0.2.
    pub minor: u32,
    /// 2 in 10.0.2.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

pub(crate) fn version_in(greeting: &[u8]) -> Option<Version> {
    #[derive(Deserialize)]
    struct Greeting {
        #[serde(rename = "QMP")]
        qmp: Versions,
    }
    #[derive(Deserialize)]
    struct Versions {
        version: Qemu,
    }
    #[derive(Deserialize)]
    struct Qemu {
        qemu: Version,
    }
    serde_json::from_slice(greeting).ok().map(|greeting: Greeting| greeting.qmp.version.qemu)
}
