"""Running a trained detector over images, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from torch import nn

from pcl_fast.data import ImageSet
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.distributed import World, gather_objects
from pcl_fast.evaluation.detection.data import TestImages
from pcl_fast.nn.precision import autocast

_TELL_EVERY = 50


class Detections(NamedTuple):
    """What was found in an image, the surest first.

    boxes: float32 [m, 4]: x1, y1, x2, y2 in pixels from the image's upper left corner.
    scores: float32 [m].
    labels: int64 [m], from 1.
    masks: a run-length code of every object as COCO has them; None from a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None


@torch.no_grad()
def detect(
    detector: nn.Module,
    images: ImageSet,
    *,
    world: World,
    resources: Resources,
    reached: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Detections]:
    """Find the objects in all images: in each by itself, so that the result does not depend on the number of ranks.

    Args:
        detector: one of torchvision's, on this rank's device.
        images: the same on all ranks.
        resources: what loading may use of the machine.
        reached: is called every 50 images, equally often on all ranks.
        progress: is told how many of this rank's images are done.

    Returns:
        What was found in every image, in their order, on all ranks.
    """
    detector.eval()
    found: dict[int, Detections] = {}
    loader = iter(TestImages(images, world=world, resources=resources))
    for done in range(-(-len(images) // world.size)):
        if (item := next(loader, None)) is not None:
            index, image = item
            with autocast(world.device):
                found[index] = _to_host(detector([image])[0])
        if (done + 1) % _TELL_EVERY == 0:
            progress(done + 1)
            reached()
    everything = {index: Detections(*item) for part in gather_objects(found, world) for index, item in part.items()}
    return [everything[index] for index in range(len(images))]


def _to_host(found: dict[str, torch.Tensor]) -> Detections:
    boxes, scores, labels = (found[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
    masks = _encode(found["masks"][:, 0] > 0.5) if "masks" in found else None
    return Detections(boxes, scores, labels, masks)


def _encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Return the run-length codes of bool [m, height, width]."""
    if not len(masks):
        return []
    # COCO's codes run down the columns: [height, width, m] with the rows of a column beside one another.
    columns = masks.permute(0, 2, 1).contiguous().cpu().numpy().astype(np.uint8)
    return rle.encode(columns.transpose(2, 1, 0))
