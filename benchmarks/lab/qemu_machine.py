"""The reference: QEMU with KVM, its own virtio devices, the host's vhost-vsock and virtiofsd.

The same test guest as ours, driven the same way (``lab_guest.machine``): scripts go over vsock to
its program. Everything that QEMU or virtiofsd print goes to the benchmark's log.
"""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from lab_guest.image import GuestImage
from lab_guest.machine import COMMAND_PORT, KERNEL_PARAMETERS

QEMU = "qemu-system-x86_64"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
MEMORY_MIB = 512
_BOOT_TIMEOUT_S = 120.0
_DAEMON_TIMEOUT_S = 20.0
_FIRST_CID = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder of the host, served by a virtiofsd of its own."""

    tag: str
    path: Path
    cache: str


class QemuMachine:
    """One machine with the test guest; closed by leaving its context."""

    def __init__(
        self, image: GuestImage, run_dir: Path, *, disk: Path, folders: Sequence[Folder], log: Path
    ) -> None:
        """Describe a machine; nothing is started."""
        self._image = image
        self._run_dir = run_dir
        self._disk = disk
        self._folders = folders
        self._log = log
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            log = self._stack.enter_context(self._log.open("ab"))
            chardevs = [self._serve(folder, log) for folder in self._folders]
            self._spawn([*self._command(), *(word for words in chardevs for word in words)], log)
            self._wait_for_guest()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _command(self) -> list[str]:
        parameters = KERNEL_PARAMETERS.replace(" pci=off", "") + " guest_root=host"
        memory = f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on"
        drive = f"if=none,id=data,file={self._disk},format=raw,cache=writeback,aio=io_uring"
        return [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35,accel=kvm,memory-backend=memory", "-cpu", "host"),
            *("-smp", "1", "-m", f"{MEMORY_MIB}M", "-object", memory, "-serial", "stdio"),
            *("-kernel", os.fspath(self._image.kernel), "-initrd", os.fspath(self._image.initrd)),
            *("-append", parameters),
            # What it is at its best: a thread of its own for the disk.
            *("-object", "iothread,id=io", "-drive", drive),
            *("-device", "virtio-blk-pci,drive=data,iothread=io"),
            *("-device", f"vhost-vsock-pci,guest-cid={_FIRST_CID}"),
        ]

    def _serve(self, folder: Folder, log: IO[bytes]) -> list[str]:
        path = self._run_dir / f"{folder.tag}.sock"
        self._spawn(
            [
                *(VIRTIOFSD, f"--socket-path={path}", "-o", f"source={folder.path}"),
                *("-o", f"cache={folder.cache}", "-o", "sandbox=chroot", "-o", "xattr"),
                # Its pool of threads makes it slower: each request is handed over.
                "--thread-pool-size=0",
            ],
            log,
        )
        deadline = time.monotonic() + _DAEMON_TIMEOUT_S
        while not path.exists():
            if time.monotonic() > deadline:
                message = f"virtiofsd does not serve {folder.path}: see {self._log}"
                raise TimeoutError(message)
            time.sleep(0.05)
        return [
            *("-chardev", f"socket,id={folder.tag},path={path}"),
            *(
                "-device",
                f"vhost-user-fs-pci,queue-size=1024,chardev={folder.tag},tag={folder.tag}",
            ),
        ]

    def _spawn(self, command: list[str], log: IO[bytes]) -> None:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

    def _wait_for_guest(self) -> None:
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        while True:
            try:
                self.run("true")
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def dial(self, port: int, *, timeout_s: float) -> socket.socket:
        """Connect to a port of the guest.

        Raises:
            OSError: nobody listens there.
        """
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect((_FIRST_CID, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def run(self, script: str, *, timeout_s: float = 60.0) -> str:
        """Run a shell script in the guest and give its output.

        Raises:
            OSError: the guest does not answer.
            RuntimeError: the script failed.
        """
        with self.dial(COMMAND_PORT, timeout_s=timeout_s) as connection:
            connection.sendall(script.encode())
            connection.shutdown(socket.SHUT_WR)
            received = bytearray()
            while data := connection.recv(65536):
                received += data
        output, _, status = received.decode(errors="replace").rstrip().rpartition("\n")
        if status != "status 0":
            message = f"{script}: {status}: {output}"
            raise RuntimeError(message)
        return output.strip()
