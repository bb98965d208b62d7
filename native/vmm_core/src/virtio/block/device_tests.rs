use std::fs;
use std::os::unix::fs::MetadataExt;

use virtio_core::mock::MockBuffer;

use super::*;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
use crate::virtio::block::EngineChoice;
use crate::virtio::block::engine::MAX_IN_FLIGHT;
use crate::virtio::block::rig::*;

// --- what a disk does --------------------------------------------------------------------------

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    each_engine(64 << 10, |mut rig, file| {
        rig.driver.write(DATA, &[0x5a; 1024]);
        assert_eq!(rig.request(OUT, 3, &to_disk(1024)), (OK, 1));
        assert_eq!(rig.request(IN, 2, &from_disk(2048)), (OK, 2049));
        let mut expected = pattern(64 << 10);
        expected[1536..2560].fill(0x5a);
        assert_eq!(rig.driver.read(DATA, 2048), expected[1024..3072]);
        assert_eq!(fs::read(file.path()).unwrap(), expected);
        assert_eq!((rig.metric("reads"), rig.metric("read_bytes")), (1, 2048));
        assert_eq!(
            (rig.metric("writes"), rig.metric("written_bytes")),
            (1, 1024)
        );
    });
}

#[test]
fn a_flush_is_a_sync() {
    each_engine(4096, |mut rig, _| {
        assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(rig.metric("flushes"), 1);
        assert_eq!(rig.metric("failed_requests"), 0);
    });
}

#[test]
fn a_driver_that_cannot_flush_gets_every_write_synced() {
    for engine in engines() {
        let file = disk_file(4096);
        let block = Block::new(config(&file, engine)).unwrap();
        let features = block.features() & !config_space::FEATURE_FLUSH;
        let mut rig = Rig::with_features(block, features);
        assert_eq!(rig.request(OUT, 0, &to_disk(512)), (OK, 1));
        assert_eq!(rig.metric("continued_steps"), 1, "the sync");
        assert_eq!(rig.request(IN, 0, &from_disk(512)), (OK, 513));
        assert_eq!(rig.metric("continued_steps"), 1, "a read needs none");
    }
}

#[test]
fn the_serial_is_the_id_in_20_bytes() {
    for engine in engines() {
        let file = disk_file(4096);
        for id in ["short", "exactly-twenty-bytes", "longer-than-twenty-bytes"] {
            let mut rig = Rig::new(BlockConfig {
                id: id.into(),
                ..config(&file, engine)
            });
            assert_eq!(rig.request(GET_ID, 0, &from_disk(20)), (OK, 21));
            let mut expected = id.as_bytes().to_vec();
            expected.resize(20, 0);
            assert_eq!(rig.driver.read(DATA, 20), expected);
            assert_eq!(rig.request(GET_ID, 0, &from_disk(19)), (IO_ERROR, 1));
        }
    }
}

#[test]
fn a_discard_gives_the_room_back() {
    each_engine(2 * MIB, |mut rig, file| {
        file.as_file().sync_all().unwrap();
        let before = file.as_file().metadata().unwrap().blocks();
        let segments = [segment(0, 1024, 0), segment(2048, 2048, 0)].concat();
        rig.driver.write(DATA, &segments);
        assert_eq!(rig.request(DISCARD, 0, &to_disk(32)), (OK, 1));
        let after = file.as_file().metadata().unwrap();
        assert!(
            after.blocks() + 3000 < before,
            "{} of {before}",
            after.blocks()
        );
        assert_eq!(after.len(), 2 * MIB as u64);
        let mut expected = pattern(2 * MIB);
        expected[..MIB / 2].fill(0);
        expected[MIB..].fill(0);
        assert_eq!(fs::read(file.path()).unwrap(), expected);
    });
}

