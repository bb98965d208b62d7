//! One queue of a tap: an open `/dev/net/tun` attached to an interface.
//!
//! What is read and written are frames with a virtio header before them, whole ones, without
//! waiting. An interface with several queues has one of these for each; those that the guest does
//! not use are detached, or the kernel would hand them frames that nobody fetches.

#![expect(unsafe_code, reason = "the ioctls of taps, which no crate of ours has")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::features::HEADER_SIZE;
use super::{TapError, TapSource};

/// The longest name and its final zero.
const NAME_SIZE: usize = libc::IFNAMSIZ;
/// What a tap of ours has to be opened with.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// What the tap may leave to the guest, instead of doing it itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "four independent claims")]
pub(super) struct Offloads {
    /// Checksums.
    pub(super) checksum: bool,
    /// Segments of TCP over IPv4.
    pub(super) tcp4: bool,
    /// Segments of TCP over IPv6.
    pub(super) tcp6: bool,
    /// Fragments of UDP.
    pub(super) udp: bool,
}

impl Offloads {
    /// Whether frames may be larger than the MTU.
    pub(super) fn has_large_frames(self) -> bool {
        self.tcp4 || self.tcp6 || self.udp
    }

    fn flags(self) -> libc::c_uint {
        let pairs = [
            (self.checksum, libc::TUN_F_CSUM),
            (self.tcp4, libc::TUN_F_TSO4),
            (self.tcp6, libc::TUN_F_TSO6),
            (self.udp, libc::TUN_F_UFO),
        ];
        let set = pairs.iter().filter(|(is_set, _)| *is_set);
        set.fold(0, |flags, (_, flag)| flags | flag)
    }
}

/// One queue.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    /// It is, and no packet socket of a test.
    is_tap: bool,
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Tap {
    /// A queue for each pair, set up for our headers; of several only the first is attached.
    ///
    /// # Errors
    /// The interface is not there, not ours, or not what is asked for.
    pub(super) fn open_all(source: TapSource, queue_pairs: u16) -> Result<Vec<Self>, TapError> {
        let (fds, is_tap) = match source {
            TapSource::Name(name) => {
                let fds = (0..queue_pairs).map(|_| open(&name, queue_pairs));
                (fds.collect::<Result<Vec<_>, _>>()?, true)
            }
            TapSource::Fds(fds) => (fds, true),
            #[cfg(any(test, feature = "mock"))]
            TapSource::Packets(fds) => (fds, false),
        };
        if fds.len() != usize::from(queue_pairs) {
            return Err(TapError::Count {
                given: fds.len(),
                queue_pairs,
            });
        }
        let taps: Vec<Self> = fds.into_iter().map(|fd| Self { fd, is_tap }).collect();
        for (index, tap) in taps.iter().enumerate() {
            tap.prepare(queue_pairs > 1)?;
            if index > 0 {
                tap.set_attached(false)?;
            }
        }
        Ok(taps)
    }

    /// Check how it was opened, and agree on the header.
    fn prepare(&self, is_multi_queue: bool) -> Result<(), TapError> {
        let flags = fcntl_getfl(&self.fd).and_then(|flags| {
            // Nobody may wait for a frame here.
            fcntl_setfl(&self.fd, flags | OFlags::NONBLOCK)
        });
        flags.map_err(system("make the tap non-blocking"))?;
        if !self.is_tap {
            return Ok(());
        }
        let mut request = request(c"");
        // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is.
        let status = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        // SAFETY: the union was filled in by the call, or by `request`; any bytes are flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let mut wanted = FLAGS;
        if is_multi_queue {
            wanted |= libc::IFF_MULTI_QUEUE;
        }
        if status != 0 || flags & wanted != wanted || flags & libc::IFF_TUN != 0 {
            let fd = self.fd.as_raw_fd();
            return Err(TapError::Descriptor { fd });
        }
        // The header's size always fits.
        let size = libc::c_int::try_from(HEADER_SIZE).unwrap_or(libc::c_int::MAX);
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let status =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        check(status).map_err(system("set the size of the tap's headers"))
    }

    /// Say what the driver agreed to do itself.
    ///
    /// # Errors
    /// The kernel does not know one of them.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> Result<(), Errno> {
        if !self.is_tap {
            return Ok(());
        }
        let flags = libc::c_ulong::from(offloads.flags());
        // SAFETY: TUNSETOFFLOAD takes a number, no address.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, flags) })
    }

    /// Have frames come to this queue of a tap with several, or not any more.
    ///
    /// # Errors
    /// The tap is gone.
    pub(super) fn set_attached(&self, is_attached: bool) -> Result<(), TapError> {
        if !self.is_tap {
            return Ok(());
        }
        let mut request = request(c"");
        let flag = if is_attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        // 0x200 and 0x400.
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or_default();
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is.
        let status =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
        match check(status) {
            // It was as it is to be.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(system("attach or detach a queue of the tap")(errno)),
        }
    }
}

/// Open one queue of the tap with this name.
fn open(name: &str, queue_pairs: u16) -> Result<OwnedFd, TapError> {
    let bad_name = || TapError::Name {
        name: name.to_owned(),
    };
    let is_sound = |byte: u8| !byte.is_ascii_whitespace() && byte != b'/' && byte != b':';
    let may_be_name = (1..NAME_SIZE).contains(&name.len()) && name.bytes().all(is_sound);
    let c_name = CString::new(name).map_err(|_| bad_name())?;
    // With a format the kernel would make up a name.
    if !may_be_name || name.contains('%') {
        return Err(bad_name());
    }
    // TUNSETIFF would create it, in a state that nobody wants.
    // SAFETY: a string that ends in zero.
    if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
        let name = name.to_owned();
        return Err(TapError::Missing { name });
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        .map_err(|errno| TapError::Unavailable(errno.into()))?;
    let mut request = request(&c_name);
    let mut flags = FLAGS;
    if queue_pairs > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // Bits below 2^15.
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    let name = name.to_owned();
    match check(status) {
        Ok(()) => Ok(fd),
        Err(Errno::BUSY) => Err(TapError::Busy { name }),
        Err(Errno::PERM | Errno::ACCESS) => Err(TapError::NoPermission { name }),
        Err(Errno::INVAL) => Err(TapError::Kind { name, queue_pairs }),
        Err(errno) => Err(system("attach to the tap")(errno)),
    }
}

/// For an interface; the name has room, by `open`.
fn request(name: &std::ffi::CStr) -> libc::ifreq {
    let mut request = libc::ifreq {
        ifr_name: [0; NAME_SIZE],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    };
    for (target, source) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *target = source.cast_signed();
    }
    request
}

fn check(status: libc::c_int) -> Result<(), Errno> {
    if status == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn system(operation: &'static str) -> impl Fn(Errno) -> TapError {
    move |errno| TapError::System {
        operation,
        source: errno.into(),
    }
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
