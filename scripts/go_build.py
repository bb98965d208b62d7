"""Builds containerd 2.x with its ``ctr`` and runc shim, and ``crictl``, from the Go module proxy.

They go into ``build/``. Checksums come with the modules: ``go.sum`` and Go's checksum database.
Without a Go compiler that is new enough, Debian's Go fetches the one that is needed, as a module
too. Standard library only.
"""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

from setup_steps import BUILD, SetupError, run, say

CONTAINERD_VERSION = "v2.4.2"
CONTAINERD_2_BIN = BUILD / "containerd-2" / "bin"
PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2")
_GO_MINIMUM = (1, 26, 6)  # the go line of containerd's go.mod
_GO_FETCHED = "1.26.8"
_MODULE = "github.com/containerd/containerd/v2"
_TAGS = "no_aufs no_btrfs no_devmapper no_zfs"  # plugins that no test uses
CRICTL_VERSION = "v1.34.0"
CRICTL = BUILD / "cri-tools" / "bin" / "crictl"
CRITEST = CRICTL.with_name(f"critest-{CRICTL_VERSION}")
_CRI_TOOLS = "sigs.k8s.io/cri-tools"
_CACHE = BUILD / "go"


def build_programs() -> None:
    """Build all of them; what both modules need is built once.

    Raises:
        SetupError: there is no Go and no way to get it, or the build failed.
    """
    go = _find_go() or _fetch_go()
    flags = f"-X {_MODULE}/version.Version={CONTAINERD_VERSION}"
    packages = [f"./cmd/{program}" for program in PROGRAMS]
    build = ["-tags", _TAGS, "-ldflags", f"-s -w {flags}", "-o", f"{CONTAINERD_2_BIN}/", *packages]
    _build(go, f"{_MODULE}@{CONTAINERD_VERSION}", build, log="containerd-2")
    flags = f"-X {_CRI_TOOLS}/pkg/version.Version={CRICTL_VERSION}"
    build = ["-ldflags", f"-s -w {flags}", "-o", f"{CRICTL.parent}/", "./cmd/crictl"]
    _build(go, f"{_CRI_TOOLS}@{CRICTL_VERSION}", build, log="crictl")
    # Gigabytes of modules and objects that nothing needs any more.
    shutil.rmtree(_CACHE)


def build_critest() -> None:
    """Build the tests of the CRI, which only ``make conformance`` needs, unless they are there.

    Raises:
        SetupError: as :func:`build_programs`.
    """
    if CRITEST.exists():
        return
    say("critest: a minute or two")
    go = _find_go() or _fetch_go()
    build = ["-c", "-o", os.fspath(CRITEST), "./cmd/critest"]
    _build(go, f"{_CRI_TOOLS}@{CRICTL_VERSION}", build, log="critest", command="test")
    shutil.rmtree(_CACHE)


def _build(go: str, module: str, arguments: list[str], *, log: str, command: str = "build") -> None:
    environment = _environment()
    run([go, "mod", "download", module], log=f"{log}-go", cwd=_CACHE, environment=environment)
    run(
        [go, command, "-trimpath", *arguments],
        log=log,
        cwd=Path(environment["GOMODCACHE"]) / module,
        environment=environment,
    )


def _environment() -> dict[str, str]:
    _CACHE.mkdir(parents=True, exist_ok=True)
    return {
        "CGO_ENABLED": "0",
        "GOCACHE": os.fspath(_CACHE / "cache"),
        "GOFLAGS": "-mod=readonly -modcacherw -buildvcs=false",
        "GOMODCACHE": os.fspath(_CACHE / "mod"),
        "GOPATH": os.fspath(_CACHE / "path"),
        "GOTOOLCHAIN": "local",
    }


def _find_go() -> str | None:
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go"):
        if candidate and Path(candidate).exists() and _version(candidate) >= _GO_MINIMUM:
            return candidate
    return None


def _version(go: str) -> tuple[int, ...]:
    told = subprocess.run(
        [go, "version"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **_environment()},
    )
    found = re.search(r"go(\d+)\.(\d+)(?:\.(\d+))?", told.stdout)
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)


def _fetch_go() -> str:
    wanted = f"golang.org/toolchain@v0.0.1-go{_GO_FETCHED}.linux-amd64"
    say(f"      no Go of at least {'.'.join(map(str, _GO_MINIMUM))} here: fetching {wanted}")
    old = shutil.which("go")
    if old is None:
        if shutil.which("apt-get") is None:
            raise SetupError("no Go compiler: install one, of any age")
        say("      golang-go: fetches that module")
        run(["apt-get", "-q", "update"], log="apt-update")
        run(["apt-get", "-qy", "install", "--no-install-recommends", "golang-go"], log="apt-go")
        old = "/usr/bin/go"
    environment = _environment()
    run([old, "mod", "download", wanted], log="go-toolchain", cwd=_CACHE, environment=environment)
    home = Path(environment["GOMODCACHE"]) / wanted
    # Modules carry no execute permission.
    for program in (*(home / "bin").iterdir(), *(home / "pkg" / "tool").rglob("*")):
        if program.is_file():
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return os.fspath(home / "bin" / "go")


if __name__ == "__main__":
    build_critest()
