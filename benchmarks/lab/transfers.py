"""What goes in and out of a machine that runs: disk, shared folder, vsock; ours and QEMU in turn.

One machine of each kind is up at the same time, the same file or folder of the host behind both.
fio runs in the guest, so that its own clock counts only the transfer.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import monitors
from guest import Guest, booted, hybrid, vhost
from images import Images
from monitors import Software
from recording import Recorder

from lab_guest.machine import KERNEL_PARAMETERS

ROUNDS = 5
FOLDER_ROUNDS = 3
"""A folder's figures are counted in instructions and hardly vary; the emulator may hang, though."""
_MEMORY_MIB = 512
_IMAGE_MIB = 256
_FILE_MIB = 64
_TREE_FOLDERS, _TREE_FILES = 20, 50
_ECHO_PORT = 5000
_BULK_PORT = 5001
_BULK_MIB = 64
"""What ``program.c`` sends."""
_PINGS = 200
_PING = b"p" * 64
_FIO = "fio --name=bench --output-format=json --ioengine=libaio --randrepeat=1"
_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
_DAEMON_TIMEOUT_S = 20.0

Measure = Callable[[Guest], float]
Pair = contextlib.AbstractContextManager[tuple[Guest, Guest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the lab files are: a folder for sockets, one for data, the log."""

    run_dir: Path
    data: Path
    log: Path


# --- machines -----------------------------------------------------------------------------------


@contextlib.contextmanager
def beside_microvm(images: Images, place: Place) -> Iterator[tuple[Guest, Guest]]:
    """Boot ours and QEMU's microvm, both with a disk of data and a vsock device."""
    disk = place.data / "data.img"
    _fill(disk, mib=_IMAGE_MIB)
    software = _software(images)
    disks = (images.root, disk)
    path = place.run_dir / "vsock"
    ours = [*monitors.runner(images.runner, software), *monitors.runner_disks(disks)]
    theirs = [
        *monitors.microvm(software),
        *monitors.qemu_disks(disks, driver="virtio-blk-device"),
        *("-device", f"vhost-vsock-device,guest-cid={monitors.GUEST_CID}"),
    ]
    with (
        booted([*ours, "--vsock", os.fspath(path)], dial=hybrid(path), log=place.log) as first,
        booted(theirs, dial=vhost, log=place.log) as second,
    ):
        for guest in (first, second):
            for role in (f"echo {_ECHO_PORT}", f"bulk {_BULK_PORT}"):
                guest.run(f'"$GUEST_PROGRAM" {role} >/run/{role.split()[0]} 2>&1 &')
        yield first, second


@contextlib.contextmanager
def beside_q35(images: Images, place: Place) -> Iterator[tuple[Guest, Guest]]:
    """Boot ours and QEMU's q35 with virtiofsd, both with a shared folder at ``/run/data``."""
    folder = place.data / "folder"
    folder.mkdir()
    _fill(folder / "file", mib=_FILE_MIB)
    for number in range(_TREE_FOLDERS * _TREE_FILES):
        path = folder / "tree" / str(number % _TREE_FOLDERS) / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    software = _software(images)
    path = place.run_dir / "vsock-folder"
    ours = [*monitors.runner(images.runner, software), *monitors.runner_disks([images.root])]
    ours += ["--folder", f"data={folder}", "--vsock", os.fspath(path)]
    chardev = "socket,id=folder,path="
    with _virtiofsd(folder, place) as served:
        theirs = [
            *monitors.q35(_software(images, has_pci=True)),
            *monitors.qemu_disks([images.root], driver="virtio-blk-pci"),
            *("-device", f"vhost-vsock-pci,guest-cid={monitors.GUEST_CID}"),
            *("-chardev", f"{chardev}{served}"),
            *("-device", "vhost-user-fs-pci,queue-size=1024,chardev=folder,tag=data"),
        ]
        with (
            booted(ours, dial=hybrid(path), log=place.log) as first,
            booted(theirs, dial=vhost, log=place.log) as second,
        ):
            for guest in (first, second):
                guest.run("mkdir -p /run/data && mount -t virtiofs data /run/data")
            yield first, second


def _software(images: Images, *, has_pci: bool = False) -> Software:
    parameters = KERNEL_PARAMETERS.replace(" pci=off", "") if has_pci else KERNEL_PARAMETERS
    return Software(
        kernel=images.guest.kernel,
        initrd=images.guest.initrd,
        parameters=f"{parameters} guest_root={images.root.name}",
        memory_mib=_MEMORY_MIB,
    )


@contextlib.contextmanager
def _virtiofsd(folder: Path, place: Place) -> Iterator[Path]:
    """Serve a folder as QEMU's machines have it, with the cache mode that ours has by default."""
    path = place.run_dir / "virtiofsd"
    command = [
        *(_VIRTIOFSD, f"--socket-path={path}", "-o", f"source={folder}", "-o", "cache=auto"),
        # Its pool of threads makes it slower: each request is handed over.
        *("-o", "sandbox=chroot", "-o", "xattr", "--thread-pool-size=0"),
    ]
    with place.log.open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _DAEMON_TIMEOUT_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"virtiofsd does not serve {folder}: see {place.log}")
            time.sleep(0.05)
        yield path
    finally:
        process.kill()
        process.wait()


def _fill(path: Path, *, mib: int) -> None:
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))