#[test]
fn zeros_are_made_in_whatever_way_the_file_knows() {
    let size = 2100 * 512;
    for (is_known, flags) in [(true, 0), (true, 1), (false, 0)] {
        each_engine(size, |mut rig, file| {
            rig.block.pump.disk.zeroing.has_zero_range = is_known;
            rig.block.pump.disk.zeroing.has_punch_hole = is_known;
            // More than a step writes, odd edges, and nothing where sectors are 0.
            let segments = [
                segment(7, 2049, flags),
                segment(2080, 0, flags),
                segment(2090, 1, flags),
            ];
            rig.driver.write(DATA, &segments.concat());
            assert_eq!(rig.request(WRITE_ZEROES, 0, &to_disk(48)), (OK, 1));
            let mut expected = pattern(size);
            expected[7 * 512..2056 * 512].fill(0);
            expected[2090 * 512..2091 * 512].fill(0);
            assert!(fs::read(file.path()).unwrap() == expected);
        });
    }
}

#[test]
fn direct_io_serves_aligned_and_unaligned_requests() {
    for engine in engines() {
        let file = disk_file(64 << 10);
        let mut rig = Rig::new(BlockConfig {
            is_direct: true,
            ..config(&file, engine)
        });
        rig.driver.write(DATA, &[0xa5; 8192]);
        assert_eq!(rig.request(OUT, 8, &to_disk(4096)), (OK, 1), "aligned");
        let odd = [MockBuffer::readable(DATA + 1, 512)];
        assert_eq!(rig.request(OUT, 17, &odd), (OK, 1), "memory is not");
        let pieces = [
            MockBuffer::writable(DATA, 100),
            MockBuffer::writable(DATA + 200, 924),
        ];
        assert_eq!(rig.request(IN, 16, &pieces), (OK, 1025));
        let mut expected = pattern(64 << 10);
        expected[4096..8192].fill(0xa5);
        expected[17 * 512..18 * 512].fill(0xa5);
        assert_eq!(rig.driver.read(DATA, 100), expected[8192..8292]);
        assert_eq!(rig.driver.read(DATA + 200, 924), expected[8292..9216]);
        assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(fs::read(file.path()).unwrap(), expected);
    }
}

/// A file as a block device of 4 KiB sectors, as long as this lives.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &tempfile::NamedTempFile) -> Option<Self> {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show", "--sector-size", "4096"])
            .arg(file.path())
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self(
                String::from_utf8(output.stdout).unwrap().trim().into(),
            )),
            other => {
                eprintln!("not tested: no loop device: {other:?}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detach = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
        eprintln!("detach {}: {detach:?}", self.0);
    }
}

#[test]
fn a_block_device_is_a_disk() {
    for engine in engines() {
        let file = disk_file(MIB);
        let Some(device) = LoopDevice::new(&file) else {
            return;
        };
        let mut rig = Rig::new(BlockConfig {
            path: device.0.clone().into(),
            ..config(&file, engine)
        });
        assert!(rig.block.disk().is_block_device());
        assert_eq!(rig.block.disk().capacity_sectors(), 2048);
        assert_eq!(rig.block.disk().logical_block_size(), 4096);
        rig.driver.write(DATA, &[0x33; 4096]);
        assert_eq!(rig.request(OUT, 8, &to_disk(4096)), (OK, 1));
        rig.driver.write(DATA, &segment(16, 8, 0));
        assert_eq!(rig.request(WRITE_ZEROES, 0, &to_disk(16)), (OK, 1));
        rig.driver.write(DATA, &segment(24, 8, 1));
        assert_eq!(rig.request(WRITE_ZEROES, 0, &to_disk(16)), (OK, 1));
        rig.driver.write(DATA, &segment(1024, 1024, 0));
        assert_eq!(rig.request(DISCARD, 0, &to_disk(16)), (OK, 1));
        assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
        let mut expected = pattern(MIB);
        expected[4096..8192].fill(0x33);
        expected[8192..16384].fill(0);
        expected[MIB / 2..].fill(0);
        assert!(fs::read(file.path()).unwrap() == expected);
        assert_eq!(rig.request(IN, 2048, &from_disk(512)), (IO_ERROR, 1));
    }
}

