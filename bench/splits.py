"""What becomes of clusters that are empty, and of the objective: `split_by` of `kmeans`, and scikit-learn's way.

    python bench/splits.py [--seeds 5] [--out bench/results]

scikit-learn moves the centroid of an empty cluster to the point that is farthest from its own. All run ten iterations
from the same centroids: points, or points and as many random directions, of which most lie near no point. The table
shows by how much the objective of a way ends above or below that of "size", which is faiss's; the record has the mean
and the range over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from pcl_fast.clustering import kmeans

ITERATIONS, POINTS, D = 10, 20_000, 128
# Name, and how far points are scattered about how many directions, of which how many have how many points.
MIXTURES = {
    "loose": {"spread": 0.8, "directions": 100, "uneven": 0},
    "tight": {"spread": 0.3, "directions": 100, "uneven": 0},
    "loose, of uneven sizes": {"spread": 1.5, "directions": 300, "uneven": 3},
    "tight, of uneven sizes": {"spread": 0.2, "directions": 60, "uneven": 4},
}
KS = (100, 200, 400)


def digits() -> torch.Tensor:
    """Return unit features of 1,797 small images, [1797, 64]."""
    features = torch.from_numpy(load_digits().data).float()
    return F.normalize(features - features.mean(0), dim=1)


def mixture(spread: float, directions: int, uneven: float) -> torch.Tensor:
    """Return unit features [POINTS, D]: random directions and noise of this length. The chance of a direction is a
    random number to the power of `uneven`.
    """
    generator = torch.Generator().manual_seed(0)
    means = F.normalize(torch.randn(directions, D, generator=generator), dim=1)
    chances = torch.rand(directions, generator=generator) ** uneven
    labels = torch.multinomial(chances, POINTS, replacement=True, generator=generator)
    return F.normalize(means[labels] + spread / D**0.5 * torch.randn(POINTS, D, generator=generator), dim=1)


def data_sets() -> Iterator[tuple[str, torch.Tensor]]:
    yield "digits", digits()
    for name, options in MIXTURES.items():
        yield name, mixture(**options)


def points(features: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:k]]


def half_astray(features: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    directions = torch.randn(k - k // 2, features.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([points(features, k // 2, seed), F.normalize(directions, dim=1)])


STARTS = {"points": points, "half astray": half_astray}


def of_ours(split_by: str, features: torch.Tensor, init: torch.Tensor, seed: int) -> float:
    return kmeans(features, len(init), iterations=ITERATIONS, init=init, seed=seed, split_by=split_by).objective


def of_scikit_learn(features: torch.Tensor, init: torch.Tensor, seed: int) -> float:
    options = {"n_init": 1, "max_iter": ITERATIONS, "tol": 0, "algorithm": "lloyd"}
    return KMeans(len(init), init=init.numpy(), random_state=seed, **options).fit(features.numpy()).inertia_


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], float]] = {
    "size": partial(of_ours, "size"),
    "spread": partial(of_ours, "spread"),
    "scikit-learn": of_scikit_learn,
}


def compare(features: torch.Tensor, k: int, start: str, seeds: int) -> dict[str, dict[str, float]]:
    """Return, for every way, by how many percent its objective lies above that of "size": mean, least and most."""
    above: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(seeds):
        init = STARTS[start](features, k, seed)
        found = {name: way(features, init, seed) for name, way in WAYS.items()}
        for name, objective in found.items():
            above[name].append(100 * (objective / found["size"] - 1))
    return {
        name: {
            "percent_above_size": round(statistics.mean(of), 3),
            "least": round(min(of), 3),
            "most": round(max(of), 3),
        }
        for name, of in above.items()
    }


def as_table(cases: dict[str, Any]) -> Table:
    table = Table("case", *WAYS)
    for name, case in cases.items():
        table.add_row(name, *(f"{row['percent_above_size']:+.2f} %" for row in case["providers"].values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--out", type=Path, default=machine.HERE / "results")
    arguments = parser.parse_args()
    cases = {
        f"{name}, k = {k}, {start}": {"providers": compare(features, k, start, arguments.seeds)}
        for name, features in data_sets()
        for k in KS
        for start in STARTS
    }
    Console(width=120).print(as_table(cases))
    sizes = {"iterations": ITERATIONS, "seeds": arguments.seeds, "N": POINTS, "d": D}
    machine.write_record(arguments.out, "splits", sizes=sizes, cases=cases)


if __name__ == "__main__":
    main()
