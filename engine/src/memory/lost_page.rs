//! Lost pages of guest memory as the operator is told of them, and his choice what becomes of them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What becomes of a guest some of whose pages the hardware lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Poisoned {
    /// It stays here.
    #[default]
    Refuse,
    /// It is moved, and a page that can no longer be read when it has to be sent arrives as zeros.
    Zero,
}

/// A lost page, as the operator is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostPage {
    /// The memory block.
    pub block: String,
    /// Of its first byte in the block.
    pub offset: u64,
    /// Length in bytes: a page, or a huge page.
    pub bytes: u64,
    /// Its address as the guest knows it, where that is known.
    pub guest_physical: Option<u64>,
}

/// Pages that a message names one by one.
const NAMED_MAX: usize = 4;

impl fmt::Display for LostPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.block, self.offset)?;
        match self.guest_physical {
            Some(address) => write!(f, " (guest-physical {address:#x})"),
            None => Ok(()),
        }
    }
}

/// Some pages by name, and how many more there are.
#[must_use]
pub fn name(pages: &[LostPage]) -> String {
    let named: Vec<_> = pages.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    let more = match pages.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    named.join(", ") + &more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pages_are_named_by_the_first_of_them() {
        let page =
            |offset| LostPage { block: "ram".into(), offset, bytes: 4096, guest_physical: None };
        assert_eq!(name(&[page(0x1000)]), "ram at 0x1000");
        let pages: Vec<_> = (0..6).map(|page_number| page(page_number * 4096)).collect();
        assert_eq!(
            name(&pages),
            "ram at 0x0, ram at 0x1000, ram at 0x2000, ram at 0x3000 and 2 more"
        );
    }
}
