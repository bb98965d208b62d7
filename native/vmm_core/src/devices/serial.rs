//! The first serial port (COM1): a 16550's registers in front of the [`Console`].
//!
//! The registers are vm-superio's; here is what it leaves to the machine: the interrupt, the bus,
//! one lock for all vCPUs, and its state in a snapshot. Nothing is ever typed in: what a reader
//! gets is output only, so the receive buffer fills in loop-back mode alone, which drivers test
//! the chip with.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::serial::{NoEvents, SerialState as Registers};
use vm_superio::{Serial as Uart, Trigger};

use crate::bus::{BusDevice, Outcome};
use crate::devices::console::Console;
use crate::lock::lock;

/// Ports it takes.
pub const PORT_COUNT: u64 = 8;

/// Why a serial port could not be made as it was.
#[derive(Debug, Error)]
pub enum SerialError {
    /// a snapshot has more received bytes than the chip has room for
    #[error("{len} received bytes are more than the chip holds")]
    ReceiveBuffer {
        /// Bytes.
        len: usize,
    },
    /// the interrupt of a pending condition could not be raised
    #[error("raise the serial port's interrupt")]
    Interrupt(#[source] io::Error),
}

/// What a snapshot keeps: every register, by the names of the data sheet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct SerialState {
    pub divisor_low: u8,
    pub divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub received: Vec<u8>,
}

/// The irqfd of the port's GSI.
#[derive(Debug)]
struct Line(Arc<OwnedFd>);

impl Trigger for Line {
    type E = Errno;

