//! The guest memory of a descriptor chain, and moving it to and from sockets without a copy.
//!
//! Addresses and lengths come from the guest: each is checked against the mapped regions once,
//! when gathered, and only the checked slices are used after. Guest memory changes under us at
//! any time, so it is touched only through volatile slices and by the kernel (`sendmsg`,
//! `readv`), never through Rust references. Called by the muxer on the I/O thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Slices given to one system call; what does not fit takes another.
const MAX_SLICES_PER_CALL: usize = 64;

/// Why a descriptor chain is refused.
#[derive(Debug, Error)]
pub enum BufferError {
    /// a descriptor points outside of guest memory
    #[error("descriptor of {len} bytes at {address:#x} is outside of guest memory")]
    OutOfMemory {
        /// Guest address in the descriptor.
        address: u64,
        /// Length in the descriptor.
        len: u32,
    },
    /// a descriptor has the wrong direction
    #[error("descriptor at {address:#x} has the wrong direction")]
    WrongDirection {
        /// Guest address in the descriptor.
        address: u64,
    },
    /// the chain is longer than the queue
    #[error("chain of more than {0} descriptors")]
    TooLong(usize),
}

/// Who writes the buffers of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest wrote them, the device reads.
    FromGuest,
    /// The device writes them.
    ToGuest,
}

