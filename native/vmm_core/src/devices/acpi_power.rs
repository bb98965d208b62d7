//! ACPI's way to switch a hardware-reduced machine off and to restart it: three byte-wide ports.
//!
//! | offset | register | reads | writes |
//! |---|---|---|---|
//! | 0 | sleep control (ACPI 6.5, 4.8.3.7) | 0 | sleep type in bits 4:2, sleep enable in bit 5 |
//! | 1 | sleep status | 0: never woken | clear the wake bit, which is never set |
//! | 2 | reset (4.8.3.6) | 0 | the value that the FADT names |
//!
//! The addresses and values are in the tables the guest is given; whoever writes those builds this
//! with the same. It has no state.

use crate::bus::{BusDevice, Outcome};

/// Ports it takes.
pub const PORT_COUNT: u64 = 3;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
/// `SLP_EN`: go to sleep now.
const SLEEP_ENABLE: u8 = 1 << 5;
/// `SLP_TYP`.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The three registers.
#[derive(Debug)]
pub struct AcpiPower {
    /// What the guest's `\_S5_` object names.
    off_sleep_type: u8,
    /// What the guest's FADT names.
    reset_value: u8,
}

impl AcpiPower {
    /// Off by this sleep type, restart by this value.
    pub fn new(off_sleep_type: u8, reset_value: u8) -> Self {
        Self {
            off_sleep_type,
            reset_value,
        }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        // A wider access is one to each of the bytes.
        for (register, value) in (offset..).zip(data) {
            match register {
                SLEEP_CONTROL => {
                    let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                    if value & SLEEP_ENABLE != 0 && sleep_type == self.off_sleep_type {
                        return Outcome::Shutdown;
                    }
                }
                RESET if *value == self.reset_value => return Outcome::Reset,
                _ => {}
            }
        }
        Outcome::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_switches_off_and_restarts() {
        let power = AcpiPower::new(5, 1);
        // What Linux writes for S5: type and enable in one go, the status cleared before.
        assert_eq!(power.write(1, &[0x80]), Outcome::Continue);
        assert_eq!(power.write(0, &[0x34]), Outcome::Shutdown);
        assert_eq!(power.write(2, &[1]), Outcome::Reset);
    }

    #[test]
    fn other_values_do_nothing() {
        let power = AcpiPower::new(5, 1);
        // Without enable; enabled with another type; other reset values; the wide access of a
        // driver that means none of it.
        let writes: [(u64, &[u8]); 6] = [
            (0, &[0x14]),
            (0, &[0x20]),
            (0, &[0x30]),
            (2, &[0]),
            (2, &[0xff]),
            (0, &[0, 1]),
        ];
        for (offset, data) in writes {
            assert_eq!(power.write(offset, data), Outcome::Continue, "{data:x?}");
        }
        let mut data = [0; 2];
        power.read(0, &mut data);
        assert_eq!(data, [0, 0]);
    }
}
