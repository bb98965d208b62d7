"""Fixtures of the measurements that pytest-benchmark runs: the installation, and the record.

``run.py`` runs pytest on each ``bench_*.py`` file beside this one, and names the file that the
records go to.
"""

import os
import secrets
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from recording import Recorder

from busybox_image import IMAGE_NAME
from harness.containers import Containers
from harness.daemon import Containerd, containerd_installs, private_containerd

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
SHIM = "containerd-shim-kata-hybrid-v2"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="where to append records, one JSON a line")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record why a measurement failed."""
    report = yield
    if call.excinfo is not None and (report.failed or report.skipped):
        recorder = Recorder(path=item.config.getoption("--records"))
        recorder.fail(item.name, reason=str(call.excinfo.value))
    return report


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    return Recorder(path=request.config.getoption("--records"))


@pytest.fixture(scope="session")
def bin_dir() -> Path:
    """Where the wheel's programs and their interpreter are installed, as a user would have them."""
    directory = Path(os.environ.get("KATA_HYBRID_BIN_DIR", BUILD / "installed" / "bin"))
    if not os.access(directory / SHIM, os.X_OK):
        pytest.fail(f"no {directory / SHIM}: run make setup", pytrace=False)
    return directory


@pytest.fixture(scope="session")
def containerd(bin_dir: Path) -> Iterator[Containerd]:
    """A private containerd, Debian's, with the test image and the guest that set-up built."""
    configuration = BUILD / "guest" / "configuration.toml"
    image = BUILD / "images" / "busybox.tar"
    install = containerd_installs(BUILD)["1"]
    absent = [os.fspath(path) for path in (configuration, image) if not path.exists()]
    if install.missing():
        absent.append(install.missing())
    if absent:
        pytest.fail(f"no {', '.join(absent)}: run make setup", pytrace=False)
    with private_containerd(
        install,
        namespace=f"kh-{secrets.token_hex(4)}",
        shim_dir=bin_dir,
        archive=image,
        environment={"KATA_CONF_FILE": os.fspath(configuration)},
    ) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def kata(containerd: Containerd) -> Containers:
    return _containers(containerd, "io.containerd.kata-hybrid.v2")


@pytest.fixture(scope="session")
def runc(containerd: Containerd) -> Containers:
    return _containers(containerd, "io.containerd.runc.v2")


def _containers(containerd: Containerd, runtime: str) -> Containers:
    return Containers(containerd, runtime=runtime, image=IMAGE_NAME, boot_timeout_s=90)
