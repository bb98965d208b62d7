//! What the vsock device makes of bytes, one question a line, for comparison with another
//! implementation (`tests/property/test_vsock_packet_differential.py`):
//!
//! - `header <guest cid> <hex>` → `<the ten fields> <hex of them encoded again> <accepted|refused>`,
//!   or `truncated`;
//! - `walk <queue size> <table> <available> <used> <hex of guest memory from address 0>` →
//!   `ring` if the ring is nonsense, else per chain `<head>:<sound|broken>:<address>,<len>,<r|w>;…`,
//!   separated by blanks after a leading `chains`; a head that cannot be given back ends the list as
//!   `<head>:invalid:`.
//!
//! Anything else answers `error …`. Runs until its input ends.

use std::fmt::Write as _;
use std::io::{self, BufRead, Write};

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vsock_io::vhost_user::buffers::{Direction, GuestBuffers};
use vsock_io::vhost_user::packet::PacketHeader;
use vsock_io::vhost_user::queue::{QueueError, Vring};

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

fn walk(size: u16, [table, available, used]: [u64; 3], bytes: &[u8]) -> Option<String> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes.len())]).ok()?;
    memory.write_slice(bytes, GuestAddress(0)).ok()?;
    let mut vring = Vring::new().ok()?;
    vring.set_size(size).ok()?;
    vring.set_addresses(table, available, used).ok()?;
    vring.is_enabled = true;
    if !vring.start(&memory) {
        return None;
    }
    let mut answer = "chains".to_owned();
    loop {
        match vring.pop(&memory) {
            Err(QueueError::Available(_)) => return Some("ring".to_owned()),
            Err(_) => return None,
            Ok(None) => return Some(answer),
            Ok(Some(chain)) => {
                let head = chain.head_index();
                if vring.complete(&memory, head, 0).is_err() {
                    return Some(format!("{answer} {head}:invalid:"));
                }
                answer.push_str(&describe(&memory, size, chain));
            }
        }
    }
}

fn describe(
    memory: &GuestMemoryMmap,
    size: u16,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> String {
    let head = chain.head_index();
    let mut buffers = GuestBuffers::default();
    let gathered = buffers.gather(
        memory,
        chain.clone(),
        Direction::FromGuest,
        usize::from(size),
    );
    let verdict = if gathered.is_ok() { "sound" } else { "broken" };
    let descriptors: Vec<String> = chain
        .map(|descriptor| {
            let direction = if descriptor.is_write_only() { 'w' } else { 'r' };
            format!("{},{},{direction}", descriptor.addr().0, descriptor.len())
        })
        .collect();
    format!(" {head}:{verdict}:{}", descriptors.join(";"))
}
