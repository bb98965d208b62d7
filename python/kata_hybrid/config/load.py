"""Find and read ``configuration.toml``: strict, and exact about what is wrong and where.

The first of these that is given or exists: ``$KATA_CONF_FILE``, the ``ConfigPath`` option of
containerd, the default paths, else the built-in defaults. Regular files in ``config.d`` beside the
(resolved) file follow in order of their names; each is checked by itself, then later values win.

A key that is Kata's and not ours (``foreign.py``) is told in ``Config.notices``, or refused.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kata_hybrid.config.foreign import FOREIGN, FOREIGN_MONITORS, MOVED, ForeignKey
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
_TWO_LEVELS = 2
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
    foreign: dict[str, _Foreign] = {}
    for file in files:
        for table, field, value in _parse(file, foreign):
            fields[table][field] = value
    # Not before all files are read: a later one may take back what an earlier one asks for.
    notices = [notice for entry in foreign.values() if (notice := entry.notice())]
    _choose_hypervisor(fields, foreign)
    described = frozenset(name for name in HypervisorName if fields["hypervisor", name.value])
    return Config(
        builtin=_fill(BuiltinConfig(), fields["hypervisor", "builtin"]),
        qemu=_fill(QemuConfig(), fields["hypervisor", "qemu"]),
        agent=_fill(AgentConfig(), fields["agent", "kata"]),
        runtime=_fill(RuntimeConfig(), fields[("runtime",)]),
        files=files,
        notices=tuple(notices),
        described=described or frozenset(HypervisorName),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Foreign:
    """A key or a table of Kata's that is not ours, as a file has it."""

    path: Path
    dotted: str
    value: object
    key: ForeignKey | None
    """None: a table of a monitor that is not here."""

    def notice(self) -> str:
        """Return what to tell of it; nothing for a value without effect.

        Raises:
            InvalidConfigError: it may not be ignored.
        """
        if self.key is None:
            return f"table [{self.dotted}]: no such machine monitor here"
        if self.key.is_harmless(self.value):
            return ""
        if self.key.refusal:
            what = f"{self.dotted} = {self.value!r} is not implemented: {self.key.refusal}"
            raise InvalidConfigError(f"configuration {self.path}: {what}")
        return f"{self.dotted} = {self.value!r}"


def _choose_hypervisor(
    fields: Mapping[_Table, dict[str, Any]], foreign: Mapping[str, _Foreign]
) -> None:
    """Whoever describes one monitor and names none means that one."""
    described = [name for name in HypervisorName if fields["hypervisor", name.value]]
    if len(described) == 1:
        fields[("runtime",)].setdefault("hypervisor_name", described[0])
    elsewhere = next((entry for entry in foreign.values() if entry.key is None), None)
    if elsewhere and not described and "hypervisor_name" not in fields[("runtime",)]:
        known = ", ".join(name.value for name in HypervisorName)
        raise InvalidConfigError(
            f"configuration {elsewhere.path}: it describes {elsewhere.dotted} alone, which is not "
            f"implemented; describe one of {known}"
        )


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


def _parse(path: Path, foreign: dict[str, _Foreign]) -> Iterator[tuple[_Table, str, object]]:
    """Yield (table, field, value) for every key of a file; those that are not ours go elsewhere."""
    for table, entries in _tables(path):
        known = TABLE_ALIASES.get(table, table)
        if table[0] == "hypervisor" and table[1] in FOREIGN_MONITORS:
            name = ".".join(table)
            foreign[name] = _Foreign(path=path, dotted=name, value=entries, key=None)
            continue
        if known not in TABLES and known not in FOREIGN:
            raise _unknown(path, key=".".join(table), value=entries, known=_table_names())
        for name, value in _expect_table(path, table, entries).items():
            place, key_name = MOVED.get((known, name), (known, name))
            dotted = ".".join((*table, name))
            keys = TABLES.get(place, {})
            if key := keys.get(key_name):
                yield place, key.field, _check(path, key, dotted=dotted, value=value)
            elif other := FOREIGN.get(known, {}).get(name):
                entry = _Foreign(path=path, dotted=dotted, value=value, key=other)
                foreign[".".join((*known, name))] = entry
            else:
                names = list(keys) or list(FOREIGN[known])
                raise _unknown(path, key=dotted, value=value, known=names)


def _tables(path: Path) -> Iterator[tuple[_Table, object]]:
    """Yield each table of a file: of two levels where Kata has one for each kind of a part."""
    outer = {table[0]: len(table) for table in (*TABLES, *FOREIGN)}
    for name, value in _read_toml(path).items():
        if outer.get(name) != _TWO_LEVELS:
            yield (name,), value
            continue
        for inner, table in _expect_table(path, (name,), value).items():
            yield (name, inner), table


def _table_names() -> list[str]:
    return [".".join(table) for table in (*TABLES, *TABLE_ALIASES)]


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
