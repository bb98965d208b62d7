//! Whatever way the driver cuts its memory up, bytes move as if it were one piece.

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

/// Two mappings side by side, and one apart.
const BORDER: u64 = 0x1_0000;
const END: u64 = 0x2_0000;
const APART: u64 = 0x10_0000;

fn ram() -> Arc<GuestRam> {
    let ranges = [
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(BORDER), 0x1_0000),
        (GuestAddress(APART), 0x1000),
    ];
    GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// Buffers of these lengths, one after the other from `start`, and the bytes in them.
struct Cut {
    ram: Arc<GuestRam>,
    start: u64,
    buffers: GuestBuffers,
    bytes: Vec<u8>,
}

fn cut(start: u64, lens: &[usize]) -> Cut {
    let ram = ram();
    let mut buffers = GuestBuffers::new(Arc::clone(&ram));
    let mut at = start;
    for &len in lens {
        assert!(buffers.push(at, len));
        at += len as u64;
    }
    let bytes: Vec<u8> = (0..lens.iter().sum())
        .map(|at: usize| u8::try_from(at % 251).unwrap())
        .collect();
    ram.mappings()
        .write_slice(&bytes, GuestAddress(start))
        .unwrap();
    Cut {
        ram,
        start,
        buffers,
        bytes,
    }
}

impl Cut {
    /// What is in memory now, with some bytes on either side.
    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes.len() + 32];
        let start = GuestAddress(self.start - 16);
        self.ram.mappings().read_slice(&mut bytes, start).unwrap();
        bytes
    }

    /// What should be there if `change` were made to one piece.
    fn expect(&self, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        bytes.extend(&self.bytes);
        change(&mut bytes[16..]);
        bytes.extend([0; 16]);
        bytes
    }
}

fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 5 } else { 200 },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

prop_compose! {
    /// More pieces than one system call takes, across the border.
    fn any_cut()(lens in vec(0usize..200, 1..100), start in BORDER - 0x2000..BORDER + 0x100) -> Cut {
        cut(start, &lens)
    }
}

impl std::fmt::Debug for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} bytes at {:#x}: {:?}",
            self.bytes.len(),
            self.start,
            self.buffers.ranges
        )
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn copies_go_where_they_would_in_one_piece(
        it in any_cut(), offset in 0usize..12_000, len in 0usize..12_000,
    ) {
        let total = it.bytes.len();
        let start = offset.min(total);
        let end = offset.saturating_add(len).min(total).max(start);
        prop_assert_eq!(it.buffers.len(), total);
        prop_assert_eq!(it.buffers.is_empty(), total == 0);

        let mut copied = vec![0xee; len];
        prop_assert_eq!(it.buffers.copy_to(offset, &mut copied), end - start);
        prop_assert_eq!(&copied[..end - start], &it.bytes[start..end]);
        prop_assert!(copied[end - start..].iter().all(|byte| *byte == 0xee));

        let part = it.buffers.range(offset, len);
        prop_assert_eq!(part.len(), end - start);
        let mut whole = vec![0; end - start + 1];
        prop_assert_eq!(part.copy_to(0, &mut whole), end - start);
        prop_assert_eq!(&whole[..end - start], &it.bytes[start..end]);

        prop_assert_eq!(it.buffers.copy_from(offset, &vec![0xaa; len]), end - start);
        prop_assert_eq!(it.memory(), it.expect(|bytes| bytes[start..end].fill(0xaa)));
        it.buffers.copy_from(0, &it.bytes);
        prop_assert_eq!(it.buffers.fill_zero(offset, len), end - start);
        prop_assert_eq!(it.memory(), it.expect(|bytes| bytes[start..end].fill(0)));
    }

    #[test]
    fn arrays_are_read_wherever_they_lie(it in any_cut(), offset in 0usize..12_000) {
        let expected = it.bytes.get(offset..offset + 44);
        let read: Option<[u8; 44]> = it.buffers.read_array(offset);
        prop_assert_eq!(read.as_ref().map(<[u8; 44]>::as_slice), expected);
    }

    #[test]
    fn iovecs_name_the_first_pieces(
        it in any_cut(), offset in 0usize..12_000, len in 0usize..12_000,
    ) {
        let iovecs = it.buffers.iovecs(offset, len);
        let entries = iovecs.as_slice();
        prop_assert!(entries.len() <= MAX_RANGES_PER_CALL);
        prop_assert!(entries.iter().all(|entry| entry.iov_len > 0));
        prop_assert_eq!(entries.iter().map(|entry| entry.iov_len).sum::<usize>(), iovecs.len);
        let left = it.bytes.len().saturating_sub(offset).min(len);
        let is_all = iovecs.len == left;
        prop_assert!(is_all || (entries.len() == MAX_RANGES_PER_CALL && iovecs.len < left));
    }

    #[test]
    fn appending_is_putting_one_after_the_other(
        lens in vec(0usize..50, 2..20), at in any::<proptest::sample::Index>(),
    ) {
        let middle = at.index(lens.len());
        let it = cut(BORDER - 100, &lens);
        let len: usize = lens[..middle].iter().sum();
        let mut joined = it.buffers.range(0, len);
        joined.append(it.buffers.range(len, usize::MAX));
        let mut bytes = vec![0; joined.len()];
        joined.copy_to(0, &mut bytes);
        prop_assert_eq!(bytes, it.bytes);
    }
}

