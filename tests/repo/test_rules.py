"""Rules of the repository that no linter knows."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_MAX_PRODUCTION_LINES = 500
_BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def tracked_files() -> list[Path]:
    """Everything that git has or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def is_production(path: Path) -> bool:
    """Source that ships: not generated, not a test."""
    parts = path.relative_to(ROOT).parts
    return (
        path.suffix in {".py", ".rs"}
        and parts[0] in {"python", "native", "scripts"}
        and "protos" not in parts
        and "tests" not in parts
        and "fuzz" not in parts
        and not path.name.endswith("tests.rs")
    )


def production_lines(path: Path) -> int:
    """Lines before the in-file tests."""
    text = path.read_text()
    if path.suffix == ".rs":
        text = re.split(r"^#\[cfg\(test\)\]\s*^mod tests \{", text, maxsplit=1, flags=re.MULTILINE)[
            0
        ]
    return len(text.splitlines())


@pytest.mark.parametrize(
    "path", [p for p in tracked_files() if is_production(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_file_is_short_and_well_named(path: Path) -> None:
    assert production_lines(path) <= _MAX_PRODUCTION_LINES
    assert path.stem not in _BANNED_NAMES
    assert not path.stem.endswith("_inner")


def test_todo_names_an_issue() -> None:
    marker = re.compile(r"(?:#|//).*\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b(?!\(#\d+\))")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path.suffix in {".py", ".rs", ".sh"} and "protos" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if marker.search(line)
    ]
    assert found == []


def test_every_crate_takes_the_workspaces_lints() -> None:
    manifests = [p for p in tracked_files() if p.name == "Cargo.toml" and p.parent != ROOT]
    missing = [
        str(path.relative_to(ROOT))
        for path in manifests
        if "fuzz" not in path.parts
        and tomllib.loads(path.read_text()).get("lints") != {"workspace": True}
    ]
    assert manifests
    assert missing == []


def test_only_the_adapters_touch_the_extension() -> None:
    # import-linter does not see compiled modules.
    importing = re.compile(r"^\s*(?:from|import) kata_hybrid\._native", flags=re.MULTILINE)
    package = ROOT / "python" / "kata_hybrid"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if importing.search(path.read_text())
    }
    assert found <= {
        "agent/client.py",
        "agent/forward.py",
        "agent/stdio.py",
        "aio/events.py",
        "hypervisor/builtin.py",
        "hypervisor/probe.py",
        "hypervisor/vsock_backend.py",
        "resource/mount.py",
        "resource/network/loopback.py",
        "runtimes/virt/factory.py",  # wires a sandbox's parts together
        "shim/run.py",
    }


def test_versions_agree() -> None:
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    package = (ROOT / "python" / "kata_hybrid" / "__init__.py").read_text()
    assert f'__version__ = "{cargo}"' in package


def test_lock_covers_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {re.split(r"[<>=\[ ]", entry)[0].lower().replace(".", "-") for entry in wanted}
    locked = {
        line.partition("==")[0].strip().lower().replace(".", "-")
        for line in (ROOT / "requirements-dev.txt").read_text().splitlines()
        if "==" in line
    }
    assert names <= locked


def test_readme_names_the_commands_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert "make demo" in readme
    assert "make test" in readme
    assert script.splitlines()[-2:] == ["make check", "make test"]


def test_every_target_in_contributing_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named <= targets
    assert targets - {"help"} <= named


def test_scripts_are_executable() -> None:
    scripts = [p for p in tracked_files() if p.suffix == ".sh" or p == ROOT / ".ci" / "run"]
    assert scripts
    assert [str(p) for p in scripts if not p.stat().st_mode & 0o100] == []
