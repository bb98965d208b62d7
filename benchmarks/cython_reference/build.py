"""Build the Cython reference into ``build/cython/``.

Run it as ``python benchmarks/cython_reference/build.py``, or call :func:`build`. Optimised as far
as the Rust side is (``-O3``), so that the two can be set against each other. Does nothing when the
built module is newer than its source. Run by hand it prints the module's path.
"""

import sys
import sysconfig
from pathlib import Path

_SOURCE = Path(__file__).with_name("vsock_reference.pyx")
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "cython"


def module_path() -> Path:
    """Return where the built module is, or will be."""
    return OUTPUT / f"vsock_reference{sysconfig.get_config_var('EXT_SUFFIX')}"


def build() -> Path:
    """Build the module unless it is up to date, and return its path.

    Raises:
        ImportError: Cython or setuptools is not installed.
        setuptools.errors.CompileError: no C compiler, or it refused.
    """
    module = module_path()
    if module.exists() and module.stat().st_mtime > _SOURCE.stat().st_mtime:
        return module
    # Imported late: a caller that only asks for the path needs neither.
    from Cython.Build import cythonize  # noqa: PLC0415
    from setuptools import Distribution, Extension  # noqa: PLC0415
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415

    OUTPUT.mkdir(parents=True, exist_ok=True)
    extension = Extension("vsock_reference", [str(_SOURCE)], extra_compile_args=["-O3"])
    extensions = cythonize([extension], build_dir=str(OUTPUT), quiet=True)
    command = build_ext(Distribution({"name": "vsock_reference", "ext_modules": extensions}))
    command.build_lib = str(OUTPUT)
    command.build_temp = str(OUTPUT / "temp")
    command.ensure_finalized()
    command.run()
    return module


if __name__ == "__main__":
    print(build(), file=sys.stdout)
