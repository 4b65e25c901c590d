//! A VMM of our own for guests under this host's KVM, in the process that migrates them: as small
//! as a VMM can be that moves a Linux guest, and an example of what one does to be moved.
//!
//! ```text
//!   source, destination    the engine's two traits
//!   machine                VM, memory, slots;  vcpu  threads that run, park and are kicked;  devices  ports
//!   state                  all of it but memory, read in one order and written in another;  cpu  what must be equal
//!   map_ahead              the guest's pages, mapped before it comes
//!   boot                   how a Linux guest begins
//!   payload                a guest of a few hundred bytes that checks itself
//!   console, power         what a guest can reach through ports, and the operator's terminal for its serial port
//! ```

pub mod boot;
pub mod config;
pub mod console;
pub mod cpu;
pub mod destination;
pub mod devices;
pub mod machine;
mod map_ahead;
mod memory;
pub mod payload;
pub mod power;
pub mod source;
pub mod state;
#[cfg(test)]
mod tests;
pub mod vcpu;
