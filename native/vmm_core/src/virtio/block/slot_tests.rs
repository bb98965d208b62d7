//! Disks that come and go below a driver.

use super::super::config::BlockConfig;
use super::super::rig::{
    DATA, GET_ID, IN, IO_ERROR, OK, OUT, Rig, config, disk_file, engines, from_disk, pattern,
    to_disk,
};
use super::*;

fn rig() -> Rig {
    let block = Block::slot("slot-0".into()).unwrap();
    let features = block.features();
    Rig::with_features(block, features)
}

fn capacity(block: &Block) -> u64 {
    let mut bytes = [0; 8];
    block.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn an_empty_slot_has_nothing_and_takes_nothing() {
    let mut rig = rig();
    assert_eq!(capacity(&rig.block), 0);
    for (kind, data) in [(IN, from_disk(512)), (OUT, to_disk(512))] {
        assert_eq!(rig.request(kind, 0, &data).0, IO_ERROR);
    }
    assert_eq!(rig.block.name(), "slot-0");
}

#[test]
fn each_disk_is_its_own_and_is_gone_when_it_is_out() {
    for engine in engines() {
        let mut rig = rig();
        let features = rig.block.features();
        for (round, sectors) in [64, 8, 256].into_iter().enumerate() {
            let file = disk_file(sectors * 512);
            let disk = Block::new(BlockConfig {
                id: format!("disk-{round}"),
                ..config(&file, engine)
            });
            let before = rig.interrupt.config_generation();
            let read = rig.block.insert(disk.unwrap()).unwrap();
            assert_eq!(rig.interrupt.config_generation(), before + 1);
            assert!(read.try_recv().is_err(), "nobody has looked yet");
            assert_eq!(capacity(&rig.block), sectors as u64);
            read.try_recv().unwrap();
            assert_eq!(rig.block.features(), features, "the driver asked once");
            assert_eq!(rig.request(IN, 0, &from_disk(4096)).0, OK);
            assert_eq!(rig.driver.read(DATA, 4096), pattern(4096));
            assert_eq!(rig.request(IN, sectors as u64, &from_disk(512)).0, IO_ERROR);
            rig.request(GET_ID, 0, &from_disk(20));
            let serial = rig.driver.read(DATA, 20);
            assert_eq!(&serial[..6], format!("disk-{round}").as_bytes());
            rig.driver.write(DATA, &[7; 512]);
            assert_eq!(rig.request(OUT, 3, &to_disk(512)).0, OK);
            rig.block.eject().unwrap();
            assert_eq!(
                std::fs::read(file.path()).unwrap()[3 * 512..][..512],
                [7; 512]
            );
            assert_eq!(capacity(&rig.block), 0);
            assert_eq!(rig.request(OUT, 0, &to_disk(512)).0, IO_ERROR);
        }
        rig.block.eject().unwrap();
    }
}

#[test]
fn what_was_under_way_is_answered_before_the_disk_is_out() {
    for engine in engines() {
        let mut rig = rig();
        let file = disk_file(1 << 20);
        rig.block
            .insert(Block::new(config(&file, engine)).unwrap())
            .unwrap();
        let tickets: Vec<_> = (0..32).map(|at| rig.add(IN, at, &from_disk(512))).collect();
        rig.kick();
        rig.turn(Duration::from_secs(1));
        rig.block.eject().unwrap();
        rig.wait_used(32);
        for ticket in tickets {
            assert_eq!(rig.status(ticket), OK);
        }
    }
}

#[test]
fn a_disk_that_may_not_be_written_refuses_it() {
    let mut rig = rig();
    let file = disk_file(4096);
    let disk = Block::new(BlockConfig {
        is_read_only: true,
        ..config(&file, EngineChoice::Sync)
    });
    rig.block.insert(disk.unwrap()).unwrap();
    assert_eq!(rig.request(OUT, 0, &to_disk(512)).0, IO_ERROR);
    assert_eq!(rig.request(IN, 0, &from_disk(512)).0, OK);
    assert_eq!(std::fs::read(file.path()).unwrap(), pattern(4096));
}

#[test]
#[expect(unsafe_code, reason = "no safe crate here has leases")]
fn once_it_is_out_nobody_has_it_open() {
    for engine in engines() {
        let mut rig = rig();
        let file = disk_file(1 << 20);
        let disk = Block::new(config(&file, engine)).unwrap();
        rig.block.insert(disk).unwrap();
        assert_eq!(rig.request(IN, 0, &from_disk(4096)).0, OK);
        assert!(
            rig.block.save().is_err(),
            "a snapshot could not be restored"
        );
        drop(rig.block.eject().unwrap());
        rig.block.save().unwrap();
        // A lease for writing is given only if nobody else has the file open (fcntl(2)).
        let path = file.into_temp_path();
        let alone = std::fs::File::open(&path).unwrap();
        let fd = rustix::fd::AsRawFd::as_raw_fd(&alone);
        // SAFETY: the descriptor is open, and the command takes an integer.
        let given = unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(given, 0, "{engine:?}: {}", std::io::Error::last_os_error());
    }
}

#[test]
fn one_disk_at_a_time_and_only_in_a_slot() {
    let file = disk_file(4096);
    let disk = || Block::new(config(&file, EngineChoice::Sync)).unwrap();
    let mut slot = Block::slot("slot-0".into()).unwrap();
    // Before the driver has looked for the first time.
    slot.insert(disk()).unwrap();
    assert_eq!(capacity(&slot), 8);
    let error = slot.insert(disk()).unwrap_err();
    assert!(error.to_string().contains("slot-0 is occupied"), "{error}");
    let mut fixed = disk();
    for error in [
        fixed.insert(disk()).unwrap_err(),
        fixed.eject().unwrap_err(),
    ] {
        assert!(error.to_string().contains("disk-0 is no slot"), "{error}");
    }
}
