//! Stdio copies over real FIFOs, pipes, sockets and files, with an agent that a test scripts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use sha2::{Digest, Sha256};
use support::{CLOSED, Io, ScriptedAgent, bytes_field, fields, number_field};
use vsock_io::agent::{AgentClient, StdioCopy};
use vsock_io::event::{Completion, Value};
use vsock_io::status::Code;
use vsock_io::stdio::pump::{OutputStream, ProcessName};
use vsock_io::stdio::window::CHUNK;

const TOTAL: usize = 64 << 20;
const COPY: u64 = 42;

fn process() -> ProcessName {
    ProcessName {
        container_id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

fn fifo(directory: &tempfile::TempDir) -> std::path::PathBuf {
    let path = directory.path().join("fifo");
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    path
}

/// Bytes that repeat only after a long way, so that a lost or doubled piece shows.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn hash_until_end(mut from: impl Read) -> (usize, Vec<u8>) {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        let count = from.read(&mut buffer).unwrap();
        if count == 0 {
            return (total, hash.finalize().to_vec());
        }
        total += count;
        hash.update(&buffer[..count]);
    }
}

fn count(event: &Completion) -> u64 {
    match event.value {
        Value::Count(count) => count,
        ref other => panic!("{other:?} is no count"),
    }
}

/// Answer one read with data.
fn give(agent: &mut ScriptedAgent, data: &[u8]) {
    let request = agent.receive().unwrap();
    assert_eq!(request.method, "ReadStdout");
    agent.reply(request.stream_id, &bytes_field(1, data));
}

/// Answer reads with all of `data` in pieces of many sizes, then with the end of the stream.
fn serve_output(mut agent: ScriptedAgent, data: Vec<u8>) -> JoinHandle<ScriptedAgent> {
    std::thread::spawn(move || {
        let mut rest = &data[..];
        let mut sizes = [1, 4096, 65_536, 100_000, CHUNK as usize]
            .into_iter()
            .cycle();
        while !rest.is_empty() {
            let request = agent.receive().unwrap();
            let len = usize::try_from(fields(&request.payload)[2].1).unwrap();
            let size = sizes.next().unwrap().min(len).min(rest.len());
            agent.reply(request.stream_id, &bytes_field(1, &rest[..size]));
            rest = &rest[size..];
        }
        give(&mut agent, b"");
        agent
    })
}

/// Start a stdout copy to `fd`.
fn output(client: &AgentClient, fd: impl Into<OwnedFd>) -> StdioCopy {
    client.copy_output(COPY, process(), OutputStream::Stdout, fd.into())
}

fn check_whole_output(to: impl Into<OwnedFd>, from: impl Read + Send + 'static) {
    let mut io = Io::start();
    let (client, agent) = io.connect();
    let data = pattern(TOTAL);
    let expected = Sha256::digest(&data).to_vec();
    let reader = std::thread::spawn(move || hash_until_end(from));
    let _copy = output(&client, to);
    let served = serve_output(agent, data);
    let event = io.wait(COPY);
    assert_eq!(
        (event.code, count(&event)),
        (Code::OK, TOTAL as u64),
        "{}",
        event.message
    );
    assert!(reader.join().unwrap() == (TOTAL, expected));
    drop(served.join().unwrap());
}

#[test]
fn output_through_a_fifo_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = fifo(&directory);
    let reader = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let writer = rustix::fs::open(&path, OFlags::WRONLY, Mode::empty()).unwrap();
    rustix::fs::fcntl_setfl(&reader, OFlags::empty()).unwrap();
    check_whole_output(writer, File::from(reader));
}

#[test]
fn output_through_a_pipe_is_whole() {
    let (reader, writer) = pipe();
    check_whole_output(writer, File::from(reader));
}

#[test]
fn output_through_a_socket_is_whole() {
    let (reader, writer) = UnixStream::pair().unwrap();
    check_whole_output(writer, reader);
}

#[test]
fn output_to_a_plain_file_is_whole() {
    let mut io = Io::start();
    let (client, agent) = io.connect();
    let data = pattern(TOTAL);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let _copy = output(&client, file.reopen().unwrap());
    let served = serve_output(agent, data.clone());
    let event = io.wait(COPY);
    assert_eq!((event.code, count(&event)), (Code::OK, TOTAL as u64));
    let mut written = Vec::new();
    file.read_to_end(&mut written).unwrap();
    assert!(written == data);
    drop(served.join().unwrap());
}

