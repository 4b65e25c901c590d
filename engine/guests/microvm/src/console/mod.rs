//! The guest's serial port and the operator's terminal.

pub mod serial;
pub mod terminal;
