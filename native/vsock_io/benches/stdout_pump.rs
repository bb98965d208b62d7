//! 32 MiB of a process's output from the agent's socket into a FIFO that somebody drains: through
//! the client's copy, against a thread that reads the bare bytes from the same kind of socket and
//! writes them to the same kind of FIFO. `splice` is that loop without the copy to user memory.

#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(clippy::unwrap_used, reason = "a failed run ends by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use support::{Io, bytes_field};
use vsock_io::event::Value;
use vsock_io::stdio::pump::{OutputStream, ProcessName};
use vsock_io::stdio::window::CHUNK;
use vsock_io::ttrpc::frame::{FrameHeader, TYPE_RESPONSE};

const TOTAL: usize = 32 << 20;
const CHUNK_LEN: usize = CHUNK as usize;

fn drain(pipe: OwnedFd) -> JoinHandle<usize> {
    std::thread::spawn(move || {
        let mut pipe = File::from(pipe);
        let mut buffer = vec![0; CHUNK_LEN];
        let mut total = 0;
        loop {
            match pipe.read(&mut buffer).unwrap() {
                0 => return total,
                count => total += count,
            }
        }
    })
}

fn bare_sender(mut stream: UnixStream) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let chunk = vec![7; CHUNK_LEN];
        for _ in 0..TOTAL / CHUNK_LEN {
            stream.write_all(&chunk).unwrap();
        }
    })
}

fn copy_loop(mut from: &UnixStream, mut to: &File) {
    let mut buffer = vec![0; CHUNK_LEN];
    loop {
        match from.read(&mut buffer).unwrap() {
            0 => return,
            count => to.write_all(&buffer[..count]).unwrap(),
        }
    }
}

fn splice_loop(from: &UnixStream, to: &File) {
    while splice(from, None, to, None, CHUNK_LEN, SpliceFlags::MOVE).unwrap() > 0 {}
}

fn bare(shovel: fn(&UnixStream, &File)) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let sender = bare_sender(theirs);
    let drained = drain(reader);
    let writer = File::from(writer);
    shovel(&ours, &writer);
    drop(writer);
    sender.join().unwrap();
    assert_eq!(drained.join().unwrap(), TOTAL);
}

fn pump(io: &mut Io) {
    let (client, mut agent) = io.connect();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let drained = drain(reader);
    let sender = std::thread::spawn(move || {
        let body = bytes_field(2, &bytes_field(1, &vec![7; CHUNK_LEN]));
        let length = u32::try_from(body.len()).unwrap();
        let header = FrameHeader {
            length,
            stream_id: 0,
            kind: TYPE_RESPONSE,
            flags: 0,
        };
        let mut frame = [&header.to_bytes()[..], &body].concat();
        for _ in 0..TOTAL / CHUNK_LEN {
            let request = agent.receive().unwrap();
            frame[4..8].copy_from_slice(&request.stream_id.to_be_bytes());
            agent.raw(&frame);
        }
        let request = agent.receive().unwrap();
        agent.reply(request.stream_id, b"");
        agent
    });
    let process = ProcessName {
        container_id: "c".repeat(64),
        exec_id: String::new(),
    };
    let _copy = client.copy_output(1, process, OutputStream::Stdout, writer);
    let event = io.wait(1);
    assert!(matches!(event.value, Value::Count(count) if count == TOTAL as u64));
    assert_eq!(drained.join().unwrap(), TOTAL);
    drop(sender.join().unwrap());
    drop(client);
    let _closed = io.wait(support::CLOSED);
}

fn stdout_pump(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("stdout_pump");
    group.throughput(Throughput::Bytes(TOTAL as u64));
    group.bench_function("copy", |bencher| bencher.iter(|| bare(copy_loop)));
    group.bench_function("splice", |bencher| bencher.iter(|| bare(splice_loop)));
    group.bench_function("pump", |bencher| {
        let mut io = Io::start();
        bencher.iter(|| pump(&mut io));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(5));
    targets = stdout_pump
}
criterion_main!(benches);
