//! Connecting to a port of the guest: non-blocking, retried with a growing pause until the
//! deadline, because the guest may still be booting when the first attempt is made.
//!
//! [`Dial`] is a source on the I/O thread that lives for one dial: start an attempt, finish the
//! handshake of hybrid sockets, deliver the descriptor or pause and try again. A refused or
//! missing socket, and a hybrid connection that closes without an answer, mean "not listening
//! yet"; what no retry can mend (permissions, limits, another protocol) ends the dial at once.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::address::Address;
use crate::event::{Completion, Value};
use crate::hybrid::{Handshake, HybridError, MAX_LINE};
use crate::reactor::{Context, Interest, Readiness, Source, StopReason};
use crate::status::Code;

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// One attempt, its handshake included; a machine monitor that never answers is asked again.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

const SOCKET: u64 = 0;
const DEADLINE_TIMER: u64 = 0;
const PAUSE_TIMER: u64 = 1;
const ATTEMPT_TIMER: u64 = 2;

/// Why an attempt to connect failed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The kernel refused.
    #[error("connect: {0}")]
    Connect(io::Error),
    /// The socket failed during the handshake.
    #[error("handshake: {0}")]
    Handshake(io::Error),
    /// The machine monitor closed the connection instead of answering.
    #[error("the machine closed the connection: the guest is not listening")]
    NotListening,
    /// The machine monitor did not answer in time.
    #[error("no answer to CONNECT within {ATTEMPT_TIMEOUT:?}")]
    NoAnswer,
    /// The machine monitor answered something else.
    #[error(transparent)]
    Answer(#[from] HybridError),
}

impl DialError {
    /// Whether the guest may simply not be there yet.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NotListening | Self::NoAnswer | Self::Handshake(_) => true,
            Self::Answer(_) => false,
            Self::Connect(error) => matches!(
                Errno::from_io_error(error),
                Some(
                    Errno::NOENT
                        | Errno::CONNREFUSED
                        | Errno::AGAIN
                        | Errno::CONNRESET
                        | Errno::TIMEDOUT
                        | Errno::HOSTUNREACH
                        | Errno::NETUNREACH
                        | Errno::NODEV
                        | Errno::PIPE
                        | Errno::INTR
                )
            ),
        }
    }
}

enum Attempt {
    Connecting(Arc<OwnedFd>),
    Shaking(Arc<OwnedFd>, Handshake),
}

/// One dial; add it to the reactor, its token is completed.
pub struct Dial {
    token: u64,
    address: Address,
    port: u32,
    deadline: Instant,
    pause: Duration,
    attempt: Option<Attempt>,
    last_error: Option<DialError>,
}

impl Dial {
    /// Prepare to connect to `port` at `address` until `timeout` is over. Time runs from now.
    #[must_use]
    pub fn new(token: u64, address: Address, port: u32, timeout: Duration) -> Self {
        let now = Instant::now();
        Self {
            token,
            address,
            port,
            deadline: now
                .checked_add(timeout)
                .unwrap_or(now + Duration::from_secs(86_400)),
            pause: FIRST_PAUSE,
            attempt: None,
            last_error: None,
        }
    }

    fn begin(&mut self, context: &mut Context<'_>) {
        context.set_timer(ATTEMPT_TIMER, Instant::now() + ATTEMPT_TIMEOUT);
        let outcome = open(&self.address, self.port).and_then(|(fd, is_connected)| {
            let fd = Arc::new(fd);
            context
                .watch(SOCKET, fd.clone(), Interest::WRITE)
                .map_err(DialError::Connect)?;
            Ok((fd, is_connected))
        });
        match outcome {
            Ok((fd, true)) => self.connected(fd, context),
            Ok((fd, false)) => self.attempt = Some(Attempt::Connecting(fd)),
            Err(error) => self.failed(error, context),
        }
    }

    fn connected(&mut self, fd: Arc<OwnedFd>, context: &mut Context<'_>) {
        if !matches!(self.address, Address::Hybrid { .. }) {
            return self.succeeded(fd, context);
        }
        let request = Handshake::request(self.port);
        // Some 17 bytes into an empty socket buffer: all of them or an error.
        let outcome = net::send(&fd, request.as_bytes(), SendFlags::NOSIGNAL)
            .map_err(|errno| DialError::Handshake(errno.into()))
            .and_then(|_| {
                context
                    .set_interest(SOCKET, Interest::READ)
                    .map_err(DialError::Handshake)
            });
        match outcome {
            Ok(()) => self.attempt = Some(Attempt::Shaking(fd, Handshake::default())),
            Err(error) => self.failed(error, context),
        }
    }

    fn shake(&mut self, fd: Arc<OwnedFd>, mut handshake: Handshake, context: &mut Context<'_>) {
        match read_answer(&fd, &mut handshake) {
            Ok(true) => self.succeeded(fd, context),
            Ok(false) => self.attempt = Some(Attempt::Shaking(fd, handshake)),
            Err(error) => self.failed(error, context),
        }
    }

    fn succeeded(&mut self, fd: Arc<OwnedFd>, context: &mut Context<'_>) {
        context.unwatch(SOCKET);
        let completion = match Arc::try_unwrap(fd) {
            Ok(fd) => Completion::ok(self.token, Value::Fd(fd)),
            Err(_) => Completion::failed(self.token, Code::INTERNAL, "the socket is still shared"),
        };
        context.sink().complete(completion);
        context.remove();
    }

