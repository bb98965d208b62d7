//! The I/O thread itself: order, timers, panics, closing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use support::{Io, PATIENCE};
use vsock_io::event::{Completion, FATAL_TOKEN, Value};
use vsock_io::reactor::{Context, Interest, ReactorError, Readiness, Source, StopReason};
use vsock_io::status::Code;

/// Tells a channel what happens to it; does what it is told.
struct Probe {
    said: Sender<String>,
    panics_when_ready: bool,
    stream: Arc<UnixStream>,
}

impl Source for Probe {
    fn started(&mut self, context: &mut Context<'_>) {
        context
            .watch(1, self.stream.clone(), Interest::READ)
            .unwrap();
        self.said.send("started".to_owned()).unwrap();
    }

    fn ready(&mut self, key: u64, readiness: Readiness, context: &mut Context<'_>) {
        assert!(!self.panics_when_ready, "as told");
        assert!(readiness.readable);
        context.set_interest(key, Interest::NONE).unwrap();
        self.said.send(format!("ready {key}")).unwrap();
    }

    fn timeout(&mut self, key: u64, _context: &mut Context<'_>) {
        self.said.send(format!("timeout {key}")).unwrap();
    }

    fn stopped(&mut self, reason: &StopReason, _context: &mut Context<'_>) {
        self.said.send(format!("{reason:?}")).unwrap();
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _heard = self.said.send("dropped".to_owned());
    }
}

fn probe(panics_when_ready: bool) -> (Probe, UnixStream, std::sync::mpsc::Receiver<String>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (said, heard) = channel();
    (
        Probe {
            said,
            panics_when_ready,
            stream: Arc::new(ours),
        },
        theirs,
        heard,
    )
}

#[test]
fn timers_fire_in_order_and_can_be_cancelled_or_replaced() {
    let io = Io::start();
    let (source, _peer, heard) = probe(false);
    let id = io.reactor.handle().add(source).unwrap();
    io.reactor
        .handle()
        .post(move |registry| {
            registry.with(id, |_: &mut Probe, context| {
                let now = Instant::now();
                context.set_timer(1, now + Duration::from_millis(30));
                context.set_timer(2, now + Duration::from_millis(10));
                context.set_timer(3, now);
                context.set_timer(4, now);
                context.cancel_timer(3);
                context.set_timer(4, now + Duration::from_millis(20));
            });
        })
        .unwrap();
    let order: Vec<String> = (0..4)
        .map(|_| heard.recv_timeout(PATIENCE).unwrap())
        .collect();
    assert_eq!(order, ["started", "timeout 2", "timeout 4", "timeout 1"]);
}

#[test]
fn a_panicking_source_is_reported_stopped_and_dropped_and_others_live() {
    let mut io = Io::start();
    let (bad, bad_peer, bad_heard) = probe(true);
    let (good, good_peer, good_heard) = probe(false);
    let bad_id = io.reactor.handle().add(bad).unwrap();
    io.reactor.handle().add(good).unwrap();
    drop(bad_peer);
    let fatal = io.wait(FATAL_TOKEN);
    assert_eq!(fatal.code, Code::INTERNAL);
    assert!(fatal.message.contains("as told"), "{}", fatal.message);
    let story: Vec<String> = (0..3)
        .map(|_| bad_heard.recv_timeout(PATIENCE).unwrap())
        .collect();
    assert_eq!(story[0], "started");
    assert!(story[1].contains("Panicked"), "{}", story[1]);
    assert_eq!(story[2], "dropped");
    drop(good_peer);
    assert_eq!(good_heard.recv_timeout(PATIENCE).unwrap(), "started");
    assert_eq!(good_heard.recv_timeout(PATIENCE).unwrap(), "ready 1");
    io.reactor
        .handle()
        .post(move |registry| {
            let found = registry.with(bad_id, |_: &mut Probe, _| ()).is_some();
            registry
                .sink()
                .complete(Completion::ok(5, Value::Count(found.into())));
        })
        .unwrap();
    assert!(matches!(io.wait(5).value, Value::Count(0)));
}

#[test]
fn a_panicking_command_is_reported_and_the_next_one_runs() {
    let mut io = Io::start();
    io.reactor
        .handle()
        .post(|_| panic!("in a command"))
        .unwrap();
    io.reactor
        .handle()
        .post(|registry| registry.sink().complete(Completion::ok(1, Value::None)))
        .unwrap();
    assert!(io.wait(FATAL_TOKEN).message.contains("in a command"));
    assert_eq!(io.wait(1).code, Code::OK);
}

#[test]
fn closing_runs_posted_commands_then_stops_sources() {
    let mut io = Io::start();
    let (source, _peer, heard) = probe(false);
    io.reactor.handle().add(source).unwrap();
    io.reactor
        .handle()
        .post(|registry| registry.sink().complete(Completion::ok(1, Value::None)))
        .unwrap();
    io.reactor.close().unwrap();
    assert_eq!(io.rest().len(), 1);
    assert_eq!(
        heard.iter().collect::<Vec<_>>(),
        ["started", "Closed", "dropped"]
    );
    let refused = io.reactor.handle().post(|_| {});
    assert!(matches!(refused, Err(ReactorError::Closed)));
    io.reactor.close().unwrap();
}

#[test]
fn many_threads_post_and_every_command_runs() {
    let io = Io::start();
    let (done, is_done) = channel();
    std::thread::scope(|scope| {
        for thread in 0..8_u32 {
            let (handle, done) = (io.reactor.handle(), done.clone());
            scope.spawn(move || {
                for index in 0..1000 {
                    let done = done.clone();
                    handle
                        .post(move |_| done.send((thread, index)).unwrap())
                        .unwrap();
                }
            });
        }
    });
    let mut next = [0; 8];
    for _ in 0..8000 {
        let (thread, index) = is_done.recv_timeout(PATIENCE).unwrap();
        assert_eq!(next[thread as usize], index);
        next[thread as usize] += 1;
    }
}