#[test]
fn what_is_not_memory_is_not_added() {
    let ram = ram();
    let mut buffers = GuestBuffers::new(Arc::clone(&ram));
    assert!(buffers.push(BORDER - 2, 4), "across two mappings");
    assert_eq!((buffers.len(), buffers.range_count()), (4, 2));
    for (address, len) in [
        (END, 1),
        (END - 1, 2),
        (0, 0x2_0001),
        (APART - 1, 1),
        (APART, 0x1001),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 3, 8),
        (APART, usize::MAX),
    ] {
        assert!(!buffers.push(address, len), "{address:#x} {len:#x}");
        assert_eq!((buffers.len(), buffers.range_count()), (4, 2));
    }
    assert!(buffers.push(u64::MAX, 0), "no bytes are nowhere");
    assert_eq!((buffers.len(), buffers.range_count()), (4, 2));
    buffers.clear();
    assert!(buffers.is_empty());
    assert_eq!(buffers.read_array::<1>(0), None);
    assert_eq!(buffers.read_array::<0>(0), Some([]));
}

#[test]
fn offsets_beyond_the_end_are_no_bytes() {
    let it = cut(0x1000, &[10, 10]);
    for offset in [20, 21, usize::MAX] {
        assert_eq!(it.buffers.copy_to(offset, &mut [0; 4]), 0);
        assert_eq!(it.buffers.copy_from(offset, &[0; 4]), 0);
        assert_eq!(it.buffers.fill_zero(offset, usize::MAX), 0);
        assert_eq!(it.buffers.iovecs(offset, usize::MAX).len, 0);
        assert!(it.buffers.range(offset, usize::MAX).is_empty());
        assert_eq!(it.buffers.read_array::<1>(offset), None);
    }
    assert_eq!(it.buffers.read_array(19), Some([19]));
    assert_eq!(it.buffers.range(5, usize::MAX).len(), 15);
}

#[test]
fn memory_stays_mapped_for_who_has_buffers_of_it() {
    let mut kept = {
        let it = cut(0x1000, &[5, 5]);
        it.buffers.range(2, 5)
    };
    assert_eq!(kept.read_array(0), Some([2, 3, 4, 5, 6]));
    // Of another time, when there was more or less memory.
    let it = cut(0x3000, &[3]);
    kept.append(it.buffers.range(0, 3));
    kept.append(kept.range(0, 2));
    drop(it);
    assert_eq!(kept.read_array(0), Some([2, 3, 4, 5, 6, 0, 1, 2, 2, 3]));
    let part = kept.range(5, 3);
    kept.reset(&ram());
    assert!(kept.is_empty());
    drop(kept);
    assert_eq!(part.read_array(0), Some([0, 1, 2]));
}

