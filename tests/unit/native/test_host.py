"""Host calls, each in a process of its own: they change the process that makes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kata_hybrid._native import host

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_thread_name_is_cut_to_what_the_kernel_keeps() -> None:
    script = """
from kata_hybrid._native import host
host.set_thread_name("kata-hybrid-shim-process")
print(open("/proc/thread-self/comm").read(), end="")
"""
    assert run(script) == "kata-hybrid-shi\n"


def test_a_thread_name_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(OSError, match="name"):
        host.set_thread_name("a\0b")


def test_a_subreaper_inherits_orphans() -> None:
    script = """
import os, subprocess, sys
from kata_hybrid._native import host
host.set_child_subreaper()
orphan = "import os, sys; os.read(0, 1); print(os.getppid())"
parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}])"
reader, writer = os.pipe()
subprocess.run([sys.executable, "-c", parent], stdin=reader, check=True)
os.write(writer, b"x")
os.wait()
print(os.getpid())
"""
    orphan_s_parent, us = run(script).split()
    assert orphan_s_parent == us


@needs_root
def test_mounts_in_the_private_namespace_stay_there(tmp_path: Path) -> None:
    script = """
import sys, pathlib
from kata_hybrid._native import host
target = sys.argv[1]
host.enter_private_mount_namespace()
host.mount("tmpfs", target, "tmpfs", ["size=1m", "nosuid", "ro"])
line, = [line for line in open("/proc/self/mountinfo") if f" {target} " in line]
print("shared:" in line, "ro,nosuid" in line)
host.unmount(target)
host.unmount(target)
host.unmount(target + "/missing")
print(target in open("/proc/self/mountinfo").read())
"""
    before = Path("/proc/self/mountinfo").read_text()
    assert run(script, tmp_path).split() == ["True", "True", "False"]
    assert Path("/proc/self/mountinfo").read_text() == before


@needs_root
def test_a_read_only_bind_mount_refuses_writes(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    script = """
import sys, pathlib
from kata_hybrid._native import host
root = pathlib.Path(sys.argv[1])
host.enter_private_mount_namespace()
host.mount(str(root / "from"), str(root / "to"), "", ["rbind", "ro", "rslave"])
(root / "from/file").write_text("seen")
print((root / "to/file").read_text())
try:
    (root / "to/file").write_text("changed")
except OSError as error:
    print(error.errno)
"""
    assert run(script, tmp_path).split() == ["seen", "30"]


@needs_root
def test_an_overlay_of_more_layers_than_a_page_holds(tmp_path: Path) -> None:
    layers = [tmp_path / f"layer-{number:03}" / ("x" * 60) for number in range(60)]
    for layer in layers:
        layer.mkdir(parents=True)
        (layer / layer.parent.name).touch()
    (tmp_path / "to").mkdir()
    script = """
import os, sys, pathlib
from kata_hybrid._native import host
root = pathlib.Path(sys.argv[1])
layers = sorted(str(path) for path in root.glob("layer-*/*"))
option = "lowerdir=" + ":".join(layers)
assert len(option) > 4096
host.enter_private_mount_namespace()
host.mount("overlay", str(root / "to"), "overlay", [option])
print(len(os.listdir(root / "to")))
"""
    assert run(script, tmp_path) == "60\n"


def test_a_refused_mount_names_its_target(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mount") as caught:
        host.mount("none", str(tmp_path / "missing"), "tmpfs", [])
    assert caught.value.filename == str(tmp_path / "missing")
