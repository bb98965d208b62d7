"""The commands of the how-to pages run as they stand and print what the pages say."""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from busybox_image import IMAGE_NAME, PAUSE_NAME
from go_build import CRICTL
from harness.containers import KATA_RUNTIME
from harness.cri import Cri, cri_containerd
from harness.daemon import Containerd, ContainerdInstall, CriSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("containerd", "kubernetes", "sizing", "volumes")
_IMAGE = "docker.io/library/busybox:latest"
_HANDLER = "kata-hybrid"
_TIMEOUT_S = 240
_CTR = """#!/bin/sh
case "$*" in
  *--runtime-config-path*) exec {ctr} "$@" ;;
  run*) shift; exec {ctr} run --runtime-config-path "$KATA_CONF_FILE" "$@" ;;
  *) exec {ctr} "$@" ;;
esac
"""

pytestmark = [pytest.mark.containerd(since=2), pytest.mark.timeout(_TIMEOUT_S + 60)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A block of commands, and the texts that are to be in its output, in order."""

    script: str
    expected: tuple[str, ...]


def steps(page: Path) -> list[Step]:
    """Read the blocks ``sh`` of a page, each with a block ``text`` that follows it at once."""
    block = r"^```{kind}\n(.*?)^```\n"
    found = re.finditer(
        block.format(kind="sh") + rf"(?:{block.format(kind='text').removeprefix('^')})?",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return [Step(script=each[1], expected=tuple((each[2] or "").splitlines())) for each in found]


@pytest.fixture(scope="module")
def containerd(
    install: ContainerdInstall,
    shim_dir: Path | None,
    configuration: Path,
    runtime: str,
    node: Path,
) -> Iterator[Containerd]:
    """A daemon with the image that the pages name."""
    if runtime != KATA_RUNTIME:
        pytest.skip("the pages are about one runtime")
    with cri_containerd(
        install,
        settings=CriSettings(
            runtime=runtime,
            pause_image=PAUSE_NAME,
            network=node,
            handler=_HANDLER,
            configuration=configuration,
        ),
        shim_dir=shim_dir,
        configuration=configuration,
        archive=ROOT / "build" / "images" / "busybox.tar",
    ) as daemon:
        daemon.ctr("image", "tag", IMAGE_NAME, _IMAGE)
        Cri(daemon, crictl=CRICTL, image=_IMAGE).wait_for_images(_IMAGE, PAUSE_NAME)
        yield daemon


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(
    daemon: Containerd, shim_dir: Path, configuration: Path, page: str, tmp_path: Path
) -> None:
    # A person's containerd finds the configuration in /etc; here ctr has to name it.
    ctr = tmp_path / "bin" / "ctr"
    ctr.parent.mkdir()
    ctr.write_text(_CTR.format(ctr=daemon.install.bin_dir / "ctr"))
    ctr.chmod(0o755)
    programs = (ctr.parent, shim_dir, CRICTL.parent)
    environment = {
        **daemon.environment,
        "PATH": os.pathsep.join([*map(os.fspath, programs), daemon.environment["PATH"]]),
        "CONTAINERD_ADDRESS": os.fspath(daemon.address),
        "CONTAINERD_NAMESPACE": daemon.namespace,
        # Where a person has /etc/crictl.yaml; the harness wrote it.
        "CRI_CONFIG_FILE": os.fspath(daemon.home / "crictl" / "crictl.yaml"),
        "KATA_CONF_FILE": os.fspath(configuration),
    }
    found = steps(ROOT / "docs" / "how-to" / f"{page}.md")
    assert found
    mark = "=== step ==="
    script = f"\necho '{mark}'\n".join(step.script for step in found)
    done = subprocess.run(
        daemon.on_node("bash", "-euc", script),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    said = f"{done.stdout}\n--- errors\n{done.stderr}\n{daemon.log_tail(lines=15)}"
    assert done.returncode == 0, said
    for step, output in zip(found, done.stdout.split(f"{mark}\n"), strict=True):
        place = 0
        for text in step.expected:
            place = output.find(text, place)
            assert place >= 0, f"{text!r} is not in what\n{step.script}\nprints: {said}"
            place += len(text)
