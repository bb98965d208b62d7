"""``make setup``: everything from a clean clone to a machine that can demonstrate and test.

Nothing outside the checkout changes, but for Debian packages that are missing (each is named with
its reason). Steps are skipped while their inputs stay the same. Standard library only.

    python3 scripts/setup.py            all steps
    python3 scripts/setup.py --for dev  what unit tests and linters need
"""

import argparse
import os
import shutil
import sys
import zipfile
from pathlib import Path

import busybox_image
import go_build
import lab_kernel
from go_build import (
    CONTAINERD_2_BIN,
    CONTAINERD_VERSION,
    CRICTL,
    CRICTL_VERSION,
    PROGRAMS,
    build_programs,
)
from host_packages import CONTAINERD_1_BIN, RUNC, install_packages, unpack_containerd
from setup_steps import BUILD, ROOT, SetupError, Step, run, run_steps

PYTHON_MINIMUM = (3, 11)
VENV = ROOT / ".venv"
INSTALLED = BUILD / "installed"
WHEELS = ROOT / "dist"
WHEEL_SCRIPTS = BUILD / "wheel-data" / "scripts"
GUEST_PROGRAMS = ROOT / "python" / "kata_hybrid" / "guest" / "bin"
GUEST = BUILD / "guest"
IMAGE = BUILD / "images" / "busybox.tar"
SHIM = "containerd-shim-kata-hybrid-v2"

_TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
_TRIPLE = "x86_64-unknown-linux-gnu"
_RUST = (ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "native", ROOT / "proto")
_CONFIGURATION = """\
# Written by set-up for the demo and the tests: the guest that was built here, a small machine.
# Both monitors are described, so that the host decides which one runs it.
[hypervisor.builtin]
kernel = "{guest}/vmlinux"
initrd = "{guest}/initrd.img"
default_memory = 512
enable_annotations = ["default_memory", "default_vcpus"]

[hypervisor.qemu]
kernel = "{guest}/vmlinux"
initrd = "{guest}/initrd.img"
default_memory = 512
enable_annotations = ["default_memory", "default_vcpus"]

[runtime]
sandbox_cgroup_only = true
"""


def make_environment() -> None:
    """Create the virtual environment with the tools, and point it at the source tree."""
    run([sys.executable, "-m", "venv", VENV], log="venv")
    run(_pip(VENV, "-r", ROOT / "requirements-dev.txt"), log="venv")
    library = VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    (library / "site-packages" / "kata_hybrid_source.pth").write_text(f"{ROOT / 'python'}\n")


def build_agent() -> None:
    """Build the guest's two programs, statically, and put them where the wheel takes them from."""
    _cargo(
        *("--profile", "agent", "--target", _TRIPLE, "-p", "guest_agent"),
        log="agent",
        environment={
            "RUSTFLAGS": "-C target-feature=+crt-static",
            "LIBSECCOMP_LINK_TYPE": "static",
            "LIBSECCOMP_LIB_PATH": "/usr/lib/x86_64-linux-gnu",
        },
    )
    for program in ("kata-agent", "guest-init"):
        _install(_TARGET / _TRIPLE / "agent" / program, GUEST_PROGRAMS / program)


def build_launcher() -> None:
    """Build the executable that containerd starts; the wheel carries it as a script."""
    _cargo("--profile", "agent", "-p", "launcher", log="launcher")
    _install(_TARGET / "agent" / SHIM, WHEEL_SCRIPTS / SHIM)


