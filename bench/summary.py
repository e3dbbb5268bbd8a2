"""The records of a machine as tables in Markdown.

    python bench/summary.py bench/results/<machine>

writes summary.md into that folder, and loss.png where there is matplotlib and a record of the loss on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Of a provider's figures: column, key, how to write it. A column that no row of a table has is left out.
COLUMNS = (
    ("median, ms", "median_ms", "{:,.4g}"),
    ("20th percentile", "p20_ms", "{:,.4g}"),
    ("80th", "p80_ms", "{:,.4g}"),
    ("times the first", "times_faster_than_first", "{:.2f}"),
    ("TFLOP/s", "tflop_per_s", "{:,.4g}"),
    ("share of a matrix product", "share_of_matmul", "{:.0%}"),
    ("GB/s", "gb_per_s", "{:,.4g}"),
    ("images/s", "images_per_s", "{:,.0f}"),
    ("share of the encoder's speed", "share_of_encoder_only", "{:.2f}"),
    ("times the official", "times_official", "{:.2f}"),
    ("share of the data sheet's FLOP/s", "mfu", "{:.0%}"),
    ("objective, % above the first's", "percent_above_size", "{:+.2f}"),
    ("share of the sum", "share_of_sum", "{:.2f}"),
    ("host waits", "host_waits_share", "{:.0%}"),
    ("the paper's E-step, estimated, ms", "estimated_paper_ms", "{:,.0f}"),
    ("memory, MB", "peak_extra_bytes", "{:,.1f}"),
)
# Records that hold no providers.
OTHERS = ("machine", "first-hour", "run")


def summary(folder: Path) -> str:
    """Return all tables of a machine's records, without a heading."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = [stack(records["machine"])] if "machine" in records else []
    parts += [outcomes(records["first-hour"])] if "first-hour" in records else []
    parts += [real_run(records["run"])] if "run" in records else []
    parts += [benchmark(name, record) for name, record in records.items() if name not in OTHERS]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def stack(record: dict[str, Any]) -> str:
    left_out = ("machine", "packages", "cases")
    said = {key: value for key, value in record.items() if key not in left_out} | record.get("packages", {})
    return table(("machine", record["machine"]), [(key.replace("_", " "), str(value)) for key, value in said.items()])


def outcomes(record: dict[str, Any]) -> str:
    rows = [
        (name, case["outcome"], case["why"], f"{case['seconds']:.0f}", case["date"], case["commit"])
        for name, case in record["cases"].items()
        if name != "summary"
    ]
    return table(("part", "outcome", "", "seconds", "date", "commit"), rows)


def real_run(record: dict[str, Any]) -> str:
    losses = [row["loss"] for row in record["rows"] if row["kind"] == "step"]
    said = "; ".join(record["wrong"]) or "as it should be"
    return (
        f"Steps of a real run (decoder: {record['decoder']}): {said}. Losses "
        f"{', '.join(f'{loss:.4g}' for loss in losses) or 'none'}."
    )


def benchmark(name: str, record: dict[str, Any]) -> str:
    """Return a record's table. In each case the first provider is what the others are compared with."""
    rows = [
        (f"{case}{_when(content)}", f"{provider}{_when(figures)}", figures)
        for case, content in record["cases"].items()
        for provider, figures in content["providers"].items()
    ]
    used = [column for column in COLUMNS if any(figures.get(column[1]) is not None for *_, figures in rows)]
    heads = (f"{name} ({record['date']}, {record['commit']})", "by", *(column[0] for column in used))
    return table(heads, [(case, by, *(_cell(figures, *column[1:]) for column in used)) for case, by, figures in rows])


def _when(measured: dict[str, Any]) -> str:
    """Say when a case or a provider was measured that the last run of its benchmark left out."""
    return " ({date}, {commit})".format(**measured["measured"]) if "measured" in measured else ""


def _cell(figures: dict[str, Any], key: str, form: str) -> str:
    value = figures.get(key)
    if value is None:
        return ""
    return form.format(value / 1e6 if key == "peak_extra_bytes" else value)


def main() -> None:
    folder = Path(sys.argv[1])
    record = folder / "loss.json"
    if record.is_file() and any(case.get("floor_ms") for case in json.loads(record.read_text())["cases"].values()):
        try:
            import plot
        except ModuleNotFoundError as error:
            print(f"no picture of the loss: {error}")
        else:
            print(f"written: {plot.plot(record)}")
    names = [json.loads(path.read_text())["machine"] for path in sorted(folder.glob("*.json"))]
    text = f"# {names[0] if names else folder.name}\n\n{summary(folder)}"
    (folder / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