// --- shapes of requests ------------------------------------------------------------------------

#[test]
fn buffers_may_be_cut_anywhere() {
    each_engine(64 << 10, |mut rig, _| {
        // Header in pieces, the last together with data; data and status in one.
        let (header, _) = rig.header(OUT, 7);
        let header_bytes = rig.driver.read(header, 16);
        rig.driver.write(DATA, &header_bytes);
        rig.driver.write(DATA + 16, &[0x77; 512]);
        rig.driver.write(DATA + 0x1000, &[NO_STATUS; 4]);
        rig.driver.add(&[
            MockBuffer::readable(DATA, 1),
            MockBuffer::readable(DATA + 1, 0),
            MockBuffer::readable(DATA + 1, 100),
            MockBuffer::readable(DATA + 101, 427),
            MockBuffer::writable(DATA + 0x1000, 3),
        ]);
        rig.kick();
        assert_eq!(rig.wait_used(1)[0].len, 1);
        let answer = rig.driver.read(DATA + 0x1000, 4);
        assert_eq!(answer, [NO_STATUS, NO_STATUS, OK, NO_STATUS]);

        let (header, _) = rig.header(IN, 7);
        rig.driver.add(&[
            MockBuffer::readable(header, 16),
            MockBuffer::writable(DATA + 0x2000, 500),
            MockBuffer::writable(DATA + 0x2200, 13),
        ]);
        rig.kick();
        assert_eq!(rig.wait_used(1)[0].len, 513);
        assert_eq!(rig.driver.read(DATA + 0x2000, 500), [0x77; 500]);
        let tail = rig.driver.read(DATA + 0x2200, 13);
        assert_eq!((&tail[..12], tail[12]), (&[0x77; 12][..], OK));
    });
}

#[test]
fn hundreds_of_ranges_and_megabytes_take_several_steps() {
    each_engine(8 * MIB, |mut rig, _| {
        // Odd pieces that do not touch, from two places in turn.
        let pieces: Vec<_> = (0..900u64)
            .map(|index| MockBuffer::writable(DATA + index * 0x1000 + index % 7, 512 * 5))
            .collect();
        let len = 900 * 512 * 5;
        assert_eq!(rig.request(IN, 1, &pieces), (OK, len + 1));
        let expected = pattern(8 * MIB);
        for (piece, bytes) in pieces.iter().zip(expected[512..].chunks(512 * 5)) {
            assert_eq!(rig.driver.read(piece.address, 512 * 5), bytes);
        }
        assert!(rig.metric("continued_steps") >= 2);
        // The whole disk at once.
        assert_eq!(rig.request(IN, 0, &from_disk(8 << 20)), (OK, (8 << 20) + 1));
        assert!(rig.driver.read(DATA, 8 * MIB) == expected);
    });
}

// --- a driver that is wrong, or hostile --------------------------------------------------------

#[test]
fn what_is_not_on_the_disk_is_refused() {
    each_engine(64 << 10, |mut rig, _| {
        for (kind, sector, data) in [
            (IN, 128, from_disk(512)),
            (IN, 127, from_disk(1024)),
            (OUT, 128, to_disk(512)),
            (IN, u64::MAX, from_disk(512)),
            (OUT, u64::MAX / 512, to_disk(512)),
            (IN, 1 << 55, from_disk(512)),
            (IN, 0, from_disk(511)),
            (OUT, 0, to_disk(513)),
        ] {
            assert_eq!(
                rig.request(kind, sector, &data),
                (IO_ERROR, 1),
                "{kind} at {sector}"
            );
        }
        assert_eq!(rig.metric("failed_requests"), 8);
        assert_eq!(rig.metric("read_bytes"), 0);
        // No data at all is no error.
        assert_eq!(rig.request(IN, 128, &[]), (OK, 1));
    });
}

