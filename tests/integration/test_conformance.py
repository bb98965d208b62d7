"""Kubernetes' own tests of the CRI pass, but for those that are listed here with their reasons."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from busybox_image import PAUSE_NAME, build_archive
from go_build import CRITEST
from harness.cri import cri_containerd, node_namespace
from harness.critest import FILES, IMAGES, run_critest
from harness.daemon import Containerd, ContainerdInstall, CriSettings

_TIMEOUT_S = 3000

SKIPPED = {
    r"Image Manager|image status|public image|PullImage|ImageFsInfo": (
        "pulls from public registries; images are containerd's, not a shim's"
    ),
    r"HostPID|HostIpc is true|HostNetwork is true|host network": (
        "a machine has no namespaces of the host's"
    ),
    r"mount with 'rs(hared|lave)'": (
        "a guest's mounts are not the host's, and the host's come only where its root is shared"
    ),
    r"non-recursive readonly mounts": (
        "what is mounted below a volume is of the volume's mount in the guest: read-only as well"
    ),
    r"Privileged is true|adding capability": (
        "makes a bridge, for which our guest has no driver; test_cri.py looks at capabilities"
    ),
    r"support MaskedPaths": "masks ls, which the shell of Debian's busybox runs itself",
    r"NoNewPrivs": "runs a program of an image of its own",
    r"AppArmor|SELinux": "the guest's kernel has neither",
    r"benchmark": "measures containerd",
}
SKIPPED_BEFORE_2 = {
    r"Idempotence": "containerd 1.6 says that what is not there is not found; later ones do not",
}


@pytest.fixture(scope="module")
def node() -> Iterator[Path]:
    """The network namespace that stands for the node's."""
    with node_namespace(CRITEST) as node:
        yield node


@pytest.fixture(scope="module")
def containerd(
    install: ContainerdInstall,
    shim_dir: Path | None,
    configuration: Path,
    runtime: str,
    node: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Containerd]:
    """A daemon with the images of the tests."""
    archive = tmp_path_factory.mktemp("images") / "images.tar"
    archive.write_bytes(build_archive(Path("/bin/busybox"), images=IMAGES, files=FILES))
    with cri_containerd(
        install,
        settings=CriSettings(runtime=runtime, pause_image=PAUSE_NAME, network=node),
        shim_dir=shim_dir,
        configuration=configuration,
        archive=archive,
        maps_ports=True,
    ) as daemon:
        yield daemon


@pytest.mark.conformance
@pytest.mark.timeout(_TIMEOUT_S + 100)
def test_the_tests_of_kubernetes_pass(daemon: Containerd, request: pytest.FixtureRequest) -> None:
    focus = request.config.getoption("--critest-focus")
    skipped = {**SKIPPED, **(SKIPPED_BEFORE_2 if daemon.install.major == 1 else {})}
    report = run_critest(CRITEST, daemon, skip="|".join(skipped), focus=focus, timeout_s=_TIMEOUT_S)
    assert report.failed == {}
    assert report.passed
