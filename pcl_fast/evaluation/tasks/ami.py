"""Adjusted mutual information between clusters and classes: Table 5."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from pcl_fast.clustering import kmeans
from pcl_fast.command_line import Integers
from pcl_fast.distributed import all_gather_shards
from pcl_fast.errors import UserError
from pcl_fast.evaluation import paper
from pcl_fast.evaluation.ami import Agreement, agreement
from pcl_fast.evaluation.features import Features
from pcl_fast.evaluation.labelled import holds_labels
from pcl_fast.evaluation.pictures import bars
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task
from pcl_fast.seeds import Purpose, mix_seeds

# Of Table 5.
_K = 25000


@dataclass(frozen=True, kw_only=True)
class Ami(Task, name="ami", scores="momentum"):
    """Cluster the training images' features and compare the clusters with the classes (Table 5).

    --data is a folder of class folders (or tar shards), or one that has them in its folder train.
    """

    k: Integers = ()
    """Numbers of clusters. None given: 25000 as in Table 5, or as many as there are classes for fewer than 250000
    images."""
    features: Literal["head", "backbone"] = "head"
    """head: the unit features that the method learned, or the backbone's where a file has no head."""
    iterations: int = 20
    """Lloyd iterations."""
    redo: int = 5
    """k-means starts, of which the one with the least objective is kept."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        return holds_labels(data)

    def check(self) -> None:
        for flag, values in {"--k": self.k, "--iterations": [self.iterations], "--redo": [self.redo]}.items():
            if values and min(values) < 1:
                raise ValueError(f"{flag} must be positive, got {min(values)}")

    def run(self, context: Context) -> Outcome:
        images, labels = context.training(self.data, self.format)
        classes = int(labels.max()) + 1
        ks = self.k or (_K if len(images) >= 10 * _K else classes,)
        if max(ks) > len(images):
            raise UserError(f"cannot make {max(ks)} clusters of {len(images)} images; use a smaller --k")
        data = self.reading(context.pretrained)
        name, features = self._pick(context.encode(images, data, "training images"))
        found = {k: self._agreement(features, labels, k, context) for k in ks}
        rows = [Row(f"{name}, k = {k}", tuple(scores)) for k, scores in found.items()]
        protocol = (
            f"k-means ({self.iterations} iterations, best of {self.redo} starts) of the {name} features at unit "
            f"length: {len(images)} training images of {classes} classes, centre crops of {data.size} px (shorter side "
            f"{data.resize})",
            "the paper has k = 25000, and does not say which normalisation its AMI has",
        )
        published = [Row(f"{name}, k = {_K}", (*score, None, None, None)) for name, score in paper.AMI.items()]
        columns = ("AMI", "AMI, max. normalised", "NMI", "purity")
        draw = partial(bars, columns=columns, rows=rows, label="agreement of clusters and classes")
        return Outcome(protocol, columns, rows, published, draw, digits=3)

    def _pick(self, features: Features) -> tuple[str, torch.Tensor]:
        """Return (name, unit features) of what is clustered."""
        if self.features == "head" and features.head is not None:
            return f"head's {features.head.shape[1]}-d", features.head
        return f"backbone's {features.backbone.shape[1]}-d", F.normalize(features.backbone, dim=1)

    def _agreement(self, features: torch.Tensor, labels: torch.Tensor, k: int, context: Context) -> Agreement:
        context.say(f"k-means with k = {k}")
        found = kmeans(
            features,
            k,
            iterations=self.iterations,
            redo=self.redo,
            seed=mix_seeds(self.seed, Purpose.EVALUATION),
            group=context.world.group,
        )
        return agreement(all_gather_shards(found.assignment, context.world.group), labels)
