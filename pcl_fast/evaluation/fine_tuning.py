"""Fine-tuning a whole encoder, with a new linear classifier on it, and testing what came out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pcl_fast.augmentations import View
from pcl_fast.config import DataConfig, OptimConfig
from pcl_fast.data import Batch, ImageSet, TrainingLoader, clustering_loader, normalise, training_loader
from pcl_fast.distributed import World, all_reduce_sum, shard_bounds
from pcl_fast.errors import ImageError, NonFiniteError
from pcl_fast.nn.batch_norm import SplitBatchNorm, average_statistics
from pcl_fast.nn.precision import autocast, encoder_dtype, loss_scaler
from pcl_fast.optim import Group, build_optimizer, load_optimizer, set_rate
from pcl_fast.schedule import encoded_at_a_time
from pcl_fast.seeds import Purpose, mix_seeds

# Steps between two looks at the losses, the only time that training waits for the device.
LOOK_EVERY = 50
# Learning rates are for this batch size.
_BATCH = 256
# Keeps the classifier's weights apart from what else evaluation seeds.
_CLASSIFIER = 2


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: SGD with weight decay on all parameters.

    batch_size: images per step over all ranks; see `fitted_batch`.
    epochs: passes over the images.
    milestones: epochs, from 0, at which the learning rates drop; drop: the factor.
    encoder_lr, head_lr: learning rates of the backbone and the classifier, for a batch of 256. They are scaled linearly
        with the batch size.
    """

    batch_size: int = 256
    epochs: int = 20
    milestones: tuple[int, ...] = (12, 16)
    drop: float = 0.2
    encoder_lr: float = 0.01
    head_lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def fitted_batch(self, images: int, ranks: int) -> int:
        """Return the images per step over all ranks: batch_size, or all images if there are fewer, less what does not
        divide among the ranks.

        Raises:
            ImageError: these are too few for batch norm, which wants 2 of each rank.
        """
        most = min(self.batch_size, images)
        if most < 2 * ranks:
            raise ImageError(
                f"a batch of {most} images is too small for batch norm, which wants at least 2 on each of {ranks} "
                "ranks; use fewer ranks, a larger batch or more images"
            )
        return most // ranks * ranks

    def factor(self, epoch: int, batch_size: int) -> float:
        """Return by what the learning rates are multiplied in an epoch, for batches of so many images."""
        return batch_size / _BATCH * self.drop ** sum(epoch >= milestone for milestone in self.milestones)


class Classifier(nn.Module):
    """A backbone and a linear classifier of its features: maps images [N, 3, H, W] to logits [N, classes]."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, *, seed: int):
        """Copy the backbone; the classifier's weights are drawn from N(0, 0.01), its bias is 0."""
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        for module in self.backbone.modules():
            if isinstance(module, SplitBatchNorm):
                module.splits = 1  # that was for pre-training
        self.linear = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(mix_seeds(seed, Purpose.EVALUATION, _CLASSIFIER))
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.backbone(images))


