"""Real containerd, real shim binary. One daemon of each version serves the whole session.

    pytest tests/integration                                   the installed shim, both daemons
    pytest tests/integration --runtime io.containerd.runc.v2   checks the harness itself
    pytest tests/integration --containerd 2                    one version only

The shim under test is the one ``make setup`` installed from the wheel (``build/installed``);
``KATA_HYBRID_BIN_DIR`` names another directory. The leak check runs after every test.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from busybox_image import IMAGE_NAME
from go_build import CRICTL
from harness.containers import KATA_RUNTIME, Containers
from harness.cri import Cri, node_namespace
from harness.daemon import Containerd, ContainerdInstall, containerd_installs, private_containerd
from harness.events import EventWatcher
from harness.leaks import Census, assert_nothing_left, take_census

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SHIM = "containerd-shim-kata-hybrid-v2"
_INSTALLS = containerd_installs(BUILD)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    is_virtual = "kata" in config.getoption("--runtime")
    for item in items:
        if not item.path.is_relative_to(here) or item.get_closest_marker("conformance"):
            continue
        item.add_marker(pytest.mark.integration)
        if is_virtual:
            item.add_marker(pytest.mark.vm)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(180))
    # Not skipped: a version that never had the feature lacks nothing.
    old = [item for item in items if _is_too_old(item)]
    if old:
        config.hook.pytest_deselected(items=old)
        items[:] = [item for item in items if item not in old]


def _is_too_old(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("containerd")
    if marker is None or not isinstance(item, pytest.Function):
        return False
    install = item.callspec.params["install"]
    assert isinstance(install, ContainerdInstall)
    return bool(install.major < marker.kwargs["since"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "install" in metafunc.fixturenames:
        every = sorted(_INSTALLS)
        usual = every[-1:] if metafunc.definition.get_closest_marker("newest") else every
        wanted = metafunc.config.getoption("--containerd") or usual
        installs = [_INSTALLS[major] for major in wanted]
        metafunc.parametrize(
            "install", installs, ids=[install.label for install in installs], scope="session"
        )


@pytest.fixture(scope="module")
def node() -> Iterator[Path]:
    """The network namespace that stands for the node's."""
    with node_namespace(CRICTL) as node:
        yield node


@pytest.fixture
def cri(daemon: Containerd) -> Cri:
    """The Kubernetes part of a daemon that has one."""
    return Cri(daemon, crictl=CRICTL, image=IMAGE_NAME)


@pytest.fixture(scope="session")
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--runtime"))


@pytest.fixture(scope="session")
def shim_dir(runtime: str) -> Path | None:
    if runtime != KATA_RUNTIME:
        return None
    directory = Path(os.environ.get("KATA_HYBRID_BIN_DIR", BUILD / "installed" / "bin"))
    if not os.access(directory / SHIM, os.X_OK):
        pytest.skip(f"no {directory / SHIM}: run make setup")
    return directory


@pytest.fixture(scope="session")
def configuration(shim_dir: Path | None) -> Path:
    """What ``KATA_CONF_FILE`` names, or set-up wrote: the guest it built, 512 MiB."""
    path = Path(os.environ.get("KATA_CONF_FILE", BUILD / "guest" / "configuration.toml"))
    if shim_dir is not None and not path.exists():
        pytest.skip(f"no {path}: run make setup")
    return path


@pytest.fixture(scope="session")
def containerd(install: ContainerdInstall, shim_dir: Path | None) -> Iterator[Containerd]:
    """A private daemon with the test image in it."""
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    if missing := install.missing():
        pytest.skip(f"no {missing}: run make setup")
    with private_containerd(
        install,
        namespace=f"kh-{secrets.token_hex(4)}",
        shim_dir=shim_dir,
        archive=BUILD / "images" / "busybox.tar",
    ) as daemon:
        yield daemon
        keep = os.environ.get("KATA_HYBRID_KEEP_LOGS")
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            shutil.copy(daemon.log, Path(keep) / f"{install.label}.log")


@pytest.fixture
def daemon(containerd: Containerd) -> Containerd:
    """The daemon, running, whatever the test before did to it."""
    if not containerd.is_running:
        containerd.start()
    return containerd


@pytest.fixture(scope="session")
def containers(containerd: Containerd, runtime: str, configuration: Path) -> Containers:
    return Containers(
        containerd,
        runtime=runtime,
        image=IMAGE_NAME,
        boot_timeout_s=90,
        configuration=configuration,
    )


@pytest.fixture
def vm_containers(containers: Containers) -> Containers:
    """Containers that are known to be in a virtual machine: for tests that would hurt a host."""
    if not containers.is_virtual:
        pytest.skip("needs a runtime with virtual machines")
    return containers


@pytest.fixture
def qemu_containers(vm_containers: Containers, configuration: Path, tmp_path: Path) -> Containers:
    """Containers in machines of QEMU's: for what is done to a process that the machine is.

    The machine of the built-in monitor is threads of the shim, which nobody can kill or stop alone.
    """
    path = tmp_path / "configuration.toml"
    shutil.copy(configuration, path)
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "10-qemu").write_text('[runtime]\nhypervisor_name = "qemu"\n')
    return Containers(
        vm_containers.containerd,
        runtime=vm_containers.runtime,
        image=vm_containers.image,
        boot_timeout_s=vm_containers.boot_timeout_s,
        configuration=path,
    )


@pytest.fixture
def events(daemon: Containerd) -> Iterator[EventWatcher]:
    with EventWatcher(daemon) as watcher:
        yield watcher


@pytest.fixture(scope="module")
def running(containers: Containers) -> Iterator[str]:
    """A container that runs as long as its test module does."""
    with containers.detached("sleep", "100000") as container_id:
        yield container_id


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare the host before and after each test, clean-up of the test's own fixtures included."""
    if "containerd" not in request.fixturenames:
        yield
        return
    containerd: Containerd = request.getfixturevalue("containerd")
    if "running" in request.fixturenames:
        request.getfixturevalue("running")
    before: Census = take_census(containerd)
    yield
    assert_nothing_left(containerd, before=before)
