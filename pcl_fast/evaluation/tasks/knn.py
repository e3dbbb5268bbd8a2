"""kNN accuracy: Table 4."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from pcl_fast.command_line import Integers, Numbers
from pcl_fast.distributed import World, all_gather_shards
from pcl_fast.evaluation import paper
from pcl_fast.evaluation.features import Features
from pcl_fast.evaluation.knn import knn_accuracies
from pcl_fast.evaluation.labelled import Labelled, holds_labelled
from pcl_fast.evaluation.pictures import bars
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task


@dataclass(frozen=True, kw_only=True)
class Knn(Task, name="knn", scores="momentum"):
    """Classify the test images by their nearest training images (Table 4).

    The paper does not say which k and temperature it took: these are InstDisc's and other libraries'.
    """

    k: Integers = (20, 200)
    """Numbers of neighbours."""
    temperature: Numbers = (0.07, 0.1)
    """tau: a neighbour's vote has the weight exp(cosine / tau)."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        return holds_labelled(data)

    def check(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"--k must be positive numbers, got {self.k}")
        if not self.temperature or not min(self.temperature) > 0:
            raise ValueError(f"--temperature must be positive numbers, got {self.temperature}")

    def run(self, context: Context) -> Outcome:
        world = context.world
        labelled = context.labelled(self.data, self.format)
        data = self.reading(context.pretrained)
        banks = _unit(context.encode(labelled.train, data, "training images"))
        queries = _unit(context.encode(labelled.test, data, "test images"))
        rows = [row for name, bank in banks.items() for row in self._rows(name, bank, queries[name], labelled, world)]
        protocol = (
            f"weighted kNN: {labelled.describe()}, centre crops of {data.size} px (shorter side {data.resize}), unit "
            "features, votes weighted by exp(cosine / tau)",
            "the paper names neither its k nor its tau",
        )
        draw = partial(bars, columns=("",), rows=rows, label="top-1 accuracy, %")
        return Outcome(protocol, ("top-1, %",), rows, [Row(*found) for found in paper.KNN.items()], draw)

    def _rows(
        self, name: str, bank: torch.Tensor, queries: torch.Tensor, labelled: Labelled, world: World
    ) -> list[Row]:
        accuracies = knn_accuracies(
            bank,
            labelled.train_labels.to(world.device),
            all_gather_shards(queries, world.group),
            labelled.test_labels.to(world.device),
            neighbours=self.k,
            temperatures=self.temperature,
            group=world.group,
        )
        return [
            Row(f"{name} ({bank.shape[1]}-d), k {k}, tau {tau:g}", (100 * value,))
            for (k, tau), value in accuracies.items()
        ]


def _unit(features: Features) -> dict[str, torch.Tensor]:
    """Return the features by the name of what they come from, at unit length."""
    found = {"backbone": F.normalize(features.backbone, dim=1)}
    return found if features.head is None else {"head": features.head, **found}