# --- figures ------------------------------------------------------------------------------------


def in_turn(recorder: Recorder, name: str, guests: tuple[Guest, Guest]) -> None:
    """Measure a figure on both, ours first, several times; the first time of each is not kept."""
    samples: tuple[list[float], list[float]] = ([], [])
    measure = MEASURES[name]
    rounds = FOLDER_ROUNDS if name in BESIDE_Q35 else ROUNDS
    for number in range(rounds + 1):
        for guest, kept in zip(guests, samples, strict=True):
            value = measure(guest)
            if number > 0:
                kept.append(value)
    recorder.keep(name, ours=samples[0], reference=samples[1])


def _fio(guest: Guest, arguments: str) -> float:
    """Read with fio; give MiB/s."""
    output = guest.run(f"{_FIO} {arguments}")
    job = json.loads(output[output.index("{") :])["jobs"][0]
    return float(job["read"]["bw_bytes"]) / (1 << 20)


def _disk(guest: Guest) -> str:
    """The node of the disk of data."""
    nodes = guest.run("cd /sys/block; for d in vd*; do echo $d $(cat $d/serial); done")
    (node,) = [line.split()[0] for line in nodes.splitlines() if line.endswith("data.img")]
    return f"/dev/{node}"


def block_random(guest: Guest) -> float:
    """4 KiB reads anywhere, sixteen at a time, past the guest's cache; MiB/s."""
    what = "--rw=randread --bs=4k --iodepth=16 --direct=1 --time_based --runtime=3"
    return _fio(guest, f"--filename={_disk(guest)} {what}")


def block_sequential(guest: Guest) -> float:
    """1 MiB reads in order, four at a time, past the guest's cache; MiB/s."""
    what = "--rw=read --bs=1m --iodepth=4 --direct=1 --time_based --runtime=3"
    return _fio(guest, f"--filename={_disk(guest)} {what}")


def folder_read(guest: Guest) -> float:
    """A file of the folder from its start to its end, not in the guest's cache; MiB/s."""
    return _fio(guest, f"--filename=/run/data/file --rw=read --bs=1m --size={_FILE_MIB}m")


def folder_walk(guest: Guest) -> float:
    """Names and attributes of a tree, none of them in the guest's cache; milliseconds."""
    guest.run("echo 2 >/proc/sys/vm/drop_caches")
    began = time.monotonic()
    guest.run("ls -lR /run/data/tree >/run/walk")
    milliseconds = (time.monotonic() - began) * 1000
    files = int(guest.run("grep -c ^- /run/walk"))
    if files != _TREE_FOLDERS * _TREE_FILES:
        raise ValueError(f"{files} files in the tree")
    return milliseconds


def vsock_throughput(guest: Guest) -> float:
    """One stream of bytes to the guest, then one from it; MiB/s."""
    seconds = [_bulk(guest, is_to_guest=is_to_guest) for is_to_guest in (True, False)]
    return 2 * _BULK_MIB / sum(seconds)


def _bulk(guest: Guest, *, is_to_guest: bool) -> float:
    """Let the guest's "bulk" take bytes or send some; give the seconds until all are there."""
    chunk = bytes(1 << 20)
    buffer = bytearray(1 << 20)
    with guest.dial(_BULK_PORT) as stream:
        began = time.monotonic()
        for _ in range(_BULK_MIB if is_to_guest else 0):
            stream.sendall(chunk)
        stream.shutdown(socket.SHUT_WR)
        received = 0
        while count := stream.recv_into(buffer):
            received += count
        seconds = time.monotonic() - began
    expected = 1 if is_to_guest else _BULK_MIB << 20
    if received != expected:
        raise ValueError(f"{received} bytes came from the guest, not {expected}")
    return seconds


def vsock_round_trip(guest: Guest) -> float:
    """64 bytes to the guest and back, on a stream that is open; microseconds."""
    samples = []
    with guest.dial(_ECHO_PORT) as stream:
        for _ in range(_PINGS):
            began = time.perf_counter()
            stream.sendall(_PING)
            left = len(_PING)
            while left:
                left -= len(stream.recv(left))
            samples.append((time.perf_counter() - began) * 1e6)
    return statistics.median(samples)


MEASURES: dict[str, Measure] = {
    "vmm_block_random": block_random,
    "vmm_block_sequential": block_sequential,
    "vmm_vsock_throughput": vsock_throughput,
    "vmm_vsock_round_trip": vsock_round_trip,
    "vmm_fs": folder_read,
    "vmm_fs_walk": folder_walk,
}
BESIDE_MICROVM = tuple(name for name in MEASURES if not name.startswith("vmm_fs"))
BESIDE_Q35 = tuple(name for name in MEASURES if name.startswith("vmm_fs"))
