//! Asked in every wait and between pieces of long work: should this go on?

use crate::error::Result;

/// Fails if what is under way should stop: the operator cancelled, the peer aborted, the guest's
/// process ended.
pub type Watch<'w> = dyn FnMut() -> Result<()> + 'w;
