"""Disks as volumes: given to a machine that runs, mounted or used as they are, and taken back."""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.containers import CRI_SANDBOX, CRI_TYPE, Containers
from harness.deadline import wait_until
from harness.leaks import find_processes
from kata_hybrid.resource.volume.direct import DIRECT_VOLUMES

pytestmark = pytest.mark.newest

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A direct volume: what a pod names, and the image behind it."""

    source: Path
    image: Path

    def mount(self, destination: str = "/data", *, options: str = "rbind:rw") -> tuple[str, str]:
        """Arguments of ``ctr run``."""
        return "--mount", f"type=bind,src={self.source},dst={destination},options={options}"

    def read(self, path: str) -> bytes:
        """Read a file of the file system, without mounting it."""
        return subprocess.run(
            ["debugfs", "-R", f"cat {path}", self.image],
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """A volume of 300 MiB, described as a storage driver does."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(300 * _MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True, timeout=60)
    source = tmp_path / "volume"
    source.mkdir()
    folder = DIRECT_VOLUMES / base64.urlsafe_b64encode(str(source).encode()).decode()
    folder.mkdir(parents=True)
    description = {
        "volume-type": "directvol",
        "device": str(image),
        "fstype": "ext4",
        "metadata": {"fsGroup": "1234"},
        "options": ["rw"],
    }
    (folder / "mountInfo.json").write_text(json.dumps(description))
    yield Volume(source=source, image=image)
    shutil.rmtree(folder)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of the host's, 16 MiB."""
    image = tmp_path / "backing"
    with image.open("wb") as file:
        file.truncate(16 * _MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", image],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield Path(device)
    subprocess.run(["losetup", "--detach", device], check=True, timeout=30)


def _pod(container_id: str, kind: str) -> tuple[str, ...]:
    labels = {CRI_TYPE: kind, CRI_SANDBOX: container_id}
    return tuple(
        word for key, value in labels.items() for word in ("--annotation", f"{key}={value}")
    )


@pytest.mark.containerd(since=2)
def test_containers_of_a_pod_have_disks_of_their_own_as_roots(containers: Containers) -> None:
    options = ("--snapshotter", "blockfile", "--null-io")
    pod = containers.new_id()
    with containers.detached(
        "sleep", "1000", options=(*options, *_pod(pod, "sandbox")), container_id=pod
    ):
        roots = set()
        for name in ("one", "two"):
            with containers.detached(
                *("sh", "-c", f"echo {name} >/name; sync; sleep 1000"),
                options=(*options, *_pod(pod, "container")),
            ) as container_id:
                wait_until(
                    lambda: containers.exec(container_id, "cat", "/name").text == name,  # noqa: B023 - called before the next
                    what="what it wrote to its root",
                )
                mounts = containers.exec(container_id, "grep", " / ", "/proc/mounts").text
                roots.add(mounts.split()[0])
        assert roots
        assert containers.exec(pod, "ls", "/").status == 0


def test_a_direct_volume_is_a_disk_of_the_guests(vm_containers: Containers, volume: Volume) -> None:
    script = (
        "grep ' /data ' /proc/mounts; stat -c %g /data;"
        " dd if=/dev/urandom of=/data/many bs=1M count=256 2>/dev/null &&"
        " sha256sum /data/many"
    )
    seen = vm_containers.run("sh", "-c", script, options=volume.mount()).text.splitlines()
    assert seen[0].startswith("/dev/vd")
    assert seen[0].split()[2] == "ext4"
    assert seen[1] == "1234"
    assert hashlib.sha256(volume.read("/many")).hexdigest() == seen[2].split()[0]
    subprocess.run(["e2fsck", "-fn", volume.image], check=True, capture_output=True, timeout=60)
    # What one wrote the next one has.
    again = vm_containers.run("sha256sum", "/data/many", options=volume.mount()).text
    assert again == seen[2]


def test_containers_of_a_pod_share_a_direct_volume_and_the_last_gives_it_back(
    vm_containers: Containers, volume: Volume
) -> None:
    containers, pod = vm_containers, vm_containers.new_id()
    with containers.detached(
        "sleep", "1000", options=("--null-io", *_pod(pod, "sandbox")), container_id=pod
    ):
        options = ("--null-io", *_pod(pod, "container"), *volume.mount())
        with containers.detached("sleep", "1000", options=options) as first:
            with containers.detached("sleep", "1000", options=options) as second:
                containers.exec(first, "sh", "-c", "echo shared >/data/file")
                assert containers.exec(second, "cat", "/data/file").text == "shared"
            assert containers.exec(first, "cat", "/data/file").text == "shared"
            assert _is_open(containers, pod, volume.image)
        assert not _is_open(containers, pod, volume.image)
        # More often than there are places: each is free again.
        for _ in range(14):
            with containers.detached("sleep", "1000", options=options) as third:
                assert containers.exec(third, "cat", "/data/file").text == "shared"


def _is_open(containers: Containers, pod: str, path: Path) -> bool:
    """Whether the shim or a child of it, the machine's, has a file open."""
    shim = containers.shim_pid(pod)
    family = [
        shim,
        *(each.pid for each in find_processes(containers.containerd) if each.parent == shim),
    ]
    return any(
        link.exists() and link.samefile(path)
        for pid in family
        for link in Path(f"/proc/{pid}/fd").iterdir()
    )


def test_an_empty_dir_is_a_disk_of_the_pods_if_it_is_to_be(
    vm_containers: Containers, configuration: Path, tmp_path: Path
) -> None:
    path = tmp_path / "configuration.toml"
    shutil.copy(configuration, path)
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "10-block").write_text('[runtime]\nemptydir_mode = "block-plain"\n')
    containers = Containers(
        vm_containers.containerd,
        runtime=vm_containers.runtime,
        image=vm_containers.image,
        boot_timeout_s=vm_containers.boot_timeout_s,
        configuration=path,
    )
    volume = tmp_path / "kubernetes.io~empty-dir" / "cache"
    volume.mkdir(parents=True)
    volume.chmod(0o777)
    mount = ("--mount", f"type=bind,src={volume},dst=/data,options=rbind:rw")
    pod = containers.new_id()
    with containers.detached(
        "sleep", "1000", options=("--null-io", *_pod(pod, "sandbox")), container_id=pod
    ):
        for number in range(2):
            options = ("--null-io", *_pod(pod, "container"), *mount)
            with containers.detached("sleep", "1000", options=options) as name:
                seen = containers.exec(name, "grep", " /data ", "/proc/mounts").text
                assert seen.startswith("/dev/vd")
                assert containers.exec(name, "stat", "-c", "%a", "/data").text == "777"
                containers.exec(name, "sh", "-c", f"echo {number} >>/data/numbers")
                expected = "".join(f"{each}\n" for each in range(number + 1)).strip()
                assert containers.exec(name, "cat", "/data/numbers").text == expected
    assert [each.name for each in volume.iterdir()] == ["disk.img"]


