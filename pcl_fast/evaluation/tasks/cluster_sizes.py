"""How large the clusters of a run are: Figure 3a."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from matplotlib.figure import Figure
from tyro.conf import Suppress

from pcl_fast.clustering import PrototypeSet
from pcl_fast.errors import CheckpointError, UserError
from pcl_fast.evaluation.pictures import names_of
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task
from pcl_fast.pretrained import Pretrained, read_pretrained


@dataclass(frozen=True, kw_only=True)
class ClusterSizes(Task, name="cluster-sizes", scores="query"):
    """How large the clusters of a run's last E-step are, beside those of another run (Figure 3a).

    The figure compares a run with one that has --cluster.fixed-concentration, at k = 50000. No images are needed.
    """

    against: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Another run's folder or checkpoint, to be drawn in the same picture."""
    k: int | None = None
    """Number of clusters, one of those of the run; None: the largest."""

    # Images, and how an encoder looks at them, are no use here.
    data: Suppress[Path | None] = None
    encoder: Suppress[None] = None
    size: Suppress[None] = None
    resize: Suppress[None] = None
    format: Suppress[str] = "folder"
    loader: Suppress[str] = "auto"
    workers: Suppress[None] = None
    cache: Suppress[None] = None
    seed: Suppress[int] = 0

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        try:
            found = read_pretrained(checkpoint, cls.scores).prototypes
        except (CheckpointError, OSError) as error:
            return str(error)
        return None if found else _missing(checkpoint)

    def run(self, context: Context) -> Outcome:
        paths = [self.checkpoint] if self.against is None else [self.checkpoint, self.against]
        runs = [context.pretrained] if self.against is None else [
            context.pretrained, context.read(self.against, self.scores)
        ]  # fmt: skip
        for path, pretrained in zip(paths, runs, strict=True):
            if not pretrained.prototypes:
                raise UserError(_missing(path))
        k = self.k or max(len(found.centroids) for found in context.pretrained.prototypes)
        sets = [_pick(path, pretrained, k) for path, pretrained in zip(paths, runs, strict=True)]
        names = [f"{name}, {_kind(found)}" for name, found in zip(names_of(paths), sets, strict=True)]
        sizes = [torch.bincount(found.assignment, minlength=k) for found in sets]
        rows = [Row(name, _scores(size)) for name, size in zip(names, sizes, strict=True)]
        protocol = (
            f"sizes of the {k} clusters of the last E-step before the checkpoint was saved, all images of the run's "
            "data set",
        )
        columns = ("clusters", "mean size", "standard deviation", "empty, %", "largest")
        return Outcome(protocol, columns, rows, [], partial(_draw, names=names, sizes=sizes, k=k))


def _missing(path: Path) -> str:
    return f"{path} holds no prototypes: its method makes none, or it is from before the first E-step"


def _pick(path: Path, pretrained: Pretrained, k: int) -> PrototypeSet:
    offered = {len(found.centroids): found for found in pretrained.prototypes}
    if k not in offered:
        raise UserError(f"{path} has not {k} clusters but {', '.join(map(str, offered))}; choose one of these by --k")
    return offered[k]


def _kind(found: PrototypeSet) -> str:
    fixed = bool((found.concentration == found.concentration[0]).all())
    return "fixed concentration" if fixed else "estimated concentration"


def _scores(sizes: torch.Tensor) -> tuple[float, ...]:
    values = sizes.double()
    empty = 100 * (sizes == 0).double().mean()
    return (len(sizes), float(values.mean()), float(values.std(correction=0)), float(empty), float(values.max()))


def _draw(figure: Figure, names: Sequence[str], sizes: Sequence[torch.Tensor], k: int) -> None:
    axes = figure.subplots()
    # The very largest clusters are all in the last bar, else they would leave the others a corner of the picture.
    end = max(float(torch.quantile(found.double(), 0.999)) for found in sizes) + 1
    for name, found in zip(names, sizes, strict=True):
        axes.hist(found.clamp(max=end).numpy(), bins=50, range=(0, end), histtype="stepfilled", alpha=0.5, label=name)
    axes.set_xlabel(f"images in a cluster (k = {k})")
    axes.set_ylabel("clusters")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
