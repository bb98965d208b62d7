"""Python files outside of any package (the benchmarks, build recipes), loaded for tests of them."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def load_module(name: str, path: Path) -> ModuleType:
    """Run a file as the module ``name``, to be found in ``sys.modules`` from then on."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def loaded_module(name: str, path: Path) -> Iterator[ModuleType]:
    """Have a file as the module ``name`` for a while."""
    try:
        yield load_module(name, path)
    finally:
        sys.modules.pop(name, None)
