"""The benchmarks' records, <folder>/<machine>/<benchmark>.json, as bench/conftest.py writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pcl_fast.planning.constants import Constant

DEFAULT = Path(__file__).resolve().parents[2] / "bench" / "results"


class Record(NamedTuple):
    """One file."""

    path: Path
    content: dict[str, Any]

    @property
    def source(self) -> str:
        path = self.path.resolve()
        root = DEFAULT.parents[1]
        return f"measured: {path.relative_to(root) if path.is_relative_to(root) else path}"

    @property
    def on_cpu(self) -> bool:
        """Encoder and loader share the cores."""
        return " CPU, " in self.content["machine"]

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return self.content["cases"]

    def figure(self, group: str, provider: str, key: str) -> float | None:
        """None if that was not measured."""
        return self.cases.get(group, {}).get("providers", {}).get(provider, {}).get(key)

    def constant(self, name: str, value: float, unit: str) -> Constant:
        return Constant(name, value, unit, self.source)


class Records:
    """All of a folder: machine -> benchmark -> record."""

    def __init__(self, folder: Path):
        """
        Raises:
            ValueError: the folder is missing, or a file in it is no record.
        """
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(f"--results {folder} is no folder; give that of the benchmarks' records (bench/results)")
        self._machines: dict[str, dict[str, Record]] = {}
        for path in sorted(folder.glob("*/*.json")):
            self._machines.setdefault(path.parent.name, {})[path.stem] = _read(path)

    def __iter__(self) -> Iterator[Record]:
        return (record for benchmarks in self._machines.values() for record in benchmarks.values())

    def of_gpu(self, gpu: str) -> dict[str, Record]:
        """benchmark -> record of the first machine whose name has the word `gpu`; empty if there is none."""
        return next((found for name, found in self._machines.items() if gpu in name.split("-")), {})

    def find(self, benchmark: str, group: str, provider: str, key: str, *, first: str = "") -> tuple[Record, float]:
        """The figure and its record: of the machine with GPU `first` if it has one, else of any.

        Raises:
            ValueError: nobody has measured it.
        """
        candidates = [self.of_gpu(first), *self._machines.values()]
        for benchmarks in candidates:
            record = benchmarks.get(benchmark)
            value = record and record.figure(group, provider, key)
            if record and value is not None:
                return record, value
        raise ValueError(
            f'no record in {self.folder} says what {benchmark}.json has under "{group}", {provider}: {key}; run the '
            "benchmarks (make bench), or give another folder by --results"
        )


def _read(path: Path) -> Record:
    try:
        content = json.loads(path.read_text())
        record = Record(path, content)
        if not isinstance(content["machine"], str) or not isinstance(record.cases, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no benchmark's record; move it away or write it anew (make bench)") from error
    return record
