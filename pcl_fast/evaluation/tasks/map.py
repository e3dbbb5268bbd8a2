"""A map of the training images of some classes: Figure 4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from pcl_fast.data import ImageFolder, ImageSet
from pcl_fast.distributed import all_gather_shards, gather_objects
from pcl_fast.errors import UserError
from pcl_fast.evaluation.labelled import holds_labels
from pcl_fast.evaluation.pictures import names_of
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task
from pcl_fast.evaluation.tsne import COMPONENTS, embed, map_neighbours, neighbour_accuracy, trustworthiness
from pcl_fast.seeds import Purpose, mix_seeds

_NEIGHBOURS = 5
# The names of more classes would hide the map.
_NAMED = 20
# A map of more points takes so long that one should know before.
_MANY = 20000
# Of t-SNE on one core: measured with 6,000 points, and a quarter more as it grows a little faster than their number.
_SECONDS_PER_POINT = 0.006


@dataclass(frozen=True)
class _Panel:
    """A map: whose it is, its points [n, 2], and how good it is."""

    name: str
    points: torch.Tensor
    trustworthiness: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Map(Task, name="map", scores="momentum"):
    """Map the training images of the first classes to the plane by t-SNE (Figure 4).

    --data is a folder of class folders (or tar shards), or one that has them in its folder train. The paper says
    neither which features it took nor how t-SNE was set.
    """

    beside: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="CHECKPOINT")] = ()
    """Other checkpoints, whose maps are drawn beside this one's."""
    classes: int = 40
    """The first so many classes are shown."""
    images_per_class: int | None = None
    """Images of a class, drawn once; None: all."""
    features: Literal["head", "backbone"] = "head"
    """head: the unit features that the method learned, or the backbone's where a file has no head."""
    perplexity: float = 30.0
    """t-SNE's perplexity: about how many neighbours a point has."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        return holds_labels(data)

    def check(self) -> None:
        for flag, value in {"--classes": self.classes, "--images-per-class": self.images_per_class}.items():
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be positive, got {value}")
        if not 1 <= self.perplexity < math.inf:
            raise ValueError(f"--perplexity must be at least 1, got {self.perplexity}")

    def run(self, context: Context) -> Outcome:
        paths = (self.checkpoint, *self.beside)
        for path in self.beside:
            context.read(path, self.encoder or self.scores)  # better refused now than after the first map
        images, labels = context.training(self.data, self.format)
        chosen = self._choose(labels)
        labels, images = labels[chosen], images.subset(chosen.tolist())
        self._warn(len(chosen), context)
        panels = self._panels(paths, images, labels, context)
        data = self.reading(context.pretrained)
        kind = "backbone" if context.pretrained.head is None else self.features
        protocol = (
            f"t-SNE (scikit-learn's, perplexity {self.perplexity:g}, from {COMPONENTS} principal components) of "
            f"{len(chosen)} training images of the first {int(labels.max()) + 1} classes: {kind} features at unit "
            f"length, of the {context.pretrained.encoder} encoder, centre crops of {data.size} px (shorter side "
            f"{data.resize})",
            f"trustworthiness: how far {_NEIGHBOURS} neighbours in the map are neighbours among the features; 1-NN "
            "accuracy: how many images are of the class of their nearest neighbour in the map",
        )
        rows = [Row(panel.name, (100 * panel.trustworthiness, 100 * panel.accuracy)) for panel in panels]
        names = images.classes if isinstance(images, ImageFolder) else range(self.classes)
        draw = partial(_draw, panels=panels, labels=labels.numpy(), names=names, seed=self.seed)
        return Outcome(protocol, ("trustworthiness, %", "1-NN accuracy, %"), rows, [], draw)

    def _choose(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the positions of the images to show.

        Raises:
            UserError: they are too few.
        """
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, Purpose.EVALUATION))
        parts = []
        for number in range(min(self.classes, int(labels.max()) + 1)):
            members = (labels == number).nonzero().view(-1)
            parts.append(members[torch.randperm(len(members), generator=generator)[: self.images_per_class]])
        chosen = torch.cat(parts).sort().values
        least = max(int(self.perplexity), 2 * _NEIGHBOURS) + 1
        if len(chosen) < least:
            raise UserError(
                f"a map with --perplexity {self.perplexity:g} needs at least {least} images, there are {len(chosen)}; "
                "use a smaller one, or more images"
            )
        return chosen

    def _warn(self, points: int, context: Context) -> None:
        if points > _MANY:
            minutes = points * _SECONDS_PER_POINT / 60
            context.say(
                f"t-SNE of {points} points takes about {minutes:.0f} minutes a map on one core; --images-per-class "
                "makes them fewer"
            )

    def _panels(self, paths: Sequence[Path], images: ImageSet, labels: torch.Tensor, context: Context) -> list[_Panel]:
        saved = context.continuation.load()
        found = {path: _Panel(**panel) for path, panel in saved["found"].items()} if saved else {}
        with context.continuation.saving():
            for path, name in zip(paths, names_of(paths), strict=True):
                if str(path) not in found:
                    context.say(f"{path}")
                    pretrained = context.read(path, self.encoder or self.scores)
                    found[str(path)] = self._panel(name, images, labels, replace(context, pretrained=pretrained))
                    context.continuation.reached(len(found), lambda: {"found": _plain(found)})
        return [found[str(path)] for path in paths]

    def _panel(self, name: str, images: ImageSet, labels: torch.Tensor, context: Context) -> _Panel:
        """Return the map of the checkpoint of `context` on all ranks; the main one makes it."""
        shard = context.encode(images, self.reading(context.pretrained), "images").unit(self.features)
        features = all_gather_shards(shard, context.world.group).float()
        panel: dict[str, Any] = {}
        if context.world.is_main:
            points = embed(features.cpu().numpy(), perplexity=self.perplexity, seed=self.seed)
            near = map_neighbours(points, _NEIGHBOURS)
            scores = trustworthiness(features, near), neighbour_accuracy(near, labels)
            panel = vars(_Panel(name, torch.from_numpy(points), *scores))
        return _Panel(**gather_objects(panel, context.world)[0])


def _plain(found: dict[str, _Panel]) -> dict[str, dict[str, Any]]:
    return {path: vars(panel) for path, panel in found.items()}


def _draw(figure: Figure, panels: Sequence[_Panel], labels: np.ndarray, names: Sequence[Any], seed: int) -> None:
    """Draw the maps side by side, a class in the same colour in all, points in random order lest one class hide
    another. A few classes have their names where the most of them are.
    """
    columns = math.ceil(math.sqrt(len(panels)))
    grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flatten()
    order = np.random.default_rng(seed).permutation(len(labels))
    colours = matplotlib.colormaps["hsv"](labels / (labels.max() + 1))
    size = 36 / math.sqrt(len(labels) / 50 + 1) / columns
    for axes, panel in zip(grid, panels, strict=False):
        axes.scatter(*panel.points.numpy()[order].T, s=size, c=colours[order], linewidths=0)
        axes.set_title(f"{panel.name}: 1-NN {100 * panel.accuracy:.1f}%")
        axes.set_aspect("equal", "datalim")
        for number in range(labels.max() + 1 if labels.max() < _NAMED else 0):
            middle = np.median(panel.points.numpy()[labels == number], axis=0)
            axes.text(*middle, names[number], ha="center", va="center", fontweight="bold", clip_on=True)
    for axes in grid:
        axes.set_axis_off()
