//! Placeholder, replaced by the links.
