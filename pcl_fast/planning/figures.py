"""Numbers that say where they come from: constants, and the benchmarks' records, out of which some are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("measured", "published", "assumed")
_PREFIXES = {
    "B/s": ((1e9, "G"),),
    "FLOP/s": ((1e12, "T"),),
    "s": ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n")),
}


@dataclass(frozen=True)
class Constant:
    """A number. `source` begins with its kind: "measured: <record>", "published: <where>" or "assumed: <why>"."""

    name: str
    value: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not self.source.partition(": ")[2]:
            raise ValueError(f'the source of "{self.name}" must be one of {", ".join(KINDS)}, a colon and which')

    @property
    def kind(self) -> str:
        return self.source.partition(":")[0]

    def __str__(self) -> str:
        """The value in a unit of readable size: 900 GB/s, 61.3 ms, 336 images/s per core."""
        quantity, _, per = self.unit.partition(" ")
        for factor, prefix in _PREFIXES.get(quantity, ()):
            if self.value >= factor:
                return f"{self.value / factor:,.4g} {prefix}{quantity} {per}".strip()
        return f"{self.value:,.4g} {self.unit}".strip()


# The repository's records, which a wheel brings along beside this file (pyproject.toml).
_BROUGHT, _CHECKED_OUT = Path(__file__).with_name("results"), Path(__file__).parents[2] / "bench" / "results"
DEFAULT = (_BROUGHT if _BROUGHT.is_dir() else _CHECKED_OUT).resolve()


class Record(NamedTuple):
    """One file, <folder>/<machine>/<benchmark>.json, as bench/conftest.py writes it."""

    path: Path
    content: dict[str, Any]

    @property
    def source(self) -> str:
        """The kind, and the file: by its place in the repository if it is one of the repository's."""
        path = self.path.resolve()
        ours = path.is_relative_to(DEFAULT)
        return f"measured: {Path('bench/results') / path.relative_to(DEFAULT) if ours else path}"

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return self.content["cases"]

    def figure(self, case: str, provider: str, key: str) -> float | None:
        """What was measured, or None."""
        return self.cases.get(case, {}).get("providers", {}).get(provider, {}).get(key)


class Records:
    """All records of a folder. `machines`: machine -> benchmark -> record."""

    def __init__(self, folder: Path):
        """
        Raises:
            ValueError: the folder is missing, or a file in it is no record.
        """
        if not folder.is_dir():
            raise ValueError(f"--results {folder} is no folder; give that of the benchmarks' records (bench/results)")
        self.folder = folder
        self.machines: dict[str, dict[str, Record]] = {}
        for path in sorted(folder.glob("*/*.json")):
            self.machines.setdefault(path.parent.name, {})[path.stem] = _read(path)

    def of_gpu(self, gpu: str) -> dict[str, Record]:
        """benchmark -> record of the first machine whose name has the word `gpu`; empty if there is none."""
        return next((found for name, found in self.machines.items() if gpu in name.split("-")), {})

    def find(self, benchmark: str, case: str, provider: str, key: str, *, first: str = "") -> Record:
        """The record that has the figure: of the machine with GPU `first` if it has one, else of any.

        Raises:
            ValueError: nobody has measured it.
        """
        for benchmarks in (self.of_gpu(first), *self.machines.values()):
            record = benchmarks.get(benchmark)
            if record and record.figure(case, provider, key) is not None:
                return record
        raise ValueError(
            f'no record in {self.folder} says what {benchmark}.json has under "{case}", {provider}: {key}; run the '
            "benchmarks (make bench), or give another folder by --results"
        )


def _read(path: Path) -> Record:
    try:
        record = Record(path, json.loads(path.read_text()))
        if not isinstance(record.content["machine"], str) or not isinstance(record.cases, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no benchmark's record; move it away or write it anew (make bench)") from error
    return record
