//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): a page of registers in front of
//! a device.
//!
//! ```text
//!   0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ (queues set up) ─▶ DRIVER_OK      the driver's steps
//!   any ──write 0──▶ 0            DRIVER_OK ──the driver broke a ring──▶ NEEDS_RESET
//! ```
//!
//! vCPUs access the registers, the I/O thread brings kicks and descriptors' readiness. Both take
//! the lock for as long as the device works, but to read registers: those are kept in a page that
//! the guest reads by itself where KVM can do that (`register_page.rs`), and brought up to date
//! whenever something changes. Kicks arrive as ioeventfds and leave no vCPU waiting.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use virtio_core::features;
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingState};

use super::device::{Activation, DeviceError, DeviceKind, Queue, VirtioDevice, Watcher};
use super::registers::{Registers, constants, initial_queues, status};
use crate::bus::{BusDevice, Outcome};
use crate::event::{VmEvents, chain};
use crate::interrupt::Interrupt;
use crate::lock::lock;
use crate::register_page::REGISTERS_SIZE;

/// Where the driver rings a queue's bell (`QueueNotify`).
pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
/// Where the driver acknowledges an interrupt (`InterruptACK`).
pub(crate) const INTERRUPT_ACK: u64 = 0x064;
/// Where the device's configuration space begins.
const CONFIG_SPACE: u64 = REGISTERS_SIZE as u64;

/// Times a device's trouble is told; further ones are only counted.
const MAX_WARNINGS: u64 = 8;

/// A device and its registers, as a snapshot keeps them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    kind: u32,
    registers: Registers,
    interrupt_status: u32,
    config_generation: u32,
    /// Of an active device.
    rings: Option<Vec<Option<RingState>>>,
    device: Vec<u8>,
}

/// A device on the memory bus.
pub struct MmioTransport {
    kind: DeviceKind,
    name: String,
    interrupt: Arc<Interrupt>,
    kicks: Vec<Arc<OwnedFd>>,
    ram: Arc<GuestRam>,
    watcher: Watcher,
    events: Arc<dyn VmEvents>,
    inner: Mutex<Inner>,
}

