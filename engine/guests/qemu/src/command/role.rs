//! At which end a QEMU is started.

/// Which end of a migration the QEMU is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It runs a guest that may be moved away later.
    Source,
    /// It waits to be filled.
    Destination,
}
