"""What goes in and out of a machine that runs: disk, shared folder, vsock; ours and QEMU in turn.

One machine of each kind is up at the same time, with one disk and one folder of the host, the same
file behind both. fio runs in the guest, so that its own clock counts only the transfer.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from images import Images
from qemu_machine import Folder, QemuMachine
from recording import Recorder

from lab_guest.machine import Machine, dial

ROUNDS = 3
_IMAGE_MIB = 256
_FILE_MIB = 64
_ECHO_PORT = 5000
_BULK_PORT = 5001
_BULK_BYTES = 64 << 20
_PINGS = 300
_PING = b"p" * 64
_TIMEOUT_S = 120.0
_FIO = "fio --name=bench --output-format=json --ioengine=libaio"


class Guest(Protocol):
    """What both kinds of machine can do."""

    def run(self, script: str, *, timeout_s: float = 60.0) -> str:
        """Run a shell script in the guest."""
        ...

    def dial(self, port: int, *, timeout_s: float) -> socket.socket:
        """Connect to a port of the guest."""
        ...


class OurMachine(Machine):
    """Ours, with streams as sockets."""

    def dial(self, port: int, *, timeout_s: float) -> socket.socket:
        """Connect to a port of the guest."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            dial(connection, self.socket, port, timeout_s=timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection


Measure = Callable[[Guest], float]


@contextlib.contextmanager
def both(images: Images, run_dir: Path, host: Path, log: Path) -> Iterator[tuple[Guest, Guest]]:
    """Boot both machines and mount the folder in each at ``/run/data``.

    ``host`` is a folder on a file system that serves direct and asynchronous I/O.
    """
    disk, folder = host / "disk.img", host / "folder"
    folder.mkdir()
    for path, mib in ((disk, _IMAGE_MIB), (folder / "file", _FILE_MIB)):
        with path.open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(1 << 20))
    root = Folder(tag="host-root", path=Path("/"), cache="always")
    data = Folder(tag="data", path=folder, cache="auto")
    with (
        OurMachine(images.guest, run_dir) as ours,
        QemuMachine(images.guest, run_dir, disk=disk, folders=(root, data), log=log) as theirs,
    ):
        ours.vm.add_disk(id="data", path=disk, engine="io_uring")
        ours.vm.add_folder(tag="data", folder=folder, cache="auto")
        ours.start()
        machines: tuple[Guest, Guest] = (ours, theirs)
        for guest in machines:
            guest.run("mkdir -p /run/data && mount -t virtiofs data /run/data")
            for role in (f"echo {_ECHO_PORT}", f"bulk {_BULK_PORT}"):
                guest.run(f'"$GUEST_PROGRAM" {role} >/run/{role.split()[0]} 2>&1 &')
        yield machines


def in_turn(recorder: Recorder, name: str, guests: tuple[Guest, Guest], measure: Measure) -> None:
    """Measure a figure on both, ours first, several times; the first time of each is not kept."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for guest, kept in zip(guests, samples, strict=True):
            value = measure(guest)
            if number > 0:
                kept.append(value)
    recorder.keep(name, ours=samples[0], reference=samples[1])


def _fio(guest: Guest, arguments: str) -> float:
    """Read with fio; give MiB/s."""
    output = guest.run(f"{_FIO} {arguments}", timeout_s=_TIMEOUT_S)
    job = json.loads(output[output.index("{") :])["jobs"][0]
    return float(job["read"]["bw_bytes"]) / (1 << 20)


def block_random(guest: Guest) -> float:
    """4 KiB reads anywhere, sixteen at a time, past the guest's cache; MiB/s."""
    return _fio(
        guest,
        "--filename=/dev/vda --rw=randread --bs=4k --iodepth=16 --direct=1 --time_based"
        " --runtime=3",
    )


def block_sequential(guest: Guest) -> float:
    """1 MiB reads in order, four at a time, past the guest's cache; MiB/s."""
    return _fio(
        guest,
        "--filename=/dev/vda --rw=read --bs=1m --iodepth=4 --direct=1 --time_based --runtime=3",
    )


def folder_sequential(guest: Guest) -> float:
    """A file of the folder from its start to its end, not in the guest's cache; MiB/s."""
    return _fio(guest, f"--filename=/run/data/file --rw=read --bs=1m --size={_FILE_MIB}m")


def folder_random(guest: Guest) -> float:
    """4 KiB reads anywhere in a file of the folder, past the guest's cache; MiB/s."""
    return _fio(
        guest,
        f"--filename=/run/data/file --size={_FILE_MIB}m --rw=randread --bs=4k --direct=1"
        " --time_based --runtime=3",
    )


def vsock_to_guest(guest: Guest) -> float:
    """One stream of bytes to the guest, until it says that it has all of them; MiB/s."""
    return _bulk(guest, to_guest=_BULK_BYTES)


def vsock_to_host(guest: Guest) -> float:
    """One stream of bytes from the guest; MiB/s."""
    return _bulk(guest, to_guest=0)


def _bulk(guest: Guest, *, to_guest: int) -> float:
    """Let the guest's "bulk" take ``to_guest`` bytes, or with 0 send its own."""
    chunk = bytes(1 << 20)
    with guest.dial(_BULK_PORT, timeout_s=_TIMEOUT_S) as stream:
        began = time.monotonic()
        for _ in range(to_guest // len(chunk)):
            stream.sendall(chunk)
        stream.shutdown(socket.SHUT_WR)
        received = 0
        buffer = bytearray(1 << 20)
        while count := stream.recv_into(buffer):
            received += count
        seconds = time.monotonic() - began
    expected = 1 if to_guest else _BULK_BYTES
    if received != expected:
        message = f"{received} bytes came from the guest, not {expected}"
        raise ValueError(message)
    return (to_guest or _BULK_BYTES) / (1 << 20) / seconds


def vsock_round_trip(guest: Guest) -> float:
    """64 bytes to the guest and back, on a stream that is open; microseconds."""
    with guest.dial(_ECHO_PORT, timeout_s=_TIMEOUT_S) as stream:
        began = time.monotonic()
        for _ in range(_PINGS):
            stream.sendall(_PING)
            left = len(_PING)
            while left:
                left -= len(stream.recv(left))
        return (time.monotonic() - began) / _PINGS * 1e6


MEASURES: dict[str, Measure] = {
    "vmm_block_random": block_random,
    "vmm_block_sequential": block_sequential,
    "vmm_folder_sequential": folder_sequential,
    "vmm_folder_random": folder_random,
    "vmm_vsock_to_guest": vsock_to_guest,
    "vmm_vsock_to_host": vsock_to_host,
    "vmm_vsock_round_trip": vsock_round_trip,
}
