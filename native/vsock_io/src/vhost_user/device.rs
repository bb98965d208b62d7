//! The device: its two listening sockets, the monitor's connection, and the turns it takes.
//!
//! Everything is watched in an epoll set of the device's own, whose descriptor is readable when
//! [`Device::run`] has something to do; the reactor watches only that. One run handles a bounded
//! number of events and packets, so that other users of the I/O thread get their turn.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};
use vm_memory::GuestMemoryMmap;

use super::backend::{Backend, FIRST_KICK, QUEUE_COUNT, RX_QUEUE, TX_QUEUE};
use super::buffers::{Direction, GuestBuffers};
use super::muxer::{Dialer, Muxer, MuxerCounters};
use super::packet::{HEADER_SIZE, PacketHeader};
use super::queue::{QueueError, RxRing, Vring};

/// Events handled in one run.
const EVENTS_PER_RUN: usize = 64;
/// Packets handled in one run, each way.
const PACKETS_PER_RUN: usize = 256;
/// Connections accepted in one run.
const ACCEPTS_PER_RUN: usize = 64;
/// The monitor sends each message whole; one that stops midway is broken.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);
/// Before accepting again after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const MONITOR_LISTENER: u64 = 0;
const MONITOR: u64 = 1;
const HYBRID_LISTENER: u64 = 2;
/// Epoll data from here on are tokens of the muxer.
const FIRST_TOKEN: u64 = 1 << 32;

/// Why the device ended.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// a listening socket could not be made
    #[error("listen on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// the monitor closed its connection, or died
    #[error("the machine disconnected")]
    Disconnected,
    /// the monitor broke the vhost-user protocol
    #[error("serve the vhost-user protocol: {0}")]
    Protocol(ProtocolError),
    /// the guest's driver broke the ring
    #[error("serve the {name} queue")]
    Queue {
        /// Which queue.
        name: &'static str,
        /// The cause.
        #[source]
        source: QueueError,
    },
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

/// A socket file that goes away with its owner.
#[derive(Debug)]
struct BoundListener {
    listener: UnixListener,
    path: PathBuf,
}

