//! Attaching to an unmodified, running QEMU.
//!
//! Nothing is loaded into QEMU and nothing in it changes. Its memory is a file that both processes map
//! ([`blocks`]); its writes are followed through a userfaultfd that one injected system call makes
//! ([`inject`]); its device state is QEMU's own migration stream, held back until the guest is stopped
//! ([`stream`]); everything else is said over QMP ([`qmp`]). If the supervisor dies in the blackout, a
//! [`guardian`] puts the guest right.

pub mod blocks;
pub mod command;
pub mod destination;
pub mod guardian;
pub mod inject;
pub mod process;
pub mod qmp;
pub mod source;
pub mod stream;
#[cfg(test)]
mod testing;
