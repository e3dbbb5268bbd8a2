"""Linear classification with a frozen encoder (paper, section 4.2): a grid of heads in one pass of the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pcl_fast.data import TrainingLoader
from pcl_fast.distributed import World, all_gather_rows, all_gather_shards, all_reduce_sum, shard_bounds
from pcl_fast.evaluation.classifiers import Classifiers
from pcl_fast.evaluation.continuation import Continuation
from pcl_fast.evaluation.features import FrozenBackbone
from pcl_fast.evaluation.heads import Heads, Setting

# Steps between two looks at the losses, the only time that training waits for the device.
LOOK_EVERY = 50
# The batch that learning rates are given for.
REFERENCE_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """How linear heads are trained.

    settings: of every head; learning rates are those for a batch of 256, and follow another one linearly.
    epochs: over the training images.
    milestones: epochs (from 0) from which on the learning rates are a tenth of what they were.
    batch_size: images per step over all ranks together.
    seed: of the heads' first weights.
    """

    settings: tuple[Setting, ...]
    epochs: int
    milestones: tuple[int, ...]
    batch_size: int
    seed: int

    def factor(self, epoch: int) -> float:
        """Return what the learning rates are multiplied by in an epoch."""
        return self.batch_size / REFERENCE_BATCH * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)


class Trained(NamedTuple):
    """Trained heads.

    classifiers: of all settings, in their order, on every rank.
    losses: float64 [H] on the CPU, mean cross entropy of the training images in the last epoch.
    """

    classifiers: Classifiers
    losses: torch.Tensor


def train_heads(
    encode: FrozenBackbone,
    loader: TrainingLoader,
    labels: torch.Tensor,
    recipe: Recipe,
    *,
    width: int,
    classes: int,
    world: World,
    continuation: Continuation | None = None,
    progress: Callable[[int], None] = lambda done: None,
    each_epoch: Callable[[int, Sequence[float]], None] = lambda epoch, losses: None,
) -> Trained:
    """Train the heads of a grid together, all on the same views.

    Every rank encodes its share of a batch. Features, which are small, are exchanged, and every rank trains its share
    of the heads on the whole batch: gradients, of which every head has as many as weights, are not exchanged.

    Args:
        encode: gives the features of uint8 [N, H, W, 3].
        loader: makes one view of each image; a rank's batches are recipe.batch_size / ranks large.
        labels: int64 [n] on the CPU, by position in the loader's data set.
        recipe: the grid and its schedule.
        width: of the features.
        classes: C.
        world: the ranks.
        continuation: where training that was stopped goes on; None: it starts anew.
        progress: is told how many steps are done, now and then.
        each_epoch: is told how many epochs are done, and every head's mean loss in the last one.

    Raises:
        ValueError: every head has diverged.
        Stopped: see Continuation.
    """
    training = _Training(recipe, width, classes, world)
    state = continuation.load() if continuation else None
    done = training.load(state) if state else 0
    for epoch in range(done // loader.steps, recipe.epochs):
        first = done % loader.steps
        if first == 0:
            training.losses.zero_()
        for batch in loader.epoch(epoch, first):
            training.step(encode(batch.views[0]), _moved(labels[batch.index], world.device), recipe.factor(epoch))
            done += 1
            if done % LOOK_EVERY == 0:
                training.look()
                progress(done)
                if continuation:
                    continuation.reached(done, lambda done=done: training.state(done))
        each_epoch(epoch + 1, training.mean_losses(loader.steps).tolist())
    training.look()
    # What comes next, scoring, cannot be stopped halfway.
    if continuation:
        continuation.reached(done, lambda: training.state(done))
    return training.finish(loader.steps)


class _Training:
    """This rank's share of the heads.

    losses: float32 [H_local], the sum over an epoch's steps so far.
    """

    def __init__(self, recipe: Recipe, width: int, classes: int, world: World):
        self.recipe, self.world = recipe, world
        self.share = slice(*shard_bounds(len(recipe.settings), world.rank, world.size))
        settings = recipe.settings[self.share]
        self.heads = Heads(settings, width, classes, seed=recipe.seed, device=world.device)
        self.losses = torch.zeros(len(settings), device=world.device)

    def step(self, features: torch.Tensor, labels: torch.Tensor, factor: float) -> None:
        """Take one step with this rank's share of the batch; all ranks' shares are of one length."""
        group = self.world.group
        self.losses += self.heads.step(all_gather_rows(features, group), all_gather_rows(labels, group), factor)

    def look(self) -> None:
        """Wait for the losses, and end work that has become useless.

        Raises:
            ValueError: every head has diverged.
        """
        finite = all_reduce_sum(self.losses.isfinite().sum(), self.world.group)
        if not int(finite):
            rates = ", ".join(f"{rate:g}" for rate in sorted({setting.lr for setting in self.recipe.settings}))
            raise ValueError(f"every linear head has diverged (learning rates {rates}); smaller ones are needed")

    def state(self, done: int) -> dict[str, Any]:
        """Return all ranks' heads after so many steps, on the CPU."""
        mine = {**self.heads.tensors(), "losses": self.losses}
        return {"done": done, **{name: all_gather_shards(t, self.world.group).cpu() for name, t in mine.items()}}

    def load(self, state: dict[str, Any]) -> int:
        """Take over what `state` returned, on any number of ranks, and return the number of steps."""
        self.heads.load({name: state[name][self.share] for name in self.heads.tensors()})
        self.losses.copy_(state["losses"][self.share])
        return state["done"]

    def mean_losses(self, steps: int) -> torch.Tensor:
        """Return all ranks' heads' mean losses in an epoch of so many steps, float64 [H] on the CPU."""
        return all_gather_shards(self.losses, self.world.group).double().cpu() / steps

    def finish(self, steps: int) -> Trained:
        """Return all ranks' heads after an epoch of so many steps."""
        everyone = [all_gather_shards(tensor, self.world.group) for tensor in self.heads.classifiers]
        return Trained(Classifiers(*everyone), self.mean_losses(steps))


def _moved(labels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return them on the device; nobody waits for the copy."""
    return labels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else labels.to(device)
