"""What detectors are trained and tested on: whole images, with boxes and masks around their objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from pcl_fast.data import ImageSet
from pcl_fast.data.loaders.order import EpochOrder
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.loaders.torchvision_loader import EpochBatches, worker_options
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError
from pcl_fast.seeds import Purpose, mix_seeds


@dataclass(frozen=True)
class Annotated:
    """Images, and the objects that are to be found in them.

    boxes: float32 [m_i, 4] of every image: x1, y1, x2, y2 in pixels from the image's upper left corner.
    labels: int64 [m_i] of every image, from 1; 0 is the background.
    masks: gives an image's masks, uint8 [m_i, height, width] of zeros and ones; None where there are none.
    """

    images: ImageSet
    boxes: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    masks: Callable[[int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def with_objects(self) -> Annotated:
        """Return the images alone in which there is an object."""
        kept = [index for index, labels in enumerate(self.labels) if len(labels)]
        masks = None if self.masks is None else _Taken(self.masks, kept)
        boxes, labels = [self.boxes[index] for index in kept], [self.labels[index] for index in kept]
        return Annotated(self.images.subset(kept), boxes, labels, masks)


@dataclass(frozen=True)
class _Taken:
    """Some images' masks. A class, for worker processes may need to pickle it."""

    masks: Callable[[int], np.ndarray]
    kept: Sequence[int]

    def __call__(self, index: int) -> np.ndarray:
        return self.masks(self.kept[index])


class Images(NamedTuple):
    """A batch, on the detector's device.

    images: float32 [3, H_i, W_i] in [0, 1].
    targets: what torchvision's detectors learn from: "boxes" float32 [m_i, 4], "labels" int64 [m_i], and perhaps
        "masks" uint8 [m_i, H_i, W_i].
    index: the images' positions in the data set.
    """

    images: list[torch.Tensor]
    targets: list[dict[str, torch.Tensor]]
    index: list[int]


class TrainingImages:
    """Loads whole images in a new order every epoch, half of them mirrored left to right.

    Order and mirroring follow from seed, epoch and image alone, whatever the number of ranks and wherever an epoch is
    gone on with.

    steps: batches per epoch and rank.
    """

    def __init__(self, annotated: Annotated, *, batch_size: int, seed: int, world: World, resources: Resources):
        """
        Args:
            batch_size: images per rank and step.
        """
        order = EpochOrder(len(annotated), batch_size=batch_size, seed=seed, world=world)
        self.steps, self.device = order.steps, world.device
        self._batches = EpochBatches(order)
        self._loader = DataLoader(
            _Mirrored(annotated, seed),
            batch_sampler=self._batches,
            collate_fn=list,
            **worker_options(resources, resources.prefetch),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Images]:
        """Yield the batches of one epoch from step `first_step` on; those before it cost nothing."""
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for items in self._loader:
            images, targets, index = zip(*items, strict=True)
            targets = [
                {name: tensor.to(self.device, non_blocking=True) for name, tensor in item.items()} for item in targets
            ]
            yield Images([as_float(image, self.device) for image in images], targets, list(index))


class _Mirrored(Dataset):
    """Item (epoch, index) is (image, target, index), of which images half are mirrored."""

    def __init__(self, annotated: Annotated, seed: int):
        self.annotated, self.seed = annotated, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        epoch, index = key
        image = read_whole(self.annotated.images, index)
        target = {
            "boxes": torch.from_numpy(self.annotated.boxes[index]),
            "labels": torch.from_numpy(self.annotated.labels[index]),
        }
        if self.annotated.masks is not None:
            masks = torch.from_numpy(self.annotated.masks(index))
            if masks.shape[1:] != image.shape[1:]:
                raise ImageError(
                    f"{self.annotated.images.name(index)} has {tuple(image.shape[1:])} pixels, but its annotations say "
                    f"{tuple(masks.shape[1:])}; it is not the image that was annotated"
                )
            target["masks"] = masks
        if mix_seeds(self.seed, Purpose.VIEWS, epoch, index) & 1:
            image, target = mirror(image, target)
        return image, target, index


def mirror(image: torch.Tensor, target: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mirror an image [3, H, W] and its objects left to right."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[2]
    mirrored = {**target, "boxes": torch.stack((width - x2, y1, width - x1, y2), 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(2)
    return image.flip(2), mirrored


class TestImages:
    """Loads this rank's share of the images one by one: what is found in an image then depends on it alone, not on what
    it shares a batch with. Iterating yields (index, float32 [3, H, W] in [0, 1] on the device).
    """

    __test__ = False  # pytest would take it for a test

    def __init__(self, images: ImageSet, *, world: World, resources: Resources):
        self.device = world.device
        self.index = range(world.rank, len(images), world.size)
        self._loader = DataLoader(
            _InOrder(images, self.index), batch_size=None, **worker_options(resources, resources.prefetch)
        )

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for index, image in zip(self.index, self._loader, strict=True):
            yield index, as_float(image, self.device)


class _InOrder(Dataset):
    def __init__(self, images: ImageSet, index: Sequence[int]):
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> torch.Tensor:
        return read_whole(self.images, self.index[position])


def read_whole(images: ImageSet, index: int) -> torch.Tensor:
    """Decode image `index`: uint8 [3, H, W].

    Raises:
        ImageError: it cannot be decoded.
    """
    return pil_to_tensor(images.read(index))


def as_float(image: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move uint8 [3, H, W] to a device, as float32 in [0, 1]."""
    return image.to(device, non_blocking=True).float() / 255
