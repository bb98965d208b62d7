//! Flow control of an output copy: the bytes that came from the guest and the host end has not
//! taken, and the rule for when to ask for more. One chunk is written while the next is on its
//! way, so at most two are held. Used on the I/O thread only.

/// Bytes asked for at once: large enough that a round trip costs little beside the copying, and
/// four FIFOs of the default size.
pub const CHUNK: u32 = 256 << 10;

/// Bytes waiting for the host end.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    /// What waits.
    pub fn waiting(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Whether another chunk may be asked for.
    pub fn has_room(&self) -> bool {
        self.bytes.len() - self.start < CHUNK as usize
    }

    /// Keep what could not be written at once.
    pub fn push(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The first `count` waiting bytes were written.
    pub fn consume(&mut self, count: usize) {
        self.start = self.bytes.len().min(self.start + count);
        if self.is_empty() {
            self.start = 0;
            self.bytes.clear();
        }
    }

    /// Drop what waits and its memory.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_that_waits_closes_the_window() {
        let mut backlog = Backlog::default();
        assert!(backlog.has_room());
        backlog.push(&vec![1; CHUNK as usize]);
        assert!(!backlog.has_room());
        backlog.consume(1);
        assert!(backlog.has_room());
    }

    #[test]
    fn bytes_leave_in_order() {
        let mut backlog = Backlog::default();
        backlog.push(b"abc");
        backlog.consume(2);
        backlog.push(b"def");
        assert_eq!(backlog.waiting(), b"cdef");
        backlog.consume(4);
        assert!(backlog.is_empty());
    }
}
