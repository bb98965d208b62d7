//! The vhost-user state of the device: what the machine monitor negotiated and handed over.
//!
//! The `vhost` crate decodes the messages and calls [`Backend`]; this keeps features, memory
//! table and rings, and watches the doorbells in the device's epoll set. Ring addresses arrive
//! as the monitor's virtual addresses and are translated by its memory table. The monitor is
//! trusted with guest memory (it owns it), but nothing it sends may make us panic. I/O thread.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::epoll;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{
    Error as ProtocolError, GpuBackend, Result as ProtocolResult, VhostUserBackendReqHandlerMut,
};
use virtio_core::features;
use virtio_core::ram::GuestRam;
use virtio_core::ring::Ring;
use virtio_core::vsock::{QUEUE_COUNT, RX_QUEUE, TX_QUEUE};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::vring::Vring;

/// The doorbell of queue `n` has the epoll datum `FIRST_KICK + n`.
pub const FIRST_KICK: u64 = 16;

/// Where one region of the monitor's address space lies in the guest's.
#[derive(Clone, Copy, Debug)]
struct Translation {
    monitor_start: u64,
    guest_start: u64,
    len: u64,
}

/// What was negotiated, and the rings.
pub struct Backend {
    guest_cid: u64,
    epoll: Arc<OwnedFd>,
    features: u64,
    memory: Option<Arc<GuestRam>>,
    translations: Vec<Translation>,
    /// The rings, see [`RX_QUEUE`] and [`TX_QUEUE`]. `QEMU` serves the event queue itself; this
    /// device has no events to send.
    pub vrings: [Vring; QUEUE_COUNT],
    has_stopped: bool,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend")
            .field("features", &self.features)
            .field("is_active", &self.is_active())
            .finish_non_exhaustive()
    }
}

impl Backend {
    /// A device before negotiation.
    pub fn new(guest_cid: u64, epoll: Arc<OwnedFd>) -> Self {
        Self {
            guest_cid,
            epoll,
            features: 0,
            memory: None,
            translations: Vec::new(),
            vrings: Default::default(),
            has_stopped: false,
        }
    }

    /// Packets can be exchanged: the guest's driver runs.
    pub fn is_active(&self) -> bool {
        self.vrings[RX_QUEUE].is_running() && self.vrings[TX_QUEUE].is_running()
    }

    /// True once after a ring was stopped or the device reset: the guest forgot all connections.
    pub fn take_stopped(&mut self) -> bool {
        std::mem::take(&mut self.has_stopped)
    }

    /// The receive and the transmit ring, while the device is active.
    pub fn rings(&mut self) -> Option<(&mut Ring, &mut Ring)> {
        let [rx, tx, _event] = &mut self.vrings;
        rx.running().zip(tx.running())
    }

    /// Interrupt the driver where it wants to know of what was done.
    ///
    /// # Errors
    /// A call descriptor is broken.
    pub fn signal(&mut self) -> io::Result<()> {
        self.vrings.iter_mut().try_for_each(Vring::signal)
    }

    fn vring(&mut self, index: u32) -> ProtocolResult<&mut Vring> {
        let vring = usize::try_from(index)
            .ok()
            .and_then(|index| self.vrings.get_mut(index));
        vring.ok_or(ProtocolError::InvalidParam)
    }

    fn translate(&self, monitor_address: u64) -> ProtocolResult<u64> {
        self.translations
            .iter()
            .find_map(|region| {
                let offset = monitor_address.checked_sub(region.monitor_start)?;
                (offset < region.len).then(|| region.guest_start + offset)
            })
            .ok_or(ProtocolError::InvalidParam)
    }

    fn stop_vring(&mut self, index: usize) {
        let Some(vring) = self.vrings.get_mut(index) else {
            return;
        };
        if let Some(kick) = &vring.kick {
            // The monitor holds the same eventfd, so closing ours would not end the watch.
            let _gone = epoll::delete(&self.epoll, kick);
        }
        vring.stop();
        self.has_stopped = true;
    }

    fn stop_all(&mut self) {
        for index in 0..QUEUE_COUNT {
            self.stop_vring(index);
        }
    }

    /// Have the rings serve again after the memory under them was replaced.
    fn revalidate(&mut self) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        for index in 0..QUEUE_COUNT {
            let vring = self.vrings.get_mut(index);
            if vring.is_some_and(|vring| !vring.set_memory(&memory)) {
                self.stop_vring(index);
            }
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop_all();
    }
}

/// The `vhost` crate receives descriptors without close-on-exec; children must not get them.
fn private(file: &File) -> ProtocolResult<()> {
    rustix::io::fcntl_setfd(file, rustix::io::FdFlags::CLOEXEC)
        .map_err(|errno| ProtocolError::ReqHandlerError(errno.into()))
}