    fn failed(&mut self, error: DialError, context: &mut Context<'_>) {
        context.unwatch(SOCKET);
        context.cancel_timer(ATTEMPT_TIMER);
        self.attempt = None;
        if error.is_transient() {
            context.set_timer(PAUSE_TIMER, Instant::now() + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.last_error = Some(error);
        } else {
            self.finish(Code::UNAVAILABLE, error.to_string(), context);
        }
    }

    fn finish(&mut self, code: Code, message: String, context: &mut Context<'_>) {
        context
            .sink()
            .complete(Completion::failed(self.token, code, message));
        context.remove();
    }
}

impl Source for Dial {
    fn started(&mut self, context: &mut Context<'_>) {
        context.set_timer(DEADLINE_TIMER, self.deadline);
        self.begin(context);
    }

    fn ready(&mut self, _key: u64, _readiness: Readiness, context: &mut Context<'_>) {
        match self.attempt.take() {
            Some(Attempt::Connecting(fd)) => match net::sockopt::socket_error(&fd) {
                Ok(Ok(())) => self.connected(fd, context),
                Ok(Err(errno)) | Err(errno) => {
                    drop(fd);
                    self.failed(DialError::Connect(errno.into()), context);
                }
            },
            Some(Attempt::Shaking(fd, handshake)) => self.shake(fd, handshake, context),
            None => {}
        }
    }

    fn timeout(&mut self, key: u64, context: &mut Context<'_>) {
        match key {
            PAUSE_TIMER => self.begin(context),
            ATTEMPT_TIMER => self.failed(DialError::NoAnswer, context),
            _ => {
                let cause = self.last_error.as_ref().map_or_else(
                    || "the first attempt has not ended".to_owned(),
                    ToString::to_string,
                );
                self.finish(Code::DEADLINE_EXCEEDED, cause, context);
            }
        }
    }

    fn stopped(&mut self, reason: &StopReason, context: &mut Context<'_>) {
        let (code, message) = reason.status();
        context
            .sink()
            .complete(Completion::failed(self.token, code, message));
    }
}

/// A socket on its way to the address, and whether it is connected already.
fn open(address: &Address, port: u32) -> Result<(OwnedFd, bool), DialError> {
    let family = match address {
        Address::Vsock { .. } => AddressFamily::VSOCK,
        Address::Hybrid { .. } | Address::Unix { .. } => AddressFamily::UNIX,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let outcome = net::socket_with(family, SocketType::STREAM, flags, None).and_then(|fd| {
        let connected = match address {
            Address::Vsock { cid } => vsock::connect(&fd, *cid, port),
            Address::Hybrid { path } | Address::Unix { path } => connect_unix(&fd, path),
        };
        match connected {
            Ok(()) => Ok((fd, true)),
            Err(Errno::INPROGRESS) => Ok((fd, false)),
            Err(errno) => Err(errno),
        }
    });
    outcome.map_err(|errno| DialError::Connect(errno.into()))
}

fn connect_unix(fd: &OwnedFd, path: &Path) -> rustix::io::Result<()> {
    net::connect(fd, &net::SocketAddrUnix::new(path)?)
}

/// Take what there is of the answer and not a byte after it. `true` when it is complete.
fn read_answer(fd: &OwnedFd, handshake: &mut Handshake) -> Result<bool, DialError> {
    let mut buffer = [0; MAX_LINE];
    loop {
        let window = buffer.get_mut(..handshake.room()).unwrap_or_default();
        let count = match net::recv(fd, &mut *window, RecvFlags::PEEK) {
            Ok((0, _)) | Err(Errno::CONNRESET) => return Err(DialError::NotListening),
            Ok((count, _)) => count,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(DialError::Handshake(errno.into())),
        };
        let progress = handshake.offer(window.get(..count).unwrap_or_default())?;
        let mut consumed = 0;
        while consumed < progress.consumed {
            let taken = buffer
                .get_mut(..progress.consumed - consumed)
                .unwrap_or_default();
            match net::recv(fd, taken, RecvFlags::empty()) {
                Ok((0, _)) => return Err(DialError::NotListening),
                Ok((count, _)) => consumed += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(DialError::Handshake(errno.into())),
            }
        }
        if progress.is_done {
            return Ok(true);
        }
    }
}

/// `connect` for `AF_VSOCK`, which rustix has no address type for.
mod vsock {
    use std::os::fd::{AsRawFd, OwnedFd};

    use rustix::io::Errno;

    #[expect(unsafe_code, reason = "rustix has no address type for AF_VSOCK")]
    pub(super) fn connect(fd: &OwnedFd, cid: u32, port: u32) -> rustix::io::Result<()> {
        // SAFETY: sockaddr_vm consists of integers, for which all-zero bytes are valid.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::AF_VSOCK.try_into().map_err(|_| Errno::AFNOSUPPORT)?;
        address.svm_cid = cid;
        address.svm_port = port;
        let len = size_of::<libc::sockaddr_vm>()
            .try_into()
            .map_err(|_| Errno::INVAL)?;
        let pointer: *const libc::sockaddr_vm = &raw const address;
        // SAFETY: the descriptor is open, and `pointer` is valid for reads of `len` bytes
        // during the call, which does not keep it.
        let result = unsafe { libc::connect(fd.as_raw_fd(), pointer.cast(), len) };
        if result == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}
