"""Put the tables of keys into ``docs/reference/configuration.md``, and write the JSON Schema.

    python scripts/configuration_reference.py [--check]

The page's text stays; what is between a table's heading and the next empty line after its rows is
replaced. ``--check`` changes nothing and fails if something would change.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from kata_hybrid.config.reference import MEANINGS, json_schema, markdown_table

_FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
PAGE = _FOLDER / "configuration.md"
SCHEMA = _FOLDER / "configuration.schema.json"


def page(text: str) -> str:
    """Return the page with its tables as the model has them."""
    for table in MEANINGS:
        heading = re.escape(f"## `[{'.'.join(table)}]`")
        rows = re.compile(rf"(^{heading}\n(?:(?!\|).*\n)*?)(?:\|.*\n)+", re.MULTILINE)
        text, count = rows.subn(lambda match: f"{match[1]}{markdown_table(table)}\n", text)  # noqa: B023
        if count != 1:
            message = f"{PAGE.name} has {count} tables of [{'.'.join(table)}]"
            raise ValueError(message)
    return text


def schema() -> str:
    """Return the schema's text."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or check both files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if one differs")
    is_check = parser.parse_args().check
    differs = False
    for path, wanted in ((PAGE, page(PAGE.read_text())), (SCHEMA, schema())):
        if path.exists() and path.read_text() == wanted:
            continue
        differs = True
        print(f"{path.name} {'differs' if is_check else 'written'}")
        if not is_check:
            path.write_text(wanted)
    return int(differs and is_check)


if __name__ == "__main__":
    sys.exit(main())
