# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A second implementation of what the vsock device does per packet, from the virtio 1.2 text.

Written from sections 2.7 (split virtqueues) and 5.10 (socket device) without a look at the Rust
code. It is the second opinion of ``tests/property/test_vsock_packet_differential.py`` (the
functions on single values) and the other side of ``benchmarks/bench_packet_reference.py`` (the
functions on batches). Guest memory is a buffer that starts at guest address 0; every address and
index taken from it is checked before use.

A broken chain is given back whole, none of it used. A chain is broken when an index leaves its
table, an indirect table is not all memory, is nested, followed by another descriptor, misshapen,
empty or too large, the chain outgrows its table (or 1024 descriptors, should the queue be shorter
than that), its length passes 2**32 - 1, a buffer is not all memory, or one to read follows one to
write. Descriptors of no bytes carry no buffer.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    HEADER_SIZE = 44
    MAX_PAYLOAD = 65536
    DESCRIPTOR_SIZE = 16
    MAX_CHAIN = 1024
    F_NEXT = 1
    F_WRITE = 2
    F_INDIRECT = 4

cdef uint64_t HOST_CID = 2


cdef inline uint16_t u16(const uint8_t* at) noexcept nogil:
    return <uint16_t>(at[0] | (at[1] << 8))


cdef inline uint32_t u32(const uint8_t* at) noexcept nogil:
    return (<uint32_t>at[0]) | (<uint32_t>at[1] << 8) | (<uint32_t>at[2] << 16) | (<uint32_t>at[3] << 24)


cdef inline uint64_t u64(const uint8_t* at) noexcept nogil:
    return (<uint64_t>u32(at)) | ((<uint64_t>u32(at + 4)) << 32)


cdef inline void put(uint8_t* at, uint64_t value, int size) noexcept nogil:
    cdef int i
    for i in range(size):
        at[i] = <uint8_t>(value >> (8 * i))


cdef struct Header:
    uint64_t src_cid
    uint64_t dst_cid
    uint32_t src_port
    uint32_t dst_port
    uint32_t length
    uint16_t socket_type
    uint16_t op
    uint32_t flags
    uint32_t buf_alloc
    uint32_t fwd_cnt


cdef inline Header decode(const uint8_t* at) noexcept nogil:
    cdef Header header
    header.src_cid = u64(at)
    header.dst_cid = u64(at + 8)
    header.src_port = u32(at + 16)
    header.dst_port = u32(at + 20)
    header.length = u32(at + 24)
    header.socket_type = u16(at + 28)
    header.op = u16(at + 30)
    header.flags = u32(at + 32)
    header.buf_alloc = u32(at + 36)
    header.fwd_cnt = u32(at + 40)
    return header


cdef inline bint is_acceptable(const Header* header, uint64_t guest_cid) noexcept nogil:
    if header.src_cid != guest_cid or header.dst_cid != HOST_CID:
        return False
    if header.socket_type != 1:
        return False
    if header.op < 1 or header.op > 7:
        return False
    if header.op != 5:
        return header.length == 0
    return header.length <= MAX_PAYLOAD


def parse_header(const uint8_t[::1] data not None):
    """The ten fields of a header, in the order of the specification.

    Raises:
        ValueError: fewer than 44 bytes.
    """
    if data.shape[0] < HEADER_SIZE:
        raise ValueError(f"{data.shape[0]} bytes are no header")
    cdef Header h = decode(&data[0])
    return (
        h.src_cid, h.dst_cid, h.src_port, h.dst_port, h.length,
        h.socket_type, h.op, h.flags, h.buf_alloc, h.fwd_cnt,
    )


def serialise_header(fields):
    """44 bytes of the ten fields."""
    cdef uint8_t out[HEADER_SIZE]
    cdef int at = 0
    sizes = (8, 8, 4, 4, 4, 2, 2, 4, 4, 4)
    for value, size in zip(fields, sizes, strict=True):
        put(&out[at], value, size)
        at += size
    return bytes(out[:HEADER_SIZE])


def accepts(const uint8_t[::1] data not None, uint64_t guest_cid):
    """Whether a device serving ``guest_cid`` may act on the header."""
    if data.shape[0] < HEADER_SIZE:
        return False
    cdef Header header = decode(&data[0])
    return bool(is_acceptable(&header, guest_cid))


cdef struct Cursor:
    uint64_t table
    uint32_t table_size
    uint32_t index
    uint32_t left
    uint32_t limit
    uint64_t total
    bint is_indirect
    bint is_writing
    bint is_over


cdef struct Step:
    uint64_t address
    uint32_t length
    uint16_t flags


cdef enum:
    END = 0
    BUFFER = 1
    BROKEN = 2


cdef inline bint is_memory(uint64_t size, uint64_t address, uint64_t length) noexcept nogil:
    return address <= size and length <= size - address


