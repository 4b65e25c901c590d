//! The verbs, as objects that free themselves.

pub(super) mod address;
pub(super) mod cm;
pub(super) mod objects;
pub(super) mod queue_pair;
pub(super) mod words;
