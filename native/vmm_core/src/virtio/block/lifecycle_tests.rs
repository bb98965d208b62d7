//! Many requests at once, pauses, resets, a disk that does not answer, and limits.

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use virtio_core::mock::MockBuffer;

use super::*;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
use crate::virtio::block::EngineChoice;
use crate::virtio::block::rig::*;

// --- many at once, pause, reset ----------------------------------------------------------------

#[test]
fn a_full_ring_is_worked_with_few_signals() {
    each_engine(MIB, |mut rig, _| {
        let tickets: Vec<_> = (0..u64::from(QUEUE_SIZE))
            .map(|index| {
                let data = [MockBuffer::writable(DATA + index * 4096, 4096)];
                rig.add(IN, index * 8, &data)
            })
            .collect();
        rig.kick();
        let used = rig.wait_used(tickets.len());
        assert!(used.iter().all(|element| element.len == 4097));
        assert!(tickets.iter().all(|ticket| rig.status(*ticket) == OK));
        assert!(rig.driver.read(DATA, MIB) == pattern(MIB));
        let raised = rig.interrupt.raised();
        assert!(raised > 0 && raised < 64, "{raised} interrupts");
        assert_eq!(rig.metric("requests_in_flight_now"), 0);
    });
}

#[test]
fn a_pause_finishes_what_is_under_way_and_touches_nothing_after() {
    each_direct_engine(16 * MIB, |mut rig| {
        let tickets: Vec<_> = (0..200u64)
            .map(|index| {
                let data = [MockBuffer::writable(DATA + index * 65536, 65536)];
                rig.add(IN, index * 128, &data)
            })
            .collect();
        rig.kick();
        assert!(rig.turn(Duration::from_secs(1)) > 0);
        rig.block.pause().unwrap();
        assert_eq!(rig.metric("requests_in_flight_now"), 0);
        let state = rig.block.ring_states()[0].unwrap();
        assert_eq!(
            state.next_available, state.next_used,
            "none is neither here nor there"
        );
        let done = rig.driver.take_used().len();
        assert_eq!(done, usize::from(state.next_used));
        for (index, ticket) in tickets.iter().enumerate() {
            let expected = if index < done { OK } else { NO_STATUS };
            assert_eq!(rig.status(*ticket), expected);
        }
        rig.block.resume();
        let rest = rig.wait_used(200 - done);
        assert_eq!(rest.len(), 200 - done);
        assert!(rig.driver.read(DATA, 200 * 65536) == pattern(16 * MIB)[..200 * 65536]);
    });
}

#[test]
fn a_reset_drops_what_is_under_way_and_the_disk_serves_again() {
    each_direct_engine(4 * MIB, |mut rig| {
        for index in 0..64u64 {
            let data = [MockBuffer::writable(DATA + index * 65536, 65536)];
            rig.add(IN, index * 128, &data);
        }
        rig.kick();
        assert!(rig.turn(Duration::from_secs(1)) > 0);
        rig.block.reset();
        rig.block.reset();
        assert_eq!(rig.metric("requests_in_flight_now"), 0);
        assert_eq!(rig.block.ring_states(), [None]);
        rig.block.handle(0, EventFlags::IN).unwrap();
        // The watches are gone: they can be added again.
        let features = rig.block.features();
        rig.activate(features).unwrap();
        assert_eq!(rig.request(IN, 0, &from_disk(512)), (OK, 513));
    });
}

#[test]
fn a_reset_may_come_from_another_thread_than_the_requests() {
    each_direct_engine(4 * MIB, |mut rig| {
        for index in 0..64u64 {
            let data = [MockBuffer::writable(DATA + index * 65536, 65536)];
            rig.add(IN, index * 128, &data);
        }
        rig.kick();
        let (to_main, from_thread) = mpsc::channel();
        let (to_thread, from_main) = mpsc::channel::<()>();
        // The I/O thread waits for something else while a vCPU resets the device: it is its
        // requests that have to end.
        let thread = std::thread::spawn(move || {
            assert!(rig.turn(Duration::from_secs(1)) > 0);
            to_main.send(rig).unwrap();
            from_main.recv().unwrap();
        });
        let mut rig = from_thread.recv().unwrap();
        rig.block.reset();
        assert_eq!(rig.metric("requests_in_flight_now"), 0);
        to_thread.send(()).unwrap();
        thread.join().unwrap();
    });
}

#[test]
fn a_disk_dropped_with_requests_under_way_waits_for_them() {
    each_direct_engine(4 * MIB, |mut rig| {
        for index in 0..64u64 {
            let data = [MockBuffer::writable(DATA + index * 65536, 65536)];
            rig.add(IN, index * 128, &data);
        }
        rig.kick();
        assert!(rig.turn(Duration::from_secs(1)) > 0);
        let ram = Arc::clone(&rig.ram);
        drop(rig);
        assert_eq!(Arc::strong_count(&ram), 1, "nothing was given up on");
    });
}

// --- a disk that does not answer ---------------------------------------------------------------

/// A rig with a request under way that does not end before something is written into the pipe.
fn hanging() -> Option<(Rig, Ticket, OwnedFd)> {
    let (disk, writer) = Disk::of_pipe();
    let engine = match Engine::new(EngineChoice::Uring, &disk) {
        Ok((Engine::Uring(mut engine), _)) => {
            engine.drop_timeout = Duration::from_millis(20);
            Engine::Uring(engine)
        }
        other => {
            eprintln!("not tested: io_uring is refused: {other:?}");
            return None;
        }
    };
    let block = Block::with_pump("hanging".into(), Pump::new(disk, engine, None));
    let features = block.features();
    let mut rig = Rig::with_features(block, features);
    let ticket = rig.add(IN, 0, &from_disk(512));
    rig.kick();
    assert!(rig.turn(Duration::from_secs(1)) > 0);
    assert_eq!(rig.metric("requests_in_flight_now"), 1);
    Some((rig, ticket, writer))
}

