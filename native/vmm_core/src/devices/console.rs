//! What the guest said last: the end of its serial output, and the line it panicked with.
//!
//! Keeps the last 64 KiB for whoever asks why a machine failed, and passes everything on to a
//! descriptor, if it was given one, for as long as that takes bytes without blocking: the guest
//! decides how much it writes, so nobody waits for a slow reader and what it misses is counted.
//!
//! Written by vCPU threads through the serial port; read by any thread. The lock is held for the
//! copy only.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::lock::lock;

/// Bytes of output kept.
pub const TAIL_SIZE: usize = 64 * 1024;
/// Bytes of a line that are looked at; the rest of a longer one is not.
const MAX_LINE_LEN: usize = 1024;
/// What Linux says when it can not go on.
const PANIC_MARK: &[u8] = b"Kernel panic - not syncing";

#[derive(Debug)]
struct Output {
    tail: VecDeque<u8>,
    /// The line under way, as far as it is looked at.
    line: Vec<u8>,
    panic_line: Option<String>,
}

/// The guest's console output.
#[derive(Debug)]
pub struct Console {
    output: Mutex<Output>,
    sink: Mutex<Option<OwnedFd>>,
    bytes: AtomicU64,
    dropped_bytes: AtomicU64,
}

impl Console {
    /// Keep the end, and pass everything on to `sink`: a pipe or socket, which is made
    /// non-blocking. The process ignores SIGPIPE, as Rust's and Python's do.
    ///
    /// # Errors
    /// As `fcntl(2)`.
    pub fn new(sink: Option<OwnedFd>) -> Result<Self, Errno> {
        if let Some(sink) = &sink {
            fcntl_setfl(sink, fcntl_getfl(sink)? | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            output: Mutex::new(Output {
                tail: VecDeque::with_capacity(TAIL_SIZE),
                line: Vec::with_capacity(MAX_LINE_LEN),
                panic_line: None,
            }),
            sink: Mutex::new(sink),
            bytes: AtomicU64::new(0),
            dropped_bytes: AtomicU64::new(0),
        })
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        lock(&self.output)
    }

    fn sink(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        lock(&self.sink)
    }

    /// Pass nothing on any more: whoever reads the descriptor's other end sees the end.
    pub fn close(&self) {
        *self.sink() = None;
    }

    /// The guest wrote `bytes`.
    pub fn write(&self, bytes: &[u8]) {
        self.output().add(bytes);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let sink = self.sink();
        let Some(sink) = &*sink else {
            return;
        };
        let written = rustix::io::retry_on_intr(|| rustix::io::write(sink, bytes));
        let dropped = bytes.len().saturating_sub(written.unwrap_or(0));
        if dropped > 0 {
            let dropped = dropped as u64;
            self.dropped_bytes.fetch_add(dropped, Ordering::Relaxed);
        }
    }

    /// The last of what the guest wrote, at most [`TAIL_SIZE`] bytes.
    pub fn tail(&self) -> Vec<u8> {
        let output = self.output();
        let (older, newer) = output.tail.as_slices();
        [older, newer].concat()
    }

    /// The first line with which the guest's kernel said that it can not go on.
    pub fn panic_line(&self) -> Option<String> {
        let output = self.output();
        let ended = output.panic_line.clone();
        // A machine may be gone before the line ends.
        ended.or_else(|| panic_text(&output.line))
    }

    /// Bytes the guest wrote.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Bytes that were not passed on because the reader was slow or gone.
    pub fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes.load(Ordering::Relaxed)
    }
}

impl Output {
    fn add(&mut self, bytes: &[u8]) {
        let fresh = bytes.get(bytes.len().saturating_sub(TAIL_SIZE)..);
        let fresh = fresh.unwrap_or(bytes);
        let excess = (self.tail.len() + fresh.len()).saturating_sub(TAIL_SIZE);
        self.tail.drain(..excess);
        self.tail.extend(fresh);
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = MAX_LINE_LEN - self.line.len();
            self.line.extend(part.iter().take(room));
            if part.ends_with(b"\n") {
                if self.panic_line.is_none() {
                    self.panic_line = panic_text(&self.line);
                }
                self.line.clear();
            }
        }
    }
}

