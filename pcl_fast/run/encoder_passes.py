"""The encoders' passes of a step, by themselves: to time them, and to compare two ways to compute them."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from pcl_fast.captured import capture_graph
from pcl_fast.config import Config
from pcl_fast.data import normalise
from pcl_fast.distributed import World
from pcl_fast.nn.batch_norm import running_statistics_kept
from pcl_fast.nn.precision import autocast, encoder_dtype
from pcl_fast.schedule import part_batch

_WARM_UP, _ROUNDS = 3, 7


def draw_images(config: Config, rows: int, world: World, side: int | None = None) -> torch.Tensor:
    """So many images of `side` px, by default of the run's size, normalised, in the type in which encoders compute.
    Neighbouring pixels are alike, as in photographs: from noise all features would come out the same.
    """
    generator = torch.Generator().manual_seed(config.seed)
    coarse = torch.randint(256, (rows, 3, 8, 8), generator=generator).float()
    images = F.interpolate(coarse, size=side or config.data.size, mode="bilinear").permute(0, 2, 3, 1).to(torch.uint8)
    return normalise(images.contiguous().to(world.device), encoder_dtype(world.device))


class Passes:
    """Those of the query encoder forward and backward, those of others forward, on images that are drawn once.

    They leave nothing behind: gradients are returned instead of kept, and see `undisturbed`.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], batches: Sequence[torch.Tensor]):
        """
        Args:
            encoders: a method's; "query" is the one with a backward pass.
            batches: one for every size of a step's views, each [N, 3, H, W], normalised, in the type in which encoders
                compute on their device.
        """
        self.encoders, self.batches, self.device = dict(encoders), tuple(batches), batches[0].device
        self._query = encoders["query"]
        self._parameters = [parameter for parameter in self._query.parameters() if parameter.requires_grad]
        self._others = [encoder for name, encoder in encoders.items() if name != "query"]

    @classmethod
    def of_run(
        cls, config: Config, encoders: Mapping[str, nn.Module], world: World, sides: Sequence[int] = ()
    ) -> Passes:
        """With as many images as a rank encodes at a time, of every size that its views have, and in proportion: for
        one view of 224 px and three of 96 px, or two and six, there are three times as many images of 96 px.

        Args:
            sides: of the method's views in pixels; none: all have the run's size.
        """
        views, rows = Counter(sides or [config.data.size]), part_batch(config, world.size)
        share = math.gcd(*views.values())
        return cls(encoders, [draw_images(config, rows * count // share, world, side) for side, count in views.items()])

    def compute(self, *, exact: bool = False) -> list[torch.Tensor]:
        """The features of all encoders, and the gradients of the query encoder's parameters.

        exact: compute in float32.
        """
        batches = [images.float() if exact else images for images in self.batches]
        with nullcontext() if exact else autocast(self.device):
            features = _encoded(self._query, batches)
            upstream = torch.linspace(-1, 1, features.numel(), device=self.device).view_as(features)
            # Not backward(): what reaches a parameter so, DistributedDataParallel sends to the other ranks.
            gradients = torch.autograd.grad(features, self._parameters, upstream)
            with torch.no_grad():
                return [features.detach(), *(_encoded(encoder, batches) for encoder in self._others), *gradients]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """In this context ranks do not wait for each other in batch norm, for one may fail; at its end batch norm's
        statistics are as they were.
        """
        modules = [module for encoder in self.encoders.values() for module in encoder.modules()]
        groups = {module: module.group for module in modules if getattr(module, "group", None) is not None}
        for module in groups:
            module.group = None
        try:
            with running_statistics_kept(nn.ModuleDict(self.encoders)):
                yield
        finally:
            for module, group in groups.items():
                module.group = group

    def reference(self) -> list[torch.Tensor]:
        """What `compute` would be without rounding to half precision."""
        # Unless it is named, cuDNN is left out, and each image is convolved by itself.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.compute(exact=True)

    def error(self, reference: Sequence[torch.Tensor]) -> float:
        """How far `compute` is from a reference, relative to its norm: of features or gradients, whichever is worse."""
        found, features = self.compute(), len(self.encoders)
        return max(_distance(found[part], reference[part]) for part in (slice(features), slice(features, None)))

    def milliseconds(self, *, captured: bool = False) -> float:
        """How long `compute` takes, the median of some rounds.

        captured: as a CUDA graph.
        """
        for _ in range(_WARM_UP):
            self.compute()
        work = capture_graph(self.compute, self.device)[0] if captured else self.compute
        return 1e3 * statistics.median(_seconds(work, self.device) for _ in range(_ROUNDS))


def _encoded(encoder: nn.Module, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The features of all batches, one below the other."""
    return encoder(batches[0]) if len(batches) == 1 else torch.cat([encoder(images) for images in batches])


def _distance(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    errors = [(a.double() - b.double()).norm() for a, b in zip(found, reference, strict=True)]
    return float(torch.stack(errors).norm() / torch.stack([tensor.double().norm() for tensor in reference]).norm())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