#[test]
fn a_disk_that_does_not_answer_ends_the_wait_and_not_the_guest() {
    let Some((mut rig, ticket, writer)) = hanging() else {
        return;
    };
    let Some(active) = &mut rig.block.active else {
        panic!("it was activated");
    };
    let short = Duration::from_millis(20);
    let error = rig
        .block
        .pump
        .drain(Some(&mut active.source), short)
        .unwrap_err();
    assert_eq!(error.to_string(), "wait for disk requests under way");
    assert_eq!(rig.status(ticket), NO_STATUS);
    rustix::io::write(&writer, &[7; 512]).unwrap();
    assert_eq!(rig.wait_used(1)[0].len, 513);
    assert_eq!(rig.driver.read(DATA, 512), [7; 512]);
}

#[test]
fn old_requests_and_new_ones_are_never_under_way_together() {
    let Some((mut rig, ticket, writer)) = hanging() else {
        return;
    };
    // A reset that gave up waiting.
    let active = rig.block.active.take().unwrap();
    rig.block.unwatch(&active.watcher);
    assert!(rig.block.pump.drain(None, Duration::ZERO).is_err());
    let features = rig.block.features();
    assert!(rig.activate(features).is_err());
    assert_eq!(rig.metric("requests_in_flight_now"), 1);
    rustix::io::write(&writer, &[7; 512]).unwrap();
    rig.block.pump.drain(None, Duration::from_secs(10)).unwrap();
    rig.activate(features).unwrap();
    assert_eq!(rig.status(ticket), NO_STATUS, "dropped, not answered");
}

#[test]
fn memory_the_kernel_may_still_write_is_never_unmapped() {
    let Some((rig, _, writer)) = hanging() else {
        return;
    };
    let ram = Arc::clone(&rig.ram);
    drop(rig);
    assert!(Arc::strong_count(&ram) > 1, "the request keeps it");
    drop(writer);
}

#[test]
fn activation_without_a_queue_is_an_error() {
    each_engine(4096, |mut rig, _| {
        rig.block.reset();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC);
        let error = rig.block.activate(Activation {
            ram: Arc::clone(&rig.ram),
            features: 0,
            queues: vec![None],
            interrupt: Arc::clone(&rig.interrupt),
            watcher: Watcher::new(Arc::new(epoll.unwrap()), 0),
        });
        assert!(matches!(error, Err(DeviceError::QueueMissing { index: 0 })));
    });
}

// --- limits ------------------------------------------------------------------------------------

#[test]
fn the_limiter_holds_requests_back_and_lets_all_through() {
    for engine in engines() {
        let file = disk_file(64 << 10);
        let mut rig = Rig::new(BlockConfig {
            rate_limiter: Some(RateLimiterConfig {
                bandwidth: None,
                operations: Some(TokenBucketConfig {
                    size: 5,
                    one_time_burst: 3,
                    refill_time_ms: 50,
                }),
            }),
            ..config(&file, engine)
        });
        let started = Instant::now();
        for index in 0..18 {
            rig.add(IN, index, &from_disk(512));
        }
        rig.kick();
        rig.wait_used(18);
        // 8 at once, 10 more at 100 a second.
        assert!(
            started.elapsed() >= Duration::from_millis(95),
            "{:?}",
            started.elapsed()
        );
        assert!(rig.metric("throttled") > 0);
        assert_eq!(rig.metric("reads"), 18);
    }
}

#[test]
fn a_request_larger_than_the_bandwidth_bucket_passes() {
    for engine in engines() {
        let file = disk_file(64 << 10);
        let mut rig = Rig::new(BlockConfig {
            rate_limiter: Some(RateLimiterConfig {
                bandwidth: Some(TokenBucketConfig {
                    size: 32 << 10,
                    one_time_burst: 0,
                    refill_time_ms: 20,
                }),
                operations: None,
            }),
            ..config(&file, engine)
        });
        let started = Instant::now();
        let large = rig.add(IN, 0, &from_disk(64 << 10));
        let small = rig.add(OUT, 0, &to_disk(512));
        rig.kick();
        rig.wait_used(2);
        assert_eq!((rig.status(large), rig.status(small)), (OK, OK));
        // A bucket's worth of debt before the second.
        assert!(started.elapsed() >= Duration::from_millis(20));
        assert!(rig.metric("throttled") > 0);
    }
}

#[test]
fn a_throttled_request_is_in_the_ring_during_a_pause() {
    for engine in engines() {
        let file = disk_file(64 << 10);
        let mut rig = Rig::new(BlockConfig {
            rate_limiter: Some(RateLimiterConfig {
                bandwidth: None,
                operations: Some(TokenBucketConfig {
                    size: 1,
                    one_time_burst: 0,
                    refill_time_ms: u32::MAX,
                }),
            }),
            ..config(&file, engine)
        });
        let first = rig.add(IN, 0, &from_disk(512));
        let second = rig.add(IN, 1, &from_disk(512));
        rig.kick();
        rig.wait_used(1);
        rig.block.pause().unwrap();
        assert_eq!((rig.status(first), rig.status(second)), (OK, NO_STATUS));
        assert_eq!(rig.block.ring_states()[0].unwrap().next_available, 1);
        assert_eq!(rig.turn(Duration::ZERO), 0, "nothing to do while paused");
        rig.block.resume();
        assert_eq!(rig.turn(Duration::ZERO), 1);
        assert_eq!(rig.status(second), NO_STATUS, "still too early");
        rig.block.pump.throttle = None;
        rig.kick();
        rig.wait_used(1);
        assert_eq!(rig.status(second), OK);
    }
}
