//! A keyboard controller without a keyboard: it resets the machine, and looks broken otherwise.
//!
//! Linux pulses the controller's reset line to restart (`reboot=k`), and first waits until the
//! status register says that a command can be taken: `INPUT_FULL` has to be clear, or each
//! attempt takes an eighth of a second. A kernel that looks for a keyboard first drains what the
//! controller has for it: as `OUTPUT_FULL` is always set it gives up after sixteen bytes, within
//! a millisecond, where a silent controller would cost it a time-out of half a second.
//!
//! Five ports from 0x60 on: data (0), system control port B (1), status and command (4).

use crate::bus::{BusDevice, Outcome};

/// Ports it takes, from the data port to the command port.
pub const PORT_COUNT: u64 = 5;

const DATA: u64 = 0;
const SYSTEM_CONTROL_B: u64 = 1;
const STATUS: u64 = 4;
const COMMAND: u64 = STATUS;

/// The controller has a byte for the driver; `INPUT_FULL`, bit 1, is clear.
const OUTPUT_FULL: u8 = 1;
/// What the data port gives: the answer of a controller that failed its test.
const NO_KEYBOARD: u8 = 0xff;
/// The timer's second output is high: whoever waits for it waits no longer.
const TIMER_OUTPUT: u8 = 1 << 5;
/// Pulse the reset line, which is the lowest of the four.
const PULSE_RESET: u8 = 0xfe;

/// The controller. It has no state.
#[derive(Debug, Default)]
pub struct I8042;

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, value) in (offset..).zip(data) {
            *value = match port {
                DATA => NO_KEYBOARD,
                SYSTEM_CONTROL_B => TIMER_OUTPUT,
                STATUS => OUTPUT_FULL,
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let is_reset = (offset..)
            .zip(data)
            .any(|(port, value)| port == COMMAND && *value == PULSE_RESET);
        if is_reset {
            Outcome::Reset
        } else {
            Outcome::Continue
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> u8 {
        let mut data = [0];
        I8042.read(4, &mut data);
        data[0]
    }

    #[test]
    fn a_restart_needs_no_wait() {
        // kb_wait() of Linux looks at bit 1.
        assert_eq!(status() & 2, 0);
        assert_eq!(I8042.write(4, &[0xfe]), Outcome::Reset);
    }

    #[test]
    fn a_driver_can_not_drain_it_and_gives_up() {
        let mut data = [0];
        for _ in 0..=16 {
            assert_eq!(status() & 1, 1);
            I8042.read(0, &mut data);
        }
        assert_eq!(data, [0xff]);
    }

    #[test]
    fn nothing_else_resets() {
        for (offset, value) in [(4, 0xfd), (4, 0xff), (4, 0x20), (0, 0xfe), (1, 0xfe)] {
            assert_eq!(I8042.write(offset, &[value]), Outcome::Continue);
        }
        // All five ports in wide accesses.
        assert_eq!(I8042.write(0, &[0xfe, 0xfe, 0xfe, 0xfe]), Outcome::Continue);
        let mut data = [0xaa; 4];
        I8042.read(0, &mut data);
        assert_eq!(data, [0xff, 0x20, 0, 0]);
    }
}
