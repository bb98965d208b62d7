"""Find and read ``configuration.toml``: strict, and exact about what is wrong and where.

The first of these that is given or exists: ``$KATA_CONF_FILE``, the ``ConfigPath`` option of
containerd, the default paths, else the built-in defaults. Regular files in ``config.d`` beside the
(resolved) file follow in order of their names; each is checked by itself, then later values win.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kata_hybrid.config.keys import TABLE_ALIASES, TABLES, Key
from kata_hybrid.config.model import (
    AgentConfig,
    BuiltinConfig,
    Config,
    HypervisorName,
    QemuConfig,
    RuntimeConfig,
)
from kata_hybrid.errors import InvalidConfigError

CONFIG_FILE_VARIABLE = "KATA_CONF_FILE"
DEFAULT_PATHS = (
    Path("/etc/kata-hybrid/configuration.toml"),
    Path("/usr/share/defaults/kata-hybrid/configuration.toml"),
)
DROP_IN_DIR = "config.d"
_MAX_FILE_BYTES = 1 << 20
_Table = tuple[str, ...]
_Section = TypeVar("_Section", BuiltinConfig, QemuConfig, AgentConfig, RuntimeConfig)


def load_config(
    *,
    environment: Mapping[str, str],
    option_path: Path | None = None,
    default_paths: tuple[Path, ...] = DEFAULT_PATHS,
) -> Config:
    """Read the configuration in force. ``option_path`` is containerd's ``ConfigPath``.

    Raises:
        InvalidConfigError: a file is missing, unreadable or wrong; the text names the file and
            the key.
    """
    path = find_config(
        environment=environment, option_path=option_path, default_paths=default_paths
    )
    return Config() if path is None else read_config(path)


def find_config(
    *,
    environment: Mapping[str, str],
    option_path: Path | None = None,
    default_paths: tuple[Path, ...] = DEFAULT_PATHS,
) -> Path | None:
    """Return the file to read; None for the built-in defaults. One asked for need not exist."""
    if from_environment := environment.get(CONFIG_FILE_VARIABLE):
        return Path(from_environment)
    if option_path is not None:
        return option_path
    return next((path for path in default_paths if path.exists()), None)


def read_config(path: Path) -> Config:
    """Read one file and its drop-ins.

    Raises:
        InvalidConfigError: see :func:`load_config`.
    """
    files = (path, *_drop_ins(path))
    fields: dict[_Table, dict[str, Any]] = {table: {} for table in TABLES}
    for file in files:
        for table, field, value in _parse(file):
            fields[table][field] = value
    _name_the_only_hypervisor(fields)
    return Config(
        builtin=_fill(BuiltinConfig(), fields["hypervisor", "builtin"]),
        qemu=_fill(QemuConfig(), fields["hypervisor", "qemu"]),
        agent=_fill(AgentConfig(), fields["agent", "kata"]),
        runtime=_fill(RuntimeConfig(), fields[("runtime",)]),
        files=files,
    )


def _name_the_only_hypervisor(fields: Mapping[_Table, dict[str, Any]]) -> None:
    """Whoever describes one monitor and names none means that one."""
    described = [name for name in HypervisorName if fields["hypervisor", name.value]]
    if len(described) == 1:
        fields[("runtime",)].setdefault("hypervisor_name", described[0])


def _fill(section: _Section, fields: Mapping[str, Any]) -> _Section:
    return dataclasses.replace(section, **fields)


def _drop_ins(path: Path) -> list[Path]:
    try:
        folder = path.resolve(strict=True).parent / DROP_IN_DIR
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except (OSError, RuntimeError) as error:
        message = f"configuration {path}: {error}"
        raise InvalidConfigError(message) from error
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            message = f"configuration {entry}: not a regular file"
            raise InvalidConfigError(message)
    return entries


def _parse(path: Path) -> Iterator[tuple[_Table, str, object]]:
    """Yield (table, field, value) for every key of a file."""
    document = _read_toml(path)
    tables = {table[0] for table in TABLES}
    for name, value in document.items():
        if name not in tables:
            raise _unknown(path, key=name, value=value, known=_table_names())
        if (name,) in TABLES:
            yield from _parse_table(path, (name,), value)
            continue
        for inner, table in _expect_table(path, (name,), value).items():
            if _known_table((name, inner)) not in TABLES:
                raise _unknown(path, key=f"{name}.{inner}", value=table, known=_table_names())
            yield from _parse_table(path, (name, inner), table)


def _known_table(table: _Table) -> _Table:
    return TABLE_ALIASES.get(table, table)


def _table_names() -> list[str]:
    return [".".join(table) for table in (*TABLES, *TABLE_ALIASES)]


def _parse_table(path: Path, table: _Table, value: object) -> Iterator[tuple[_Table, str, object]]:
    known = _known_table(table)
    keys = TABLES[known]
    for name, entry in _expect_table(path, table, value).items():
        dotted = ".".join((*table, name))
        key = keys.get(name)
        if key is None:
            raise _unknown(path, key=dotted, value=entry, known=list(keys))
        yield known, key.field, _check(path, key, dotted=dotted, value=entry)


def _check(path: Path, key: Key, *, dotted: str, value: object) -> object:
    try:
        return key.check(value)
    except ValueError as error:
        message = f"configuration {path}: {dotted} = {value!r} is not {error}"
        raise InvalidConfigError(message) from error


def _expect_table(path: Path, table: _Table, value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    message = f"configuration {path}: {'.'.join(table)} = {value!r} is not a table"
    raise InvalidConfigError(message)


def _unknown(path: Path, *, key: str, value: object, known: list[str]) -> InvalidConfigError:
    what = f"table [{key}]" if isinstance(value, dict) else f"key {key} = {value!r}"
    name = key if "." in known[0] else key.rsplit(".", 1)[-1]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return InvalidConfigError(
        f"configuration {path}: unknown {what}; the nearest known is {nearest[0]}"
    )


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            message = f"configuration {path}: larger than {_MAX_FILE_BYTES} bytes"
            raise InvalidConfigError(message)
        return tomllib.loads(data.decode())
    except OSError as error:
        message = f"configuration {path}: {error.strerror}"
        raise InvalidConfigError(message) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"configuration {path}: not TOML: {error}"
        raise InvalidConfigError(message) from error
