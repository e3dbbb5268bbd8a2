"""The config.json that timm keeps beside weights: which network they are of, and how it wants its images."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcl_fast.config import DataConfig
from pcl_fast.data.batch import MEAN, STD
from pcl_fast.errors import CheckpointError

# Arguments of a network that change neither its features nor how they are computed in eval mode.
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate"}


@dataclass(frozen=True)
class HubConfig:
    """What a config.json says.

    architecture: timm's name of the network; tag: of these weights, or None.
    data: how its images are read.
    notes: what is done otherwise here.
    """

    architecture: str
    tag: str | None
    data: DataConfig
    notes: tuple[str, ...]


def hub_config(weights: Path) -> HubConfig | None:
    """Return what the config.json beside a file of weights says, or None if there is none of timm's.

    Raises:
        CheckpointError: it cannot be read, or says that the network or its images are not as they are here.
    """
    file = weights.with_name("config.json")
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return _understood(config, file) if "architecture" in config else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is not as timm writes it ({type(error).__name__}: {error})") from error


def _understood(config: dict[str, Any], file: Path) -> HubConfig:
    # Older files have it all in one.
    images = config.get("pretrained_cfg", config)
    for name, ours in (("mean", MEAN), ("std", STD)):
        theirs = images.get(name)
        if theirs is not None and any(abs(255 * a - b) > 0.5 for a, b in zip(theirs, ours, strict=True)):
            raise CheckpointError(
                f"{file}: the network wants images normalised with {name} {theirs}, here they are with "
                f"{[round(value / 255, 3) for value in ours]}"
            )
    changes = {name: value for name, value in (config.get("model_args") or {}).items() if name not in _HARMLESS}
    if (pool := config.get("global_pool", "avg")) != "avg":
        changes["global_pool"] = pool
    if changes:
        raise CheckpointError(f"{file}: the network is no plain ResNet, it was built with {changes}")
    size = images.get("input_size", (3, 224, 224))[-1]
    interpolation = images.get("interpolation", "bilinear")
    return HubConfig(
        architecture=str(config["architecture"]),
        tag=images.get("tag"),
        data=DataConfig(size=size, resize=math.floor(size / (images.get("crop_pct") or 0.875))),
        notes=() if interpolation == "bilinear" else (f"timm resizes its images with {interpolation}, here bilinear",),
    )
