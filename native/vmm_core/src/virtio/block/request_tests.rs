//! What a request does with results that a disk here does not give on demand.

use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::block::rig::disk_file;

const DATA: u64 = 0x4000;

const TERMS: Terms = Terms {
    serial: [0; SERIAL_LEN],
    has_flush: true,
    has_discard: true,
    has_write_zeroes: true,
};

fn disk(is_direct: bool) -> (tempfile::NamedTempFile, Disk) {
    let file = disk_file(1 << 20);
    let disk = Disk::open(file.path(), false, is_direct).unwrap();
    (file, disk)
}

/// A request of this type for what `data` holds, begun.
fn begun(disk: &Disk, kind: u32, data: &[u8], answer_len: u32, terms: &Terms) -> (Request, Next) {
    let ram = mock_ram(1 << 16);
    let mut driver = MockDriver::new(&ram, 0x1000, 16);
    let mut header = u128::from(kind).to_le_bytes().to_vec();
    header.extend(data);
    driver.write(DATA, &header);
    driver.add(&[
        MockBuffer::readable(DATA, u32::try_from(header.len()).unwrap()),
        MockBuffer::writable(DATA + 0x4000, answer_len + 1),
    ]);
    let mut request = Request::new(&ram);
    assert!(driver.ring(false).unwrap().pop(&mut request.chain).unwrap());
    let next = request.begin(disk, terms);
    (request, next)
}

fn error(number: i32) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(number))
}

fn segment(sectors: u32, flags: u32) -> Vec<u8> {
    let word = u128::from(sectors) << 64 | u128::from(flags) << 96;
    word.to_le_bytes().to_vec()
}

#[test]
fn a_short_transfer_goes_on_where_it_ended() {
    let (_file, mut disk) = disk(false);
    let (mut request, next) = begun(&disk, TYPE_IN, &[], 2048, &TERMS);
    assert_eq!(next, Next::Step);
    assert_eq!(request.advance(Ok(700), &mut disk), Next::Step);
    let rest = Step {
        operation: Operation::Read,
        position: 700,
        len: 1348,
        offset: 700,
    };
    assert_eq!(*request.step(), rest);
    assert_eq!(
        request.advance(Ok(1348), &mut disk),
        Next::Finished(Status::Ok)
    );
    assert_eq!(request.answer(Status::Ok), 2049);
}

#[test]
fn an_interrupted_call_is_made_again_but_not_for_ever() {
    let (_file, mut disk) = disk(false);
    let (mut request, _) = begun(&disk, TYPE_OUT, &[0; 512], 0, &TERMS);
    let step = *request.step();
    for number in [libc::EINTR, libc::EAGAIN].repeat(8) {
        assert_eq!(request.advance(error(number), &mut disk), Next::Step);
        assert_eq!(*request.step(), step);
    }
    let last = request.advance(error(libc::EAGAIN), &mut disk);
    assert_eq!(last, Next::Finished(Status::IoError));
}

#[test]
fn direct_io_that_is_refused_goes_through_the_page_cache_once() {
    let (_file, mut disk) = disk(true);
    let (mut request, _) = begun(&disk, TYPE_IN, &[], 512, &TERMS);
    assert!(!request.is_cached());
    assert_eq!(request.advance(error(libc::EINVAL), &mut disk), Next::Step);
    assert!(request.is_cached());
    let again = request.advance(error(libc::EINVAL), &mut disk);
    assert_eq!(again, Next::Finished(Status::IoError));

    let (_file, mut disk) = self::disk(false);
    let (mut request, _) = begun(&disk, TYPE_IN, &[], 512, &TERMS);
    let cached = request.advance(error(libc::EINVAL), &mut disk);
    assert_eq!(cached, Next::Finished(Status::IoError));
}

