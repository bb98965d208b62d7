"""How a measurement under pytest hands its samples to ``run.py``: one JSON object a line.

Used by ``conftest.py``, whose ``record`` fixture is this bound to a file, and by the ``bench_*.py``
files for its type.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Appends to a file; without one, samples go nowhere and pytest's own table is all there is."""

    path: Path | None

    def keep(
        self, name: str, *, ours: Sequence[float], reference: Sequence[float], note: str = ""
    ) -> None:
        """Keep the samples of both sides under the figure's name."""
        self._append({"name": name, "ours": list(ours), "reference": list(reference), "note": note})

    def fail(self, test: str, *, reason: str) -> None:
        """Tell that a test did not measure what it should have."""
        self._append({"failed": test, "reason": reason})

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
