"""The whole method in five minutes: python -m pcl_fast.demo

Writes 5,000 handwritten digits as JPEG class folders, trains on them with two processes through the same entry point as
ImageNet, and compares what the encoder learned with raw pixels and with the untrained encoder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from pcl_fast.clustering import kmeans
from pcl_fast.config import PRESETS
from pcl_fast.data import clustering_loader, find_images, normalise
from pcl_fast.data.sources.digits import digits_folder
from pcl_fast.distributed import World
from pcl_fast.evaluation import adjusted_mutual_information, knn_accuracy
from pcl_fast.learner import Learner
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows

RANKS = 2


@dataclass
class Scores:
    """AMI of k-means into 10 and into 50 clusters with the digits, and leave-one-out kNN accuracy."""

    ami_10: float
    ami_50: float
    knn: float


def main(output: Path = Path("runs/demo")) -> None:
    """Train and print the table.

    Args:
        output: the run's folder; a run that is already there goes on, or is only scored again if it is complete.
    """
    folder = digits_folder()
    print(f"5,000 digits as JPEG class folders in {folder}", flush=True)
    train(output, folder)
    Console().print(as_table(score_all(output, folder)))
    print(f"{RANKS} processes, {minutes_of(output):.1f} minutes of training; more in {output}/report.png")


def train(output: Path, folder: Path) -> None:
    """Launch the trainer as a user would; ends the program if the run did not come to its end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    trainer = ["-m", "pcl_fast.train", "demo", "--data", str(folder), "--output", str(output)]
    # One thread per rank, and no GPU where the ranks would have to share it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < RANKS:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.Popen([*torchrun, *trainer], env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the run as well, which saves
    code = run.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if code or not load_checkpoint(output)["finished"]:
        sys.exit(code or "stopped; the same command goes on")


def minutes_of(output: Path) -> float:
    """Time of all phases of the run, over all its continuations."""
    phases = [row["seconds"] for row in read_rows(output) if row["kind"] in ("epoch", "finished")]
    # Waiting for data is part of training.
    return sum(value for row in phases for name, value in row.items() if name != "waiting for data") / 60


def score_all(output: Path, folder: Path) -> dict[str, Scores]:
    """Scores of raw pixels, the untrained and the trained momentum encoder: its unit features and its backbone's."""
    config = replace(PRESETS["demo"][1], output=output)
    world = World(0, 1, torch.device("cpu"), None)
    images = find_images(folder)
    labels = torch.tensor(images.labels)
    learner = Learner(config, world)
    views = torch.cat(list(clustering_loader(images, config.data, batch_size=500, world=world)))

    pixels = np.stack([np.asarray(images.read(index).convert("L")) for index in range(len(images))])
    rows = {"raw pixels": score(torch.from_numpy(pixels).flatten(1).float(), labels)}
    for name in ("untrained", "trained"):
        if name == "trained":
            state = load_checkpoint(output)
            learner.load(state["learner"], state["ranks"][0])
        encoder = learner.twin.key.eval()
        with torch.inference_mode():
            backbone = torch.cat([encoder.backbone(normalise(chunk, torch.float32)) for chunk in views.split(500)])
            features = F.normalize(encoder.head(backbone), dim=1)
        rows[f"{name}, backbone"] = score(backbone, labels)
        rows[f"{name}, 128-d"] = score(features, labels)
    return rows


def score(features: torch.Tensor, labels: torch.Tensor) -> Scores:
    """Labels are used here and nowhere else. Everything is compared by angle, the raw pixels too: it favours them."""
    unit = F.normalize(features.clone(), dim=1)
    temperature = PRESETS["demo"][1].loss.temperature

    def ami(k: int) -> float:
        return adjusted_mutual_information(kmeans(unit, k, redo=10).assignment, labels)

    everything = torch.arange(len(labels))
    return Scores(ami(10), ami(50), knn_accuracy(unit, labels, everything, neighbours=20, temperature=temperature))


def as_table(rows: dict[str, Scores]) -> Table:
    table = Table("features", "AMI, k = 10", "AMI, k = 50", "kNN accuracy")
    for name, scores in rows.items():
        table.add_row(name, f"{scores.ami_10:.3f}", f"{scores.ami_50:.3f}", f"{scores.knn:.3f}")
    return table


if __name__ == "__main__":
    tyro.cli(main)