/// The checked memory of one or more descriptor chains, in order.
#[derive(Debug, Default)]
pub struct GuestBuffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> GuestBuffers<'m> {
    /// Check the descriptors of a chain and add their memory.
    ///
    /// # Errors
    /// A descriptor breaks a rule; what was added before it stays.
    pub fn gather(
        &mut self,
        memory: &'m GuestMemoryMmap,
        descriptors: impl Iterator<Item = Descriptor>,
        direction: Direction,
        max_descriptors: usize,
    ) -> Result<(), BufferError> {
        for (count, descriptor) in descriptors.enumerate() {
            if count >= max_descriptors {
                return Err(BufferError::TooLong(max_descriptors));
            }
            let (address, len) = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() != (direction == Direction::ToGuest) {
                return Err(BufferError::WrongDirection { address: address.0 });
            }
            // A range may span adjacent regions, so one descriptor may give several slices.
            for slice in memory.get_slices(address, len as usize) {
                let slice = slice.map_err(|_| BufferError::OutOfMemory {
                    address: address.0,
                    len,
                })?;
                self.len += slice.len();
                self.slices.push(slice);
            }
        }
        Ok(())
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` bytes from `offset`; fewer if the buffers end before.
    #[must_use]
    pub fn range(&self, offset: usize, len: usize) -> GuestBuffers<'m> {
        let mut range = GuestBuffers::default();
        let (mut skip, mut rest) = (offset, len);
        for slice in &self.slices {
            if rest == 0 {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let count = rest.min(slice.len() - skip);
            // Cannot fail: skip + count is at most the slice's length.
            if let Ok(part) = slice.subslice(skip, count) {
                range.len += count;
                range.slices.push(part);
            }
            rest -= count;
            skip = 0;
        }
        range
    }

    /// Append the memory of `other`.
    pub fn append(&mut self, mut other: GuestBuffers<'m>) {
        self.len += other.len;
        self.slices.append(&mut other.slices);
    }

    /// Copy the first bytes out; gives how many.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Some(rest) = target.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copy `source` in; gives how many bytes fitted.
    pub fn copy_from(&self, source: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Some(rest) = source.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let count = rest.len().min(slice.len());
            slice.copy_from(&rest[..count]);
            done += count;
        }
        done
    }

    /// Give bytes from `offset` on to a stream socket: as many as one call takes.
    ///
    /// # Errors
    /// As sendmsg(2); EPIPE comes without a signal.
    pub fn send(&self, socket: BorrowedFd<'_>, offset: usize) -> io::Result<usize> {
        let (iovecs, count) = self.iovecs(offset);
        retry(|| send_iovecs(socket, &iovecs[..count]))
    }

    /// Fill from a stream socket: as many bytes as one call gives, 0 at end of file.
    ///
    /// # Errors
    /// As readv(2).
    pub fn receive(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (iovecs, count) = self.iovecs(0);
        retry(|| receive_iovecs(socket, &iovecs[..count]))
    }

    fn iovecs(&self, offset: usize) -> ([libc::iovec; MAX_SLICES_PER_CALL], usize) {
        let empty = libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        let mut iovecs = [empty; MAX_SLICES_PER_CALL];
        let (mut skip, mut count) = (offset, 0);
        for slice in &self.slices {
            if count == MAX_SLICES_PER_CALL {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            // The guard only matters for Xen's on-demand mappings; ours live as long as 'm.
            let base = slice.ptr_guard_mut().as_ptr().wrapping_add(skip);
            iovecs[count] = libc::iovec {
                iov_base: base.cast(),
                iov_len: slice.len() - skip,
            };
            count += 1;
            skip = 0;
        }
        (iovecs, count)
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[expect(
    unsafe_code,
    reason = "guest memory may not be lent as a Rust slice, which rustix wants"
)]
fn send_iovecs(socket: BorrowedFd<'_>, iovecs: &[libc::iovec]) -> io::Result<usize> {
    let message = libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: iovecs.as_ptr().cast_mut(),
        msg_iovlen: iovecs.len(),
        msg_control: ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    };
    // SAFETY: `message` names `iovecs.len()` valid entries that the kernel only reads. Each entry
    // was made by `GuestBuffers::iovecs` from a volatile slice, so its range lies in a mapping
    // that outlives the borrow of the buffers; concurrent guest writes only change the bytes sent.
    let result =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[expect(
    unsafe_code,
    reason = "guest memory may not be lent as a Rust slice, which rustix wants"
)]
fn receive_iovecs(socket: BorrowedFd<'_>, iovecs: &[libc::iovec]) -> io::Result<usize> {
    // At most MAX_SLICES_PER_CALL.
    let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the entries are valid (see `send_iovecs`) and name writable shared mappings that no
    // Rust reference points into, so the kernel may write them.
    let result = unsafe { libc::readv(socket.as_raw_fd(), iovecs.as_ptr(), count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;
    use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemoryMmap {
        let regions = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ];
        GuestMemoryMmap::from_ranges(&regions).unwrap()
    }

    fn descriptor(address: u64, len: u32, direction: Direction) -> Descriptor {
        let flags = if direction == Direction::ToGuest {
            VRING_DESC_F_WRITE
        } else {
            0
        };
        Descriptor::new(address, len, u16::try_from(flags).unwrap(), 0)
    }

    proptest! {
        /// Whatever the split of descriptors, bytes come through a socket as they are in memory.
        #[test]
        fn any_split_sends_and_receives_the_same_bytes(
            lens in proptest::collection::vec(0u32..200, 1..100), start in 0xff00u64..0x1_0100, skip in 0usize..300,
        ) {
            let memory = memory();
            let total: u32 = lens.iter().sum();
            let bytes: Vec<u8> = (0..total).map(|i| u8::try_from(i % 251).unwrap()).collect();
            memory.write_slice(&bytes, GuestAddress(start)).unwrap();
            let mut at = start;
            let chain: Vec<Descriptor> = lens.iter().map(|len| {
                let made = descriptor(at, *len, Direction::FromGuest);
                at += u64::from(*len);
                made
            }).collect();
            let mut buffers = GuestBuffers::default();
            buffers.gather(&memory, chain.into_iter(), Direction::FromGuest, 100).unwrap();
            prop_assert_eq!(buffers.len(), bytes.len());

            let skip = skip.min(bytes.len());
            let (mut host, device) = UnixStream::pair().unwrap();
            let mut sent = skip;
            while sent < bytes.len() {
                sent += buffers.send(device.as_fd(), sent).unwrap();
            }
            drop(device);
            let mut received = Vec::new();
            host.read_to_end(&mut received).unwrap();
            prop_assert_eq!(&received, &bytes[skip..]);

            let part = buffers.range(skip, 77);
            let mut copied = vec![0; 77];
            let count = part.copy_to(&mut copied);
            prop_assert_eq!(&copied[..count], &bytes[skip..bytes.len().min(skip + 77)]);
        }
    }

    #[test]
    fn receiving_fills_buffers_in_order() {
        let memory = memory();
        let chain = [(0x100, 3), (0xfffe, 4), (0x300, 10)]
            .map(|(a, l)| descriptor(a, l, Direction::ToGuest));
        let mut buffers = GuestBuffers::default();
        buffers
            .gather(&memory, chain.into_iter(), Direction::ToGuest, 3)
            .unwrap();
        let (mut host, device) = UnixStream::pair().unwrap();
        host.write_all(b"abcdefghij").unwrap();
        assert_eq!(buffers.receive(device.as_fd()).unwrap(), 10);
        let mut across = [0; 4];
        memory
            .read_slice(&mut across, GuestAddress(0xfffe))
            .unwrap();
        assert_eq!(&across, b"defg");
    }

    #[test]
    fn addresses_outside_of_memory_are_refused() {
        let memory = memory();
        for (address, len) in [(0x2_0000, 1), (0x1_ffff, 2), (u64::MAX, 2), (0, u32::MAX)] {
            let mut buffers = GuestBuffers::default();
            let chain = [descriptor(address, len, Direction::ToGuest)];
            let result = buffers.gather(&memory, chain.into_iter(), Direction::ToGuest, 8);
            assert!(
                matches!(result, Err(BufferError::OutOfMemory { .. })),
                "{address:#x} {len}"
            );
        }
    }

    #[test]
    fn wrong_direction_and_endless_chains_are_refused() {
        let memory = memory();
        let mut buffers = GuestBuffers::default();
        let wrong = [descriptor(0, 1, Direction::FromGuest)];
        assert!(
            buffers
                .gather(&memory, wrong.into_iter(), Direction::ToGuest, 8)
                .is_err()
        );
        let endless = std::iter::repeat(descriptor(0, 1, Direction::ToGuest));
        assert!(
            buffers
                .gather(&memory, endless, Direction::ToGuest, 8)
                .is_err()
        );
        assert!(buffers.len() <= 8);
    }

    #[test]
    fn a_closed_peer_is_an_error_not_a_signal() {
        let memory = memory();
        let mut buffers = GuestBuffers::default();
        let chain = [descriptor(0, 1, Direction::FromGuest)];
        buffers
            .gather(&memory, chain.into_iter(), Direction::FromGuest, 8)
            .unwrap();
        let (host, device) = UnixStream::pair().unwrap();
        drop(host);
        assert_eq!(
            buffers.send(device.as_fd(), 0).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }
}
