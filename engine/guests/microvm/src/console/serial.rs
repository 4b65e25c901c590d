//! The guest's serial port: a 16550 at the PC's first place, and what comes to it from a terminal.

use pageferry_engine::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{Write, sink};
use std::sync::Arc;
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

/// Its first I/O port, and how many there are: those of a PC's COM1.
pub const PORT: u16 = 0x3f8;
/// See [`PORT`].
pub const PORTS: u8 = 8;
/// Its interrupt, as the interrupt controllers count them.
pub const INTERRUPT: u32 = 4;

/// Bytes that the port itself holds for the guest, as its driver expects of this model.
const FIFO_BYTES: usize = 64;
/// Bytes that wait for room in the port: a large paste. What the guest does not read beyond that is
/// the terminal's to keep.
const TYPED_BYTES_MAX: usize = 64 << 10;
/// Registers by their offset from [`PORT`]: data, modem control (which has the loopback switch).
const DATA: u8 = 0;
const MODEM_CONTROL: u8 = 4;

/// Where a guest's serial port writes to.
pub struct Console {
    /// Must not block: a vCPU waits for it. A bounded buffer with a thread behind it does not.
    pub output: Box<dyn Write + Send>,
}

impl Console {
    /// One that nobody sees.
    #[must_use]
    pub fn none() -> Self {
        Self { output: Box::new(sink()) }
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

/// All that a serial port knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// What the guest can read.
    received: Vec<u8>,
    /// What waits for room there.
    typed: Vec<u8>,
}

impl Default for SerialState {
    /// That of a port that was just switched on.
    fn default() -> Self {
        Self::of(vm_superio::SerialState::default(), Vec::new())
    }
}

impl SerialState {
    fn of(state: vm_superio::SerialState, typed: Vec<u8>) -> Self {
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
            typed,
        }
    }

    fn registers(&self) -> vm_superio::SerialState {
        vm_superio::SerialState {
            baud_divisor_low: self.divisor[0],
            baud_divisor_high: self.divisor[1],
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.received.clone(),
        }
    }
}

/// The interrupt line, pulsed through an eventfd that KVM listens to.
#[derive(Debug, Clone)]
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

type Port = vm_superio::Serial<Line, NoEvents, Box<dyn Write + Send>>;

/// The port.
pub struct Serial {
    port: Port,
    typed: VecDeque<u8>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Serial {
    /// A port that was just switched on. `output` must not block; `interrupt` is written to for
    /// each interrupt.
    #[must_use]
    pub fn new(output: Box<dyn Write + Send>, interrupt: EventFd) -> Self {
        Self { port: Port::new(Line(Arc::new(interrupt)), output), typed: VecDeque::new() }
    }

    /// The guest reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.port.read(offset);
        if offset == DATA {
            self.refill();
        }
        value
    }

    /// The guest writes a register.
    pub fn write(&mut self, offset: u8, value: u8) {
        log(self.port.write(offset, value));
        if offset == MODEM_CONTROL {
            // Nothing is received in loopback, and this may be its end.
            self.refill();
        }
    }

    /// Input for the guest. Returns how many bytes were taken; the others are for later.
    pub fn enqueue_input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(TYPED_BYTES_MAX - self.typed.len());
        self.typed.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    /// What travels with the guest.
    #[must_use]
    pub fn state(&self) -> SerialState {
        SerialState::of(self.port.state(), self.typed.iter().copied().collect())
    }

    /// Goes on from another port's state.
    pub fn restore(&mut self, state: &SerialState) -> Result<()> {
        if state.received.len() > FIFO_BYTES || state.typed.len() > TYPED_BYTES_MAX {
            return Err(Error::Guest(format!(
                "the state of the serial port that arrived has {} and {} bytes of input, and {FIFO_BYTES} and \
                 {TYPED_BYTES_MAX} are possible",
                state.received.len(),
                state.typed.len()
            )));
        }
        let line = self.port.interrupt_evt().clone();
        let output = std::mem::replace(self.port.writer_mut(), Box::new(sink()));
        // A pending interrupt is raised again: one too many is harmless, one too few is a guest
        // that hangs.
        self.port = Port::from_state(&state.registers(), line, NoEvents, output)
            .map_err(|e| Error::os("restoring the serial port", std::io::Error::other(e)))?;
        self.typed = state.typed.iter().copied().collect();
        self.refill();
        Ok(())
    }

