"""The paper's tables that take labels, on a set as small as the demo's: seconds on a CPU for each encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pcl_fast.config import DataConfig, view_of
from pcl_fast.distributed import World
from pcl_fast.evaluation.fine_tuning import Recipe, fine_tune, top_accuracies
from pcl_fast.evaluation.label_lists import draw_balanced
from pcl_fast.evaluation.labelled import Labelled
from pcl_fast.evaluation.logistic import linear_accuracy
from pcl_fast.evaluation.svm import Workers, low_shot_accuracy, unit

SHOTS = (1, 2, 4, 8, 16)
SHARES = (0.01, 0.1)
DRAWS = 5
# A hundredth of the digits is 40 images, which the paper's 20 epochs would pass in 20 steps.
_RECIPE = Recipe(batch_size=20, epochs=40, milestones=(24, 32), encoder_lr=0.5, head_lr=5.0)


@dataclass(frozen=True)
class LabelScores:
    """Accuracies on the test images in percent.

    linear: of a linear classifier that learned from all training images.
    low_shot: of an SVM that learned from 1, 2, 4, 8 and 16 images of each class, means over 5 draws.
    semi: of the fine-tuned encoder, from 1% and 10% of the labels; None for features without an encoder.
    """

    linear: float
    low_shot: tuple[float, ...]
    semi: tuple[float, ...] | None


def score_features(train: torch.Tensor, test: torch.Tensor, labelled: Labelled) -> LabelScores:
    """Score features [n, width] of the training and the test images."""
    parts = [unit(features.numpy()) for features in (train, test)]
    labels = [found.numpy() for found in (labelled.train_labels, labelled.test_labels)]
    learned, tested = zip(parts, labels, strict=True)
    low_shot = [low_shot_accuracy(learned, tested, shots, Workers(), draws=DRAWS, seed=0) for shots in SHOTS]
    linear = linear_accuracy(train, labelled.train_labels, test, labelled.test_labels)
    return LabelScores(100 * linear.top1, tuple(float(np.mean(found)) for found in low_shot), None)


def score_fine_tuned(
    backbone: nn.Module, width: int, labelled: Labelled, data: DataConfig, world: World
) -> tuple[float, ...]:
    """Fine-tune a copy of a backbone on 1% and on 10% of the training images; return the accuracies on the test images.

    Args:
        backbone: maps images [N, 3, H, W] to features [N, width].
        data: how images are cropped and augmented: as they were to train the backbone.
    """
    found = []
    for share in SHARES:
        chosen = draw_balanced(labelled.train_labels, share, labelled.classes, seed=0)
        model = fine_tune(
            backbone,
            width,
            labelled.train.subset(chosen.tolist()),
            labelled.train_labels[chosen],
            len(labelled.classes),
            _RECIPE,
            data=data,
            view=view_of(data),
            world=world,
        )
        [top1] = top_accuracies(model, labelled.test, labelled.test_labels, data=data, world=world, top=(1,))
        found.append(top1)
    return tuple(found)