    fn trigger(&self) -> Result<(), Errno> {
        match rustix::io::retry_on_intr(|| rustix::io::write(&*self.0, &1u64.to_ne_bytes())) {
            // A counter at its maximum is an interrupt that is pending anyway.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

#[derive(Debug)]
struct Output(Arc<Console>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port.
#[derive(Debug)]
pub struct Serial {
    uart: Mutex<Uart<Line, NoEvents, Output>>,
}

impl Serial {
    /// A port as after power-on. `irqfd` is an eventfd that does not block.
    pub fn new(console: Arc<Console>, irqfd: Arc<OwnedFd>) -> Self {
        let uart = Uart::new(Line(irqfd), Output(console));
        Self {
            uart: Mutex::new(uart),
        }
    }

    /// A port as it was saved. Its interrupt is raised again if it was pending.
    ///
    /// # Errors
    /// The state is none, or the interrupt could not be raised.
    pub fn restore(
        state: &SerialState,
        console: Arc<Console>,
        irqfd: Arc<OwnedFd>,
    ) -> Result<Self, SerialError> {
        let registers = Registers {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let uart = Uart::from_state(&registers, Line(irqfd), NoEvents, Output(console));
        let uart = uart.map_err(|error| match error {
            vm_superio::serial::Error::FullFifo => SerialError::ReceiveBuffer {
                len: state.received.len(),
            },
            vm_superio::serial::Error::Trigger(errno) => SerialError::Interrupt(errno.into()),
            vm_superio::serial::Error::IOError(error) => SerialError::Interrupt(error),
        })?;
        Ok(Self {
            uart: Mutex::new(uart),
        })
    }

    /// The registers, for a snapshot. The vCPUs stand still.
    pub fn save(&self) -> SerialState {
        let registers = self.uart().state();
        SerialState {
            divisor_low: registers.baud_divisor_low,
            divisor_high: registers.baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            received: registers.in_buffer,
        }
    }

    fn uart(&self) -> MutexGuard<'_, Uart<Line, NoEvents, Output>> {
        lock(&self.uart)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The chip has byte-wide registers; a wider access finds nothing, as on its own bus.
        if let ([value], Ok(register)) = (data, u8::try_from(offset)) {
            *value = self.uart().read(register);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        if let ([value], Ok(register)) = (data, u8::try_from(offset)) {
            // Only the interrupt can fail, and an eventfd of ours does not: the guest's driver
            // polls when one is late.
            let _written = self.uart().write(register, *value);
        }
        Outcome::Continue
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const MODEM_CONTROL: u64 = 4;
    const LINE_STATUS: u64 = 5;
    const SCRATCH: u64 = 7;

    struct Fixture {
        serial: Serial,
        console: Arc<Console>,
        irqfd: Arc<OwnedFd>,
    }

    fn fixture() -> Fixture {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let irqfd = Arc::new(eventfd(0, flags).unwrap());
        let console = Arc::new(Console::new(None).unwrap());
        Fixture {
            serial: Serial::new(Arc::clone(&console), Arc::clone(&irqfd)),
            console,
            irqfd,
        }
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    fn write(serial: &Serial, offset: u64, value: u8) {
        assert_eq!(serial.write(offset, &[value]), Outcome::Continue);
    }

    fn interrupts(irqfd: &OwnedFd) -> u64 {
        let mut counter = [0; 8];
        match rustix::io::read(irqfd, &mut counter) {
            Ok(_) => u64::from_ne_bytes(counter),
            Err(errno) => {
                assert_eq!(errno, Errno::AGAIN);
                0
            }
        }
    }

    #[test]
    fn what_the_guest_prints_is_on_the_console() {
        let Fixture {
            serial, console, ..
        } = fixture();
        for byte in b"Kernel panic - not syncing: test\n" {
            // The transmitter is empty: a driver does not wait.
            assert_eq!(read(&serial, LINE_STATUS) & 0x20, 0x20);
            write(&serial, DATA, *byte);
        }
        assert_eq!(console.tail(), b"Kernel panic - not syncing: test\n");
        assert!(console.panic_line().is_some());
    }

    #[test]
    fn a_driver_that_wants_to_know_is_interrupted() {
        let Fixture { serial, irqfd, .. } = fixture();
        write(&serial, DATA, b'a');
        assert_eq!(interrupts(&irqfd), 0);
        write(&serial, INTERRUPT_ENABLE, 2);
        assert_eq!(interrupts(&irqfd), 1);
        // Pending until it is identified: one interrupt, not one a byte.
        write(&serial, DATA, b'b');
        assert_eq!(interrupts(&irqfd), 0);
        assert_eq!(read(&serial, 2) & 0xf, 2);
        write(&serial, DATA, b'c');
        assert_eq!(interrupts(&irqfd), 1);
    }

    #[test]
    fn wide_accesses_find_nothing() {
        let Fixture {
            serial, console, ..
        } = fixture();
        let mut data = [0; 2];
        serial.read(LINE_STATUS, &mut data);
        assert_eq!(data, [0, 0]);
        assert_eq!(serial.write(DATA, b"ab"), Outcome::Continue);
        serial.read(1000, &mut data[..1]);
        assert_eq!(serial.write(1000, b"a"), Outcome::Continue);
        assert_eq!(console.bytes(), 0);
    }

    #[test]
    fn registers_and_pending_interrupts_are_kept() {
        let Fixture { serial, .. } = fixture();
        write(&serial, SCRATCH, 0x5a);
        write(&serial, INTERRUPT_ENABLE, 2);
        write(&serial, MODEM_CONTROL, 0x1b);
        write(&serial, DATA, b'l');
        let state = serial.save();
        assert_eq!(state.received, b"l");
        let bytes = postcard::to_stdvec(&state).unwrap();
        let state: SerialState = postcard::from_bytes(&bytes).unwrap();
        let fresh = fixture();
        let restored = Serial::restore(&state, fresh.console, Arc::clone(&fresh.irqfd)).unwrap();
        assert_eq!(interrupts(&fresh.irqfd), 1);
        assert_eq!(restored.save(), state);
        assert_eq!(read(&restored, SCRATCH), 0x5a);
        assert_eq!(read(&restored, DATA), b'l');
    }

    #[test]
    fn a_state_that_cannot_be_is_refused() {
        let Fixture {
            serial,
            console,
            irqfd,
        } = fixture();
        let mut state = serial.save();
        state.received = vec![0; 65];
        let error = Serial::restore(&state, console, irqfd).unwrap_err();
        assert!(matches!(error, SerialError::ReceiveBuffer { len: 65 }));
    }
}
