//! The agent's client against an agent that answers as a test says, well-behaved or hostile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use support::{CLOSED, Io, bytes_field};
use vsock_io::agent::AgentClient;
use vsock_io::event::Value;
use vsock_io::status::Code;
use vsock_io::ttrpc::frame::{FrameHeader, MAX_PAYLOAD, TYPE_REQUEST, TYPE_RESPONSE};

const FOREVER: Duration = Duration::ZERO;

fn bytes(value: Value) -> Vec<u8> {
    match value {
        Value::Bytes(bytes) => bytes,
        other => panic!("{other:?} is no payload"),
    }
}

#[test]
fn a_call_carries_its_parts_and_brings_the_reply() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(7, "grpc.Health", "Check", b"abc", Duration::from_secs(2));
    let request = agent.receive().unwrap();
    assert_eq!(
        (request.service.as_str(), request.method.as_str()),
        ("grpc.Health", "Check")
    );
    assert_eq!(
        (request.stream_id, request.payload.as_slice()),
        (1, &b"abc"[..])
    );
    assert_eq!(request.timeout_nano, 2_000_000_000);
    agent.reply(1, b"fine");
    let event = io.wait(7);
    assert_eq!(
        (event.code, bytes(event.value)),
        (Code::OK, b"fine".to_vec())
    );
}

#[test]
fn replies_out_of_order_find_their_calls() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    for token in 1..=100 {
        client.call(token, "s", "m", &token.to_be_bytes(), FOREVER);
    }
    let mut requests: Vec<_> = (0..100).map(|_| agent.receive().unwrap()).collect();
    let ids: Vec<u32> = requests.iter().map(|request| request.stream_id).collect();
    assert_eq!(ids, (0..100).map(|index| 2 * index + 1).collect::<Vec<_>>());
    requests.reverse();
    for request in &requests {
        agent.reply(request.stream_id, &request.payload);
    }
    for token in 1..=100_u64 {
        assert_eq!(bytes(io.wait(token).value), token.to_be_bytes());
    }
}

#[test]
fn a_status_is_reported_with_its_text() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    agent.fail(1, 5, "container not found");
    let event = io.wait(1);
    assert_eq!(
        (event.code, event.message.as_str()),
        (Code::NOT_FOUND, "container not found")
    );
}

#[test]
fn an_oversized_reply_fails_only_its_call() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    client.call(2, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    agent.receive().unwrap();
    agent.send(1, TYPE_RESPONSE, &vec![0; MAX_PAYLOAD + 1]);
    agent.reply(3, b"alive");
    assert_eq!(io.wait(1).code, Code::RESOURCE_EXHAUSTED);
    assert_eq!(bytes(io.wait(2).value), b"alive");
}

#[test]
fn the_largest_reply_passes() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    let body = bytes_field(2, &vec![9; MAX_PAYLOAD - 5]);
    assert_eq!(body.len(), MAX_PAYLOAD);
    agent.send(1, TYPE_RESPONSE, &body);
    assert_eq!(bytes(io.wait(1).value).len(), MAX_PAYLOAD - 5);
}

#[test]
fn an_oversized_request_is_refused_here() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", &vec![0; MAX_PAYLOAD], FOREVER);
    assert_eq!(io.wait(1).code, Code::RESOURCE_EXHAUSTED);
    client.call(2, "s", "m", b"", FOREVER);
    assert_eq!(agent.receive().unwrap().stream_id, 1);
}

#[test]
fn a_large_request_leaves_whole_through_a_slow_socket() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let payload: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    client.call(1, "s", "m", &payload, FOREVER);
    client.call(2, "s", "m", b"after", FOREVER);
    assert!(agent.receive().unwrap().payload == payload);
    assert_eq!(agent.receive().unwrap().payload, b"after");
    agent.reply(1, b"");
    agent.reply(3, b"");
    assert_eq!((io.wait(1).code, io.wait(2).code), (Code::OK, Code::OK));
}

#[test]
fn frames_nobody_waits_for_are_counted_and_ignored() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    agent.reply(2, b"even");
    agent.reply(99, b"unknown");
    agent.send(1, 3, b"data");
    agent.send(1, TYPE_REQUEST, b"request");
    agent.send(1, 200, b"unknown kind");
    agent.send(99, TYPE_RESPONSE, b"\xff\xff");
    agent.reply(1, b"ok");
    assert_eq!(bytes(io.wait(1).value), b"ok");
    assert_eq!(client.ignored_frames(), 6);
    assert!(io.rest().is_empty());
}

