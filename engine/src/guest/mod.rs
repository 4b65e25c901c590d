//! What the engine needs of whoever runs the guest, at either end.
//!
//! ```text
//!   source:       preflight, facts, start_tracking ... arm, pause, begin_save, save, seal
//!                 any failure before seal(): resume()
//!   destination:  describe ... load, seal, run            any failure before seal(): discard()
//! ```

mod describe;
mod destination;
mod source;

pub(crate) use describe::always_alive;
pub use describe::{
    BLOCKS_MAX, BlockDescription, Facts, FixedCosts, GuestDescription, ImageDescription, Liveness,
    PLATFORM_BYTES_MAX, Vouched,
};
pub use destination::DestinationGuest;
pub use source::SourceGuest;