fn map_region(region: &VhostUserMemoryRegion, file: File) -> ProtocolResult<GuestRegionMmap> {
    private(&file)?;
    let size = usize::try_from(region.memory_size).map_err(|_| ProtocolError::InvalidParam)?;
    // A mapping past the end of its file would fault on access.
    let file_len = file
        .metadata()
        .map_err(ProtocolError::ReqHandlerError)?
        .len();
    let end = region.mmap_offset.checked_add(region.memory_size);
    if end.is_none_or(|end| end > file_len) {
        return Err(ProtocolError::InvalidParam);
    }
    let mapping = MmapRegion::from_file(FileOffset::new(file, region.mmap_offset), size)
        .map_err(|_| ProtocolError::InvalidParam)?;
    GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr))
        .ok_or(ProtocolError::InvalidParam)
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> ProtocolResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> ProtocolResult<()> {
        self.stop_all();
        Ok(())
    }

    fn reset_device(&mut self) -> ProtocolResult<()> {
        self.stop_all();
        Ok(())
    }

    fn get_features(&mut self) -> ProtocolResult<u64> {
        Ok(features::RING | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, accepted: u64) -> ProtocolResult<()> {
        if accepted & !self.get_features()? != 0 {
            return Err(ProtocolError::InvalidParam);
        }
        self.features = accepted;
        let has_protocol_features =
            accepted & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        for vring in &mut self.vrings {
            vring.set_event_idx(accepted & features::EVENT_IDX != 0);
            // Without protocol features there is no SET_VRING_ENABLE and rings start enabled.
            vring.is_enabled |= !has_protocol_features;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> ProtocolResult<()> {
        let mut mapped = Vec::with_capacity(regions.len());
        let mut translations = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            mapped.push(map_region(region, file)?);
            translations.push(Translation {
                monitor_start: region.user_addr,
                guest_start: region.guest_phys_addr,
                len: region.memory_size,
            });
        }
        mapped.sort_by_key(vm_memory::GuestMemoryRegion::start_addr);
        let memory =
            GuestMemoryMmap::from_regions(mapped).map_err(|_| ProtocolError::InvalidParam)?;
        self.memory = Some(GuestRam::new(memory));
        self.translations = translations;
        self.revalidate();
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> ProtocolResult<()> {
        let size = u16::try_from(num).map_err(|_| ProtocolError::InvalidParam)?;
        self.vring(index)?
            .set_size(size)
            .map_err(|_| ProtocolError::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> ProtocolResult<()> {
        let table = self.translate(descriptor)?;
        let (used, available) = (self.translate(used)?, self.translate(available)?);
        self.vring(index)?.set_addresses(table, available, used);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> ProtocolResult<()> {
        let base = u16::try_from(base).map_err(|_| ProtocolError::InvalidParam)?;
        self.vring(index)?.set_base(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> ProtocolResult<VhostUserVringState> {
        let base = self.vring(index)?.base();
        // "The back-end must stop the ring" (vhost-user, ring states).
        self.stop_vring(usize::try_from(index).map_err(|_| ProtocolError::InvalidParam)?);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        let index = usize::from(index);
        if index >= QUEUE_COUNT {
            return Err(ProtocolError::InvalidParam);
        }
        // No descriptor would mean polling guest memory: not on a shared thread.
        let kick = fd.ok_or(ProtocolError::InvalidParam)?;
        private(&kick)?;
        self.stop_vring(index);
        let memory = self.memory.as_ref().ok_or(ProtocolError::InvalidParam)?;
        self.vrings[index]
            .start(memory)
            .map_err(|_| ProtocolError::InvalidParam)?;
        let data = epoll::EventData::new_u64(FIRST_KICK + index as u64);
        epoll::add(&self.epoll, &kick, data, epoll::EventFlags::IN)
            .map_err(|errno| ProtocolError::ReqHandlerError(errno.into()))?;
        self.vrings[index].kick = Some(kick);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        if let Some(call) = &fd {
            private(call)?;
        }
        self.vring(u32::from(index))?.call = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> ProtocolResult<()> {
        // Errors end the connection, which the monitor cannot miss.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> ProtocolResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> ProtocolResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> ProtocolResult<u64> {
        Ok(QUEUE_COUNT as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> ProtocolResult<()> {
        self.vring(index)?.is_enabled = enable;
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> ProtocolResult<Vec<u8>> {
        // struct virtio_vsock_config: the guest's context id, nothing else.
        let config = self.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).map_err(|_| ProtocolError::InvalidParam)?;
        let end = u64::from(offset) + u64::from(size);
        let end = usize::try_from(end).map_err(|_| ProtocolError::InvalidParam)?;
        config
            .get(start..end)
            .map(<[u8]>::to_vec)
            .ok_or(ProtocolError::InvalidParam)
    }

    fn set_config(
        &mut self,
        _offset: u32,
        _buf: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> ProtocolResult<()> {
        Err(ProtocolError::InvalidOperation(
            "the configuration is read-only",
        ))
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> ProtocolResult<()> {
        Err(ProtocolError::InvalidOperation("not a gpu"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> ProtocolResult<File> {
        Err(ProtocolError::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> ProtocolResult<(VhostUserInflight, File)> {
        Err(ProtocolError::InvalidOperation("no inflight tracking"))
    }

    fn set_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
        _file: File,
    ) -> ProtocolResult<()> {
        Err(ProtocolError::InvalidOperation("no inflight tracking"))
    }

    fn get_max_mem_slots(&mut self) -> ProtocolResult<u64> {
        Err(ProtocolError::InvalidOperation(
            "memory slots are not configurable",
        ))
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
    ) -> ProtocolResult<()> {
        Err(ProtocolError::InvalidOperation(
            "memory slots are not configurable",
        ))
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> ProtocolResult<()> {
        Err(ProtocolError::InvalidOperation(
            "memory slots are not configurable",
        ))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> ProtocolResult<Option<File>> {
        Err(ProtocolError::InvalidOperation("no device state transfer"))
    }

    fn check_device_state(&mut self) -> ProtocolResult<()> {
        Err(ProtocolError::InvalidOperation("no device state transfer"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> ProtocolResult<()> {
        Err(ProtocolError::InvalidOperation("no migration log"))
    }
}