def fine_tune(
    backbone: nn.Module,
    width: int,
    images: ImageSet,
    labels: torch.Tensor,
    classes: int,
    recipe: Recipe,
    *,
    data: DataConfig,
    view: View,
    world: World,
    seed: int = 0,
    state: dict[str, Any] | None = None,
    reached: Callable[[int, Callable[[], dict[str, Any]]], None] = lambda step, state: None,
) -> Classifier:
    """Fine-tune a copy of a backbone, and a new classifier on it. All ranks call it together.

    Batch norm works as in any training, with the statistics of a rank's own images; the running ones are averaged over
    the ranks. Every epoch drops the last images that do not fill a batch, others each time. GPUs compute in half
    precision.

    Args:
        backbone: maps images [N, 3, H, W] to features [N, width]; is left as it is.
        images: those to learn from, the same on all ranks.
        labels: int64 [n] on the CPU, their classes.
        classes: the number of classes.
        data: which loader, and what it may use of the machine.
        view: how images are cropped and augmented.
        seed: of the classifier's first weights, the order of the images and their views.
        state: of a stopped call, to go on from there.
        reached: is told every 50 steps, and after the last one, on all ranks: how many steps are done, and what returns
            the state to go on from there, of tensors and plain values.

    Returns:
        The classifier, in eval mode, the same on all ranks.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        ImageError: there are too few images, see Recipe.fitted_batch.
    """
    size = recipe.fitted_batch(len(images), world.size)
    loader = training_loader(images, data, views=[view], batch_size=size // world.size, seed=seed, world=world)
    model = Classifier(backbone, width, classes, seed=seed).to(world.device, memory_format=torch.channels_last)
    tuning = _Tuning(model, recipe, size, world)
    if state is not None:
        tuning.load(state)
    losses: list[torch.Tensor] = []
    for batch in tuning.batches(loader):
        losses.append(tuning.step(batch, labels))
        if tuning.done % LOOK_EVERY == 0 or tuning.done == recipe.epochs * loader.steps:
            tuning.look(losses)
            losses.clear()
            reached(tuning.done, tuning.state)
    return model.eval()


class _Tuning:
    """A classifier, its optimiser, and how many steps they have done."""

    def __init__(self, model: Classifier, recipe: Recipe, batch_size: int, world: World):
        self.model, self.recipe, self.batch_size, self.world, self.done = model.train(), recipe, batch_size, world, 0
        groups = [
            Group(list(model.backbone.parameters()), lr_scale=recipe.encoder_lr),
            Group(list(model.linear.parameters()), lr_scale=recipe.head_lr),
        ]
        optim = OptimConfig(lr=1.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        self.optimizer = build_optimizer(groups, optim, world.device)
        self.scaler = loss_scaler(world.device)
        self.forward: nn.Module = model
        if world.group is not None:
            # Statistics are averaged at every look instead.
            self.forward = DistributedDataParallel(
                model, process_group=world.group, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def batches(self, loader: TrainingLoader) -> Iterator[Batch]:
        """Yield the batches of all steps that are left, each at its learning rates."""
        for epoch in range(self.done // loader.steps, self.recipe.epochs):
            set_rate(self.optimizer, self.recipe.factor(epoch, self.batch_size))
            yield from loader.epoch(epoch, self.done % loader.steps)

    def step(self, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
        """Take a step, and return the loss of this rank's images, 0-d. Nothing waits for the device."""
        device, answers = self.world.device, labels[batch.index]
        if device.type == "cuda":
            answers = answers.pin_memory().to(device, non_blocking=True)
        with autocast(device):
            logits = self.forward(normalise(batch.views[0], encoder_dtype(device)))
        loss = F.cross_entropy(logits.float(), answers)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()

    def look(self, losses: Sequence[torch.Tensor]) -> None:
        """Bring the ranks' statistics together, and look at the losses since the last look, and at the weights.

        Raises:
            NonFiniteError: on all ranks, if they are not finite on any rank.
        """
        average_statistics(self.model, self.world.group)
        weights = torch.stack(torch._foreach_norm(list(self.model.parameters()))).sum()
        found = all_reduce_sum(torch.stack([*losses, weights]), self.world.group).tolist()
        if wrong := [place for place, value in enumerate(found) if not math.isfinite(value)]:
            step = min(self.done, self.done - len(losses) + 1 + wrong[0])
            raise NonFiniteError(
                f"the loss of step {step} of fine-tuning, or its update, is not finite; are the learning rates, "
                f"{self.recipe.encoder_lr:g} of the encoder and {self.recipe.head_lr:g} of the classifier, too high?"
            )

    def state(self) -> dict[str, Any]:
        """Return what is the same on all ranks after a look: all there is."""
        return {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


@torch.inference_mode()
def top_accuracies(
    model: nn.Module,
    images: ImageSet,
    labels: torch.Tensor,
    *,
    data: DataConfig,
    world: World,
    top: Sequence[int] = (1, 5),
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, ...]:
    """Return for every k of `top` how many of the images, in percent, have their class among the k largest logits.

    All ranks call it together, with the same model in eval mode, and get the same.

    Args:
        model: maps images [N, 3, H, W] to logits [N, classes]; on this rank's device.
        images: the test images, of which centre crops are taken.
        labels: int64 [n], their classes.
        data: how to read and crop.
        progress: is told how many images of this rank's are done.
    """
    device = world.device
    begin, end = shard_bounds(len(images), world.rank, world.size)
    answers = labels[begin:end].to(device)
    hits, done = torch.zeros(len(top), dtype=torch.int64, device=device), 0
    rows = encoded_at_a_time(device)
    for batch in clustering_loader(images, data, batch_size=rows, world=world):
        with autocast(device):
            logits = model(normalise(batch, encoder_dtype(device))).float()
        best = logits.topk(min(max(top), logits.shape[1]), dim=1).indices
        right = best == answers[done : done + len(batch), None]
        hits += torch.stack([right[:, :k].sum() for k in top])
        done += len(batch)
        progress(done)
    return tuple(100 * count / len(images) for count in all_reduce_sum(hits, world.group).tolist())
