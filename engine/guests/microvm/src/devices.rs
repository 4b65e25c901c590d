//! What a machine has besides memory, vCPUs and what KVM emulates: a serial port, and ways to end.

use super::power::{self, PowerRequest};
use super::vcpu::{Ending, Exits};
use crate::console::serial::{Console, INTERRUPT, PORT, PORTS, Serial, SerialState};
use crate::payload::code::FAILURE_PORT;
use kvm_ioctls::VmFd;
use pageferry_engine::dirty::ring::RingSet;
use pageferry_engine::error::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// The devices of one machine.
pub struct Devices {
    serial: Mutex<Port>,
    rings: Option<Arc<RingSet>>,
}

/// The serial port, and whether input must wait because the machine is paused: an interrupt of it
/// would come to controllers whose state has been read.
struct Port {
    serial: Serial,
    frozen: bool,
}

impl Devices {
    /// The devices of a machine whose interrupt controllers are there.
    pub(super) fn new(vm: &VmFd, console: Console, rings: Option<Arc<RingSet>>) -> Result<Self> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| Error::os("making the serial port's interrupt line", e))?;
        vm.register_irqfd(&line, INTERRUPT)
            .map_err(|e| Error::os("connecting the serial port's interrupt line", e))?;
        let serial = Mutex::new(Port { serial: Serial::new(console.output, line), frozen: true });
        Ok(Self { serial, rings })
    }

    /// Input from a terminal. Returns how many bytes were taken; the others are for later.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut port = self.port();
        if port.frozen { 0 } else { port.serial.enqueue_input(bytes) }
    }

    /// Lets no input in from here on.
    pub(super) fn freeze(&self) {
        self.port().frozen = true;
    }

    /// Lets input in again.
    pub(super) fn thaw(&self) {
        self.port().frozen = false;
    }

    /// The serial port's state.
    pub(super) fn state(&self) -> SerialState {
        self.port().serial.state()
    }

    /// Goes on from another machine's serial port.
    pub(super) fn restore(&self, state: &SerialState) -> Result<()> {
        self.port().serial.restore(state)
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A register of the serial port.
fn serial_register(port: u16) -> Option<u8> {
    let offset = port.checked_sub(PORT)?;
    u8::try_from(offset).ok().filter(|offset| *offset < PORTS)
}

impl Exits for Devices {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        // Nothing is there: all ones, as on a bus without a device.
        data.fill(0xff);
        let Some(first) = data.first_mut() else { return };
        if let Some(register) = serial_register(port) {
            *first = self.port().serial.read(register);
        } else if let Some(value) = power::read(port) {
            *first = value;
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<Ending> {
        let value = *data.first()?;
        if let Some(register) = serial_register(port) {
            // A write of several bytes is a string instruction's: one after the other to the same
            // register.
            let mut port = self.port();
            data.iter().for_each(|value| port.serial.write(register, *value));
            return None;
        }
        if port == FAILURE_PORT {
            return Some(Ending::Failed(
                "the payload guest found a page that is not as it wrote it".into(),
            ));
        }
        match power::written(port, value)? {
            PowerRequest::Reset => Some(Ending::Reset),
            PowerRequest::Off => Some(Ending::Off),
        }
    }

    fn ring_full(&self, vcpu: usize) -> Result<()> {
        match &self.rings {
            Some(rings) => rings.serve_full(vcpu),
            None => Err(Error::Guest("KVM says that a ring is full, and there is none".into())),
        }
    }
}