#[test]
fn bad_segments_are_refused_whole() {
    each_engine(64 << 10, |mut rig, file| {
        let good = segment(0, 1, 0);
        for (kind, segments, status) in [
            (
                DISCARD,
                [good.clone(), segment(128, 1, 0)].concat(),
                IO_ERROR,
            ),
            (
                DISCARD,
                [good.clone(), segment(u64::MAX, 2, 0)].concat(),
                IO_ERROR,
            ),
            (
                DISCARD,
                [good.clone(), segment(0, u32::MAX, 0)].concat(),
                IO_ERROR,
            ),
            (
                DISCARD,
                [good.clone(), segment(0, 1, 1)].concat(),
                UNSUPPORTED,
            ),
            (
                WRITE_ZEROES,
                [good.clone(), segment(0, 1, 2)].concat(),
                UNSUPPORTED,
            ),
            (WRITE_ZEROES, good.repeat(33), IO_ERROR),
            (WRITE_ZEROES, good[..15].to_vec(), IO_ERROR),
            (DISCARD, Vec::new(), IO_ERROR),
        ] {
            rig.driver.write(DATA, &segments);
            let data = to_disk(u32::try_from(segments.len()).unwrap());
            let data = if segments.is_empty() {
                &[][..]
            } else {
                &data[..]
            };
            assert_eq!(rig.request(kind, 0, data), (status, 1), "{segments:?}");
        }
        assert!(fs::read(file.path()).unwrap() == pattern(64 << 10));
    });
}

#[test]
fn unknown_and_unnegotiated_types_are_unsupported() {
    for engine in engines() {
        let file = disk_file(4096);
        let block = Block::new(config(&file, engine)).unwrap();
        let denied = config_space::FEATURE_DISCARD | config_space::FEATURE_WRITE_ZEROES;
        let features = block.features() & !denied;
        let mut rig = Rig::with_features(block, features);
        rig.driver.write(DATA, &segment(0, 1, 0));
        for kind in [2, 3, 10, DISCARD, WRITE_ZEROES, 14, u32::MAX] {
            assert_eq!(rig.request(kind, 0, &to_disk(16)), (UNSUPPORTED, 1));
        }
        assert_eq!(rig.metric("unsupported_requests"), 7);
    }
}

#[test]
fn a_read_only_disk_is_not_changed() {
    for engine in engines() {
        let file = disk_file(4096);
        let mut rig = Rig::new(BlockConfig {
            is_read_only: true,
            ..config(&file, engine)
        });
        assert_ne!(rig.block.features() & 1 << 5, 0);
        assert_eq!(rig.block.features() & config_space::FEATURE_DISCARD, 0);
        assert_eq!(rig.request(OUT, 0, &to_disk(512)), (IO_ERROR, 1));
        assert_eq!(rig.request(IN, 0, &from_disk(512)), (OK, 513));
        assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
        // Agreed to although not offered: the transport forbids it, and so do we.
        let block = Block::new(BlockConfig {
            is_read_only: true,
            ..config(&file, engine)
        });
        let mut rig = Rig::with_features(block.unwrap(), u64::MAX);
        rig.driver.write(DATA, &segment(0, 1, 0));
        assert_eq!(rig.request(DISCARD, 0, &to_disk(16)), (IO_ERROR, 1));
        assert_eq!(rig.request(WRITE_ZEROES, 0, &to_disk(16)), (IO_ERROR, 1));
        assert_eq!(fs::read(file.path()).unwrap(), pattern(4096));
    }
}