def build_wheel() -> None:
    """Build the wheel a user gets, and put its extension into the source tree for unit tests."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    # Not by way of pip: maturin shows what it does, and is pinned with the other tools.
    run(
        [VENV / "bin" / "maturin", "build", "--release", "--locked", "--out", WHEELS],
        log="wheel",
        environment={"CARGO_TARGET_DIR": os.fspath(_TARGET)},
    )
    with zipfile.ZipFile(_wheel()) as wheel:
        extension = next(name for name in wheel.namelist() if name.endswith("_native.abi3.so"))
        part = ROOT / "python" / "kata_hybrid" / ".native.part"
        part.write_bytes(wheel.read(extension))
        # Replaced, not rewritten: a running process may have the old one mapped.
        part.replace(ROOT / "python" / "kata_hybrid" / "_native.abi3.so")


def install_wheel() -> None:
    """Install the wheel with nothing but its own requirements: what a user gets."""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    run([sys.executable, "-m", "venv", INSTALLED], log="installed")
    run(_pip(INSTALLED, "-c", ROOT / "requirements-dev.txt", _wheel()), log="installed")


def build_guest() -> None:
    """Build kernel and initrd with the installed command, as a user would."""
    run(
        [
            *(INSTALLED / "bin" / "kata-hybrid", "guest", "build"),
            *("--output", GUEST, "--cache", BUILD / "cache" / "kernel"),
        ],
        log="guest",
    )
    (GUEST / "configuration.toml").write_text(_CONFIGURATION.format(guest=GUEST))


def build_image() -> None:
    """Write the test image."""
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    IMAGE.write_bytes(busybox_image.build_archive(Path("/bin/busybox")))


def steps() -> list[Step]:
    """Return all steps, in order."""
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    return [
        Step(name="packages", title="Debian packages", run=install_packages, always=True),
        Step(
            name="venv",
            title="Tools from PyPI (.venv)",
            run=make_environment,
            inputs=(ROOT / "requirements-dev.txt",),
            salt=python,
            outputs=(VENV / "bin" / "maturin", VENV / "bin" / "pytest"),
        ),
        Step(
            name="agent",
            title="Guest agent (Rust, static)",
            run=build_agent,
            inputs=_RUST,
            outputs=(GUEST_PROGRAMS / "kata-agent", GUEST_PROGRAMS / "guest-init"),
        ),
        Step(
            name="launcher",
            title="Shim launcher (Rust)",
            run=build_launcher,
            inputs=(ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "native" / "launcher"),
            outputs=(WHEEL_SCRIPTS / SHIM,),
        ),
        Step(
            name="wheel",
            title="Wheel with the extension (Rust)",
            run=build_wheel,
            inputs=(*_RUST, ROOT / "python", ROOT / "pyproject.toml", ROOT / "README.md"),
            outputs=(WHEELS, ROOT / "python" / "kata_hybrid" / "_native.abi3.so"),
        ),
        Step(
            name="installed",
            title="The wheel, installed as a user would (build/installed)",
            run=install_wheel,
            inputs=(WHEELS,),
            salt=python,
            outputs=(INSTALLED / "bin" / SHIM, INSTALLED / "bin" / "kata-hybrid"),
        ),
        Step(
            name="guest",
            title="Guest kernel and initrd",
            run=build_guest,
            inputs=(GUEST_PROGRAMS, ROOT / "python" / "kata_hybrid" / "guest", Path(__file__)),
            outputs=(GUEST / "vmlinux", GUEST / "initrd.img", GUEST / "configuration.toml"),
        ),
        Step(
            name="image",
            title="Container image (busybox)",
            run=build_image,
            inputs=(Path(busybox_image.__file__),),
            outputs=(IMAGE,),
        ),
        Step(
            name="containerd-1",
            title="containerd 1.6 (Debian's, unpacked in build/)",
            run=unpack_containerd,
            outputs=(CONTAINERD_1_BIN / "containerd", RUNC),
        ),
        Step(
            name="containerd-2",
            title=f"containerd {CONTAINERD_VERSION[1:]}, crictl {CRICTL_VERSION[1:]} (Go modules)",
            run=build_programs,
            inputs=(Path(go_build.__file__),),
            outputs=(*(CONTAINERD_2_BIN / program for program in PROGRAMS), CRICTL),
        ),
        Step(
            name="lab-kernel",
            title="The lab's kernel (Debian's, unpacked in build/)",
            run=lab_kernel.unpack_lab_kernel,
            inputs=(Path(lab_kernel.__file__),),
            outputs=(lab_kernel.TREE / "boot",),
        ),
    ]


_PURPOSES = {
    "dev": ("packages", "venv", "agent", "launcher", "wheel"),
    "wheel": ("packages", "venv", "agent", "launcher", "wheel"),
    "tools": ("packages", "venv"),
}


def _cargo(*arguments: str, log: str, environment: dict[str, str] | None = None) -> None:
    run(
        ["cargo", "build", "--locked", *arguments],
        log=log,
        environment={"CARGO_TARGET_DIR": os.fspath(_TARGET), **(environment or {})},
    )


def _install(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copy2(source, part)
    part.chmod(0o755)
    part.replace(target)


def _wheel() -> Path:
    found = sorted(WHEELS.glob("kata_hybrid-*.whl"))
    if len(found) != 1:
        raise SetupError(f"expected one wheel in {WHEELS}, found {len(found)}")
    return found[0]


def _pip(environment: Path, *arguments: str | Path) -> list[str | os.PathLike[str]]:
    pip = (environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    return [*pip, "install", "--quiet", *arguments]


def main() -> int:
    """Run the set-up; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--for", dest="purpose", choices=sorted(_PURPOSES), help="a part only")
    purpose = parser.parse_args().purpose
    if sys.version_info < PYTHON_MINIMUM:
        print("Python 3.11 or later is needed", file=sys.stderr)
        return 1
    chosen = [step for step in steps() if purpose is None or step.name in _PURPOSES[purpose]]
    try:
        run_steps(chosen)
    except SetupError as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
