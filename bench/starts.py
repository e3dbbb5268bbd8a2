"""What `--cluster.prune-starts` costs: how often a start of k-means that was left after 5 iterations would have won.

    python bench/starts.py RUN [--seeds 20] [--out bench/results]

RUN is the folder of a run on the digits, runs/demo say. Its momentum encoder makes features of random views of the
digits, 100,000 of 5,000 images. They are clustered for every seed from five starts of 20 iterations, and again with
all but the best left early. The record has, for every number of clusters, how often the start that led after 5
iterations was not the best after 20, by how many percent the objective ended above that of the best, and the times of
the two ways, which take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pcl_fast import demo
from pcl_fast.clustering import KMeansResult, kmeans
from pcl_fast.config import PRESETS, PRUNED_AFTER, view_of
from pcl_fast.data import find_images, training_loader
from pcl_fast.data.sources.digits import digits_folder
from pcl_fast.distributed import World
from pcl_fast.pretrained import read_pretrained

POINTS, KS = 100_000, (100, 1000, 5000)
STARTS, ITERATIONS = 5, 20


@torch.no_grad()
def features_of(run: Path) -> torch.Tensor:
    """Return unit features of random views [POINTS, d]."""
    config, images = PRESETS["demo"][1], find_images(digits_folder())
    world = World(0, 1, torch.device("cpu"), None)
    loader = training_loader(images, config.data, views=[view_of(config.data)], batch_size=500, seed=0, world=world)
    encoder, found = read_pretrained(run, "momentum"), []
    for epoch in range(POINTS // len(images) + 1):
        for batch in loader.epoch(epoch):
            found.append(demo.encoded(encoder, batch.views[0])[1])
    return torch.cat(found)[:POINTS].contiguous()


def timed(features: torch.Tensor, k: int, seed: int, prune_after: int | None) -> tuple[KMeansResult, float]:
    begin = time.perf_counter()
    found = kmeans(features, k, iterations=ITERATIONS, redo=STARTS, seed=seed, prune_after=prune_after)
    return found, time.perf_counter() - begin


def compare(features: torch.Tensor, k: int, seeds: int) -> dict[str, Any]:
    """Return the figures of one number of clusters."""
    above, seconds = [], {"all": [], "pruned": []}
    for seed in track(range(seeds), f"k = {k}"):
        ways = {"all": None, "pruned": PRUNED_AFTER}
        results = {}
        for name in sorted(ways, reverse=bool(seed % 2)):
            # Seeds lie so far apart that no two of them share a start.
            results[name], took = timed(features, k, STARTS * seed, ways[name])
            seconds[name].append(took)
        above.append(100 * (results["pruned"].objective / results["all"].objective - 1))
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    # What went on ends with the bits that it would have had: the objective is the same, or another start had won.
    return {
        "seeds": seeds,
        "another_would_have_won": sum(percent > 0 for percent in above),
        "percent_above": {"mean": round(statistics.mean(above), 4), "most": round(max(above), 4)},
        "providers": {
            name: {"median_ms": round(ms, 1), "times_faster_than_first": round(medians["all"] / ms, 2)}
            for name, ms in medians.items()
        },
    }


def as_table(cases: dict[str, Any]) -> Table:
    table = Table("case", "another would have won", "objective above, mean", "most", "times faster")
    for name, case in cases.items():
        percent, pruned = case["percent_above"], case["providers"]["pruned"]
        won = f"{case['another_would_have_won']} of {case['seeds']}"
        above = f"{percent['mean']:.3f} %", f"{percent['most']:.3f} %"
        table.add_row(name, won, *above, f"{pruned['times_faster_than_first']:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--seeds", type=int, default=20, help="how many, from 0")
    parser.add_argument("--out", type=Path, default=machine.HERE / "results")
    arguments = parser.parse_args()
    features = features_of(arguments.run)
    cases = {f"k = {k}": compare(features, k, arguments.seeds) for k in KS}
    Console(width=120).print(as_table(cases))
    sizes = {"N": len(features), "d": features.shape[1], "starts": STARTS, "iterations": ITERATIONS}
    machine.write_record(arguments.out, "starts", sizes=sizes, cases=cases)


if __name__ == "__main__":
    main()