struct Inner {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    is_active: bool,
    failures: u64,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("kind", &self.kind)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Put registers in front of `device`.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        interrupt: Arc<Interrupt>,
        watcher: Watcher,
        events: Arc<dyn VmEvents>,
    ) -> Result<Self, Errno> {
        let sizes = device.queue_sizes();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let kicks = sizes
            .iter()
            .map(|_| eventfd(0, flags).map(Arc::new))
            .collect::<Result<_, _>>()?;
        let registers = Registers {
            queues: initial_queues(sizes),
            ..Registers::default()
        };
        let transport = Self {
            kind: device.kind(),
            name: device.name().to_owned(),
            interrupt,
            kicks,
            ram,
            watcher,
            events,
            inner: Mutex::new(Inner {
                device,
                registers,
                is_active: false,
                failures: 0,
            }),
        };
        transport.set(&constants(transport.kind as u32));
        transport.publish(&transport.lock());
        Ok(transport)
    }

    /// What is behind the registers.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Which of its kind.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// The queues' bells, to be registered as ioeventfds.
    pub fn kicks(&self) -> &[Arc<OwnedFd>] {
        &self.kicks
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A device that panicked took the I/O thread with it, or a vCPU: the machine ends.
        lock(&self.inner)
    }

    /// Use the device itself, for requests of the host.
    pub(crate) fn with_device<R>(&self, work: impl FnOnce(&mut dyn VirtioDevice) -> R) -> R {
        work(self.lock().device.as_mut())
    }

    // --- the I/O thread ------------------------------------------------------------------------

    /// A descriptor watched with `token` is ready.
    pub fn ready(&self, token: u32, readiness: epoll::EventFlags) {
        let mut inner = self.lock();
        if !inner.is_active {
            return;
        }
        if let Err(error) = inner.device.handle(token, readiness) {
            self.fail(&mut inner, &error);
        }
    }

    /// The device cannot go on: tell the driver, who has to reset it.
    fn fail(&self, inner: &mut Inner, error: &DeviceError) {
        self.deactivate(inner);
        self.ask_for_reset(inner, error);
    }

    fn ask_for_reset(&self, inner: &mut Inner, error: &DeviceError) {
        inner.registers.status |= status::NEEDS_RESET;
        // Before the interrupt: its handler reads it.
        self.publish(inner);
        self.interrupt.signal_config();
        self.warn(inner, error);
    }

    fn warn(&self, inner: &mut Inner, error: &DeviceError) {
        inner.failures += 1;
        if inner.failures <= MAX_WARNINGS {
            let what = format!("{} {}: {}", self.kind.name(), self.name, chain(error));
            self.events.warning(&what);
        }
    }

    /// Finish what is under way; nothing is served until [`MmioTransport::resume`].
    ///
    /// # Errors
    /// What the device says.
    pub fn pause(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        if inner.is_active {
            inner.device.pause()?;
        }
        Ok(())
    }

    /// Go on.
    pub fn resume(&self) {
        let mut inner = self.lock();
        if inner.is_active {
            inner.device.resume();
        }
    }

    /// The machine ends: let go of the guest's memory.
    pub(crate) fn stop(&self) {
        self.deactivate(&mut self.lock());
    }

    /// The device's counters, and those of the transport.
    pub(crate) fn metrics(&self) -> Vec<(&'static str, u64)> {
        let inner = self.lock();
        let mut metrics = inner.device.metrics();
        metrics.push(("interrupts", self.interrupt.raised()));
        metrics.push(("failures", inner.failures));
        metrics
    }

    /// Keep everything. While paused.
    ///
    /// # Errors
    /// What the device says.
    pub fn save(&self) -> Result<MmioState, DeviceError> {
        let inner = self.lock();
        Ok(MmioState {
            kind: self.kind as u32,
            registers: inner.registers.clone(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            rings: inner.is_active.then(|| inner.device.ring_states()),
            device: inner.device.save()?,
        })
    }

    /// Become what was kept. The device is fresh; it is paused afterwards if it was active.
    ///
    /// # Errors
    /// The state is of another device, or says what cannot be.
    pub fn restore(&self, state: &MmioState) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        let refuse = |reason: &str| DeviceError::State {
            kind: self.kind.name(),
            reason: reason.to_owned(),
        };
        if state.kind != self.kind as u32 {
            return Err(refuse("the snapshot has another device in its place"));
        }
        if state.registers.queues.len() != self.kicks.len() {
            return Err(refuse("the snapshot's device has another number of queues"));
        }
        inner.device.restore(&state.device)?;
        inner.registers = state.registers.clone();
        self.publish(&inner);
        self.interrupt.set_status(state.interrupt_status);
        self.interrupt
            .set_config_generation(state.config_generation);
        if let Some(rings) = &state.rings {
            self.activate(&mut inner, Some(rings))?;
            // A snapshot may be of a version that had interrupts raised by a worker of the kernel,
            // perhaps after the controllers were saved. One too many does no harm.
            self.interrupt.signal_used();
        }
        Ok(())
    }

    // --- activation ----------------------------------------------------------------------------

    /// The driver is ready, or was when `saved` was taken.
    fn activate(
        &self,
        inner: &mut Inner,
        saved: Option<&[Option<RingState>]>,
    ) -> Result<(), DeviceError> {
        let features = inner.registers.driver_features;
        let has_event_idx = features & features::EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.kicks.len());
        for (index, registers) in inner.registers.queues.iter().enumerate() {
            let state = match saved {
                Some(saved) => saved.get(index).copied().flatten(),
                None => registers.is_ready.then_some(RingState {
                    size: registers.size,
                    descriptors: registers.descriptors,
                    available: registers.available,
                    used: registers.used,
                    has_event_idx,
                    next_available: 0,
                    next_used: 0,
                }),
            };
            queues.push(state.map(|state| self.queue(index, state)).transpose()?);
        }
        self.watch_kicks()?;
        let activation = Activation {
            ram: Arc::clone(&self.ram),
            features,
            queues,
            interrupt: Arc::clone(&self.interrupt),
            watcher: self.watcher.clone(),
        };
        if let Err(error) = inner.device.activate(activation) {
            self.unwatch_kicks();
            return Err(error);
        }
        inner.is_active = true;
        Ok(())
    }

    fn queue(&self, index: usize, state: RingState) -> Result<Queue, DeviceError> {
        let kick = self.kicks.get(index);
        let kick = kick.ok_or(DeviceError::QueueMissing { index })?;
        let ring = Ring::new(Arc::clone(&self.ram), state).map_err(DeviceError::ring(index))?;
        Ok(Queue {
            index,
            ring,
            kick: Arc::clone(kick),
            interrupt: Arc::clone(&self.interrupt),
        })
    }

    /// By their edges: each write to an eventfd is told once, so that nobody has to read it, which
    /// would be a system call for every kick.
    fn watch_kicks(&self) -> Result<(), DeviceError> {
        let interest = epoll::EventFlags::IN | epoll::EventFlags::ET;
        for (token, kick) in (0u32..).zip(&self.kicks) {
            if let Err(errno) = self.watcher.add(kick, token, interest) {
                self.unwatch_kicks();
                return Err(DeviceError::system("watch a queue's bell")(errno));
            }
        }
        Ok(())
    }

    fn unwatch_kicks(&self) {
        for kick in &self.kicks {
            // One that is not watched is as good.
            let _gone = self.watcher.remove(kick.as_fd());
        }
    }

    fn deactivate(&self, inner: &mut Inner) {
        if std::mem::replace(&mut inner.is_active, false) {
            self.unwatch_kicks();
            inner.device.reset();
        }
    }

    // --- registers -----------------------------------------------------------------------------

    /// Bring the registers that the guest reads up to date with what they depend on.
    fn publish(&self, inner: &Inner) {
        let Inner {
            registers, device, ..
        } = inner;
        self.set(&registers.readable(device.features(), device.queue_sizes()));
    }

    fn set(&self, registers: &[(usize, u32)]) {
        for (offset, value) in registers {
            let register = self.interrupt.page().register(*offset);
            register.store(*value, Ordering::SeqCst);
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            INTERRUPT_ACK => return self.interrupt.acknowledge(value),
            QUEUE_NOTIFY => {
                // Only where the kernel has no ioeventfd for it.
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _written = rustix::io::write(&**kick, &1u64.to_ne_bytes());
                }
                return;
            }
            _ => {}
        }
        let mut inner = self.lock();
        let Inner {
            registers, device, ..
        } = &mut *inner;
        let is_choosing = registers.status & status::DRIVER != 0
            && registers.status & (status::FEATURES_OK | status::FAILED) == 0;
        let may_set_queues = registers.status & status::FEATURES_OK != 0
            && registers.status & status::DRIVER_OK == 0;
        match offset {
            0x014 => registers.device_features_select = value,
            0x024 => registers.driver_features_select = value,
            0x020 if is_choosing => {
                let shift = registers.driver_features_select.min(1) * 32;
                if registers.driver_features_select <= 1 {
                    let kept = registers.driver_features & !(u64::from(u32::MAX) << shift);
                    registers.driver_features = kept | u64::from(value) << shift;
                }
            }
            0x030 => registers.queue_select = value,
            0x070 => self.write_status(&mut inner, value),
            // The selected queue's size, readiness and addresses.
            0x038 | 0x044 | 0x080..=0x0a4 if may_set_queues => {
                let index = registers.queue_select as usize;
                let max = device.queue_sizes().get(index).copied().unwrap_or(0);
                if let Some(queue) = registers.queues.get_mut(index) {
                    queue.write(offset, value, max);
                }
            }
            _ => {}
        }
        self.publish(&inner);
    }

    fn write_status(&self, inner: &mut Inner, value: u32) {
        if value == 0 {
            self.deactivate(inner);
            let queues = initial_queues(inner.device.queue_sizes());
            inner.registers = Registers {
                queues,
                ..Registers::default()
            };
            self.interrupt.set_status(0);
            return;
        }
        let before = inner.registers.status;
        // The driver sets bits; what it must not set, or not yet, stays clear.
        let mut added = value & !before & !status::NEEDS_RESET;
        let known = status::ACKNOWLEDGE
            | status::DRIVER
            | status::FEATURES_OK
            | status::DRIVER_OK
            | status::FAILED;
        added &= known;
        if added & status::FEATURES_OK != 0 && !inner.accepts_features() {
            added &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && (before | added) & status::FEATURES_OK == 0 {
            added &= !status::DRIVER_OK;
        }
        inner.registers.status = before | added;
        if added & status::DRIVER_OK != 0
            && !inner.is_active
            && let Err(error) = self.activate(inner, None)
        {
            self.ask_for_reset(inner, &error);
        }
    }
}

impl Inner {
    /// Only what was offered, and never the legacy interface.
    fn accepts_features(&self) -> bool {
        let chosen = self.registers.driver_features;
        chosen & !self.device.features() == 0 && chosen & features::VERSION_1 != 0
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            if let Ok(offset) = usize::try_from(offset) {
                self.lock().device.read_config(offset, data);
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            // Registers are accessed whole (virtio 1.2, 4.2.2.2); anything else reads as zeros.
            *word = self.interrupt.page().read(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            let mut inner = self.lock();
            if inner.registers.status & status::DRIVER != 0
                && let Ok(offset) = usize::try_from(offset)
            {
                inner.device.write_config(offset, data);
            }
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
        Outcome::Continue
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
