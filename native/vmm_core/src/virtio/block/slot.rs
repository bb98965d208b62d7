//! A device that disks come into and leave while the guest runs, as media of a drive do.
//!
//! ```text
//!   empty ──insert──▶ occupied ──eject──▶ empty
//!     capacity 0        the disk's          capacity 0, requests fail
//! ```
//!
//! The guest's kernel drives the device as long as it runs: a virtio-mmio device cannot be taken
//! from a Linux guest, but its capacity may change (virtio 1.2, 5.2.4). So what the driver asks
//! only once is the same for every disk: blocks of 512 bytes, and that it may be written. A disk
//! that may not refuses writes by itself. Called by whoever plugs, under the transport's lock, with
//! a disk that was opened before.

use std::cell::RefCell;
use std::mem;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use super::config::BlockError;
use super::config_space;
use super::device::{Active, Block, serial_of};
use super::disk::Disk;
use super::engine::{Engine, EngineChoice};
use super::pump::Pump;
use crate::virtio::device::{DeviceError, DeviceKind, VirtioDevice};

/// What stands in for a disk where there is none: nothing can be read from it or written to it.
const NOTHING: &str = "/dev/null";
/// How long requests under way are waited for; no other device is served meanwhile. A disk is
/// ejected when the guest has unmounted it, so there are hardly any.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A device's slot.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: String,
    is_occupied: bool,
    /// Told once the driver has read the capacity.
    reader: RefCell<Option<SyncSender<()>>>,
}

/// A disk that was taken out, and is open until this is dropped.
#[derive(Debug)]
pub struct Ejected(#[expect(dead_code, reason = "held to be dropped")] Pump);

impl Slot {
    /// The driver reads the configuration space.
    pub(super) fn is_read(&self, offset: usize) {
        if offset < config_space::CAPACITY_END
            && let Some(reader) = self.reader.take()
        {
            // Whoever waited may have given up.
            let _received = reader.try_send(());
        }
    }
}

impl Block {
    /// A device without a disk; `name` is the device's.
    ///
    /// # Errors
    /// The host's /dev/null cannot be opened.
    pub fn slot(name: String) -> Result<Self, BlockError> {
        let disk = match Disk::absent(Path::new(NOTHING)) {
            Ok(disk) => disk,
            Err(source) => return Err(BlockError::Disk { id: name, source }),
        };
        let (engine, _) = match Engine::new(EngineChoice::Sync, &disk) {
            Ok(made) => made,
            Err(source) => return Err(BlockError::Uring { id: name, source }),
        };
        let slot = Slot {
            name,
            is_occupied: false,
            reader: RefCell::new(None),
        };
        let mut block = Self::with_pump(String::new(), Pump::new(disk, engine, None));
        block.config_space = config_space::of_slot(0);
        block.slot = Some(slot);
        Ok(block)
    }

    /// Put a disk in, opened before: the device it was opened as is used up. Gives what is told
    /// when the driver has read the new capacity.
    ///
    /// # Errors
    /// This is no slot, or not empty; or a request of before does not end.
    pub fn insert(&mut self, disk: Self) -> Result<Receiver<()>, DeviceError> {
        match &self.slot {
            None => return Err(self.refuse("is no slot")),
            Some(slot) if slot.is_occupied => return Err(self.refuse("is occupied")),
            Some(_) => {}
        }
        let (sender, receiver) = sync_channel(1);
        if let Some(slot) = &self.slot {
            slot.reader.replace(Some(sender));
        }
        let _nothing = self.swap(disk, true)?;
        Ok(receiver)
    }

    /// Take the disk out: requests under way are finished, later ones fail. To be dropped without the
    /// transport's lock: closing a disk may write what the host still has of it.
    ///
    /// # Errors
    /// This is no slot, the host's /dev/null cannot be opened, or the disk does not answer: then it
    /// stays in.
    pub fn eject(&mut self) -> Result<Option<Ejected>, DeviceError> {
        let Some(slot) = &self.slot else {
            return Err(self.refuse("is no slot"));
        };
        if !slot.is_occupied {
            return Ok(None);
        }
        let empty = Self::slot(slot.name.clone());
        let empty = empty.map_err(|_| self.refuse("has no /dev/null"))?;
        Ok(Some(Ejected(self.swap(empty, false)?)))
    }

    /// Exchange the disk, and give back the one before; if that fails nothing has changed.
    fn swap(&mut self, other: Self, is_occupied: bool) -> Result<Pump, DeviceError> {
        let mut active = self.active.take();
        let swapped = self.exchange(other, active.as_mut(), is_occupied);
        if let Some(active) = &mut active {
            active.source.queue.signal();
            active.source.queue.kick_self();
        }
        self.active = active;
        swapped
    }

    fn exchange(
        &mut self,
        other: Self,
        mut active: Option<&mut Active>,
        is_occupied: bool,
    ) -> Result<Pump, DeviceError> {
        let source = active.as_mut().map(|active| &mut active.source);
        self.pump.drain(source, DRAIN_TIMEOUT)?;
        if let Some(active) = &active {
            if let Err(error) = other.watch(&active.watcher) {
                other.unwatch(&active.watcher);
                return Err(error);
            }
            self.unwatch(&active.watcher);
        }
        let mut before = mem::replace(&mut self.pump, other.pump);
        self.pump.metrics = mem::take(&mut before.metrics);
        self.id = other.id;
        self.uring_refusal = other.uring_refusal;
        self.config_space = config_space::of_slot(self.pump.disk.capacity_sectors());
        if let Some(slot) = &mut self.slot {
            slot.is_occupied = is_occupied;
        }
        if let Some(active) = active {
            active.source.terms.serial = serial_of(&self.id);
            active.source.queue.interrupt.signal_config();
        }
        Ok(before)
    }

    /// Whether a disk is in this slot.
    pub(super) fn has_plugged_disk(&self) -> bool {
        self.slot.as_ref().is_some_and(|slot| slot.is_occupied)
    }

    fn refuse(&self, what: &str) -> DeviceError {
        DeviceError::State {
            kind: DeviceKind::Block.name(),
            reason: format!("{} {what}", self.name()),
        }
    }
}

#[cfg(test)]
#[path = "slot_tests.rs"]
mod tests;