#[test]
fn a_malformed_reply_is_internal_and_the_connection_lives() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    client.call(2, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    agent.receive().unwrap();
    agent.send(1, TYPE_RESPONSE, &[0x12, 0xff, 0xff]);
    agent.reply(3, b"");
    assert_eq!(io.wait(1).code, Code::INTERNAL);
    assert_eq!(io.wait(2).code, Code::OK);
}

#[test]
fn a_deadline_is_enforced_here_and_its_late_reply_ignored() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let begin = Instant::now();
    client.call(1, "s", "m", b"", Duration::from_secs(20));
    client.call(2, "s", "m", b"", Duration::from_millis(50));
    assert_eq!(io.wait(2).code, Code::DEADLINE_EXCEEDED);
    assert!(begin.elapsed() >= Duration::from_millis(50));
    assert!(begin.elapsed() < Duration::from_secs(10));
    agent.receive().unwrap();
    let late = agent.receive().unwrap();
    agent.reply(late.stream_id, b"late");
    agent.reply(1, b"");
    assert_eq!(io.wait(1).code, Code::OK);
    assert_eq!(client.ignored_frames(), 1);
    assert!(io.rest().is_empty());
}

#[test]
fn a_connection_that_closes_completes_everything_once() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    for token in 1..=3 {
        client.call(token, "s", "m", b"", Duration::from_secs(20));
    }
    for _ in 0..3 {
        agent.receive().unwrap();
    }
    agent.reply(1, b"in time");
    drop(agent);
    assert_eq!(io.wait(1).code, Code::OK);
    for token in [2, 3, CLOSED] {
        assert_eq!(io.wait(token).code, Code::UNAVAILABLE);
    }
    client.call(4, "s", "m", b"", FOREVER);
    assert_eq!(io.wait(4).code, Code::UNAVAILABLE);
    client.close();
    drop(client);
    io.reactor.close().unwrap();
    assert!(io.rest().is_empty());
}

#[test]
fn a_connection_cut_within_a_frame_says_so() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    let header = FrameHeader {
        length: 10,
        stream_id: 1,
        kind: TYPE_RESPONSE,
        flags: 0,
    };
    agent.raw(&header.to_bytes());
    agent.raw(b"half");
    drop(agent);
    let event = io.wait(1);
    assert_eq!(event.code, Code::UNAVAILABLE);
    assert!(
        event.message.contains("within a message"),
        "{}",
        event.message
    );
}

#[test]
fn replies_that_came_before_a_failed_send_count() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    let id = agent.receive().unwrap().stream_id;
    agent.reply(id, b"last words");
    drop(agent);
    client.call(2, "s", "m", b"", FOREVER);
    assert_eq!(bytes(io.wait(1).value), b"last words");
    assert_eq!(io.wait(2).code, Code::UNAVAILABLE);
    assert_eq!(io.wait(CLOSED).code, Code::UNAVAILABLE);
}

#[test]
fn close_cancels_and_the_agent_sees_the_end() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    client.close();
    assert_eq!(io.wait(1).code, Code::CANCELLED);
    assert_eq!(io.wait(CLOSED).code, Code::CANCELLED);
    assert_eq!(agent.receive(), None);
    client.call(2, "s", "m", b"", FOREVER);
    assert_eq!(io.wait(2).code, Code::CANCELLED);
}

#[test]
fn closing_the_thread_completes_calls_and_later_ones() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    client.call(1, "s", "m", b"", FOREVER);
    agent.receive().unwrap();
    io.reactor.close().unwrap();
    client.call(2, "s", "m", b"", FOREVER);
    let mut codes: Vec<_> = io
        .rest()
        .into_iter()
        .map(|event| (event.token, event.code))
        .collect();
    codes.sort_by_key(|(token, _)| *token);
    let expected = [1, 2, CLOSED].map(|token| (token, Code::CANCELLED));
    assert_eq!(codes, expected);
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let _late = AgentClient::new(&io.reactor.handle(), ours.into(), 5);
    assert_eq!(io.wait(5).code, Code::CANCELLED);
}

#[test]
fn random_bytes_from_the_agent_end_in_events_not_in_silence() {
    for seed in 0..200_u32 {
        let mut io = Io::start();
        let (client, mut agent) = io.connect();
        client.call(1, "s", "m", b"", Duration::from_secs(20));
        agent.receive().unwrap();
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let noise: Vec<u8> = (0..2000)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state.to_le_bytes()[0]
            })
            .collect();
        agent.raw(&noise);
        drop(agent);
        assert_eq!(io.wait(CLOSED).code, Code::UNAVAILABLE);
        assert!(!io.wait(1).code.is_ok());
    }
}
