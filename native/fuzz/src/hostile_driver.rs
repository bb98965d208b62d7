//! A driver that does to a device whatever its program says: sound requests, broken ones, rings
//! overwritten, kicks at any time, pauses, resets and new negotiations in between.
//!
//! An operation is a byte, then its operands. Checked beside panics and sanitizer findings: the
//! device comes to rest, gives back only what it was given, and a state it saved can be restored.

use std::sync::Arc;

use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;
use vmm_core::virtio::device::VirtioDevice;
use vmm_core::virtio::mock::MockTransport;

use crate::Input;

/// Guest memory; the rings are at its start, 16 KiB each.
pub const RAM_SIZE: usize = 0x10_0000;
const RING_SPACE: u64 = 0x4000;
/// Entries of every ring: small ones wrap early.
const RING_SIZE: u16 = 16;

/// The driver, its rings, and the transport between it and the device.
pub struct HostileDriver {
    ram: Arc<GuestRam>,
    transport: MockTransport,
    drivers: Vec<MockDriver>,
    is_active: bool,
    features: u64,
}

impl HostileDriver {
    /// A driver that has just accepted all that the device offers.
    pub fn new(device: &mut dyn VirtioDevice) -> Self {
        let ram = mock_ram(RAM_SIZE);
        let count = u32::try_from(device.queue_sizes().len()).expect("a few queues");
        let mut driver = Self {
            transport: MockTransport::new(&ram, count),
            ram,
            drivers: Vec::new(),
            is_active: false,
            features: device.features(),
        };
        driver.activate(device, u64::MAX, u8::MAX);
        driver
    }

    /// Negotiate some of the features and set up some of the queues.
    fn activate(&mut self, device: &mut dyn VirtioDevice, features: u64, queues: u8) {
        self.features = device.features() & features;
        self.drivers = (0..device.queue_sizes().len() as u64)
            .map(|index| MockDriver::new(&self.ram, index * RING_SPACE, RING_SIZE))
            .collect();
        let is_set_up = |index: usize| queues.rotate_right(index as u32) & 1 != 0;
        let rings = self.drivers.iter().enumerate();
        let rings: Vec<_> = rings
            .map(|(index, driver)| is_set_up(index).then_some(driver))
            .collect();
        let activation = self.transport.activation(self.features, &rings);
        self.is_active = device.activate(activation).is_ok();
    }

    /// Run one operation; `None` at the end of the input. Operations from 16 on are the target's.
    pub fn step(
        &mut self,
        operation: u8,
        input: &mut Input<'_>,
        device: &mut dyn VirtioDevice,
    ) -> Option<()> {
        let queue = usize::from(input.u8()?) % self.drivers.len();
        let driver = &mut self.drivers[queue];
        match operation % 16 {
            0..=2 => {
                let buffers = buffers(input)?;
                driver.add(&buffers);
            }
            3 => {
                let table = address(input)?;
                let buffers = buffers(input)?;
                if table + 16 * buffers.len() as u64 <= RAM_SIZE as u64 {
                    driver.add_indirect(table, &buffers);
                }
            }
            4 => {
                let [index, next] = [input.u16()?, input.u16()?];
                let (at, len, flags) = (input.u64()?, input.u32()?, input.u16()?);
                driver.put_descriptor(index % RING_SIZE, at, len, flags, next);
            }
            5 => driver.make_available(input.u16()?),
            6 => driver.set_available_index(input.u16()?),
            7 => {
                let at = address(input)?;
                let len = usize::from(input.u8()?);
                let bytes = input.bytes(len);
                if at + bytes.len() as u64 <= RAM_SIZE as u64 {
                    driver.write(at, bytes);
                }
            }
            8 | 9 => self.transport.kick(queue),
            10 => {
                let offset = usize::from(input.u16()?);
                let len = usize::from(input.u8()? % 16);
                device.read_config(offset, &mut vec![0; len]);
                device.write_config(offset, input.bytes(len));
            }
            11 if self.is_active => {
                device.pause().expect("nothing is under way for long");
                assert_eq!(device.ring_states().len(), device.queue_sizes().len());
                let saved = device.save().expect("a device that is paused");
                device.restore(&saved).expect("what it just said");
                device.resume();
            }
            12 => {
                device.reset();
                self.activate(device, input.u64()?, input.u8()?);
            }
            13 => driver.set_used_event(input.u16()?),
            14 => driver.set_no_interrupt(input.u8()? & 1 != 0),
            _ => {
                let state = input.bytes(16);
                if !self.is_active {
                    // Any bytes may be in a file; most are no state of this device.
                    let _taken = device.restore(state);
                }
            }
        }
        self.settle(device);
        Some(())
    }

    /// Give the device `bytes` to read, in one buffer of queue `index`.
    pub fn request(&mut self, index: usize, bytes: &[u8], device: &mut dyn VirtioDevice) {
        let at = RAM_SIZE as u64 - bytes.len() as u64;
        if let Some(driver) = self.drivers.get_mut(index) {
            driver.write(at, bytes);
            let len = u32::try_from(bytes.len()).expect("less than the memory");
            driver.add(&[MockBuffer::readable(at, len)]);
            self.transport.kick(index);
        }
        self.settle(device);
    }

    /// Let the device do what it has to; a ring that makes no sense resets it.
    pub fn settle(&mut self, device: &mut dyn VirtioDevice) {
        if self.transport.settle(device).is_err() {
            device.reset();
            self.is_active = false;
        }
        for driver in &mut self.drivers {
            let _used = driver.take_used();
        }
        let _metrics = device.metrics();
    }
}

/// An address in the first 2 MiB: half of them are memory.
fn address(input: &mut Input<'_>) -> Option<u64> {
    Some(u64::from(input.u16()?) * 32)
}

fn buffers(input: &mut Input<'_>) -> Option<Vec<MockBuffer>> {
    let count = input.u8()? % 6;
    let mut buffers = Vec::new();
    for _ in 0..count {
        let address = address(input)? + u64::from(input.u8()?);
        let len = u32::from(input.u16()?);
        let kind = input.u8()?;
        buffers.push(MockBuffer {
            address,
            // Sometimes larger than 64 KiB.
            len: len << (kind >> 6),
            is_writable: kind & 1 != 0,
        });
    }
    Some(buffers)
}
