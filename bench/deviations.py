"""What pcl_v2_fast saves and loses: the digits in pcl_v2's way, with each of its deviations alone, and with all.

    python bench/deviations.py [--seeds 3] [--epochs 24] [--runs runs/deviations] [--out bench/results]

Every way is the demo's miniature of pcl_v2 with the paper's five starts of k-means, for as many epochs, in two
processes; nothing is evaluated while it trains. Ways take turns, each seed in another order, so that all see the
machine alike. A measurement that was cut short goes on with the same command. The record is
<out>/<machine>/deviations.json: of every way the median over the seeds of the run's time (median_ms), means of the
scores, and the seeds one by one. Scores are the demo's, of the momentum encoder's 128 features and of its backbone,
at the full size of the digits.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from rich.table import Table

from pcl_fast import demo
from pcl_fast.config import PRESETS, Config, changed_settings, setting, with_settings
from pcl_fast.crop_sizes import Stage
from pcl_fast.data import clustering_loader, find_images
from pcl_fast.data.sources.digits import digits_folder
from pcl_fast.distributed import World
from pcl_fast.pretrained import read_pretrained
from pcl_fast.run.metrics import read_rows

PAPER, ALL = "pcl_v2's way", "all"
# Which of the deviations belong together.
GROUPS = {
    "keys as features": ("cluster.features",),
    "warm start, 10 iterations": ("cluster.init", "cluster.warm_iterations"),
    "crops that grow": ("data.sizes",),
}
SCORES = {"knn": "kNN", "ami_10": "AMI, k = 10", "ami_50": "AMI, k = 50", "backbone_knn": "kNN, backbone"}
PHASES = ("training", "features", "clustering")


def ways(epochs: int) -> dict[str, Config]:
    """Return the recipes, by name."""
    usual = demo.small("pcl_v2")
    share = epochs / usual.epochs
    paper = with_settings(
        usual,
        {
            "epochs": epochs,
            "cluster.redo": PRESETS["pcl_v2"][1].cluster.redo,
            "cluster.warmup_epochs": max(1, round(usual.cluster.warmup_epochs * share)),
            "evaluation.every": 0,
        },
    )
    fast = demo.small("pcl_v2_fast")
    values = {name: setting(fast, name) for name in deviations()}
    values["data.sizes"] = scaled(fast.data.sizes, share)
    found = {PAPER: paper}
    for name, settings in GROUPS.items():
        found[name] = with_settings(paper, {setting: values[setting] for setting in settings})
    return {**found, ALL: with_settings(paper, values)}


def deviations() -> list[str]:
    """Return the settings in which the two presets differ."""
    paper, fast = PRESETS["pcl_v2"][1], PRESETS["pcl_v2_fast"][1]
    return [name for name in changed_settings(paper, fast) if name not in ("preset", "output")]


def scaled(stages: Sequence[Stage], share: float) -> tuple[Stage, ...]:
    """Return stages of a run that is so many times as long, without those that have no epoch then."""
    kept: list[Stage] = []
    for stage in stages:
        until = round(stage.until * share)
        if until > (kept[-1].until if kept else 0):
            kept.append(Stage(stage.size, until))
    return tuple(kept)


def measure(config: Config, output: Path, folder: Path, views: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Train, unless it is done already; return scores and seconds."""
    demo.train(config, output, folder)
    encoder = read_pretrained(output, "momentum")
    backbone, features = demo.encoded(encoder, views)
    found, of_backbone = demo.score(features, labels), demo.score(backbone, labels)
    seconds = Counter()
    for row in read_rows(output):
        if row["kind"] in ("epoch", "finished"):
            seconds.update({phase: row["seconds"].get(phase, 0.0) for phase in PHASES})
    return {
        **vars(found),
        "backbone_knn": of_backbone.knn,
        "seconds": 60 * demo.minutes_of(output),
        **{f"seconds_{phase}": seconds[phase] for phase in PHASES},
    }


def figures(seeds: Sequence[dict[str, float]], first: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return what the record says of a way."""
    own, paper = (statistics.median(seed["seconds"] for seed in way) for way in (seeds, first))
    keys = [*SCORES, *(f"seconds_{phase}" for phase in PHASES)]
    return {
        "median_ms": round(1e3 * own),
        "times_faster_than_first": round(paper / own, 2),
        **{key: round(statistics.mean(seed[key] for seed in seeds), 4) for key in keys},
        "seeds": [{key: round(value, 4) for key, value in seed.items()} for seed in seeds],
    }


def as_table(providers: dict[str, dict[str, Any]], title: str) -> Table:
    table = Table("way", *SCORES.values(), "seconds", *PHASES, "times", title=title)
    for name, row in providers.items():
        spread = [
            f"{row[key]:.3f} ({min(seed[key] for seed in row['seeds']):.3f} to "
            f"{max(seed[key] for seed in row['seeds']):.3f})"
            for key in SCORES
        ]
        seconds = [f"{row['median_ms'] / 1e3:.0f}", *(f"{row[f'seconds_{phase}']:.0f}" for phase in PHASES)]
        table.add_row(name, *spread, *seconds, f"{row['times_faster_than_first']:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--epochs", type=int, default=demo.small("pcl_v2").epochs)
    parser.add_argument("--runs", type=Path, default=Path("runs/deviations"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=machine.HERE / "results")
    arguments = parser.parse_args()
    folder = digits_folder()
    images = find_images(folder)
    recipes = ways(arguments.epochs)
    view = clustering_loader(images, recipes[PAPER].data, batch_size=500, world=World(0, 1, torch.device("cpu"), None))
    views, labels = torch.cat(list(view)), torch.tensor(images.labels)
    seeds: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    names = list(recipes)
    for seed in range(arguments.seeds):
        turn = seed % len(names)
        for name in names[turn:] + names[:turn]:
            output = arguments.runs / f"{arguments.epochs}-epochs" / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
            config = replace(recipes[name], seed=seed)
            seeds[name].append(measure(config, output, folder, views, labels))
    providers = {name: figures(of_way, seeds[PAPER]) for name, of_way in seeds.items()}
    case = f"digits, {arguments.epochs} epochs, seeds 0 to {arguments.seeds - 1}"
    Console(width=200).print(as_table(providers, case))
    sizes = {"images": len(images), "epochs": arguments.epochs, "ranks": demo.RANKS}
    machine.write_record(arguments.out, "deviations", sizes=sizes, cases={case: {"providers": providers}})


if __name__ == "__main__":
    main()
