//! What the two ends say to each other on the control connection. No I/O here but the framing.
//!
//! ```text
//!   source                                                  destination
//!     | -- preamble, Hello { guest, lanes, features } --------> | same machine, same memory?
//!     | <---------------------- Welcome { token, features } ----- |
//!     | == lanes open, each with the token ===================> |
//!     |    tracking on, touched pages found                     |
//!     | -- Offer { touched, lanes } ---------------------------> | room for it? memory exposed,
//!     | <---------------------------- Accept { regions, state } -- | prefault under way
//!     |    rounds: writes and fences in the lanes               |
//!     |    pause, last sync, remaining, device state, fence    |
//!     | -- Prepare { fence, state_bytes } ----------------------> | fence; load; revoke
//!     | <-------------------------------------------- Ready ---- |
//!     |    seal: this side never resumes by itself from here    |
//!     | -- Commit ----------------------------------------------> | seal, run
//!     | <------------------------------------------ Running ---- |
//!     |    end the guest here                                   |
//! ```
//!
//! Either side may say Abort instead of its next message. That is eight messages for a migration
//! without incident, however large the guest and however many its rounds. Who may run the guest at
//! each moment is [`phase`]'s affair.

pub(crate) mod bounded;
pub mod control;
pub mod features;
pub mod message;
pub mod phase;
pub mod refusal;

pub use control::Control;
pub use features::Features;
pub use message::{
    Abort, Accept, Cause, Hello, Lanes, Message, Offer, Prepare, RdmaAnswer, Ready, Running,
    Welcome,
};
pub use phase::{DestinationEvent, DestinationPhase, SourceEvent, SourcePhase};
