import hashlib
import os
import socket
from pathlib import Path

import pytest

from kata_hybrid.shim import address
from kata_hybrid.shim.failure import ShimError


def test_the_key_is_that_of_the_fact_sheet() -> None:
    found = address.sandbox_dir("/run/containerd/containerd.sock", namespace="default", group="c1")
    assert found == "/run/kata-hybrid/sb/d25aa4ef11a84e95"


def test_the_hash_is_sha256() -> None:
    assert address._sha256_hex(b"x" * 1000) == hashlib.sha256(b"x" * 1000).hexdigest()


def with_root(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.setattr(address, "environment", {address.ENV_ROOT: root}.get)


def test_the_root_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with_root(monkeypatch, "/tmp/x/")
    assert address.sandboxes_dir() == "/tmp/x/sb"


def test_a_relative_root_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_root(monkeypatch, "run")
    with pytest.raises(ShimError, match="absolute"):
        address.sandboxes_dir()


def test_a_root_too_deep_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_root(monkeypatch, "/" + "x" * 80)
    with pytest.raises(ShimError, match="exceed 106 bytes"):
        address.sandbox_dir("/c", namespace="n", group="g")


def test_a_listener_is_seen(folder: Path, listener: socket.socket) -> None:
    assert address.is_listening(str(folder / "listener"))
    listener.close()
    assert not address.is_listening(str(folder / "listener"))
    assert not address.is_listening(str(folder / "absent"))


def test_a_file_is_replaced_whole_and_private(folder: Path) -> None:
    path = folder / "address"
    path.write_text("older and longer")
    address.write_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == ["address"]


def test_a_failed_write_leaves_nothing(folder: Path) -> None:
    (folder / "address").mkdir()
    with pytest.raises(OSError, match="directory"):
        address.write_file(str(folder / "address"), b"new")
    assert [path.name for path in folder.iterdir()] == ["address"]


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(ShimError, match="longer than"):
        address.read_file("/dev/zero")


def test_start_ticks_are_those_of_proc() -> None:
    assert address.start_ticks(os.getpid()) > 0
    assert address.start_ticks(2**22 + 1) == 0