/// The line's text, if it is a panic's.
fn panic_text(line: &[u8]) -> Option<String> {
    let is_panic = line
        .windows(PANIC_MARK.len())
        .any(|part| part == PANIC_MARK);
    is_panic.then(|| String::from_utf8_lossy(line).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    #[test]
    fn the_end_of_the_output_is_kept() {
        let console = Console::new(None).unwrap();
        assert_eq!(console.tail(), b"");
        console.write(b"first ");
        console.write(&vec![b'x'; TAIL_SIZE - 5]);
        let tail = console.tail();
        assert_eq!(tail.len(), TAIL_SIZE);
        assert!(tail.starts_with(b"irst xx"));
        let many: Vec<u8> = (0..TAIL_SIZE + 7)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        console.write(&many);
        assert_eq!(console.tail(), many[7..]);
        assert_eq!(console.bytes(), (6 + TAIL_SIZE - 5 + TAIL_SIZE + 7) as u64);
    }

    #[test]
    fn a_panic_is_found_byte_by_byte_and_the_first_is_kept() {
        let console = Console::new(None).unwrap();
        let text = "[    0.5] all is well\r\n[    0.6] Kernel panic - not syncing: VFS: no root\r\n\
                    [    0.7] Kernel panic - not syncing: again\r\n";
        for byte in text.bytes() {
            console.write(&[byte]);
        }
        let line = console.panic_line().unwrap();
        assert_eq!(line, "[    0.6] Kernel panic - not syncing: VFS: no root");
    }

    #[test]
    fn a_panic_line_needs_no_end() {
        let console = Console::new(None).unwrap();
        console.write(b"Kernel panic");
        assert_eq!(console.panic_line(), None);
        console.write(b" - not syncing: \xff");
        let line = console.panic_line().unwrap();
        assert_eq!(line, "Kernel panic - not syncing: \u{fffd}");
    }

    #[test]
    fn a_line_without_end_takes_no_memory_and_hides_no_later_panic() {
        let console = Console::new(None).unwrap();
        console.write(&[b'x'; 3 * MAX_LINE_LEN]);
        console.write(b"Kernel panic - not syncing: too far right");
        assert_eq!(console.panic_line(), None);
        assert_eq!(console.output().line.len(), MAX_LINE_LEN);
        console.write(b"\nKernel panic - not syncing: seen\n");
        let line = console.panic_line().unwrap();
        assert_eq!(line, "Kernel panic - not syncing: seen");
    }

    #[test]
    fn a_full_pipe_costs_bytes_and_no_time() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let console = Console::new(Some(writer)).unwrap();
        console.write(b"hello\n");
        let mut bytes = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut bytes).unwrap(), 6);
        assert_eq!(&bytes[..6], b"hello\n");
        // More than any pipe's default size, in two writes so that the second finds it full.
        console.write(&vec![b'x'; 1 << 20]);
        let after_first = console.dropped_bytes();
        assert!((1..1 << 20).contains(&after_first));
        console.write(b"lost");
        assert_eq!(console.dropped_bytes(), after_first + 4);
        assert!(console.tail().ends_with(b"xlost"));
    }

    #[test]
    fn a_reader_that_left_is_not_missed() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let console = Console::new(Some(writer)).unwrap();
        drop(reader);
        console.write(b"nobody");
        assert_eq!(console.dropped_bytes(), 6);
        assert_eq!(console.tail(), b"nobody");
    }

    #[test]
    fn a_closed_console_tells_its_reader_and_keeps_its_tail() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let console = Console::new(Some(writer)).unwrap();
        console.write(b"last");
        console.close();
        console.write(b" words");
        let mut bytes = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut bytes).unwrap(), 4);
        assert_eq!(rustix::io::read(&reader, &mut bytes).unwrap(), 0);
        assert_eq!(console.tail(), b"last words");
        assert_eq!(console.dropped_bytes(), 0);
    }
}
