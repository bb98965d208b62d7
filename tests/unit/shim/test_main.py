"""What the short actions print, cost and never import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.shim import MAIN, Shim
from kata_hybrid import __version__
from kata_hybrid.protos import runtime_info_pb2
from kata_hybrid.shim.info import FEATURES

HEAVY = (
    "asyncio",
    "ctypes",
    "google",
    "grpc",
    "hashlib",
    "json",
    "kata_hybrid._native",
    "kata_hybrid.config",
    "logging",
    "pathlib",
    "pyroute2",
    "re",
    "subprocess",
    "typing",
)

# Runs an action in this interpreter and reports the modules instead of ending the process.
PROBE = """
import posix, sys
def report(status):
    posix.write(2, ("%d " % status + " ".join(sys.modules)).encode())
    posix.kill(posix.getpid(), 9)
posix._exit = report
sys.path.append({root!r})
from kata_hybrid.shim.main import main
main(sys.argv[1:])
"""


def modules_after(shim: Shim, action: str) -> set[str]:
    bundle = shim.folder / "c1"
    probe = PROBE.format(root=str(MAIN.parent.parent.parent))
    identity = ["-namespace", "default", "-address", "/c", "-id", "c1"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", probe, *identity, action],
        cwd=bundle,
        input=b"",
        env={"KATA_HYBRID_RUN_DIR": str(shim.run_dir)},
        capture_output=True,
        timeout=20,
        check=False,
    )
    status, *modules = done.stderr.decode().split()
    assert status == "0"
    return set(modules)


@pytest.mark.parametrize("action", ["start", "delete"])
def test_short_actions_import_nothing_heavy(shim: Shim, action: str) -> None:
    shim.bundle("c1")
    assert modules_after(shim, action).isdisjoint(HEAVY)


def test_a_start_that_joins_imports_nothing_heavy(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    assert modules_after(shim, "start").isdisjoint(HEAVY)


def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-I", "-S", os.fspath(MAIN), *words],
        input=stdin,
        capture_output=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize("flag", ["-v", "--version"])
def test_version_is_printed(flag: str) -> None:
    done = run(flag)
    assert done.returncode == 0
    assert __version__ in done.stdout.decode()


def test_info_is_what_containerd_decodes() -> None:
    done = run("-info")
    assert (done.returncode, done.stderr) == (0, b"")
    info = runtime_info_pb2.RuntimeInfo.FromString(done.stdout)
    assert info.name == "io.containerd.kata-hybrid.v2"
    assert info.version.version == __version__
    features = json.loads(info.features.value)
    assert info.features.type_url.endswith("/features/Features")
    assert "user" not in features["linux"]["namespaces"]
    assert features["linux"]["mountExtensions"]["idmap"]["enabled"] is False


def test_features_are_json() -> None:
    assert json.loads(FEATURES)["ociVersionMin"] == "1.0.0"


def test_info_hands_options_back() -> None:
    options = bytes.fromhex("0a0178 120179".replace(" ", ""))
    info = runtime_info_pb2.RuntimeInfo.FromString(run("-info", stdin=options).stdout)
    assert (info.options.type_url, info.options.value) == ("x", b"y")


def test_an_unknown_action_is_refused() -> None:
    done = run("-namespace", "n", "-id", "c1", "fly")
    assert done.returncode == 1
    assert b"unknown action 'fly'" in done.stderr


def test_module_form_is_the_same() -> None:
    root = MAIN.parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "kata_hybrid.shim", "-v"],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=Path("/"),
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.stdout == run("-v").stdout


def test_serving_by_hand_uses_the_socket_given_and_removes_it(shim: Shim) -> None:
    path = shim.folder / "by-hand"
    identity = ["-namespace", "default", "-address", "/c", "-id", "c1"]
    with subprocess.Popen(
        [sys.executable, "-I", os.fspath(MAIN), *identity, "-socket", os.fspath(path)],
        cwd=shim.folder,
        env={"PATH": os.environ["PATH"], "KATA_HYBRID_RUN_DIR": str(shim.run_dir)},
        stderr=subprocess.PIPE,
    ) as server:
        assert server.stderr is not None
        first = json.loads(server.stderr.readline())
        assert (first["msg"], first["sandbox"]) == ("shim serves", "c1")
        server.terminate()
        assert server.wait(20) == 0
    assert not path.exists()
    assert shim.folder.exists()
    assert shim.sandboxes() == []
