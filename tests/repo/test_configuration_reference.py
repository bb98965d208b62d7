"""The reference page lists exactly the keys there are."""

import re
from pathlib import Path

from kata_hybrid.config.keys import TABLES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "configuration.md"


def test_reference_lists_every_key_of_every_table() -> None:
    listed: dict[tuple[str, ...], set[str]] = {}
    table: tuple[str, ...] = ()
    for line in PAGE.read_text().splitlines():
        if heading := re.fullmatch(r"## `\[(.+)\]`", line):
            table = tuple(heading[1].split("."))
            listed[table] = set()
        elif row := re.match(r"\| `(\w+)` \|", line):
            listed[table].add(row[1])
    assert listed == {table: set(keys) for table, keys in TABLES.items()}
