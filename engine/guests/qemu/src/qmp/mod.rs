//! A client of the QEMU Machine Protocol over a unix socket.
//!
//! One JSON object a line each way. QEMU greets, we negotiate capabilities, then commands and their
//! answers alternate while events come in between at any time:
//!
//! ```text
//!   {"QMP": {"version": ...}}                      <-
//!                                                  -> {"execute": "qmp_capabilities", "id": 1}
//!   {"return": {}, "id": 1}                        <-
//!                                                  -> {"execute": "stop", "id": 2}
//!   {"event": "STOP", ...}                         <-      kept for wait_event
//!   {"return": {}, "id": 2}                        <-
//! ```
//!
//! QEMU reads a command byte by byte, each by a turn of its event loop, so that a command of fifty
//! bytes takes some 0.3 ms to be read. One that is wanted at an exact moment is typed ahead, all
//! but its last byte ([`Qmp::type_ahead`]): QEMU runs nothing before the closing brace.
//!
//! Every wait blocks in `poll(2)` until bytes or its deadline come, and looks at its deadline
//! between two lines too. A command is one `sendmsg`. What QEMU sends is checked: a line has a
//! bounded length, events are kept up to a number of bytes, a line that nobody waits for is not
//! parsed, and no answer can panic.

pub(crate) mod client;
mod events;
mod lines;
mod version;
mod wire;

pub use client::Qmp;
pub use events::{Event, Turns};
pub use version::Version;