/// Sockets and files. Miri knows no scattered reads and writes.
#[cfg(not(miri))]
mod kernel {
    use std::fs::{self, File};
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A file with nothing in it and no name.
    fn file(name: &str) -> File {
        let path = std::env::temp_dir().join(format!("virtio_core-{}-{name}", std::process::id()));
        let mut options = File::options();
        let opened = options.read(true).write(true).create_new(true).open(&path);
        let file = opened.unwrap();
        fs::remove_file(path).unwrap();
        file
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn any_cut_sends_the_bytes_that_are_in_memory(it in any_cut(), skip in 0usize..12_000) {
            let skip = skip.min(it.bytes.len());
            for is_socket in [true, false] {
                let (mut host, device) = UnixStream::pair().unwrap();
                let mut sent = skip;
                while sent < it.bytes.len() {
                    sent += if is_socket {
                        it.buffers.send(device.as_fd(), sent).unwrap()
                    } else {
                        it.buffers.write_to(device.as_fd(), sent).unwrap()
                    };
                }
                prop_assert_eq!(it.buffers.send(device.as_fd(), sent).unwrap(), 0);
                drop(device);
                let mut received = Vec::new();
                host.read_to_end(&mut received).unwrap();
                prop_assert_eq!(&received, &it.bytes[skip..]);
            }
        }

        #[test]
        fn any_cut_is_filled_in_order(it in any_cut()) {
            let total = it.bytes.len();
            it.buffers.fill_zero(0, total);
            let (mut host, device) = UnixStream::pair().unwrap();
            host.write_all(&it.bytes).unwrap();
            drop(host);
            let mut received = 0;
            loop {
                let count = it.buffers.range(received, total).receive(device.as_fd()).unwrap();
                if count == 0 {
                    break;
                }
                received += count;
            }
            prop_assert_eq!(received, total);
            prop_assert_eq!(it.memory(), it.expect(|_| {}));
        }

        #[test]
        fn files_are_written_and_read_at_positions(
            it in any_cut(), skip in 0usize..12_000, position in 0u64..0x1_0000_0000,
        ) {
            let total = it.bytes.len();
            let skip = skip.min(total);
            let mut file = file("positions");
            let mut done = skip;
            while done < total {
                let to = position + (done - skip) as u64;
                done += it.buffers.write_at(file.as_fd(), done, to).unwrap();
            }
            file.seek(SeekFrom::Start(position)).unwrap();
            let mut written = Vec::new();
            file.read_to_end(&mut written).unwrap();
            prop_assert_eq!(&written, &it.bytes[skip..]);

            it.buffers.fill_zero(0, total);
            let mut done = skip;
            while done < total {
                let from = position + (done - skip) as u64;
                done += it.buffers.read_at(file.as_fd(), done, from).unwrap();
            }
            prop_assert_eq!(it.memory(), it.expect(|bytes| bytes[..skip].fill(0)));
            // The end of the file.
            let end = position + (total - skip) as u64;
            prop_assert_eq!(it.buffers.read_at(file.as_fd(), 0, end).unwrap(), 0);
        }
    }

    #[test]
    fn a_closed_peer_is_an_error_not_a_signal() {
        let it = cut(0x1000, &[1]);
        let (host, device) = UnixStream::pair().unwrap();
        drop(host);
        let error = it.buffers.send(device.as_fd(), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_socket_with_nothing_would_block() {
        let it = cut(0x1000, &[1]);
        let (_host, device) = UnixStream::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        let error = it.buffers.receive(device.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_position_no_file_has_is_an_error() {
        let it = cut(0x1000, &[4]);
        let file = file("position");
        for position in [u64::MAX, 1 << 63, i64::MAX.cast_unsigned()] {
            assert!(it.buffers.read_at(file.as_fd(), 0, position).is_err());
            assert!(it.buffers.write_at(file.as_fd(), 0, position).is_err());
        }
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
