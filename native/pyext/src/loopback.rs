//! One socket for every TCP port of a network namespace's loopback, by a BPF program of type
//! `sk_lookup` (bpf-helpers(7), Linux 5.9), which the kernel runs before it looks for a listener.
//! The program is a page long, so it is written here as instructions and needs no loader.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use pyo3::prelude::*;

use crate::errors::NativeError;

// linux/bpf.h, enum bpf_cmd, bpf_map_type, bpf_prog_type, bpf_attach_type.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// `union bpf_attr` of `BPF_MAP_CREATE`: what a map is made of.
#[repr(C)]
struct NewMap {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// `union bpf_attr` of `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` of `BPF_PROG_LOAD`, up to the last field that is needed.
#[repr(C)]
struct NewProgram {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// `union bpf_attr` of `BPF_LINK_CREATE`.
#[repr(C)]
struct NewLink {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// `struct bpf_insn`: operation, registers (source high, destination low), jump or offset, value.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

/// The program: a TCP connection to 127.0.0.0/8 or `::1` goes to the one socket of the map, any
/// other its usual way. Offsets are those of `struct bpf_sk_lookup`; addresses are big-endian,
/// and read as they lie in memory.
#[expect(clippy::cast_possible_wrap, reason = "bit patterns")]
fn program(map: RawFd) -> [Instruction; 33] {
    const LOOPBACK_IP6_END: i32 = u32::from_ne_bytes([0, 0, 0, 1]) as i32;
    const FIRST_BYTE: i32 = u32::from_ne_bytes([0xff, 0, 0, 0]) as i32;
    const LOOPBACK_IP4: i32 = u32::from_ne_bytes([127, 0, 0, 0]) as i32;
    // Operations (linux/bpf_common.h, linux/bpf.h): load a word, jumps, moves, call, exit.
    const LOAD: u8 = 0x61;
    const STORE: u8 = 0x62;
    const LOAD_MAP: u8 = 0x18;
    const JUMP_IF_EQUAL: u8 = 0x15;
    const JUMP_UNLESS_EQUAL: u8 = 0x55;
    const COMPARE_32: u8 = 0x56;
    const JUMP: u8 = 0x05;
    const AND_32: u8 = 0x54;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    let to_end = |at: i16| 31 - at - 1;
    [
        /* 0 */ instruction(MOVE, 0x16, 0, 0),
        /* 1 */ instruction(LOAD, 0x60, 12, 0), // protocol
        /* 2 */ instruction(JUMP_UNLESS_EQUAL, 0x00, to_end(2), libc::IPPROTO_TCP),
        /* 3 */ instruction(LOAD, 0x60, 8, 0), // family
        /* 4 */ instruction(JUMP_IF_EQUAL, 0x00, 9, libc::AF_INET),
        /* 5 */ instruction(LOAD, 0x60, 44, 0), // local_ip6
        /* 6 */ instruction(JUMP_UNLESS_EQUAL, 0x00, to_end(6), 0),
        /* 7 */ instruction(LOAD, 0x60, 48, 0),
        /* 8 */ instruction(JUMP_UNLESS_EQUAL, 0x00, to_end(8), 0),
        /* 9 */ instruction(LOAD, 0x60, 52, 0),
        /* 10 */ instruction(JUMP_UNLESS_EQUAL, 0x00, to_end(10), 0),
        /* 11 */ instruction(LOAD, 0x60, 56, 0),
        /* 12 */ instruction(COMPARE_32, 0x00, to_end(12), LOOPBACK_IP6_END),
        /* 13 */ instruction(JUMP, 0x00, 3, 0),
        /* 14 */ instruction(LOAD, 0x60, 40, 0), // local_ip4
        /* 15 */ instruction(AND_32, 0x00, 0, FIRST_BYTE),
        /* 16 */ instruction(COMPARE_32, 0x00, to_end(16), LOOPBACK_IP4),
        /* 17 */ instruction(STORE, 0x0a, -4, 0), // the key
        /* 18 */ instruction(LOAD_MAP, 0x11, 0, map),
        /* 19 */ instruction(0, 0x00, 0, 0),
        /* 20 */ instruction(MOVE, 0xa2, 0, 0),
        /* 21 */ instruction(ADD, 0x02, 0, -4),
        /* 22 */ instruction(CALL, 0x00, 0, MAP_LOOKUP),
        /* 23 */ instruction(JUMP_IF_EQUAL, 0x00, to_end(23), 0),
        /* 24 */ instruction(MOVE, 0x07, 0, 0),
        /* 25 */ instruction(MOVE, 0x61, 0, 0),
        /* 26 */ instruction(MOVE, 0x02, 0, 0),
        /* 27 */ instruction(SET, 0x03, 0, 0),
        /* 28 */ instruction(CALL, 0x00, 0, SK_ASSIGN),
        /* 29 */ instruction(MOVE, 0x71, 0, 0),
        /* 30 */ instruction(CALL, 0x00, 0, SK_RELEASE),
        /* 31 */ instruction(SET, 0x00, 0, 1), // SK_PASS
        /* 32 */ instruction(EXIT, 0x00, 0, 0),
    ]
}

/// Let a listening socket have every TCP connection to the loopback of the network namespace
/// ``namespace_fd``. Return the descriptor of the hook; closing it ends that.
#[pyfunction]
pub(crate) fn catch_loopback(
    py: Python<'_>,
    namespace_fd: RawFd,
    listener_fd: RawFd,
) -> Result<RawFd, NativeError> {
    py.detach(|| catch(namespace_fd, listener_fd))
        .map(IntoRawFd::into_raw_fd)
        .map_err(|source| NativeError::Host {
            operation: "redirect the loopback of a network namespace",
            path: None,
            source,
        })
}

fn catch(namespace: RawFd, listener: RawFd) -> io::Result<OwnedFd> {
    let map = bpf(
        MAP_CREATE,
        &NewMap {
            map_type: MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
        },
    )
    .map(owned)?;
    let key = 0_u32;
    let value = u64::from(word(listener));
    let element = Element {
        map_fd: word(map.as_raw_fd()),
        padding: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &element)?;
    let instructions = program(map.as_raw_fd());
    let license = c"Apache-2.0";
    let program = bpf(
        PROG_LOAD,
        &NewProgram {
            prog_type: PROG_TYPE_SK_LOOKUP,
            insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            insns: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
            prog_name: *b"kata_loopback\0\0\0",
            prog_ifindex: 0,
            expected_attach_type: ATTACH_SK_LOOKUP,
        },
    )
    .map(owned)?;
    bpf(
        LINK_CREATE,
        &NewLink {
            prog_fd: word(program.as_raw_fd()),
            target_fd: word(namespace),
            attach_type: ATTACH_SK_LOOKUP,
            flags: 0,
        },
    )
    .map(owned)
}

/// A descriptor as BPF's structures have it.
fn word(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

/// bpf(2).
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<RawFd> {
    #[expect(unsafe_code, reason = "neither std nor rustix has bpf(2)")]
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a `repr(C)` structure that lives across
    // the call; the addresses in it are of values that do too, of the sizes that the map and the
    // program were described with. What it makes is a descriptor; it writes to none of them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}

/// Own what bpf(2) made; it closes on exec by itself.
fn owned(fd: RawFd) -> OwnedFd {
    #[expect(
        unsafe_code,
        reason = "a number from the kernel becomes a descriptor here"
    )]
    // SAFETY: bpf(2) has just made it for the caller, and nobody else knows it.
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}
