"""The whole method in five minutes: python -m pcl_fast.demo [PRESET]

Writes 5,000 handwritten digits as JPEG class folders, trains a preset on them, made small, with two processes through
the same entry point as ImageNet, compares what the encoder learned with raw pixels and with the untrained encoder, and
writes pages that show what it found.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from pcl_fast.clustering import kmeans
from pcl_fast.command import command
from pcl_fast.config import PRESETS, Config, changed_settings, setting, with_settings
from pcl_fast.crop_sizes import Stage
from pcl_fast.data import clustering_loader, find_images, normalise
from pcl_fast.data.sources.digits import digits_folder
from pcl_fast.distributed import World
from pcl_fast.evaluation import adjusted_mutual_information, knn_accuracy
from pcl_fast.evaluation.labelled import pair
from pcl_fast.evaluation.miniature import SHOTS, LabelScores, score_features, score_fine_tuned
from pcl_fast.explore import Options as Explored
from pcl_fast.explore import explore
from pcl_fast.methods import build, flag, method_class
from pcl_fast.nn.encoder import Encoder
from pcl_fast.pretrained import Pretrained, read_pretrained
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows

RANKS = 2
_CPU = torch.device("cpu")
# Every fifth image is a test image where labels are learned from.
_TEST_SHARE = 5
# Of kNN's votes, the same for every preset.
_TEMPERATURE = 0.1


@dataclass
class Scores:
    """AMI of k-means into 10 and into 50 clusters with the digits, and leave-one-out kNN accuracy."""

    ami_10: float
    ami_50: float
    knn: float


def main(
    preset: Annotated[str, tyro.conf.Positional] = "demo", /, output: Path | None = None, compare: bool = False
) -> None:
    """Train and print the tables.

    Args:
        preset: any of pcl_fast.train's; what makes its method is kept, what goes with the size of the data made small.
        output: the run's folder, by default runs/PRESET; a run that is already there goes on, or is only scored again
            if it is complete.
        compare: also train the same recipe without prototypes, InfoNCE alone, into OUTPUT-infonce, which takes as long
            again, and show it in the tables.
    """
    if preset not in PRESETS:
        sys.exit(f"pcl_fast.demo: there is no preset {preset!r}; choose from {', '.join(PRESETS)}")
    output = output or Path("runs") / (preset if preset == "demo" else f"demo-{preset}")
    folder = digits_folder()
    print(f"5,000 digits as JPEG class folders in {folder}", flush=True)
    config = small(preset)
    if compare and not config.cluster.ks:
        sys.exit(f"pcl_fast.demo: --compare leaves out the prototypes, and {preset} has none")
    train(config, output, folder)
    runs = {"trained": output}
    if compare:
        runs = {"InfoNCE alone": output.with_name(f"{output.name}-infonce"), **runs}
        train(without_prototypes(config), runs["InfoNCE alone"], folder)
    begin = time.perf_counter()
    print("scoring", flush=True)
    scores, label_scores = score_all(config, runs, folder)
    console = Console()
    console.print(as_table(scores))
    console.print(as_label_table(label_scores))
    print(f"scored in {time.perf_counter() - begin:.0f} seconds")
    print(f"{RANKS} processes, {minutes_of(output):.1f} minutes of training; more in {output}/report.png")
    explore(Explored(run=output, data=folder, output=output / "site", force=True))


def small(preset: str) -> Config:
    """The preset at the demo's scale."""
    return PRESETS["demo"][1] if preset == "demo" else miniature(PRESETS[preset][1])


def miniature(config: Config) -> Config:
    """A recipe at the demo's scale: 5,000 digits of 20 px, an encoder of 80,000 parameters, 24 epochs of batches of 64.

    All get the same views, encoder, epochs, schedule and evaluation; what makes the method, its loss, head and
    optimiser, is kept. Method.miniature has what is the method's own.
    """
    demo, method = PRESETS["demo"][1], method_class(config.method)
    config = replace(
        config,
        epochs=demo.epochs,
        data=replace(demo.data, sizes=_small_stages(config)),
        model=replace(config.model, arch=demo.model.arch, small_stem=demo.model.small_stem),
        optim=replace(config.optim, batch_size=demo.optim.batch_size, schedule=demo.optim.schedule),
        evaluation=replace(demo.evaluation, ks=() if config.cluster.ks else demo.cluster.ks),
    )
    return with_settings(config, method.miniature(config))


def _small_stages(config: Config) -> tuple[Stage, ...]:
    """The same shares of the size and of the epochs."""
    demo = PRESETS["demo"][1]
    size, epochs = demo.data.size / config.data.size, demo.epochs / config.epochs
    return tuple(Stage(round(stage.size * size), round(stage.until * epochs)) for stage in config.data.sizes)


def without_prototypes(config: Config) -> Config:
    """The same recipe with InfoNCE alone."""
    changes = {"cluster.ks": (), "evaluation.ks": config.cluster.ks}
    return with_settings(config, changes)