def test_what_was_synced_survives_the_machine(qemu_containers: Containers, volume: Volume) -> None:
    script = "echo kept >/data/kept; sync /data/kept; echo done; sleep 1000"
    with qemu_containers.detached(
        "sh", "-c", script, options=("--null-io", *volume.mount())
    ) as name:
        wait_until(
            lambda: qemu_containers.exec(name, "cat", "/data/kept").text == "kept", what="the file"
        )
        qemu_containers.exec(name, "sync")
        shim = qemu_containers.shim_pid(name)
        machines = find_processes(qemu_containers.containerd, name="qemu-system")
        (machine,) = (each.pid for each in machines if each.parent == shim)
        os.kill(machine, signal.SIGKILL)
        wait_until(lambda: qemu_containers.task(name).status == "STOPPED", what="the task's end")
    # Its journal is replayed.
    subprocess.run(["e2fsck", "-fp", volume.image], check=False, capture_output=True, timeout=60)
    assert volume.read("/kept") == b"kept\n"


def test_a_wrong_description_is_named_and_nothing_is_left(
    vm_containers: Containers, volume: Volume
) -> None:
    folder = DIRECT_VOLUMES / base64.urlsafe_b64encode(str(volume.source).encode()).decode()
    (folder / "mountInfo.json").write_text('{"volume-type": "directvol", "device": "/none"}')
    failed = vm_containers.attempt("true", options=volume.mount())
    assert failed.status != 0
    assert "mountInfo.json: fstype must be a text" in failed.error
    (folder / "mountInfo.json").write_text(
        '{"volume-type": "directvol", "device": "/none", "fstype": "ext4"}'
    )
    failed = vm_containers.attempt("true", options=volume.mount())
    assert "disk /none: No such file or directory" in failed.error


def test_a_device_of_the_hosts_is_the_containers_as_it_is(
    vm_containers: Containers, loop_device: Path
) -> None:
    script = f"dd if=/dev/urandom bs=1M count=1 2>/dev/null | tee {loop_device} | sha256sum; sync"
    seen = vm_containers.run("sh", "-c", script, options=("--device", str(loop_device))).text
    content = loop_device.read_bytes()[:_MIB]
    assert hashlib.sha256(content).hexdigest() == seen.split()[0]


def test_disks_of_the_node_are_not_a_privileged_containers(
    vm_containers: Containers, loop_device: Path
) -> None:
    listed = vm_containers.run(
        "sh", "-c", f"ls {loop_device} 2>&1 | tail -1; ls /dev/null", options=("--privileged",)
    ).text.splitlines()
    assert "No such file" in listed[0]
    assert listed[1] == "/dev/null"