    /// Hands on what waits, as far as there is room.
    fn refill(&mut self) {
        let room = self.port.fifo_capacity().min(self.typed.len());
        if room > 0 {
            let next: Vec<u8> = self.typed.iter().take(room).copied().collect();
            let taken = self.port.enqueue_raw_bytes(&next);
            // An interrupt that failed leaves the bytes where the guest can read them.
            let count = *taken.as_ref().unwrap_or(&room);
            log(taken);
            self.typed.drain(..count);
        }
    }
}

/// A vCPU cannot be told, and the guest's driver expects no error of a port.
fn log<T>(result: std::result::Result<T, vm_superio::serial::Error<std::io::Error>>) {
    if let Err(e) = result {
        tracing::debug!(error = %e, "the guest's serial port");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    const INTERRUPT_ENABLE: u8 = 1;
    const INTERRUPT_IDENTIFICATION: u8 = 2;
    const LINE_STATUS: u8 = 5;
    const SCRATCH: u8 = 7;
    const DATA_READY: u8 = 1;
    const LOOPBACK: u8 = 1 << 4;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial, Screen, EventFd) {
        let (screen, line) = (Screen::default(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        (Serial::new(Box::new(screen.clone()), line.try_clone().unwrap()), screen, line)
    }

    fn read_all(serial: &mut Serial) -> Vec<u8> {
        let mut bytes = Vec::new();
        while serial.read(LINE_STATUS) & DATA_READY != 0 {
            bytes.push(serial.read(DATA));
        }
        bytes
    }

    #[test]
    fn what_the_guest_writes_is_shown() {
        let (mut serial, screen, _line) = port();
        b"text".iter().for_each(|byte| serial.write(DATA, *byte));
        assert_eq!(*screen.0.lock().unwrap(), b"text");
    }

    #[test]
    fn input_interrupts_the_guest_and_is_read_whole_though_the_port_is_small() {
        let (mut serial, _, line) = port();
        serial.write(INTERRUPT_ENABLE, 1);
        let input: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        assert_eq!(serial.enqueue_input(&input), 1000);
        line.read().expect("no interrupt");
        assert_eq!(read_all(&mut serial), input);
        line.read().expect("no interrupt for what came after");
        serial.read(INTERRUPT_IDENTIFICATION);
        assert!(line.read().is_err());
    }

    #[test]
    fn input_that_nobody_reads_is_refused_at_some_point() {
        let (mut serial, _, _line) = port();
        let taken = serial.enqueue_input(&vec![0; TYPED_BYTES_MAX + 1]);
        assert_eq!(taken, TYPED_BYTES_MAX);
        assert_eq!(serial.enqueue_input(&[0; 100]), FIFO_BYTES);
        assert_eq!(serial.enqueue_input(b"x"), 0);
        serial.read(DATA);
        assert_eq!(serial.enqueue_input(b"xy"), 1);
    }

    #[test]
    fn input_waits_for_the_end_of_loopback() {
        let (mut serial, _, _line) = port();
        serial.write(MODEM_CONTROL, LOOPBACK);
        serial.enqueue_input(b"later");
        assert_eq!(read_all(&mut serial), b"");
        serial.write(MODEM_CONTROL, 0);
        assert_eq!(read_all(&mut serial), b"later");
    }

    #[test]
    fn a_port_goes_on_where_another_was() {
        let (mut there, ..) = port();
        let (mut here, screen, line) = port();
        there.write(INTERRUPT_ENABLE, 1);
        there.write(SCRATCH, 0x5a);
        there.enqueue_input(&[7; 100]);
        let state = there.state();
        let travelled = postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()).unwrap();
        here.restore(&travelled).unwrap();
        assert_eq!(here.state(), state);
        line.read().expect("the guest waits for an interrupt that was on its way");
        assert_eq!((here.read(SCRATCH), read_all(&mut here)), (0x5a, vec![7; 100]));
        here.write(DATA, b'!');
        assert_eq!(*screen.0.lock().unwrap(), b"!");
    }

    #[test]
    fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
        let (mut serial, screen, _line) = port();
        for wrong in [
            SerialState { received: vec![0; FIFO_BYTES + 1], ..SerialState::default() },
            SerialState { typed: vec![0; TYPED_BYTES_MAX + 1], ..SerialState::default() },
        ] {
            let error = serial.restore(&wrong).unwrap_err().to_string();
            assert!(error.contains("bytes of input"), "{error}");
        }
        assert_eq!(serial.state(), SerialState::default());
        serial.write(DATA, b'!');
        assert_eq!(*screen.0.lock().unwrap(), b"!");
    }
}