def train(config: Config, output: Path, folder: Path) -> None:
    """Launch the trainer as a user would; ends the program if the run did not come to its end."""
    launcher = ["-m", "pcl_fast.launch", f"--nproc-per-node={RANKS}"]
    trainer = ["-m", "pcl_fast.train", config.preset, "--data", str(folder), "--output", str(output)]
    command = [sys.executable, *launcher, *trainer, *flags(config)]
    print(shlex.join(["python", *command[1:]]), flush=True)
    # One thread per rank, and no GPU where the ranks would have to share it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < RANKS:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the run as well, which saves
    code = run.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if code or not load_checkpoint(output)["finished"]:
        sys.exit(code or "stopped; the same command goes on")


def flags(config: Config) -> list[str]:
    """The command line's flags that make a preset this configuration."""
    found: list[str] = []
    for name in changed_settings(PRESETS[config.preset][1], config):
        if name not in ("output", "preset"):
            value: Any = setting(config, name)
            if isinstance(value, bool):
                found.append(flag(name) if value else re.sub(r"(--|\.)(?=[^.]+$)", r"\1no-", flag(name), count=1))
            else:
                found += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def minutes_of(output: Path) -> float:
    """Time of all phases of the run, over all its continuations."""
    phases = [row["seconds"] for row in read_rows(output) if row["kind"] in ("epoch", "finished")]
    # Waiting for data is part of training.
    return sum(value for row in phases for name, value in row.items() if name != "waiting for data") / 60


def score_all(config: Config, runs: dict[str, Path], folder: Path) -> tuple[dict[str, Scores], dict[str, LabelScores]]:
    """Scores of raw pixels, of the untrained encoder, and of the encoders in the folders of `runs`.

    Returns:
        Of the unit features and the backbone's, of all images; and what labels add to the backbone's.
    """
    world = World(0, 1, _CPU, None)
    images = find_images(folder)
    labels = torch.tensor(images.labels)
    views = torch.cat(list(clustering_loader(images, config.data, batch_size=500, world=world)))
    # Images of a class lie together.
    tested = torch.arange(len(images)) % _TEST_SHARE == _TEST_SHARE - 1
    train, test = (images.subset(mask.nonzero().view(-1).tolist()) for mask in (~tested, tested))
    labelled = pair(train, test)

    pixels = np.stack([np.asarray(images.read(index).convert("L")) for index in range(len(images))])
    pixels = torch.from_numpy(pixels).flatten(1).float()
    scores = {"raw pixels": score(pixels, labels)}
    label_scores = {"raw pixels": LabelScores(*score_features(pixels[~tested], pixels[tested], labelled), None)}
    method = build(config, world, len(images))
    for state in ("untrained", *runs):
        encoders = {
            name: method.encoders()[name].eval() if state == "untrained" else read_pretrained(runs[state], name)
            for name in {method.features().encoder, "query"}
        }
        backbone, features = encoded(encoders[method.features().encoder], views)
        scores[f"{state}, backbone"], scores[f"{state}, 128-d"] = score(backbone, labels), score(features, labels)
        backbone, _ = encoded(encoders["query"], views)
        label_scores[state] = LabelScores(
            *score_features(backbone[~tested], backbone[tested], labelled),
            score_fine_tuned(encoders["query"].backbone, backbone.shape[1], labelled, config.data, world),
        )
    return scores, label_scores


@torch.inference_mode()
def encoded(encoder: Encoder | Pretrained, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the backbone's features, unit features) of the clustering view, uint8 [n, H, W, 3]."""
    backbone = torch.cat([encoder.backbone(normalise(chunk, torch.float32)) for chunk in views.split(500)])
    return backbone, F.normalize(encoder.head(backbone), dim=1)


def score(features: torch.Tensor, labels: torch.Tensor) -> Scores:
    """Labels are used here and nowhere else. Everything is compared by angle, the raw pixels too: it favours them."""
    unit = F.normalize(features.clone(), dim=1)

    def ami(k: int) -> float:
        return adjusted_mutual_information(kmeans(unit, k, redo=10).assignment, labels)

    everything = torch.arange(len(labels))
    return Scores(ami(10), ami(50), knn_accuracy(unit, labels, everything, neighbours=20, temperature=_TEMPERATURE))


def as_table(rows: dict[str, Scores]) -> Table:
    table = Table("features", "AMI, k = 10", "AMI, k = 50", "kNN accuracy")
    for name, scores in rows.items():
        table.add_row(name, f"{scores.ami_10:.3f}", f"{scores.ami_50:.3f}", f"{scores.knn:.3f}")
    return table


def as_label_table(rows: dict[str, LabelScores]) -> Table:
    title = "accuracy, %, on 1,000 digits from labels of the 4,000 others"
    low_shot = [f"SVM {shots}" for shots in SHOTS]
    table = Table("backbone", *low_shot, "linear", "1%", "10%", title=title)
    for name, scores in rows.items():
        semi = ("-", "-") if scores.semi is None else [f"{value:.1f}" for value in scores.semi]
        table.add_row(name, *[f"{value:.1f}" for value in scores.low_shot], f"{scores.linear:.1f}", *semi)
    return table


if __name__ == "__main__":
    with command("pcl_fast.demo"):
        tyro.cli(main)