#[test]
fn a_full_disk_is_data_loss_and_the_guest_is_drained() {
    let mut io = Io::start();
    let (client, agent) = io.connect();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let _copy = output(&client, full);
    let served = serve_output(agent, pattern(1 << 20));
    let event = io.wait(COPY);
    assert_eq!((event.code, count(&event)), (Code::DATA_LOSS, 0));
    drop(served.join().unwrap());
}

#[test]
fn after_the_reader_vanished_the_guest_is_drained_to_the_end() {
    let mut io = Io::start();
    let (client, agent) = io.connect();
    let (reader, writer) = pipe();
    let _copy = output(&client, writer);
    let served = serve_output(agent, pattern(8 << 20));
    let mut reader = File::from(reader);
    reader.read_exact(&mut vec![0; 1 << 20]).unwrap();
    drop(reader);
    let event = io.wait(COPY);
    assert_eq!(event.code, Code::DATA_LOSS);
    assert!(count(&event) >= 1 << 20);
    // The agent has handed out everything, its end included.
    drop(served.join().unwrap());
}

#[test]
fn the_next_chunk_is_asked_for_while_the_last_one_waits_and_no_further() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (reader, writer) = pipe();
    let _copy = output(&client, writer);
    let chunk = vec![1; CHUNK as usize];
    // The pipe is enlarged to two chunks; a third waits here, and a fourth is asked for and kept.
    for _ in 0..4 {
        give(&mut agent, &chunk);
    }
    client.call(1, "s", "m", b"", std::time::Duration::ZERO);
    // The call is the only thing to arrive: no fifth read while two chunks wait.
    let call = agent.receive().unwrap();
    assert_eq!(call.method, "m");
    agent.reply(call.stream_id, b"");
    io.wait(1);
    let mut reader = File::from(reader);
    reader.read_exact(&mut vec![0; 4 * CHUNK as usize]).unwrap();
    give(&mut agent, b"");
    assert_eq!(count(&io.wait(COPY)), 4 * u64::from(CHUNK));
}

#[test]
fn when_the_event_comes_the_descriptor_is_closed() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (reader, writer) = pipe();
    let _copy = output(&client, writer);
    give(&mut agent, b"all");
    give(&mut agent, b"");
    assert_eq!(count(&io.wait(COPY)), 3);
    rustix::fs::fcntl_setfl(&reader, OFlags::NONBLOCK).unwrap();
    let mut text = String::new();
    // With a writer left this would fail with EAGAIN instead of finding the end.
    File::from(reader).read_to_string(&mut text).unwrap();
    assert_eq!(text, "all");
}

#[test]
fn a_process_that_is_gone_ends_the_output() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (_reader, writer) = pipe();
    let _copy = output(&client, writer);
    give(&mut agent, b"abc");
    let request = agent.receive().unwrap();
    agent.fail(request.stream_id, 5, "no such process");
    let event = io.wait(COPY);
    assert_eq!((event.code, count(&event)), (Code::OK, 3));
}

#[test]
fn another_failure_ends_the_output_with_its_code() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (_reader, writer) = pipe();
    let _copy = output(&client, writer);
    give(&mut agent, b"abc");
    let request = agent.receive().unwrap();
    agent.fail(request.stream_id, 13, "EIO");
    let event = io.wait(COPY);
    assert_eq!(
        (event.code, count(&event), event.message.as_str()),
        (Code::INTERNAL, 3, "EIO")
    );
}

#[test]
fn a_malformed_chunk_ends_the_output_with_internal() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (_reader, writer) = pipe();
    let _copy = output(&client, writer);
    let request = agent.receive().unwrap();
    agent.reply(request.stream_id, b"\x0a\xff");
    assert_eq!(io.wait(COPY).code, Code::INTERNAL);
}

#[test]
fn what_came_before_the_connection_broke_is_written() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (reader, writer) = pipe();
    let _copy = output(&client, writer);
    let data = pattern(CHUNK as usize);
    give(&mut agent, &data);
    agent.receive().unwrap();
    drop(agent);
    assert_eq!(io.wait(CLOSED).code, Code::UNAVAILABLE);
    let mut delivered = Vec::new();
    File::from(reader).read_to_end(&mut delivered).unwrap();
    assert!(delivered == data);
    let event = io.wait(COPY);
    assert_eq!(
        (event.code, count(&event)),
        (Code::UNAVAILABLE, u64::from(CHUNK))
    );
}

