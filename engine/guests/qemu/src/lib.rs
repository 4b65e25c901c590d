//! Attaching to an unmodified, running QEMU.
//!
//! Nothing is loaded into QEMU and nothing in it changes. Its memory is a file that both processes
//! map ([`memory`]); its writes are followed through a userfaultfd that one injected system call
//! makes ([`inject`]); its device state is QEMU's own migration stream, held back until the guest
//! is stopped ([`stream`]); a lock says whose a memory file is ([`memory::ownership`]); everything
//! else is said over QMP ([`qmp`]). What may write its memory is known by type
//! ([`preflight::devices`]) and by what QEMU holds open ([`preflight::disks`]). If the supervisor
//! dies in the downtime, a [`guardian`] puts the guest right; if another monitor lets a guest run
//! that must not, a sentry ([`guardian::sentry`]) stops it.

pub mod command;
pub mod destination;
pub mod guardian;
pub mod inject;
pub mod memory;
pub mod platform;
pub mod preflight;
pub mod process;
pub mod qmp;
pub mod source;
pub mod stream;
#[cfg(test)]
mod testing;
