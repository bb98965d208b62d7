//! The device as the monitor meets it: the socket it connects to, its messages, and turns.
//!
//! Everything is watched in an epoll set of the device's own, whose descriptor is readable when
//! [`Device::run`] has something to do; the reactor watches only that. Host sockets are in a set
//! nested in it (`virtio_core::vsock::hybrid`). One run handles a bounded number of events and
//! packets, so that other users of the I/O thread get their turn.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};
use virtio_core::vsock::QUEUE_COUNT;
use virtio_core::vsock::exchange::QueueError;
use virtio_core::vsock::hybrid::{HybridError, HybridVsock};
use virtio_core::vsock::listener::BoundListener;
use virtio_core::vsock::muxer::MuxerCounters;

use super::backend::{Backend, FIRST_KICK};

/// Events handled in one run: the doorbells and four others.
const EVENTS_PER_RUN: usize = 8;
/// The monitor sends each message whole; one that stops midway is broken.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);

const MONITOR_LISTENER: u64 = 0;
const MONITOR: u64 = 1;
const HOST_SOCKETS: u64 = 2;

/// Why the device ended.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// a listening socket could not be made
    #[error(transparent)]
    Hybrid(#[from] HybridError),
    /// the guest's driver broke a ring
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// the monitor closed its connection, or died
    #[error("the machine disconnected")]
    Disconnected,
    /// the monitor broke the vhost-user protocol
    #[error("serve the vhost-user protocol: {0}")]
    Protocol(ProtocolError),
    /// a system call that should not fail did
    #[error("{operation}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What a run left.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Run again soon: the bound was reached.
    pub has_more: bool,
    /// Run again at this time.
    pub deadline: Option<Instant>,
}

/// A vhost-user-vsock device.
pub struct Device {
    epoll: Arc<OwnedFd>,
    monitor_listener: BoundListener,
    monitor: Option<BackendReqHandler<Mutex<Backend>>>,
    backend: Arc<Mutex<Backend>>,
    host: HybridVsock,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

impl Device {
    /// Listen for the monitor on `socket_path` and for host processes on `hybrid_path`.
    ///
    /// # Errors
    /// A path cannot be bound; nothing is left behind.
    pub fn bind(
        socket_path: &Path,
        hybrid_path: &Path,
        guest_cid: u64,
    ) -> Result<Self, DeviceError> {
        let monitor_listener = BoundListener::bind(socket_path).map_err(HybridError::from)?;
        let host = HybridVsock::bind(hybrid_path, guest_cid)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| system("create an epoll set", errno))?;
        let epoll = Arc::new(epoll);
        watch(&epoll, &monitor_listener, MONITOR_LISTENER)?;
        watch(&epoll, &host, HOST_SOCKETS)?;
        let backend = Backend::new(guest_cid, Arc::clone(&epoll));
        Ok(Self {
            epoll,
            monitor_listener,
            monitor: None,
            backend: Arc::new(Mutex::new(backend)),
            host,
        })
    }

    /// The device's epoll set: readable when [`Device::run`] has something to do.
    pub fn epoll(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.epoll)
    }

    /// Diagnosis.
    pub fn counters(&self) -> MuxerCounters {
        self.host.counters()
    }

    /// Do what is due, for a bounded while.
    ///
    /// # Errors
    /// The device has come to its end; drop it.
    pub fn run(&mut self) -> Result<Turn, DeviceError> {
        let mut events = Vec::with_capacity(EVENTS_PER_RUN);
        let no_wait = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let buffer = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, buffer, Some(&no_wait)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(system("wait for events", errno)),
        }
        let mut has_more = events.len() == EVENTS_PER_RUN;
        let now = Instant::now();
        let mut is_host_due = self.host.next_deadline().is_some_and(|due| due <= now);
        for event in events {
            match event.data.u64() {
                MONITOR_LISTENER => self.accept_monitor()?,
                MONITOR => self.on_message()?,
                HOST_SOCKETS => is_host_due = true,
                kick => self.clear_kick(kick),
            }
        }
        if is_host_due {
            let is_active = lock(&self.backend).is_active();
            has_more |= self
                .host
                .poll(is_active)
                .map_err(|errno| system("wait for host sockets", errno))?;
        }
        has_more |= self.exchange()?;
        Ok(Turn {
            has_more,
            deadline: self.host.next_deadline(),
        })
    }

    fn clear_kick(&mut self, data: u64) {
        let index = usize::try_from(data.wrapping_sub(FIRST_KICK)).unwrap_or(QUEUE_COUNT);
        if let Some(vring) = lock(&self.backend).vrings.get_mut(index) {
            vring.clear_kick();
        }
    }

    fn accept_monitor(&mut self) -> Result<(), DeviceError> {
        let Ok(socket) = self.monitor_listener.accept() else {
            // It left again, or a signal came.
            return Ok(());
        };
        let failed = |source| DeviceError::System {
            operation: "set up the connection",
            source,
        };
        // One monitor per device: no further ones.
        epoll::delete(&self.epoll, &self.monitor_listener).map_err(|errno| failed(errno.into()))?;
        // Messages are read whole when readable; the limits keep a broken peer from blocking us.
        socket.set_nonblocking(false).map_err(failed)?;
        socket
            .set_read_timeout(Some(MESSAGE_TIMEOUT))
            .map_err(failed)?;
        socket
            .set_write_timeout(Some(MESSAGE_TIMEOUT))
            .map_err(failed)?;
        watch(&self.epoll, &socket, MONITOR)?;
        self.monitor = Some(BackendReqHandler::from_stream(
            socket,
            Arc::clone(&self.backend),
        ));
        Ok(())
    }

    fn on_message(&mut self) -> Result<(), DeviceError> {
        let Some(monitor) = &mut self.monitor else {
            return Ok(());
        };
        match monitor.handle_request() {
            Ok(()) => Ok(()),
            Err(ProtocolError::Disconnected | ProtocolError::SocketBroken(_)) => {
                Err(DeviceError::Disconnected)
            }
            Err(error) => Err(DeviceError::Protocol(error)),
        }
    }

    /// Move packets both ways. True if more can be moved at once.
    fn exchange(&mut self) -> Result<bool, DeviceError> {
        let mut backend = lock(&self.backend);
        if backend.take_stopped() {
            self.host.reset();
        }
        let Some((rx, tx)) = backend.rings() else {
            return Ok(false);
        };
        let has_more = self.host.exchange(rx, tx)?;
        backend.signal().map_err(|source| DeviceError::System {
            operation: "signal the driver",
            source,
        })?;
        Ok(has_more)
    }
}

fn lock(backend: &Mutex<Backend>) -> std::sync::MutexGuard<'_, Backend> {
    // Only this thread locks it; a panic while it was locked ends the device anyway.
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(epoll: &OwnedFd, fd: impl AsFd, data: u64) -> Result<(), DeviceError> {
    let data = epoll::EventData::new_u64(data);
    epoll::add(epoll, fd.as_fd(), data, epoll::EventFlags::IN)
        .map_err(|errno| system("watch a descriptor", errno))
}

fn system(operation: &'static str, errno: Errno) -> DeviceError {
    DeviceError::System {
        operation,
        source: errno.into(),
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
