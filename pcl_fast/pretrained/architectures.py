"""Which ResNet some tensors are of: told by their shapes, which all of torchvision's have their own of."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from pcl_fast.config import ModelConfig
from pcl_fast.errors import CheckpointError
from pcl_fast.nn.encoder import build_backbone, resnet_names
from pcl_fast.pretrained.tensors import Differences, differences, shapes_of


def architecture(tensors: Mapping[str, torch.Tensor], *, file: Path, prefix: str = "", likely: object = None) -> str:
    """Return torchvision's name of the ResNet that has exactly these tensors, but for its classifier.

    Args:
        tensors: by torchvision's names.
        file: that they come from; prefix: of their names there.
        likely: the name that the file gives it, which is tried first.

    Raises:
        CheckpointError: no ResNet has; says what stands between them and the nearest one.
    """
    names = resnet_names()
    found: dict[str, Differences] = {}
    for name in sorted(names, key=lambda name: (name != likely, name != "resnet50")):
        found[name] = differences(_shapes(name), tensors, prefix)
        if not found[name].count:
            return name
    nearest = min(found, key=lambda name: found[name].count)
    reason = f"{file} holds no ResNet of torchvision's. The nearest is {nearest}, but {found[nearest]}"
    stem = tensors.get("conv1.weight")
    if stem is not None and stem.dim() == 4 and stem.shape[-1] == 3:
        reason += (
            f". Its {prefix}conv1.weight {list(stem.shape)} is a stem for small images, which only this project's own "
            "checkpoints may have: nothing in others' says what follows it"
        )
    raise CheckpointError(reason)


@functools.cache
def _shapes(name: str) -> dict[str, torch.Size]:
    """Return what the backbone of a ResNet has."""
    with torch.device("meta"):
        return shapes_of(build_backbone(ModelConfig(arch=name))[0])
