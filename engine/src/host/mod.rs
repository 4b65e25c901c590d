//! What the engine asks of the host it runs on.

pub mod descriptors;
pub mod maps;
pub mod own_code;
pub mod private;
pub mod room;
