"""Every method that has a preset, made so small that a run takes a second or two."""

from __future__ import annotations

from typing import Any

from pcl_fast.config import PRESETS, Config, with_settings
from pcl_fast.demo import small
from pcl_fast.methods import method_class

# Other tests make methods of their own, which no preset has.
METHODS = sorted({config.method for _, config in PRESETS.values()})

# Of those fields that a method reads; what others are made of, see `_clusters`.
_OWN = {
    "cluster.iterations": 3,
    "cluster.warmup_epochs": 1,
    "loss.num_negatives": 4,
    "model.queue_size": 50,
    "swav.prototypes": 7,
    "swav.frozen_steps": 1,
    "swav.queue_size": 36,
    "swav.queue_epoch": 0,
    "swav.small_crops": 2,
}


def tiny(method: str, **changes: Any) -> Config:
    """The miniature of its first preset with a few clusters, negatives and keys, and batches of 12 images of 16 px; in
    names of changes a double underscore is a dot.
    """
    preset = next(name for name, (_, config) in PRESETS.items() if config.method == method)
    config = small(preset)
    settings: dict[str, Any] = {"model.dim": 8, "optim.batch_size": 12, "data.size": 16, "data.resize": 20}
    settings |= {name: value for name, value in _OWN.items() if reads(method, name)}
    if config.cluster.ks:
        settings["cluster.ks"] = _clusters(config.cluster.ks)
    return with_settings(config, settings | {name.replace("__", "."): value for name, value in changes.items()})


def reads(method: str, name: str) -> bool:
    """Whether a field is among the method's own settings."""
    return any(name == own or (own.endswith(".") and name.startswith(own)) for own in method_class(method).settings)


def _clusters(ks: tuple[int, ...]) -> tuple[int, ...]:
    """As many numbers, the same where those are the same: 3, 5, ..."""
    return tuple(3 + 2 * sorted(set(ks)).index(k) for k in ks)
