import asyncio
import gzip
import hashlib
from pathlib import Path

import pytest

from guest_program import Ending, say
from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError
from kata_hybrid.guest import kernel as kernel_source
from kata_hybrid.guest.build import INITRD_NAME, KERNEL_NAME, build_guest, bundled_programs
from kata_hybrid.guest.cpio import CpioEntry, read_archive
from kata_hybrid.guest.manifest import MANIFEST_NAME, Manifest, read_manifest

PROGRAM = say(b"hello\n", ending=Ending.POWER_OFF)
KERNEL = b"\x7fELF" + b"Linux version 6.1.0-built-in (x)" + bytes(1000)


class Inputs:
    """A kernel with everything built in, and two programs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kernel = root / "my-vmlinux"
        self.agent = root / "agent"
        self.init = root / "init"
        self.kernel.write_bytes(KERNEL)
        self.agent.write_bytes(PROGRAM + b"agent")
        self.init.write_bytes(PROGRAM)
        self.steps: list[str] = []

    def build(self, output: str = "out", **changes: Path | None) -> Manifest:
        options = {"kernel": self.kernel, "agent": self.agent, "init": self.init, **changes}
        return asyncio.run(
            build_guest(
                self.root / output,
                cache_dir=self.root / "cache",
                progress=self.steps.append,
                **options,
            )
        )


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def entries_of(path: Path) -> dict[str, CpioEntry]:
    return {entry.path: entry for entry in read_archive(path.read_bytes())}


def test_same_inputs_give_the_same_bytes(inputs: Inputs) -> None:
    inputs.build("one")
    inputs.build("two")
    for name in (KERNEL_NAME, INITRD_NAME, MANIFEST_NAME):
        one, two = inputs.root / "one" / name, inputs.root / "two" / name
        assert one.read_bytes() == two.read_bytes()


def test_the_initrd_holds_init_and_agent(inputs: Inputs) -> None:
    inputs.build()
    entries = entries_of(inputs.root / "out" / INITRD_NAME)
    assert entries["init"].data == PROGRAM
    assert entries["init"].mode & 0o777 == 0o755
    assert entries["sbin/init"].data == PROGRAM + b"agent"
    assert entries["etc/kata-hybrid/modules"].data == b""
    assert entries["etc/resolv.conf"].data == b""
    assert {"dev/console", "proc", "sys", "run", "tmp"} <= entries.keys()


def test_the_manifest_describes_the_outputs(inputs: Inputs) -> None:
    manifest = inputs.build()
    assert read_manifest(inputs.root / "out" / MANIFEST_NAME) == manifest
    assert manifest.kernel_version == "6.1.0-built-in"
    for digest in manifest.outputs:
        data = (inputs.root / "out" / digest.name).read_bytes()
        assert (digest.size, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_another_agent_changes_the_initrd_only(inputs: Inputs) -> None:
    before = inputs.build()
    inputs.agent.write_bytes(PROGRAM + b"other")
    after = inputs.build()
    assert before.output(KERNEL_NAME) == after.output(KERNEL_NAME)
    assert before.output(INITRD_NAME) != after.output(INITRD_NAME)


def test_outputs_are_replaced_whole(inputs: Inputs) -> None:
    inputs.build()
    held = (inputs.root / "out" / INITRD_NAME).open("rb")
    inputs.agent.write_bytes(PROGRAM + b"other, longer agent")
    inputs.build()
    with held:
        old = held.read()
    assert b"other, longer" not in old
    assert sorted(path.name for path in (inputs.root / "out").iterdir()) == [
        "initrd.img",
        "manifest.json",
        "vmlinux",
    ]


def test_a_missing_agent_is_named_with_the_option(inputs: Inputs) -> None:
    with pytest.raises(FailedPreconditionError, match=r"nowhere.*--agent"):
        inputs.build(agent=inputs.root / "nowhere")


def test_an_agent_that_is_a_script_is_refused(inputs: Inputs) -> None:
    inputs.agent.write_text("#!/bin/sh\n")
    with pytest.raises(InvalidArgumentError, match="static ELF"):
        inputs.build()


def test_a_kernel_that_is_none_is_refused_and_nothing_is_written(inputs: Inputs) -> None:
    inputs.kernel.write_bytes(gzip.compress(KERNEL))
    with pytest.raises(InvalidArgumentError, match="my-vmlinux"):
        inputs.build()
    assert not (inputs.root / "out").exists()


def test_without_apt_the_error_says_what_to_give_instead(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_source, "find_tool", lambda _tool: None)
    with pytest.raises(FailedPreconditionError, match=r"--kernel.*--modules"):
        inputs.build(kernel=None)


def test_a_kernel_without_modules_is_said_to_need_virtio_built_in(inputs: Inputs) -> None:
    inputs.build()
    assert any("built in" in step for step in inputs.steps)


def test_bundled_programs_are_in_the_package() -> None:
    programs = bundled_programs()
    assert programs.agent.parts[-4:] == ("kata_hybrid", "guest", "bin", "kata-agent")
    assert programs.init.name == "guest-init"


def test_nothing_of_the_build_is_left_in_the_cache(inputs: Inputs) -> None:
    inputs.build()
    assert list((inputs.root / "cache").iterdir()) == []