#[test]
fn chains_that_are_no_requests_come_back() {
    each_engine(4096, |mut rig, file| {
        let (header, status) = rig.header(OUT, 0);
        // No room for a status; no whole header; nothing readable; nothing at all.
        rig.driver.add(&[
            MockBuffer::readable(header, 16),
            MockBuffer::readable(DATA, 512),
        ]);
        rig.driver.add(&[
            MockBuffer::readable(header, 15),
            MockBuffer::writable(status, 1),
        ]);
        rig.driver.add(&[MockBuffer::writable(DATA, 1)]);
        rig.driver.add(&[MockBuffer::readable(header, 0)]);
        // Not memory: the ring gives it back itself.
        rig.driver.add(&[MockBuffer::readable(u64::MAX - 8, 16)]);
        rig.kick();
        let used = rig.wait_used(5);
        let lens: Vec<_> = used.iter().map(|element| element.len).collect();
        assert_eq!(lens, [0, 1, 1, 0, 0]);
        assert_eq!(rig.driver.read(status, 1), [IO_ERROR]);
        assert_eq!(rig.metric("malformed_chains"), 1);
        assert_eq!(rig.metric("failed_requests"), 4);
        assert_eq!(fs::read(file.path()).unwrap(), pattern(4096));
    });
}

#[test]
fn a_chain_longer_than_the_ring_takes_comes_back_unused() {
    each_engine(4 * MIB, |mut rig, _| {
        let pieces: Vec<_> = (0..2000u64)
            .map(|index| MockBuffer::writable(DATA + index * 1024, 512))
            .collect();
        assert_eq!(rig.request(IN, 0, &pieces), (NO_STATUS, 0));
        assert_eq!(rig.metric("malformed_chains"), 1);
        assert_eq!(rig.request(IN, 0, &from_disk(512)), (OK, 513));
    });
}

#[test]
fn one_head_made_available_over_and_over_is_bounded() {
    each_engine(4096, |mut rig, _| {
        let ticket = rig.add(IN, 0, &from_disk(4096));
        for _ in 1..QUEUE_SIZE {
            rig.driver.make_available(ticket.head);
        }
        rig.kick();
        let used = rig.wait_used(QUEUE_SIZE.into());
        assert_eq!(used.len(), usize::from(QUEUE_SIZE));
        assert!(rig.block.pump.spare().len() <= usize::from(MAX_IN_FLIGHT));
        assert_eq!(rig.status(ticket), OK);
    });
}

#[test]
fn an_index_that_jumps_is_the_end_of_the_ring() {
    each_engine(4096, |mut rig, _| {
        rig.driver.set_available_index(1000);
        let error = rig.block.handle(0, EventFlags::IN).unwrap_err();
        assert!(matches!(error, DeviceError::Ring { index: 0, .. }));
        rig.block.reset();
        rig.activate(rig.block.features()).unwrap();
        assert_eq!(rig.request(IN, 0, &from_disk(512)), (OK, 513));
    });
}

#[test]
fn a_file_that_was_cut_gives_errors_not_zeros() {
    each_engine(64 << 10, |mut rig, file| {
        file.as_file().set_len(32 << 10).unwrap();
        assert_eq!(rig.request(IN, 64, &from_disk(512)), (IO_ERROR, 1));
        // Half of it is there.
        assert_eq!(rig.request(IN, 63, &from_disk(1024)), (IO_ERROR, 513));
    });
}