impl BoundListener {
    /// Bind `path` with mode 0600 from its first moment on.
    fn bind(path: &Path) -> Result<Self, DeviceError> {
        let make = || -> io::Result<UnixListener> {
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // Before bind(2), which gives the file the socket's mode.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&socket, &address)?;
            rustix::net::listen(&socket, 128)?;
            Ok(UnixListener::from(socket))
        };
        let listener = make().map_err(|source| DeviceError::Listen {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl Drop for BoundListener {
    fn drop(&mut self) {
        // Gone already is as good.
        let _result = rustix::fs::unlink(&self.path);
    }
}

/// Guest-initiated connections to port P go to the socket `<hybrid path>_P`.
#[derive(Debug)]
struct PathDialer {
    hybrid_path: PathBuf,
}

impl Dialer for PathDialer {
    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.hybrid_path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(PathBuf::from(path))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A Unix socket connects at once or not at all.
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

/// A vhost-user-vsock device.
pub struct Device {
    epoll: Arc<OwnedFd>,
    monitor_listener: BoundListener,
    hybrid_listener: BoundListener,
    monitor: Option<BackendReqHandler<Mutex<Backend>>>,
    backend: Arc<Mutex<Backend>>,
    muxer: Muxer,
    accept_after: Option<Instant>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("muxer", &self.muxer)
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
        let monitor_listener = BoundListener::bind(socket_path)?;
        let hybrid_listener = BoundListener::bind(hybrid_path)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| system("create an epoll set", errno))?;
        let epoll = Arc::new(epoll);
        watch(
            &epoll,
            &monitor_listener.listener,
            MONITOR_LISTENER,
            epoll::EventFlags::IN,
        )?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        watch(&epoll, &hybrid_listener.listener, HYBRID_LISTENER, flags)?;
        let backend =
            Backend::new(guest_cid, Arc::clone(&epoll)).map_err(|source| DeviceError::Queue {
                name: "new",
                source,
            })?;
        let dialer = Box::new(PathDialer {
            hybrid_path: hybrid_path.to_owned(),
        });
        Ok(Self {
            muxer: Muxer::new(guest_cid, dialer, Arc::clone(&epoll)),
            epoll,
            monitor_listener,
            hybrid_listener,
            monitor: None,
            backend: Arc::new(Mutex::new(backend)),
            accept_after: None,
        })
    }

    /// The device's epoll set: readable when [`Device::run`] has something to do.
    pub fn epoll(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.epoll)
    }

    /// Diagnosis.
    pub fn counters(&self) -> MuxerCounters {
        self.muxer.counters()
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
        let is_full = events.len() == EVENTS_PER_RUN;
        for event in events {
            self.on_event(event.data.u64(), event.flags)?;
        }
        let now = Instant::now();
        self.muxer.expire(now);
        if self.accept_after.is_some_and(|after| after <= now) {
            self.accept_hosts();
        }
        let has_more = self.exchange()?;
        let deadlines = [self.muxer.next_deadline(), self.accept_after];
        Ok(Turn {
            has_more: has_more || is_full,
            deadline: deadlines.into_iter().flatten().min(),
        })
    }

    fn on_event(&mut self, data: u64, flags: epoll::EventFlags) -> Result<(), DeviceError> {
        match data {
            MONITOR_LISTENER => self.accept_monitor(),
            MONITOR => self.on_message(),
            HYBRID_LISTENER => {
                self.accept_hosts();
                Ok(())
            }
            token if token >= FIRST_TOKEN => {
                let is_ready = lock(&self.backend).is_active();
                self.muxer.on_socket(token, flags, is_ready);
                Ok(())
            }
            kick => {
                let index = usize::try_from(kick.wrapping_sub(FIRST_KICK)).unwrap_or(QUEUE_COUNT);
                if let Some(vring) = lock(&self.backend).vrings.get_mut(index) {
                    vring.clear_kick();
                }
                Ok(())
            }
        }
    }

    fn accept_monitor(&mut self) -> Result<(), DeviceError> {
        let Ok((socket, _)) = self.monitor_listener.listener.accept() else {
            // It left again, or a signal came.
            return Ok(());
        };
        let failed = |source| DeviceError::System {
            operation: "set up the connection",
            source,
        };
        // One monitor per device: no further ones.
        epoll::delete(&self.epoll, &self.monitor_listener.listener)
            .map_err(|errno| failed(errno.into()))?;
        // Messages are read whole when readable; the limits keep a broken peer from blocking us.
        socket.set_nonblocking(false).map_err(failed)?;
        socket
            .set_read_timeout(Some(MESSAGE_TIMEOUT))
            .map_err(failed)?;
        socket
            .set_write_timeout(Some(MESSAGE_TIMEOUT))
            .map_err(failed)?;
        watch(&self.epoll, &socket, MONITOR, epoll::EventFlags::IN)?;
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

    fn accept_hosts(&mut self) {
        self.accept_after = None;
        for _ in 0..ACCEPTS_PER_RUN {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&self.hybrid_listener.listener, flags) {
                Ok(socket) => self.muxer.accept(UnixStream::from(socket)),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(_out_of_resources) => {
                    self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            }
        }
        self.accept_after = Some(Instant::now());
    }

    /// Move packets both ways. True if more can be moved at once.
    fn exchange(&mut self) -> Result<bool, DeviceError> {
        let mut backend = lock(&self.backend);
        if backend.take_stopped() {
            self.muxer.reset();
        }
        if !backend.is_active() {
            return Ok(false);
        }
        let Some((memory, rx, tx)) = backend.parts() else {
            return Ok(false);
        };
        let tx_has_more =
            drain_tx(&mut self.muxer, memory, tx).map_err(|source| DeviceError::Queue {
                name: QUEUE_NAMES[TX_QUEUE],
                source,
            })?;
        let rx_has_more =
            fill_rx(&mut self.muxer, memory, rx).map_err(|source| DeviceError::Queue {
                name: QUEUE_NAMES[RX_QUEUE],
                source,
            })?;
        // Packets left on the ring for want of reply space can be taken when there is some again;
        // without guest buffers there is none, and the guest's next buffer kicks.
        Ok(rx_has_more || tx_has_more && !self.muxer.is_reply_queue_full())
    }
}

const QUEUE_NAMES: [&str; 2] = ["receive", "transmit"];

/// Take packets from the guest. True if some were left on the ring.
///
/// # Errors
/// The ring is broken.
pub fn drain_tx(
    muxer: &mut Muxer,
    memory: &GuestMemoryMmap,
    tx: &mut Vring,
) -> Result<bool, QueueError> {
    let mut budget = PACKETS_PER_RUN;
    tx.disable_kicks(memory)?;
    let has_more = loop {
        if muxer.is_reply_queue_full() || budget == 0 {
            break true;
        }
        let Some(chain) = tx.pop(memory)? else {
            if tx.enable_kicks(memory)? {
                continue;
            }
            break false;
        };
        budget -= 1;
        let head = chain.head_index();
        let mut packet = GuestBuffers::default();
        let max = usize::from(tx.size());
        let gathered = packet.gather(memory, chain, Direction::FromGuest, max);
        let mut bytes = [0; HEADER_SIZE];
        if packet.copy_to(&mut bytes) == HEADER_SIZE {
            let header = PacketHeader::parse(&bytes);
            // With a part of the chain unusable the payload comes out short, and is refused.
            let payload = match gathered {
                Ok(()) => packet.range(HEADER_SIZE, header.len as usize),
                Err(_) => GuestBuffers::default(),
            };
            muxer.receive(&header, &payload);
        } else {
            muxer.count_invalid();
        }
        tx.complete(memory, head, 0)?;
    };
    tx.signal(memory)?;
    Ok(has_more)
}

/// Give the guest what waits. True if there is more and room for it.
///
/// # Errors
/// The ring is broken.
pub fn fill_rx(
    muxer: &mut Muxer,
    memory: &GuestMemoryMmap,
    rx: &mut Vring,
) -> Result<bool, QueueError> {
    let mut ring = RxRing::new(rx, memory, PACKETS_PER_RUN);
    muxer.transmit(&mut ring)?;
    let is_exhausted = ring.is_exhausted();
    rx.signal(memory)?;
    if !muxer.has_pending() {
        return Ok(false);
    }
    // Only a kick tells of new buffers, so ask for it; some may have come meanwhile.
    Ok(!is_exhausted || rx.enable_kicks(memory)?)
}

fn lock(backend: &Mutex<Backend>) -> std::sync::MutexGuard<'_, Backend> {
    // Only this thread locks it; a panic while it was locked ends the device anyway.
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(
    epoll: &OwnedFd,
    fd: impl AsFd,
    data: u64,
    flags: epoll::EventFlags,
) -> Result<(), DeviceError> {
    let fd: BorrowedFd<'_> = fd.as_fd();
    epoll::add(epoll, fd, epoll::EventData::new_u64(data), flags)
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