#[test]
fn more_ranges_than_any_driver_needs_are_refused_and_not_remembered() {
    let (_file, disk) = disk(false);
    // Each piece lies across the edge of two mappings: 600 descriptors, 1200 ranges.
    let mappings = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)];
    let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&mappings).unwrap());
    let mut driver = MockDriver::new(&ram, 0x1000, 16);
    driver.write(DATA, &[0; HEADER_LEN]);
    let mut buffers = vec![MockBuffer::readable(DATA, 16)];
    buffers.resize(600, MockBuffer::writable(0x7f00, 512));
    buffers.push(MockBuffer::writable(DATA + 16, 1));
    driver.add_indirect(0xa000, &buffers);
    let mut request = Request::new(&ram);
    assert!(driver.ring(false).unwrap().pop(&mut request.chain).unwrap());
    assert_eq!(
        request.begin(&disk, &TERMS),
        Next::Finished(Status::IoError)
    );
    assert!(!request.is_reusable());
}

#[test]
fn errors_of_the_disk_are_the_guests_to_know() {
    let (_file, mut disk) = disk(false);
    for (kind, data) in [
        (TYPE_OUT, vec![0; 512]),
        (TYPE_FLUSH, Vec::new()),
        (TYPE_DISCARD, segment(1, 0)),
        (TYPE_WRITE_ZEROES, segment(1, 1)),
    ] {
        for number in [libc::EIO, libc::ENOSPC, libc::EBADF] {
            let (mut request, next) = begun(&disk, kind, &data, 0, &TERMS);
            assert_eq!(next, Next::Step);
            let failed = request.advance(error(number), &mut disk);
            assert_eq!(failed, Next::Finished(Status::IoError));
        }
    }
}

#[test]
fn a_discard_that_the_file_cannot_do_is_unsupported() {
    let (_file, mut disk) = disk(false);
    let (mut request, _) = begun(&disk, TYPE_DISCARD, &segment(8, 0), 0, &TERMS);
    assert_eq!(request.step().operation, Operation::Discard);
    let refused = request.advance(error(libc::EOPNOTSUPP), &mut disk);
    assert_eq!(refused, Next::Finished(Status::Unsupported));
}

#[test]
fn zeros_are_tried_in_every_way_and_what_fails_is_remembered() {
    let (_file, mut disk) = disk(false);
    for (flags, ways) in [
        (
            FLAG_UNMAP,
            [
                Operation::PunchHole,
                Operation::ZeroRange,
                Operation::WriteZeros,
            ],
        ),
        (
            0,
            [
                Operation::ZeroRange,
                Operation::PunchHole,
                Operation::WriteZeros,
            ],
        ),
    ] {
        disk.zeroing.has_punch_hole = true;
        disk.zeroing.has_zero_range = true;
        let (mut request, _) = begun(&disk, TYPE_WRITE_ZEROES, &segment(8, flags), 0, &TERMS);
        assert_eq!(request.cost_bytes(&disk), 0);
        for way in ways {
            assert_eq!(request.step().operation, way);
            if way != Operation::WriteZeros {
                assert_eq!(
                    request.advance(error(libc::EOPNOTSUPP), &mut disk),
                    Next::Step
                );
            }
        }
        assert_eq!(request.cost_bytes(&disk), 4096, "now it is writing");
        assert_eq!(
            request.advance(Ok(4096), &mut disk),
            Next::Finished(Status::Ok)
        );
        let (request, _) = begun(&disk, TYPE_WRITE_ZEROES, &segment(8, flags), 0, &TERMS);
        assert_eq!(request.step().operation, Operation::WriteZeros);
    }
}

#[test]
fn zeros_are_synced_too_for_a_driver_that_cannot_flush() {
    let (_file, mut disk) = disk(false);
    let terms = Terms {
        has_flush: false,
        ..TERMS
    };
    let (mut request, _) = begun(&disk, TYPE_WRITE_ZEROES, &segment(8, 0), 0, &terms);
    assert_eq!(request.advance(Ok(0), &mut disk), Next::Step);
    assert_eq!(request.step().operation, Operation::Sync);
    assert_eq!(
        request.advance(Ok(0), &mut disk),
        Next::Finished(Status::Ok)
    );
}
