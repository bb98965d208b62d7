//! One call to an agent that answers at once, against the same bytes sent to and fro over the same
//! kind of socket by two threads that do nothing else. The client's side includes all a caller
//! pays: the call, the I/O thread, the event queue and the poll of its eventfd.
//!
//! All threads share one processor. Left to the scheduler, it decides at each start which of them
//! do, and a hand-over between two processors takes three times as long as one on the same.

#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(clippy::unwrap_used, reason = "a failed run ends by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};
use support::{Io, ScriptedAgent, bytes_field};
use vsock_io::ttrpc::frame::{FrameHeader, HEADER_LEN, TYPE_RESPONSE};
use vsock_io::ttrpc::message::encode_request_frame;

const SERVICE: &str = "grpc.AgentService";
const METHOD: &str = "StatsContainer";
const PAYLOAD: [u8; 64] = [7; 64];
const TIMEOUT: Duration = Duration::from_secs(60);

fn response(stream_id: u32) -> Vec<u8> {
    let body = bytes_field(2, &PAYLOAD);
    let length = u32::try_from(body.len()).unwrap();
    let header = FrameHeader {
        length,
        stream_id,
        kind: TYPE_RESPONSE,
        flags: 0,
    };
    [&header.to_bytes()[..], &body].concat()
}

fn request_len() -> usize {
    let nanoseconds = i64::try_from(TIMEOUT.as_nanos()).unwrap();
    let (head, tail) =
        encode_request_frame(1, SERVICE, METHOD, PAYLOAD.len(), nanoseconds).unwrap();
    head.len() + PAYLOAD.len() + tail.len()
}

/// Answers every request of a known length, with its own stream id, until the peer closes.
fn answer(mut stream: UnixStream) {
    let mut request = vec![0; request_len()];
    let mut reply = response(1);
    while stream.read_exact(&mut request).is_ok() {
        let header = FrameHeader::from_bytes(*request.first_chunk::<HEADER_LEN>().unwrap());
        reply[4..8].copy_from_slice(&header.stream_id.to_be_bytes());
        if stream.write_all(&reply).is_err() {
            break;
        }
    }
}

fn stay_on_one_processor() {
    let mut here = CpuSet::new();
    here.set(sched_getcpu());
    sched_setaffinity(None, &here).unwrap();
}

fn round_trip(criterion: &mut Criterion) {
    stay_on_one_processor();
    let mut group = criterion.benchmark_group("agent_round_trip");
    group.bench_function("raw", |bencher| {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || answer(theirs));
        let request = vec![0; request_len()];
        let mut reply = response(1);
        bencher.iter(|| {
            ours.write_all(black_box(&request)).unwrap();
            ours.read_exact(black_box(&mut reply)).unwrap();
        });
        drop(ours);
        server.join().unwrap();
    });
    group.bench_function("client", |bencher| {
        let io = Io::start();
        let (client, ScriptedAgent { stream }) = io.connect();
        stream.set_read_timeout(None).unwrap();
        stream.set_write_timeout(None).unwrap();
        let server = std::thread::spawn(move || answer(stream));
        let mut token = 0;
        bencher.iter(|| {
            token += 1;
            client.call(token, SERVICE, METHOD, black_box(&PAYLOAD), TIMEOUT);
            let mut fds = [PollFd::new(&*io.queue, PollFlags::IN)];
            poll(&mut fds, None).unwrap();
            let events = io.queue.drain();
            assert!(events.len() == 1 && events[0].code.is_ok() && events[0].token == token);
        });
        drop(client);
        drop(io);
        server.join().unwrap();
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4));
    targets = round_trip
}
criterion_main!(benches);
