//! Dialling real Unix sockets: listeners that come late, answer oddly, or never.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use support::{Io, PATIENCE};
use vsock_io::dial::Dial;
use vsock_io::event::{Completion, Value};
use vsock_io::status::Code;

fn dial(io: &Io, scheme: &str, path: &Path, timeout: Duration) {
    let address = format!("{scheme}://{}", path.display()).parse().unwrap();
    io.reactor
        .handle()
        .add(Dial::new(1, address, 1024, timeout))
        .unwrap();
}

fn stream(event: Completion) -> UnixStream {
    assert_eq!(event.code, Code::OK, "{}", event.message);
    let Value::Fd(fd) = event.value else {
        panic!("no descriptor")
    };
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn read_request(stream: &mut UnixStream) {
    let mut request = [0; 13];
    stream.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"CONNECT 1024\n");
}

#[test]
fn a_plain_socket_is_connected_without_handshake() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut io = Io::start();
    dial(&io, "unix", &path, PATIENCE);
    let mut ours = stream(io.wait(1));
    accept(&listener).write_all(b"x").unwrap();
    let mut byte = [0];
    ours.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn what_the_guest_says_first_is_left_in_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut io = Io::start();
    dial(&io, "hvsock", &path, PATIENCE);
    let mut monitor = accept(&listener);
    read_request(&mut monitor);
    monitor
        .write_all(b"OK 1073741824\n{\"level\":\"info\"}\n")
        .unwrap();
    drop(monitor);
    let mut text = String::new();
    stream(io.wait(1)).read_to_string(&mut text).unwrap();
    assert_eq!(text, "{\"level\":\"info\"}\n");
}

#[test]
fn an_answer_byte_by_byte_is_understood() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut io = Io::start();
    dial(&io, "hvsock", &path, PATIENCE);
    let mut monitor = accept(&listener);
    read_request(&mut monitor);
    for byte in b"OK 5\nrest" {
        monitor.write_all(&[*byte]).unwrap();
    }
    drop(monitor);
    let mut text = String::new();
    stream(io.wait(1)).read_to_string(&mut text).unwrap();
    assert_eq!(text, "rest");
}

#[test]
fn a_closed_connection_means_not_yet_and_is_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut io = Io::start();
    dial(&io, "hvsock", &path, PATIENCE);
    for _ in 0..3 {
        read_request(&mut accept(&listener));
    }
    let mut monitor = accept(&listener);
    read_request(&mut monitor);
    monitor.write_all(b"OK 1\n").unwrap();
    stream(io.wait(1));
}

#[test]
fn a_socket_that_appears_late_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut io = Io::start();
    let stale = UnixListener::bind(&path).unwrap();
    drop(stale);
    dial(&io, "unix", &path, PATIENCE);
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    stream(io.wait(1));
    accept(&listener);
}

#[test]
fn the_deadline_ends_the_dial_with_the_last_cause() {
    let directory = tempfile::tempdir().unwrap();
    let mut io = Io::start();
    let begin = Instant::now();
    dial(
        &io,
        "unix",
        &directory.path().join("none"),
        Duration::from_millis(100),
    );
    let event = io.wait(1);
    assert_eq!(event.code, Code::DEADLINE_EXCEEDED);
    assert!(event.message.contains("No such file"), "{}", event.message);
    assert!(begin.elapsed() >= Duration::from_millis(100));
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_monitor_that_never_answers_is_given_up_at_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut io = Io::start();
    dial(&io, "hvsock", &path, Duration::from_millis(50));
    let mut monitor = accept(&listener);
    read_request(&mut monitor);
    assert_eq!(io.wait(1).code, Code::DEADLINE_EXCEEDED);
    assert_eq!(
        monitor.read(&mut [0]).unwrap(),
        0,
        "the attempt's socket is closed"
    );
}

#[test]
fn another_answer_ends_the_dial_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    for answer in [&b"HTTP/1.1 400 Bad Request\n"[..], &[b'O'; 100]] {
        let mut io = Io::start();
        dial(&io, "hvsock", &path, PATIENCE);
        let mut monitor = accept(&listener);
        read_request(&mut monitor);
        monitor.write_all(answer).unwrap();
        assert_eq!(io.wait(1).code, Code::UNAVAILABLE);
    }
}

#[test]
fn a_path_that_is_no_socket_ends_the_dial_at_once_or_at_the_deadline() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut io = Io::start();
    dial(&io, "unix", file.path(), Duration::from_millis(100));
    // A plain file answers ECONNREFUSED, like a socket whose listener is gone.
    assert_eq!(io.wait(1).code, Code::DEADLINE_EXCEEDED);
    dial(&io, "unix", &file.path().join("below"), PATIENCE);
    assert_eq!(io.wait(1).code, Code::UNAVAILABLE);
}

#[test]
fn closing_the_thread_cancels_the_dial() {
    let directory = tempfile::tempdir().unwrap();
    let mut io = Io::start();
    dial(&io, "unix", &directory.path().join("none"), PATIENCE);
    io.reactor.close().unwrap();
    assert_eq!(io.wait(1).code, Code::CANCELLED);
}

#[test]
fn a_vsock_guest_that_is_not_there_is_tried_until_the_deadline_or_refused() {
    let mut io = Io::start();
    let address = "vsock://3735928559".parse().unwrap();
    let dial = Dial::new(1, address, 1024, Duration::from_millis(200));
    io.reactor.handle().add(dial).unwrap();
    let event = io.wait(1);
    // Without the kernel's vsock at all there is nothing to wait for.
    assert!(
        [Code::DEADLINE_EXCEEDED, Code::UNAVAILABLE].contains(&event.code),
        "{} {}",
        event.code,
        event.message
    );
}
