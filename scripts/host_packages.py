"""What set-up needs from the distribution, and why; on Debian it is installed, elsewhere named.

No package with a service in it is installed: Debian's containerd is only unpacked below ``build/``.
Standard library only.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setup_steps import BUILD, SetupError, run, say

CONTAINERD_1 = BUILD / "containerd-1"
CONTAINERD_1_BIN = CONTAINERD_1 / "usr" / "bin"
RUNC = CONTAINERD_1 / "usr" / "sbin" / "runc"
_EXECUTABLE_DIRS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_RUST = (1, 88)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A Debian package, the file or program that proves it is there, and what it is for."""

    package: str
    probe: str
    reason: str

    def is_met(self) -> bool:
        """Whether the file or program is there, from whatever package."""
        if self.probe.startswith("/"):
            return Path(self.probe).exists()
        return shutil.which(self.probe, path=_EXECUTABLE_DIRS) is not None


REQUIREMENTS = (
    Requirement(package="gcc", probe="gcc", reason="links the Rust parts"),
    Requirement(
        package="libc6-dev",
        probe="/usr/include/stdlib.h",
        reason="the C library's static half, for the guest agent",
    ),
    Requirement(
        package="libseccomp-dev",
        probe="/usr/include/seccomp.h",
        reason="seccomp filters in the guest agent, linked statically",
    ),
    Requirement(
        package="qemu-system-x86",
        probe="qemu-system-x86_64",
        reason="the virtual machine monitor",
    ),
    Requirement(
        package="qemu-system-common",
        probe="/usr/lib/qemu/virtiofsd",
        reason="virtiofsd, which shares the containers' root file systems with the guest",
    ),
    Requirement(package="util-linux", probe="setpriv", reason="setpriv ties helpers to the shim"),
    Requirement(package="busybox-static", probe="/bin/busybox", reason="content of the test image"),
    Requirement(package="iproute2", probe="ip", reason="the lab's loopback; networks of the tests"),
    Requirement(package="kmod", probe="modprobe", reason="kernel modules in the lab"),
    Requirement(
        package="binutils",
        probe="strings",
        reason="virtme-ng reads the version of the lab's kernel",
    ),
    Requirement(
        package="containernetworking-plugins",
        probe="/usr/lib/cni/bridge",
        reason="networks of the tests' pods",
    ),
    Requirement(package="fio", probe="fio", reason="checks and measures disks in the lab"),
    Requirement(package="iperf3", probe="iperf3", reason="checks and measures networks in the lab"),
    Requirement(package="stress-ng", probe="stress-ng", reason="load for tests in the lab"),
    Requirement(package="e2fsprogs", probe="mkfs.ext4", reason="file systems on the tests' disks"),
    Requirement(package="lz4", probe="lz4", reason="unpacks Debian's kernel for the guest"),
    Requirement(package="zstd", probe="zstd", reason="unpacks kernel modules and packages"),
    Requirement(
        package="ca-certificates",
        probe="/etc/ssl/certs/ca-certificates.crt",
        reason="downloads from PyPI, crates.io and the Go module proxy",
    ),
)
VENV = Requirement(
    package="python3-venv", probe="", reason="virtual environments for tools and tests"
)

HEADERS = Requirement(
    package="python3-dev", probe="", reason="builds the Cython reference that tests compare with"
)


def install_packages() -> None:
    """Install what is missing, or say what is.

    Raises:
        SetupError: this is not Debian or we are not root, and something is missing.
    """
    missing = [requirement for requirement in REQUIREMENTS if not requirement.is_met()]
    if not _has_ensurepip():
        missing.append(VENV)
    if not _has_headers():
        missing.append(HEADERS)
    if missing:
        for requirement in missing:
            say(f"      {requirement.package}: {requirement.reason}")
        names = [requirement.package for requirement in missing]
        if shutil.which("apt-get") is None:
            raise SetupError(
                "this is not Debian; install what provides the above (Debian's names) and "
                "run make setup again"
            )
        if os.geteuid() != 0:
            raise SetupError(f"run as root: apt-get install {' '.join(names)}")
        apt = {"DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "-q", "update"], log="apt-update", environment=apt)
        run(
            ["apt-get", "-qy", "install", "--no-install-recommends", *names],
            log="apt-install",
            environment=apt,
        )
    _check_rust()


def unpack_containerd() -> None:
    """Unpack Debian's containerd and runc below ``build/``; nothing is installed or started.

    Raises:
        SetupError: this is not Debian, or the packages can't be had.
    """
    packages = BUILD / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if shutil.which("apt-get") is None:
        raise SetupError("needs Debian's packages containerd and runc (apt-get download)")
    try:
        run(["apt-get", "-q", "download", "containerd", "runc"], log="containerd-1", cwd=packages)
    except SetupError:
        run(["apt-get", "-q", "update"], log="apt-update")
        run(["apt-get", "-q", "download", "containerd", "runc"], log="containerd-1", cwd=packages)
    for archive in (*packages.glob("containerd_*.deb"), *packages.glob("runc_*.deb")):
        run(["dpkg-deb", "-x", archive, CONTAINERD_1], log="containerd-1")
        archive.unlink()


def _has_ensurepip() -> bool:
    probe = ["python3", "-c", "import ensurepip, venv"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def _has_headers() -> bool:
    probe = "import os, sysconfig; print(os.path.join(sysconfig.get_path('include'), 'Python.h'))"
    told = subprocess.run(["python3", "-c", probe], check=False, capture_output=True, text=True)
    return told.returncode == 0 and Path(told.stdout.strip()).exists()


def _check_rust() -> None:
    cargo = shutil.which("cargo")
    wanted = ".".join(str(part) for part in _RUST)
    if cargo is None:
        raise SetupError(f"no cargo: install Rust {wanted} or later (rustup.rs)")
    told = subprocess.run([cargo, "--version"], capture_output=True, text=True, check=False)
    words = told.stdout.split()
    version = tuple(int(part) for part in words[1].split(".")[:2]) if len(words) > 1 else (0, 0)
    if version < _RUST:
        raise SetupError(f"{told.stdout.strip()} is too old: Rust {wanted} or later is needed")