// --- configuration and snapshots ---------------------------------------------------------------

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let file = disk_file(64 << 10);
    let block = Block::new(config(&file, EngineChoice::Sync)).unwrap();
    let read = |offset: usize, len: usize| {
        let mut bytes = [0; 8];
        block.read_config(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(read(0, 8), 128, "capacity");
    assert_eq!(read(12, 4), 254, "seg_max");
    assert_eq!(read(20, 4), 512, "blk_size");
    let block_size = file.as_file().metadata().unwrap().blksize();
    assert_eq!(512 << read(24, 1), block_size, "physical_block_exp");
    assert_eq!(read(26, 2), block_size / 512, "min_io_size");
    assert_eq!(read(36, 4), 1 << 21, "max_discard_sectors");
    assert_eq!(read(40, 4), 32, "max_discard_seg");
    assert_eq!(read(44, 4), block_size / 512, "discard_sector_alignment");
    assert_eq!(read(56, 1), 1, "write_zeroes_may_unmap");
    assert_eq!(read(58, 8), 0, "past the end");
    assert_eq!(read(usize::MAX, 8), 0);
}

#[test]
fn a_snapshot_is_taken_over_by_the_same_disk_only() {
    let file = disk_file(64 << 10);
    let saved = Block::new(config(&file, EngineChoice::Sync))
        .unwrap()
        .save()
        .unwrap();
    let mut same = Block::new(config(&file, EngineChoice::Sync)).unwrap();
    same.restore(&saved).unwrap();

    let grown = disk_file(128 << 10);
    let others = [
        config(&grown, EngineChoice::Sync),
        BlockConfig {
            is_read_only: true,
            ..config(&file, EngineChoice::Sync)
        },
        BlockConfig {
            id: "other".into(),
            ..config(&file, EngineChoice::Sync)
        },
    ];
    let reasons = others.map(|config| {
        let error = Block::new(config).unwrap().restore(&saved).unwrap_err();
        error.to_string()
    });
    assert_eq!(
        reasons,
        [
            "restore block: disk disk-0: capacity in sectors was 128, is 256",
            "restore block: disk disk-0: read-only was false, is true",
            "restore block: disk other: id was disk-0, is other",
        ]
    );
    assert!(same.restore(&saved[..3]).is_err());
    assert!(same.restore(&[]).is_err());
}

/// Have `io_uring_setup` refused to this thread, as container runtimes' filters do.
#[expect(
    unsafe_code,
    reason = "a filter on system calls, for this thread alone"
)]
fn refuse_io_uring() {
    let instruction = |code: u32, if_not: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf: if_not,
        k,
    };
    let number = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let refusal = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
    let mut program = [
        // The number comes first in `struct seccomp_data`.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, number),
        instruction(libc::BPF_RET | libc::BPF_K, 0, refusal),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: sets a flag of this thread and reads no memory.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(result, 0);
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: `program` names four valid instructions, which the kernel copies during the call.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    assert_eq!(result, 0);
}

#[test]
fn without_io_uring_the_disk_works_all_the_same() {
    let file = disk_file(4096);
    let thread = std::thread::spawn(move || {
        refuse_io_uring();
        let error = Block::new(config(&file, EngineChoice::Uring)).unwrap_err();
        assert!(matches!(&error, BlockError::Uring { source, .. }
            if source.kind() == io::ErrorKind::PermissionDenied));
        let mut rig = Rig::new(config(&file, EngineChoice::Auto));
        assert_eq!(rig.block.engine_name(), "sync");
        assert!(rig.block.uring_refusal().is_some());
        assert_eq!(rig.request(IN, 0, &from_disk(512)), (OK, 513));
    });
    thread.join().unwrap();
}

#[test]
fn errors_name_the_disk_and_what_to_do() {
    let missing = BlockConfig {
        id: "root".into(),
        path: "/nonexistent/disk.raw".into(),
        is_read_only: true,
        is_direct: false,
        engine: EngineChoice::Auto,
        rate_limiter: None,
    };
    let error = Block::new(missing).unwrap_err();
    assert_eq!(error.to_string(), "disk root");
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("/nonexistent/disk.raw"));

    let file = disk_file(4096);
    let unlimited = BlockConfig {
        rate_limiter: Some(RateLimiterConfig {
            bandwidth: Some(TokenBucketConfig {
                size: 0,
                one_time_burst: 0,
                refill_time_ms: 1,
            }),
            operations: None,
        }),
        ..config(&file, EngineChoice::Sync)
    };
    let error = Block::new(unlimited).unwrap_err();
    assert!(matches!(error, BlockError::Throttle { .. }));
}
