//! What the vsock device makes of bytes, one question a line, for comparison with another
//! implementation (`tests/property/test_vsock_packet_differential.py`):
//!
//! - `header <guest cid> <hex>` → `<the ten fields> <hex of them encoded again> <accepted|refused>`,
//!   or `truncated`;
//! - `walk <queue size> <table> <available> <used> <hex of guest memory from address 0>` →
//!   `ring` if the ring is nonsense, else per chain `<head>:sound:<address>,<len>,<r|w>;…` (each
//!   buffer that is not empty) or `<head>:broken:`, separated by blanks after a leading `chains`; a
//!   head that is no descriptor ends the list as `<head>:invalid:`.
//!
//! Anything else answers `error …`. Runs until its input ends.

use std::fmt::Write as _;
use std::io::{self, BufRead, Write};

use std::sync::Arc;

use virtio_core::buffers::GuestBuffers;
use virtio_core::chain::Chain;
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingError, RingState};
use virtio_core::vsock::packet::PacketHeader;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

fn main() -> io::Result<()> {
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let answer = answer(&line).unwrap_or_else(|| "error: not understood".to_owned());
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

fn answer(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["header", cid, hex] => Some(header(cid.parse().ok()?, &bytes(hex)?)),
        ["walk", size, table, available, used, hex] => {
            let addresses = [
                table.parse().ok()?,
                available.parse().ok()?,
                used.parse().ok()?,
            ];
            walk(size.parse().ok()?, addresses, &bytes(hex)?)
        }
        _ => None,
    }
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits
        .chunks_exact(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

fn header(cid: u64, bytes: &[u8]) -> String {
    let Ok(header) = PacketHeader::parse_prefix(bytes) else {
        return "truncated".to_owned();
    };
    let verdict = if header.check(cid).is_ok() {
        "accepted"
    } else {
        "refused"
    };
    let mut encoded = String::new();
    for byte in header.to_bytes() {
        // Writing to a string does not fail.
        let _result = write!(encoded, "{byte:02x}");
    }
    format!(
        "{} {} {} {} {} {} {} {} {} {} {encoded} {verdict}",
        header.src_cid,
        header.dst_cid,
        header.src_port,
        header.dst_port,
        header.len,
        header.socket_type,
        header.op,
        header.flags,
        header.buf_alloc,
        header.fwd_cnt,
    )
}

fn walk(size: u16, [descriptors, available, used]: [u64; 3], bytes: &[u8]) -> Option<String> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes.len())]).ok()?;
    memory.write_slice(bytes, GuestAddress(0)).ok()?;
    let ram = GuestRam::new(memory);
    let state = RingState {
        size,
        descriptors,
        available,
        used,
        ..RingState::default()
    };
    let mut ring = Ring::new(Arc::clone(&ram), state).ok()?;
    let mut chain = Chain::new(&ram);
    let mut answer = "chains".to_owned();
    let mut seen = 0u16;
    loop {
        let popped = ring.pop(&mut chain);
        // What was given back by the ring itself broke a rule.
        while seen != ring.state().next_used {
            let at = used + 4 + u64::from(seen % size) * 8;
            let head: u32 = ram.mappings().read_obj(GuestAddress(at)).ok()?;
            let _result = write!(answer, " {head}:broken:");
            seen += 1;
        }
        match popped {
            Ok(true) => {}
            Ok(false) => return Some(answer),
            Err(RingError::AvailableIndex { .. }) => return Some("ring".to_owned()),
            Err(RingError::Head { head, .. }) => return Some(format!("{answer} {head}:invalid:")),
            Err(_) => return None,
        }
        ring.complete(chain.head, 0);
        seen += 1;
        let mut buffers = describe(&ram, &chain.readable, 'r')?;
        buffers.extend(describe(&ram, &chain.writable, 'w')?);
        let _result = write!(answer, " {}:sound:{}", chain.head, buffers.join(";"));
    }
}

/// The buffers by their guest addresses; memory is one mapping from address 0.
fn describe(ram: &GuestRam, buffers: &GuestBuffers, direction: char) -> Option<Vec<String>> {
    let start = ram.mappings().get_host_address(GuestAddress(0)).ok()?;
    let mut described = Vec::new();
    let mut offset = 0;
    while offset < buffers.len() {
        // A long chain takes several calls.
        let iovecs = buffers.iovecs(offset, buffers.len() - offset);
        for entry in iovecs.as_slice() {
            let address = entry.iov_base.addr() - start.addr();
            described.push(format!("{address},{},{direction}", entry.iov_len));
        }
        offset += iovecs.len;
    }
    Some(described)
}
