//! How a guest says that its machine shall end: the keyboard controller's reset line, and ACPI's
//! sleep register ([`crate::boot::acpi`] tells the guest of both).

/// The keyboard controller's command port, and status when read.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// Its command that pulses the processor's reset line.
pub const KEYBOARD_RESET: u8 = 0xfe;
/// ACPI's sleep control register, and the status register after it. No device of a PC is there.
pub const SLEEP_CONTROL: u16 = 0x600;
/// See [`SLEEP_CONTROL`].
pub const SLEEP_STATUS: u16 = SLEEP_CONTROL + 1;
/// SLP_TYP of the state S5, soft off. Any number does, as long as the tables and this agree.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// SLP_EN and SLP_TYP in the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// What a guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// To begin anew. There is no firmware to begin with, so the machine ends.
    Reset,
    /// To be switched off.
    Off,
}

/// What a write to a port asks for, if it is one of ours.
#[must_use]
pub fn written(port: u16, value: u8) -> Option<PowerRequest> {
    let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
    match port {
        KEYBOARD_COMMAND if value == KEYBOARD_RESET => Some(PowerRequest::Reset),
        SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_OFF => {
            Some(PowerRequest::Off)
        }
        _ => None,
    }
}

/// What a read of a port gives, if it is one of ours: a keyboard controller that is ready for a
/// command, and sleep registers at rest.
#[must_use]
pub fn read(port: u16) -> Option<u8> {
    matches!(port, KEYBOARD_COMMAND | SLEEP_CONTROL | SLEEP_STATUS).then_some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_ends_its_machine_by_its_reset_line_or_by_acpi() {
        assert_eq!(written(0x64, 0xfe), Some(PowerRequest::Reset));
        assert_eq!(written(SLEEP_CONTROL, 5 << 2 | 1 << 5), Some(PowerRequest::Off));
    }

    #[test]
    fn nothing_else_ends_it() {
        // Another command, another port, a sleep type that is not enabled, a sleep state that we
        // have not.
        for (port, value) in
            [(0x64, 0xd1), (0x60, 0xfe), (SLEEP_CONTROL, 5 << 2), (SLEEP_CONTROL, 3 << 2 | 1 << 5)]
        {
            assert_eq!(written(port, value), None, "{port:#x} {value:#x}");
        }
    }
}