#[test]
fn stop_before_the_first_chunk() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (_reader, writer) = pipe();
    let copy = output(&client, writer);
    let request = agent.receive().unwrap();
    copy.stop();
    copy.stop();
    let event = io.wait(COPY);
    assert_eq!((event.code, count(&event)), (Code::CANCELLED, 0));
    agent.reply(request.stream_id, &bytes_field(1, b"late"));
    client.call(1, "s", "m", b"", std::time::Duration::ZERO);
    let call = agent.receive().unwrap();
    agent.reply(call.stream_id, b"");
    io.wait(1);
    assert!(io.rest().is_empty());
}

#[test]
fn stop_with_a_full_pipe_does_not_wait() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (reader, writer) = pipe();
    let copy = output(&client, writer);
    // More than the pipe holds even when it is enlarged.
    for _ in 0..3 {
        give(&mut agent, &vec![1; CHUNK as usize]);
    }
    // The reactor has written what it can when it answers this.
    client.call(1, "s", "m", b"", std::time::Duration::ZERO);
    let mut last = agent.receive().unwrap();
    while last.method != "m" {
        last = agent.receive().unwrap();
    }
    agent.reply(last.stream_id, b"");
    io.wait(1);
    copy.stop();
    let event = io.wait(COPY);
    assert_eq!(event.code, Code::CANCELLED);
    assert!(event.message.contains("not written"), "{}", event.message);
    let mut delivered = Vec::new();
    File::from(reader).read_to_end(&mut delivered).unwrap();
    assert_eq!(delivered.len() as u64, count(&event));
}

#[test]
fn stop_after_the_end_does_nothing() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (_reader, writer) = pipe();
    let copy = output(&client, writer);
    give(&mut agent, b"");
    assert_eq!(io.wait(COPY).code, Code::OK);
    copy.stop();
    io.reactor.close().unwrap();
    copy.stop();
    let late: Vec<u64> = io.rest().into_iter().map(|event| event.token).collect();
    assert_eq!(late, [CLOSED]);
}

#[test]
fn closing_the_client_or_the_thread_cancels_copies() {
    for closes_thread in [false, true] {
        let mut io = Io::start();
        let (client, mut agent) = io.connect();
        let (_reader, writer) = pipe();
        let (input, _input_writer) = pipe();
        let _copy = output(&client, writer);
        let _input = client.copy_input(COPY + 1, process(), input);
        give(&mut agent, b"abc");
        agent.receive().unwrap();
        if closes_thread {
            io.reactor.close().unwrap();
        } else {
            client.close();
        }
        let event = io.wait(COPY);
        assert_eq!((event.code, count(&event)), (Code::CANCELLED, 3));
        assert_eq!(io.wait(COPY + 1).code, Code::CANCELLED);
        let (_other, late) = pipe();
        let _copy = client.copy_output(77, process(), OutputStream::Stderr, late);
        assert_eq!(io.wait(77).code, Code::CANCELLED);
    }
}

/// Take input until the empty write, with an answer that `accepts` some of each piece.
fn take_input(agent: &mut ScriptedAgent, accepts: impl Fn(usize) -> usize) -> Vec<u8> {
    let mut taken = Vec::new();
    loop {
        let request = agent.receive().unwrap();
        assert_eq!(request.method, "WriteStdin");
        let parts = fields(&request.payload);
        assert_eq!(
            (parts[0].2.as_slice(), parts[1].2.as_slice()),
            (&b"c1"[..], &b"e1"[..])
        );
        let data = parts
            .get(2)
            .map(|(_, _, data)| data.clone())
            .unwrap_or_default();
        let accepted = accepts(data.len());
        taken.extend(&data[..accepted]);
        let reply = number_field(1, accepted);
        agent.reply(request.stream_id, &reply);
        if data.is_empty() {
            return taken;
        }
    }
}

