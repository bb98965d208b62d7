//! The relay between two sockets: bytes both ways, half-closes, ends that go.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use support::{Io, PATIENCE};
use vsock_io::event::Value;
use vsock_io::relay::Relay;
use vsock_io::status::Code;

/// More than sockets and relay hold together.
const MANY: usize = 3 << 20;

/// The far ends of a relay that runs under `token`.
fn relayed(io: &Io, token: u64) -> (UnixStream, UnixStream) {
    let (near, client) = UnixStream::pair().unwrap();
    let (far, server) = UnixStream::pair().unwrap();
    let relay = Relay::new(token, OwnedFd::from(near), OwnedFd::from(far));
    io.reactor.handle().add(relay).unwrap();
    for end in [&client, &server] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (client, server)
}

fn bytes(seed: usize) -> Vec<u8> {
    (0..MANY)
        .map(|index| (index * 7 + seed + index / 251).to_le_bytes()[0])
        .collect()
}

fn shut(end: &UnixStream) {
    end.shutdown(std::net::Shutdown::Write).unwrap();
}

fn count(value: &Value) -> u64 {
    match value {
        Value::Count(count) => *count,
        other => panic!("{other:?} is no count"),
    }
}

#[test]
fn both_ways_at_once_arrive_whole() {
    let mut io = Io::start();
    let (client, server) = relayed(&io, 1);
    let threads: Vec<_> = [(client, 1), (server, 2)]
        .into_iter()
        .flat_map(|(end, seed)| {
            let mut reader = end.try_clone().unwrap();
            let mut writer = end;
            [
                thread::spawn(move || {
                    writer.write_all(&bytes(seed)).unwrap();
                    shut(&writer);
                }),
                thread::spawn(move || {
                    let mut received = Vec::new();
                    reader.read_to_end(&mut received).unwrap();
                    assert!(received == bytes(3 - seed), "other bytes than sent");
                }),
            ]
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let event = io.wait(1);
    assert_eq!(
        (event.code, count(&event.value)),
        (Code::OK, 2 * MANY as u64)
    );
}

#[test]
fn an_end_of_file_leaves_the_other_direction_open() {
    let mut io = Io::start();
    let (mut client, mut server) = relayed(&io, 1);
    client.write_all(b"question").unwrap();
    shut(&client);
    let mut question = String::new();
    server.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    server.write_all(b"answer").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert_eq!(io.wait(1).code, Code::OK);
}

#[test]
fn an_end_that_is_gone_ends_it() {
    let mut io = Io::start();
    let (client, mut server) = relayed(&io, 1);
    drop(client);
    let mut nothing = Vec::new();
    server.read_to_end(&mut nothing).unwrap();
    assert!(nothing.is_empty());
    // Nobody takes this: sooner or later the server is told.
    while server.write_all(&[0; 4096]).is_ok() {}
    let event = io.wait(1);
    assert_eq!(event.code, Code::UNAVAILABLE);
}

#[test]
fn an_answer_arrives_though_the_question_was_not_read() {
    let mut io = Io::start();
    let (mut client, mut server) = relayed(&io, 1);
    client.set_nonblocking(true).unwrap();
    // More than is held on the way, so that some of it meets a server that is gone.
    while let Ok(_sent) = client.write(&[0; 4096]) {}
    server.write_all(&vec![7; 100_000]).unwrap();
    drop(server);
    client.set_nonblocking(false).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert!(answer == vec![7; 100_000], "{} bytes", answer.len());
    drop(client);
    assert_eq!(io.wait(1).code, Code::UNAVAILABLE);
}

/// The far ends of a relay between a client's TCP connection and the machine's socket.
fn relayed_tcp(io: &Io, token: u64) -> (TcpStream, UnixStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let (far, server) = UnixStream::pair().unwrap();
    let relay = Relay::new(token, OwnedFd::from(near), OwnedFd::from(far));
    io.reactor.handle().add(relay).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (client, server)
}

#[test]
fn a_long_answer_arrives_whole_though_the_question_was_not_read() {
    let mut io = Io::start();
    let (mut client, mut server) = relayed_tcp(&io, 1);
    let mut asking = client.try_clone().unwrap();
    // For as long as anybody takes it.
    let question = thread::spawn(move || while asking.write_all(&[0; 8192]).is_ok() {});
    server.read_exact(&mut [0; 4096]).unwrap();
    // And then it is gone, with something unread.
    let answering = thread::spawn(move || server.write_all(&bytes(1)).unwrap());
    let mut answer = vec![0; MANY];
    client.read_exact(&mut answer).unwrap();
    answering.join().unwrap();
    assert!(answer == bytes(1), "other bytes than sent");
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "and then its end");
    client.shutdown(std::net::Shutdown::Both).unwrap();
    question.join().unwrap();
    assert_eq!(io.wait(1).code, Code::UNAVAILABLE);
}

#[test]
fn a_client_that_resets_ends_it_though_the_server_says_nothing() {
    let mut io = Io::start();
    let (client, mut server) = relayed_tcp(&io, 1);
    server.write_all(b"unread").unwrap();
    client.peek(&mut [0; 6]).unwrap();
    // With something unread, so the relay is told by a reset.
    drop(client);
    assert_eq!(server.read(&mut [0]).unwrap(), 0, "its end is told at once");
    assert_eq!(io.wait(1).code, Code::UNAVAILABLE);
    drop(server);
}

#[test]
fn a_reader_that_does_not_read_stops_the_writer() {
    let io = Io::start();
    let (client, server) = relayed(&io, 1);
    client
        .set_write_timeout(Some(std::time::Duration::from_millis(200)))
        .unwrap();
    let mut sent = 0;
    while let Ok(count) = (&client).write(&[0; 4096]) {
        sent += count;
        assert!(sent < MANY, "{sent} bytes are held");
    }
    drop(server);
}

#[test]
fn the_threads_end_is_its_end() {
    let mut io = Io::start();
    let (mut client, _server) = relayed(&io, 1);
    io.reactor.close().unwrap();
    assert_eq!(io.wait(1).code, Code::CANCELLED);
    let mut nothing = Vec::new();
    client.read_to_end(&mut nothing).unwrap();
}