cdef inline int advance(const uint8_t* memory, uint64_t size, Cursor* cursor, Step* step) noexcept nogil:
    """Read on to the next descriptor that carries a buffer, or the end, or the break."""
    cdef const uint8_t* at
    cdef uint16_t flags
    while not cursor.is_over:
        if cursor.left == 0 or cursor.index >= cursor.table_size:
            return BROKEN
        # The table lies in memory: the ring's is the caller's promise, an indirect one is checked.
        at = memory + cursor.table + <uint64_t>cursor.index * DESCRIPTOR_SIZE
        step.address = u64(at)
        step.length = u32(at + 8)
        flags = u16(at + 12)
        step.flags = flags
        cursor.left -= 1
        if flags & F_INDIRECT:
            if cursor.is_indirect or flags & F_NEXT:
                return BROKEN
            if step.length == 0 or step.length % DESCRIPTOR_SIZE:
                return BROKEN
            if step.length // DESCRIPTOR_SIZE > 65536 or not is_memory(size, step.address, step.length):
                return BROKEN
            cursor.table = step.address
            cursor.table_size = step.length // DESCRIPTOR_SIZE
            cursor.index = 0
            cursor.left = min(cursor.table_size, cursor.limit)
            cursor.is_indirect = True
            continue
        if flags & F_NEXT:
            cursor.index = u16(at + 14)
        else:
            cursor.is_over = True
        if not flags & F_WRITE and cursor.is_writing:
            return BROKEN
        if step.length == 0:
            continue
        cursor.is_writing = flags & F_WRITE
        cursor.total += step.length
        if cursor.total > 0xffffffffU or not is_memory(size, step.address, step.length):
            return BROKEN
        return BUFFER
    return END


cdef inline Cursor start(uint64_t table, uint32_t queue_size, uint32_t head) noexcept nogil:
    cdef Cursor cursor
    cursor.table = table
    cursor.table_size = queue_size
    cursor.index = head
    cursor.left = queue_size
    cursor.limit = max(queue_size, <uint32_t>MAX_CHAIN)
    cursor.total = 0
    cursor.is_indirect = False
    cursor.is_writing = False
    cursor.is_over = False
    return cursor


def walk_ring(
    const uint8_t[::1] memory not None, uint32_t queue_size, uint64_t table, uint64_t available,
    uint64_t used,
):
    """Every chain of the available ring, from index 0 on.

    Returns None when the ring itself is nonsense: the index is further ahead than the queue is
    long. Otherwise a list of ``(head, is_sound, buffers)``; ``buffers`` of a sound chain are
    ``(address, length, is_writable)``, those of a broken one are nobody's business. A head outside
    of the table ends the list with ``(head, None, [])``: it cannot be given back.
    """
    cdef uint64_t size = memory.shape[0]
    cdef const uint8_t* base = &memory[0]
    cdef uint16_t count = u16(base + available + 2)
    if count > queue_size:
        return None
    chains = []
    cdef uint16_t head
    cdef Cursor cursor
    cdef Step step
    cdef uint32_t i
    cdef int found
    for i in range(count):
        head = u16(base + available + 4 + 2 * (i % queue_size))
        if head >= queue_size:
            chains.append((head, None, []))
            break
        cursor = start(table, queue_size, head)
        buffers = []
        found = advance(base, size, &cursor, &step)
        while found == BUFFER:
            buffers.append((step.address, step.length, bool(step.flags & F_WRITE)))
            found = advance(base, size, &cursor, &step)
        chains.append((head, True, buffers) if found == END else (head, False, []))
    return chains


def parse_batch(const uint8_t[::1] data not None, uint64_t guest_cid):
    """Decode and judge each header in ``data``; gives a sum over the acceptable ones."""
    cdef Py_ssize_t offset = 0
    cdef uint64_t total = 0
    cdef Header header
    while data.shape[0] - offset >= HEADER_SIZE:
        header = decode(&data[offset])
        if is_acceptable(&header, guest_cid):
            total += <uint64_t>header.src_port + header.length
        offset += HEADER_SIZE
    return total


def walk_batch(
    uint8_t[::1] memory not None, uint32_t queue_size, uint64_t table, uint64_t available,
    uint64_t used,
):
    """Take every chain of the available ring from index 0 on: check its descriptors, copy out and
    decode its header, put it into the used ring. Gives a sum over the packets.

    Raises:
        ValueError: the ring or a chain is not sound.
    """
    cdef uint64_t size = memory.shape[0]
    cdef uint8_t* base = &memory[0]
    cdef uint64_t total = 0
    cdef uint64_t length
    cdef uint16_t next_available = 0
    cdef uint16_t next_used = 0
    cdef uint16_t head
    cdef uint8_t copied[HEADER_SIZE]
    cdef uint32_t filled, part
    cdef int found
    cdef Cursor cursor
    cdef Step step
    cdef Header header
    while True:
        # Looked at anew for each chain, as a device does.
        if u16(base + available + 2) == next_available:
            return total
        if <uint16_t>(u16(base + available + 2) - next_available) > queue_size:
            raise ValueError("available index")
        head = u16(base + available + 4 + 2 * (next_available % queue_size))
        next_available += 1
        if head >= queue_size:
            raise ValueError("head")
        cursor = start(table, queue_size, head)
        filled = 0
        length = 0
        found = advance(base, size, &cursor, &step)
        while found == BUFFER:
            if step.flags & F_WRITE:
                raise ValueError("descriptor")
            length += step.length
            part = 0
            while filled < HEADER_SIZE and part < step.length:
                copied[filled] = base[step.address + part]
                filled += 1
                part += 1
            found = advance(base, size, &cursor, &step)
        if found == BROKEN or filled < HEADER_SIZE:
            raise ValueError("chain")
        header = decode(copied)
        total += header.src_port + length
        put(base + used + 4 + 8 * (next_used % queue_size), head, 4)
        put(base + used + 8 + 8 * (next_used % queue_size), 0, 4)
        next_used += 1
        put(base + used + 2, next_used, 2)