#[test]
fn input_through_a_pipe_is_whole_and_closes_the_guest_end() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let data = pattern(TOTAL);
    let expected = Sha256::digest(&data);
    let (reader, writer) = pipe();
    let _copy = client.copy_input(COPY, process(), reader);
    let feeder = std::thread::spawn(move || File::from(writer).write_all(&data).unwrap());
    let taken = take_input(&mut agent, |len| len);
    feeder.join().unwrap();
    let event = io.wait(COPY);
    assert_eq!((event.code, count(&event)), (Code::OK, TOTAL as u64));
    assert!(Sha256::digest(&taken) == expected);
}

#[test]
fn input_taken_in_part_is_sent_again_from_there() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let data = pattern(1 << 20);
    let (reader, writer) = pipe();
    let _copy = client.copy_input(COPY, process(), reader);
    let fed = data.clone();
    let feeder = std::thread::spawn(move || File::from(writer).write_all(&fed).unwrap());
    let taken = take_input(&mut agent, |len| len.div_ceil(3));
    feeder.join().unwrap();
    assert_eq!(count(&io.wait(COPY)), 1 << 20);
    assert!(taken == data);
}

#[test]
fn input_from_a_plain_file_is_whole() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let data = pattern(300_000);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&data).unwrap();
    let _copy = client.copy_input(COPY, process(), File::open(file.path()).unwrap().into());
    assert!(take_input(&mut agent, |len| len) == data);
    assert_eq!(count(&io.wait(COPY)), 300_000);
}

#[test]
fn a_fifo_without_writer_is_not_at_its_end() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let directory = tempfile::tempdir().unwrap();
    let path = fifo(&directory);
    let reader = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let _copy = client.copy_input(COPY, process(), reader);
    client.call(1, "s", "m", b"", std::time::Duration::ZERO);
    let call = agent.receive().unwrap();
    assert_eq!(call.method, "m", "nothing was sent for the copy");
    agent.reply(call.stream_id, b"");
    io.wait(1);
    let mut writer = File::options().write(true).open(&path).unwrap();
    writer.write_all(b"typed").unwrap();
    drop(writer);
    assert_eq!(take_input(&mut agent, |len| len), b"typed");
    assert_eq!(count(&io.wait(COPY)), 5);
}

#[test]
fn input_for_a_process_that_is_gone_ends_quietly() {
    let mut io = Io::start();
    let (client, mut agent) = io.connect();
    let (reader, writer) = pipe();
    let _copy = client.copy_input(COPY, process(), reader);
    rustix::io::write(&writer, b"abc").unwrap();
    let request = agent.receive().unwrap();
    agent.fail(request.stream_id, 5, "gone");
    let event = io.wait(COPY);
    assert_eq!((event.code, count(&event)), (Code::OK, 0));
    assert_eq!(
        rustix::io::write(&writer, b"x"),
        Err(rustix::io::Errno::PIPE)
    );
}

#[test]
fn a_guest_that_takes_more_than_it_got_ends_the_input() {
    for reply in [&b""[..], &[0x08, 4]] {
        let mut io = Io::start();
        let (client, mut agent) = io.connect();
        let (reader, writer) = pipe();
        let _copy = client.copy_input(COPY, process(), reader);
        rustix::io::write(&writer, b"abc").unwrap();
        let request = agent.receive().unwrap();
        agent.reply(request.stream_id, reply);
        assert_eq!(io.wait(COPY).code, Code::INTERNAL);
    }
}

#[test]
fn input_that_waits_notices_a_lost_connection() {
    let mut io = Io::start();
    let (client, agent) = io.connect();
    let (reader, _writer) = pipe();
    let _copy = client.copy_input(COPY, process(), reader);
    client.call(1, "s", "m", b"", std::time::Duration::ZERO);
    drop(agent);
    assert_eq!(io.wait(COPY).code, Code::UNAVAILABLE);
}

#[test]
fn stop_ends_waiting_and_sending_input() {
    for is_sending in [false, true] {
        let mut io = Io::start();
        let (client, mut agent) = io.connect();
        let (reader, writer) = pipe();
        let copy = client.copy_input(COPY, process(), reader);
        if is_sending {
            rustix::io::write(&writer, b"abc").unwrap();
            agent.receive().unwrap();
        }
        copy.stop();
        let event = io.wait(COPY);
        assert_eq!((event.code, count(&event)), (Code::CANCELLED, 0));
        assert_eq!(
            rustix::io::write(&writer, b"x"),
            Err(rustix::io::Errno::PIPE)
        );
    }
}
