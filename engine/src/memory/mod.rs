//! Guest memory as the engine sees it: slots, each a shared mapping, laid end to end on one line of
//! pages.

pub mod bitmap;
pub mod digest;
mod extents;
pub mod file;
pub mod holes;
pub mod lost;
pub mod lost_page;
pub mod opened;
pub mod page;
pub mod prefault;
mod slots;
pub mod staging;
pub mod users;

pub use slots::{GuestMemory, MemorySlot, SlotSource};
