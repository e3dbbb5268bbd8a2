"""The paper's tables that take labels, on a set as small as the demo's: seconds on a CPU for each encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from pcl_fast.config import DataConfig, view_of
from pcl_fast.distributed import World
from pcl_fast.evaluation.fine_tuning import Recipe, fine_tune, top_accuracies
from pcl_fast.evaluation.label_lists import draw_balanced
from pcl_fast.evaluation.labelled import Labelled
from pcl_fast.evaluation.logistic import linear_accuracy
from pcl_fast.evaluation.svm import draw_labels, score_labels, unit

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5
# In 20 epochs of batches of 256, as on ImageNet, a hundredth of the digits would be 20 steps. The batches are small
# instead, and the learning rates (for a batch of 256) large.
_RECIPE = Recipe(encoder_lr=0.25, head_lr=2.5)
_SEMI = {
    0.01: replace(_RECIPE, batch_size=20, epochs=50, milestones=(30, 40)),
    0.1: replace(_RECIPE, batch_size=50, epochs=20, milestones=(12, 16)),
}


@dataclass(frozen=True)
class LabelScores:
    """Accuracies on the test images in percent.

    linear: of a linear classifier that learned from all training images.
    low_shot: of an SVM that learned from 1, 2, 4, 8 and 16 images of each class, means over 5 draws.
    semi: of the encoder fine-tuned on 1% and on 10% of the labels; None for features without an encoder.
    """

    linear: float
    low_shot: tuple[float, ...]
    semi: tuple[float, ...] | None


def score_features(train: torch.Tensor, test: torch.Tensor, labelled: Labelled) -> tuple[float, tuple[float, ...]]:
    """Return LabelScores' linear and low_shot of features [n, width] of the training and the test images."""
    linear = linear_accuracy(train, labelled.train_labels, test, labelled.test_labels)
    learned, tested = unit(train.numpy()), unit(test.numpy())
    labels, answers = labelled.train_labels.numpy(), labelled.test_labels.numpy()
    low_shot = []
    for shots in SHOTS:
        drawn = [draw_labels(labels, shots, 0, draw) for draw in range(DRAWS)]
        found = [score_labels(learned, tested, answers, rows, labels[rows])[0] for rows in drawn]
        low_shot.append(100 * float(np.mean(found)))
    return 100 * linear.top1, tuple(low_shot)


def score_fine_tuned(
    backbone: nn.Module, width: int, labelled: Labelled, data: DataConfig, world: World
) -> tuple[float, ...]:
    """Fine-tune a copy of a backbone on 1% and on 10% of the labels; return its accuracies on the test images.

    Args:
        backbone: maps images [N, 3, H, W] to features [N, width].
        labelled: the images.
        data: how images are cropped and augmented: as they were to train the backbone.
        world: this process.
    """
    found = []
    for share, recipe in _SEMI.items():
        chosen = draw_balanced(labelled.train_labels, share, labelled.classes, seed=0)
        images, labels = labelled.train.subset(chosen.tolist()), labelled.train_labels[chosen]
        options = {"data": data, "view": view_of(data), "world": world}
        model = fine_tune(backbone, width, images, labels, len(labelled.classes), recipe, **options)
        found += top_accuracies(model, labelled.test, labelled.test_labels, data=data, world=world, top=(1,))
    return tuple(found)
