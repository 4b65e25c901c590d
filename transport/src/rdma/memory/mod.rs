//! Memory that devices may read and write: registrations, keys, limits.

pub(super) mod keys;
pub(super) mod lock_limit;
pub(super) mod pinner;
pub(super) mod registrar;
