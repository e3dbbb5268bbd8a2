"""Makes docs/benchmarks.md of bench/benchmarks.md.in, which has the text, and of the records, which have the figures.

    python bench/report.py

A figure that no record has is an error. On machines with a GPU the page shows all that was measured.
"""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import summary

from pcl_fast import plan as planner
from pcl_fast.planning.job import CLUSTERING, ENCODER, FEATURES

HERE = Path(__file__).parent
RESULTS, TEMPLATE, PAGE = HERE / "results", "benchmarks.md.in", HERE.parent / "docs" / "benchmarks.md"
CPU, XEON = "amd-epyc-cpu-2-threads", "intel-r-xeon-r-processor-cpu-2-threads"
GOAL = 24.0  # hours
UNBROKEN = {"break_long_words": False, "break_on_hyphens": False}
LIMITS = {
    "alu": "integer instructions", "tensor": "matrix units", "issue": "instructions a clock",
    "special": "special functions", "fma": "float instructions", "convert": "conversions",
}  # fmt: skip


def page(results: Path = RESULTS) -> str:
    """Return docs/benchmarks.md.

    Raises:
        jinja2.UndefinedError: the text names a figure that no record has.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "ms": milliseconds, "speed": speed, "rate": rate, "two": two,
        "share": lambda figures: two(figures["share_of_encoder_only"]),
        "most": most, "limit": lambda name: LIMITS.get(name, name), "anchor": anchor,
    }  # fmt: skip
    text = environment.get_template(TEMPLATE).render(
        cpu=figures_of(results / CPU),
        deviations=next(iter(read(results / CPU / "deviations.json")["cases"].values()))["providers"],
        slow_disk=figures_of(results / XEON)["slow_disk"],
        xeon_features=figures_of(results / XEON)["features"],
        epyc_features=figures_of(results / CPU)["features"]["resnet18, 64 px, 64 images"],
        starts=read(results / CPU / "starts.json")["cases"],
        splits_seeds=read(results / CPU / "splits.json")["sizes"]["seeds"],
        profile=profile(results / CPU / "step-profile.txt"),
        bounds={record["target"]: record for record in map(read, sorted(results.glob("bounds-sm_*.json")))},
        gpus=gpus(results),
        plan=hours,
    )
    return wrapped(text)


def wrapped(text: str) -> str:
    """Return the page with its paragraphs filled, and no space at the end of a line."""
    blocks, in_code = [], False
    for block in re.split(r"\n{2,}", "\n".join(map(str.rstrip, text.strip().splitlines()))):
        is_prose = re.match(r"[\w*]", block) and not in_code
        in_code ^= block.count("```") % 2 == 1
        blocks.append(textwrap.fill(block, 120, **UNBROKEN) if is_prose else block)
    return "\n\n".join(blocks) + "\n"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def figures_of(folder: Path) -> dict[str, dict]:
    """Return a machine's figures: record -> case -> provider -> figure."""
    return {
        path.stem: {case: content.get("providers", {}) for case, content in read(path)["cases"].items()}
        for path in sorted(folder.glob("*.json"))
    }


def gpus(results: Path) -> list[dict[str, str]]:
    """Return name, folder and tables of every machine with a GPU."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        records = sorted(folder.glob("*.json"))
        name = read(records[0])["machine"] if records else "CPU"
        if not re.search(r"\bCPU\b", name):
            found.append({"name": name, "slug": folder.name, "summary": summary.summary(folder).strip()})
    return found


def profile(path: Path) -> dict[str, str]:
    """Return, in ms, what a step of ours adds to the encoder's passes."""
    whole, encoder = (
        float(re.search(rf"^{name} +([\d.]+)", path.read_text(), re.MULTILINE)[1])
        for name in ("together", "encoder-only")
    )
    return {"added": f"{whole - encoder:.0f}"}


@functools.cache
def hours(preset: str, **changes: float) -> dict[str, str]:
    """Return hours of a plan, ours, ours with what fusion should bring (projected; fused: its encoder) and the official
    way's, and ours by phases. faster: by what factor the encoder would have to be faster than planned for the goal to
    be met.
    """
    found = planner.plan(replace(planner.CHOICES[preset][1], **changes))
    own, encoder = planner.hours(found.ours), found.ours[ENCODER].hours
    named = {name: found.ours[phase].hours for name, phase in (("features", FEATURES), ("clustering", CLUSTERING))}
    numbers = {
        "ours": own,
        "projected": planner.hours(found.projected),
        "encoder": encoder,
        "fused": found.projected[ENCODER].hours,
        **named,
        "rest": own - encoder - sum(named.values()),
        "faster": encoder / (GOAL - own + encoder),
    }
    # The official way's hours are too many for tenths.
    return {
        **{key: f"{hours:.1f}" for key, hours in numbers.items()},
        "official": f"{planner.hours(found.official):.0f}",
    }


# --- how figures are written --------------------------------------------------------------------------------------


def milliseconds(figures: Mapping[str, Any]) -> str:
    ms = figures["median_ms"]
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.{0 if ms >= 10 else 1}f} ms"


def speed(figures: Mapping[str, Any]) -> str:
    """Return how fast a provider is beside the first one, if both ran together."""
    times = figures.get("times_faster_than_first")
    if times is None:
        return "not compared in one run"
    text = f"{times:.{0 if times >= 10 else 1 if times >= 2 else 2}f} times"
    return f"{text} faster" if times > 1 else f"{text} as fast"


def rate(figures: Mapping[str, Any]) -> str:
    images = figures["images_per_s"]
    return f"{images:,.0f} images/s"


def two(number: float) -> str:
    return f"{number:.2f}"


def most(bound: Mapping[str, Any]) -> str:
    return f"{bound['tflop_per_s']:.0f} TFLOP/s" if bound["tflop_per_s"] else f"{bound['tb_per_s']:.2f} TB/s"


def anchor(name: str, *before: str) -> str:
    """Return what a heading is called in links, as GitHub has it."""
    return re.sub(r"[^\w\- ]", "", " ".join([*before, name]).lower()).replace(" ", "-")


def main() -> None:
    PAGE.write_text(page())
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
