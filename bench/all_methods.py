"""All methods on the digits: what they learn in equally many epochs, and how long that takes.

    python bench/all_methods.py [--seeds 3] [--presets P ...] [--runs runs/methods] [--out bench/results]

Every preset is trained as `python -m pcl_fast.demo PRESET` does it, in two processes, with each seed. Presets take
turns, each seed in another order, so that all see the machine alike. A measurement that was cut short goes on with the
same command, and more seeds are added by a larger --seeds. The record is <out>/<machine>/all_methods.json: of every
preset the median over the seeds of the run's time (median_ms), means of the scores, and the seeds one by one. Presets
that are not asked for keep what the record has of them.

Scores are of the encoder that represents the images (of methods that cluster a momentum encoder's features, that one):
AMI and leave-one-out kNN of its 128 features and of its backbone's; and, of the query encoder's backbone, a linear
classifier from 4,000 labels and SVMs from 1 and 8 labels of a class, in percent of 1,000 test digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from rich.console import Console
from rich.table import Table

from pcl_fast import demo
from pcl_fast.config import PRESETS
from pcl_fast.data import ImageSet, clustering_loader, find_images
from pcl_fast.data.sources.digits import digits_folder
from pcl_fast.distributed import World
from pcl_fast.evaluation.labelled import Labelled, pair
from pcl_fast.evaluation.miniature import SHOTS, score_features
from pcl_fast.methods import method_class
from pcl_fast.pretrained import read_pretrained

# One of each method, and both of PCL's and MoCo's newest recipes.
METHODS = ("pcl_v2", "moco_v2", "simclr", "siamese_pcl", "deepcluster_v2", "instdisc", "swav", "byol")
SHOWN_SHOTS = (1, 8)
SCORES = {
    "ami_10": "AMI, k = 10",
    "ami_50": "AMI, k = 50",
    "knn": "kNN",
    "backbone_ami_10": "AMI, k = 10, backbone",
    "backbone_ami_50": "AMI, k = 50, backbone",
    "backbone_knn": "kNN, backbone",
    "linear": "linear, %",
    **{f"svm_{shots}": f"SVM {shots}, %" for shots in SHOWN_SHOTS},
}
NAME, CASE = "all_methods", "digits"
_CPU = World(0, 1, torch.device("cpu"), None)
# Every fifth image is a test image, as in the demo.
_TEST_SHARE = 5


class Digits(NamedTuple):
    """The images, and how they are split where labels are learned from.

    tested: bool [n].
    """

    folder: Path
    images: ImageSet
    labels: torch.Tensor
    tested: torch.Tensor
    labelled: Labelled


def digits() -> Digits:
    folder = digits_folder()
    images = find_images(folder)
    tested = torch.arange(len(images)) % _TEST_SHARE == _TEST_SHARE - 1
    parts = (images.subset(mask.nonzero().view(-1).tolist()) for mask in (~tested, tested))
    return Digits(folder, images, torch.tensor(images.labels), tested, pair(*parts))


def measure(preset: str, seed: int, runs: Path, data: Digits) -> dict[str, float]:
    """Train, unless it is done already; return scores and seconds."""
    config, output = replace(demo.small(preset), seed=seed), runs / f"{preset}-{seed}"
    demo.train(config, output, data.folder)
    views = torch.cat(list(clustering_loader(data.images, config.data, batch_size=500, world=_CPU)))
    backbone, features = demo.encoded(read_pretrained(output, representing(preset)), views)
    of_features, of_backbone = demo.score(features, data.labels), demo.score(backbone, data.labels)
    learned, _ = demo.encoded(read_pretrained(output, "query"), views)
    linear, low_shot = score_features(learned[~data.tested], learned[data.tested], data.labelled)
    return {
        **vars(of_features),
        **{f"backbone_{name}": value for name, value in vars(of_backbone).items()},
        "linear": linear,
        **{f"svm_{shots}": low_shot[SHOTS.index(shots)] for shots in SHOWN_SHOTS},
        "seconds": 60 * demo.minutes_of(output),
    }


def representing(preset: str) -> str:
    """Return the name of the encoder that represents the images."""
    config = demo.small(preset)
    return method_class(config.method)(config, _CPU, 5000).features().encoder


def figures(seeds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return what the record says of a preset."""
    return {
        "median_ms": round(1e3 * statistics.median(seed["seconds"] for seed in seeds)),
        **{name: round(statistics.mean(seed[name] for seed in seeds), 4) for name in SCORES},
        "seeds": [{name: round(value, 4) for name, value in seed.items()} for seed in seeds],
    }


def as_table(providers: dict[str, dict[str, Any]]) -> Table:
    table = Table("preset", "seeds", *SCORES.values(), "seconds")
    for name, row in providers.items():
        cells = [f"{row[score]:.1f}" if "%" in title else f"{row[score]:.3f}" for score, title in SCORES.items()]
        table.add_row(name, f"{len(row['seeds'])}", *cells, f"{row['median_ms'] / 1e3:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--presets", nargs="+", default=METHODS, choices=sorted(PRESETS))
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=machine.HERE / "results")
    arguments = parser.parse_args()
    data, names = digits(), list(arguments.presets)
    seeds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(arguments.seeds):
        turn = seed % len(names)
        for name in names[turn:] + names[:turn]:
            seeds[name].append(measure(name, seed, arguments.runs, data))
    path = arguments.out / machine.slug() / f"{NAME}.json"
    before = json.loads(path.read_text())["cases"][CASE]["providers"] if path.is_file() else {}
    providers = before | {name: figures(of_preset) for name, of_preset in seeds.items()}
    providers = {name: providers[name] for name in PRESETS if name in providers}
    Console(width=200).print(as_table(providers))
    sizes = {"images": len(data.images), "epochs": demo.small(names[0]).epochs, "ranks": demo.RANKS}
    machine.write_record(arguments.out, NAME, sizes=sizes, cases={CASE: {"providers": providers}})


if __name__ == "__main__":
    main()
