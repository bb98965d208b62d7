"""The shim binary run by hand, as containerd runs it: ``start``, ``delete``, ``-info``, ``-v``.

No task is created here, so no machine is started: only the binary's own contract is checked.
"""

import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.daemon import Containerd
from harness.deadline import wait_until
from harness.leaks import find_processes
from harness.wire import (
    TASK_V2,
    TASK_V3,
    ShimConnection,
    decode,
    encode_any,
    encode_bytes,
    encode_string,
)

SHIM = "containerd-shim-kata-hybrid-v2"
_END_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle directory as containerd prepares it, and the shim pointed at it."""

    path: Path
    shim: Path
    containerd: Containerd

    @property
    def container_id(self) -> str:
        return self.path.name

    def argv(self, *action: str) -> list[str]:
        return [
            *(os.fspath(self.shim), "-namespace", self.containerd.namespace),
            *("-address", os.fspath(self.containerd.address)),
            *("-publish-binary", os.fspath(self.containerd.install.bin_dir / "containerd")),
            *("-id", self.container_id, *action),
        ]

    def run(
        self, *action: str, stdin: bytes = b"", timeout_s: float = 20
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {
            **self.containerd.environment,
            "TTRPC_ADDRESS": f"{self.containerd.address}.ttrpc",
            "GRPC_ADDRESS": os.fspath(self.containerd.address),
            "NAMESPACE": self.containerd.namespace,
        }
        return subprocess.run(
            self.argv(*action),
            cwd=self.path,
            env=environment,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *, stdin: bytes = b"") -> str:
        done = self.run("start", stdin=stdin)
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        return done.stdout.decode()

    def delete(self) -> subprocess.CompletedProcess[bytes]:
        return self.run("-bundle", os.fspath(self.path), "delete")


@pytest.fixture
def bundle(daemon: Containerd, shim_dir: Path | None, tmp_path: Path) -> Iterator[Bundle]:
    if shim_dir is None:
        pytest.skip("these are this shim's own promises")
    made = make_bundle(daemon, shim_dir=shim_dir, path=tmp_path / "by-hand")
    yield made
    made.delete()


def make_bundle(
    daemon: Containerd,
    *,
    shim_dir: Path,
    path: Path,
    annotations: dict[str, str] | None = None,
) -> Bundle:
    (path / "rootfs").mkdir(parents=True)
    spec = {
        "ociVersion": "1.0.2",
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "annotations": annotations or {},
        "linux": {},
    }
    (path / "config.json").write_text(json.dumps(spec))
    return Bundle(path=path, shim=shim_dir / SHIM, containerd=daemon)


def test_start_prints_an_address_that_already_answers(bundle: Bundle) -> None:
    address = bundle.start()
    assert address.startswith("unix:///")
    assert (bundle.path / "address").read_text() == address.strip()
    with ShimConnection(bundle.path) as shim:
        reply = shim.call("Connect", encode_string(1, bundle.container_id))
        assert reply.code == 0
        pid = decode(reply.payload)[1][0]
        assert isinstance(pid, int)
        # Ended, whether or not the host's init has already collected it.
        end = os.pidfd_open(pid)
        try:
            shim.call("Shutdown", encode_string(1, bundle.container_id))
            assert select.select([end], [], [], _END_S)[0], "the shim lives after Shutdown"
        finally:
            os.close(end)


def test_second_start_names_the_same_shim(bundle: Bundle) -> None:
    assert bundle.start() == bundle.start()
    servers = [p for p in find_processes(bundle.containerd) if p.parent == 1]
    assert len(servers) == 1


def test_start_returns_though_the_server_lives_on(bundle: Bundle) -> None:
    # containerd reads until every holder of stdout and stderr closed it.
    began = time.monotonic()
    bundle.start()
    assert time.monotonic() - began < 10
    with ShimConnection(bundle.path) as shim:
        assert shim.call("Connect", encode_string(1, bundle.container_id)).code == 0


@pytest.mark.parametrize("service", [TASK_V2, TASK_V3])
def test_both_task_services_answer(bundle: Bundle, service: str) -> None:
    bundle.start()
    with ShimConnection(bundle.path, service=service) as shim:
        assert shim.call("Connect", encode_string(1, bundle.container_id)).code == 0


def test_options_on_stdin_are_taken_bare(bundle: Bundle) -> None:
    options = encode_any("runtimeoptions.v1.Options", encode_string(2, "/no/such/file.toml"))
    assert bundle.start(stdin=options).startswith("unix:///")


def test_bootstrap_parameters_on_stdin_are_understood(bundle: Bundle) -> None:
    parameters = (
        encode_string(1, bundle.container_id)
        + encode_string(2, bundle.containerd.namespace)
        + encode_string(4, "v2.4.2")
        + encode_string(5, f"{bundle.containerd.address}.ttrpc")
        + encode_string(6, os.fspath(bundle.containerd.address))
    )
    done = bundle.run("start", stdin=parameters)
    assert done.returncode == 0, done.stderr
    # Plain text, or BootstrapResult: version, address, protocol.
    if not done.stdout.startswith((b"unix://", b"{")):
        result = decode(done.stdout)
        assert result[1][0] in (2, 3)
        assert result[3] == [b"ttrpc"]
    with ShimConnection(bundle.path) as shim:
        assert shim.call("Connect", encode_string(1, bundle.container_id)).code == 0


def test_garbage_on_stdin_is_refused_or_ignored_but_never_hangs(bundle: Bundle) -> None:
    done = bundle.run("start", stdin=b"\xff" * 4096)
    assert done.returncode != 0 or done.stdout.startswith(b"unix:///")


def test_malformed_spec_fails_start_with_its_name(bundle: Bundle) -> None:
    (bundle.path / "config.json").write_text('{"annotations": ')
    done = bundle.run("start")
    assert done.returncode != 0
    assert b"config.json" in done.stdout + done.stderr
    assert b"Traceback" not in done.stdout + done.stderr


def test_containers_of_a_pod_get_one_address(
    daemon: Containerd, bundle: Bundle, shim_dir: Path, tmp_path: Path
) -> None:
    sandbox = make_bundle(
        daemon,
        shim_dir=shim_dir,
        path=tmp_path / "sandbox",
        annotations={
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": "sandbox",
        },
    )
    member = make_bundle(
        daemon,
        shim_dir=shim_dir,
        path=tmp_path / "member",
        annotations={
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "sandbox",
        },
    )
    try:
        assert sandbox.start() == member.start()
        assert bundle.start() != member.start()
    finally:
        member.delete()
        sandbox.delete()


def test_delete_answers_137_and_repeats(bundle: Bundle) -> None:
    for _ in range(2):
        done = bundle.delete()
        assert done.returncode == 0, done.stderr
        fields = decode(done.stdout)
        assert fields[2] == [137]
        assert fields[3], "no exit time"


def test_delete_ends_a_shim_that_never_got_a_task(bundle: Bundle) -> None:
    bundle.start()
    assert bundle.delete().returncode == 0
    wait_until(lambda: not find_processes(bundle.containerd), what="no shim")


def test_delete_works_without_config_and_rootfs(bundle: Bundle) -> None:
    (bundle.path / "config.json").unlink()
    (bundle.path / "rootfs").rmdir()
    done = bundle.delete()
    assert done.returncode == 0, done.stderr
    assert decode(done.stdout)[2] == [137]


def test_delete_is_quick(bundle: Bundle) -> None:
    bundle.start()
    began = time.monotonic()
    bundle.delete()
    assert time.monotonic() - began < 5  # io.containerd.timeout.shim.cleanup


def test_version_is_told(bundle: Bundle) -> None:
    done = subprocess.run(
        [bundle.shim, "-v"], capture_output=True, text=True, timeout=10, check=True
    )
    assert "0." in done.stdout
    assert done.stderr == ""


def test_info_is_a_runtime_info(bundle: Bundle) -> None:
    done = subprocess.run(
        [bundle.shim, "-info"], input=b"", capture_output=True, timeout=10, check=True
    )
    info = decode(done.stdout)
    assert info[1] == [b"io.containerd.kata-hybrid.v2"]
    features = info[4][0]
    assert isinstance(features, bytes)
    document = decode(features)[2][0]
    assert isinstance(document, bytes)
    assert json.loads(document)["ociVersionMin"]


def test_ctr_can_inspect_the_runtime(bundle: Bundle) -> None:
    if bundle.containerd.install.major < 2:
        # Nothing asks for it there, and nothing may be lost by that.
        assert "inspect-runtime" not in bundle.containerd.ctr("plugins", "--help").text
        return
    shown = bundle.containerd.ctr(
        "plugins", "inspect-runtime", "--runtime=io.containerd.kata-hybrid.v2"
    )
    assert json.loads(shown.text)["Name"] == "io.containerd.kata-hybrid.v2"


@pytest.mark.parametrize("identifier", ["../../etc", "a/b", "x" * 300, ".", ""])
def test_id_that_is_no_id_is_refused(bundle: Bundle, identifier: str) -> None:
    argv = bundle.argv("start")
    argv[argv.index("-id") + 1] = identifier
    done = subprocess.run(
        argv,
        cwd=bundle.path,
        env=bundle.containerd.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.returncode != 0
    assert b"Traceback" not in done.stdout + done.stderr
    assert not (bundle.path / "address").exists()


def test_unknown_flag_is_only_a_warning(bundle: Bundle) -> None:
    argv = bundle.argv("-flag-of-the-future=1", "-bundle", os.fspath(bundle.path), "delete")
    done = subprocess.run(
        argv,
        cwd=bundle.path,
        env=bundle.containerd.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0


def test_nested_bootstrap_extension_is_found(bundle: Bundle) -> None:
    options = encode_any("runtimeoptions.v1.Options", encode_string(2, "/no/such/file.toml"))
    parameters = (
        encode_string(1, bundle.container_id)
        + encode_string(2, bundle.containerd.namespace)
        + encode_bytes(8, encode_bytes(1, options))
    )
    assert bundle.run("start", stdin=parameters).returncode == 0
