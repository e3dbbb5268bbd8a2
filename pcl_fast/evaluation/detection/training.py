"""Training torchvision's detectors, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pcl_fast.data.loaders.resources import Resources
from pcl_fast.distributed import World, gather_objects
from pcl_fast.errors import NonFiniteError
from pcl_fast.evaluation.detection.data import Annotated, Images, TrainingImages
from pcl_fast.nn.precision import autocast, loss_scaler
from pcl_fast.seeds import Purpose, mix_seeds

# Steps between two looks at the losses, for which training waits for the device.
_LOOK_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained.

    epochs: passes over the images.
    milestones: epochs at which the learning rate is divided by ten.
    batch_size: images per step over all ranks together.
    lr: learning rate at this batch size.
    weight_decay: of all trained parameters.
    warmup: steps over which the learning rate grows linearly in the beginning; at most the first epoch.
    """

    epochs: int
    milestones: tuple[int, ...]
    batch_size: int
    lr: float
    weight_decay: float
    warmup: int

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` of the whole training, with `steps` steps in an epoch."""
        lr = self.lr * 0.1 ** sum(step // steps >= milestone for milestone in self.milestones)
        return lr * min(1.0, (step + 1) / max(1, min(self.warmup, steps)))


def train_detector(
    detector: nn.Module,
    annotated: Annotated,
    recipe: Recipe,
    *,
    seed: int,
    world: World,
    resources: Resources,
    state: dict[str, Any] | None = None,
    reached: Callable[[int, Callable[[], dict[str, Any]]], None] = lambda step, state: None,
    progress: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda text: None,
) -> Callable[[], dict[str, Any]]:
    """Train a detector in place with SGD of momentum 0.9, in half precision on GPUs. All ranks call this together.

    Args:
        detector: one of torchvision's, on this rank's device, the same on all ranks.
        annotated: images that have objects, the same on all ranks.
        seed: of order, mirroring, and the anchors and proposals that are drawn.
        resources: what loading may use of the machine.
        state: what a training that was stopped gave to `reached`, to go on with.
        reached: is called every 50 steps on all ranks with the number of steps done, and a function that gives the
            state.
        progress: is told how many steps are done.
        say: is told about every epoch.

    Returns:
        A function that gives the state, from which this function returns without another step.

    Raises:
        ValueError: the batch does not divide among the ranks, or is larger than the data set.
        NonFiniteError: the loss became NaN or infinite, on any rank; names the images.
    """
    loader = TrainingImages(
        annotated,
        batch_size=_share(recipe.batch_size, len(annotated), world),
        seed=seed,
        world=world,
        resources=resources,
    )
    training = _Training(detector, recipe, seed, world)
    if state is not None:
        training.load(state)
    total, recent = recipe.epochs * loader.steps, _Recent(annotated, world)
    while training.step < total:
        epoch, first = divmod(training.step, loader.steps)
        for batch in loader.epoch(epoch, first):
            recent.add(training.advance(batch, loader.steps), batch)
            if training.step % _LOOK_EVERY == 0 or training.step % loader.steps == 0:
                loss = recent.look()
                progress(training.step)
                reached(training.step, training.state)
        say(f"epoch {epoch + 1} of {recipe.epochs}: loss {loss:.3f} in its last steps")
    return training.state


def _share(batch: int, images: int, world: World) -> int:
    """Return a rank's images per step."""
    if batch % world.size:
        raise ValueError(f"--batch-size {batch} does not divide among {world.size} ranks; use a multiple of them")
    if batch > images:
        raise ValueError(f"--batch-size {batch} is larger than the training set of {images} images; make it smaller")
    return batch // world.size


class _Training:
    """A detector and its optimiser."""

    def __init__(self, detector: nn.Module, recipe: Recipe, seed: int, world: World):
        self.detector, self.recipe, self.seed, self.world = detector, recipe, seed, world
        self.step = 0
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in detector.parameters() if parameter.requires_grad],
            lr=recipe.lr,
            momentum=0.9,
            weight_decay=recipe.weight_decay,
        )
        self.scaler = loss_scaler(world.device)
        self._forward = detector.train()
        if world.group is not None:
            # No buffer ever changes: batch norm is fixed.
            self._forward = DistributedDataParallel(detector, broadcast_buffers=False, gradient_as_bucket_view=True)

    def advance(self, batch: Images, steps: int) -> torch.Tensor:
        """Make a step; return its loss on this rank, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step, steps)
        with drawn(self.world.device, self.seed, Purpose.EVALUATION, self.step, self.world.rank):
            with autocast(self.world.device):
                loss = sum(self._forward(batch.images, batch.targets).values())
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])
        # One saved in another precision has none, and begins with a new scale.
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


class _Recent:
    """The losses since the last look, which stay on the device until then."""

    def __init__(self, annotated: Annotated, world: World):
        self.annotated, self.world = annotated, world
        self._losses: list[torch.Tensor] = []
        self._index: list[list[int]] = []

    def add(self, loss: torch.Tensor, batch: Images) -> None:
        self._losses.append(loss)
        self._index.append(batch.index)

    def look(self) -> float:
        """Return their mean on this rank, and forget them.

        Raises:
            NonFiniteError: on all ranks, if one of them is not finite on any.
        """
        losses = torch.stack(self._losses)
        finite = losses.isfinite().tolist()
        # After the first such step weights are not finite either: it alone says whose fault it was.
        step = finite.index(False) if not all(finite) else len(finite)
        names = [self.annotated.images.name(index) for index in self._index[step]] if step < len(finite) else []
        first, names = min(gather_objects((step, names), self.world))
        if first < len(finite):
            raise NonFiniteError(
                f"the loss became NaN or infinite with the images {', '.join(names)}; use a smaller --lr or a longer "
                "--warmup, or look whether the images' annotations are right"
            )
        mean = losses.mean().item()
        self._losses, self._index = [], []
        return mean


@contextmanager
def drawn(device: torch.device, *seeds: int) -> Iterator[None]:
    """In this context torch's generators follow from `seeds`; afterwards they are as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(mix_seeds(*seeds))
        yield
