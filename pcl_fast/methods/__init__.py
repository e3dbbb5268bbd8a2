"""The methods: what is learned, a file each. A new file is found by itself."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import torch

from pcl_fast.config import PRESETS, Config, changed_settings
from pcl_fast.crop_sizes import epoch_sides
from pcl_fast.distributed import World
from pcl_fast.methods.base import FeatureSpec, Inputs, Method, Metric, Part, Step, join_rows
from pcl_fast.nn.timm_network import check_image_sizes

__all__ = [
    "FeatureSpec",
    "Inputs",
    "Method",
    "Metric",
    "Part",
    "Step",
    "build",
    "check_method",
    "join_rows",
    "method_class",
]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def method_class(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ValueError: there is none; names those that there are.
    """
    if name not in Method.named:
        raise ValueError(f"there is no method {name!r}; choose from {', '.join(sorted(Method.named))}")
    return Method.named[name]


def build(config: Config, world: World, images: int) -> Method:
    """The method of a recipe on its device. Initial weights depend on config.seed alone.

    Args:
        images: in the data set.

    Raises:
        ValueError: an unknown method or architecture, or one that does not take images of the run's sizes.
        MissingPackageError: the architecture is timm's, which is not installed.
    """
    kind = method_class(config.method)
    data = config.data
    check_image_sizes(config.model.arch, epoch_sides(data.sizes, data.size, [data.size]))
    # Drawn on the CPU, so that every device and rank starts alike.
    torch.manual_seed(config.seed)
    method = kind(config, world, images)
    # A method with small crops has checked them by their own flag, see small_crops.
    sides = epoch_sides(data.sizes, data.size, {view.size for view in method.views})
    check_image_sizes(config.model.arch, sides, "size of its views")
    return method.to(world.device, memory_format=torch.channels_last)


def check_method(config: Config) -> None:
    """Refuse an unknown method, settings of other methods, which would have no effect, and a step in parts if the
    method cannot divide it.

    Raises:
        ValueError: names the method's own settings, or the methods.
    """
    kind = method_class(config.method)
    if config.optim.accumulate > 1 and kind.accumulation is None:
        able = sorted(other.name for other in Method.named.values() if other.accumulation is not None)
        raise ValueError(
            f"--optim.accumulate {config.optim.accumulate}: {kind.name} computes a step as a whole, and not in parts, "
            f"as {', '.join(able)} can; use 1, and a smaller --optim.batch-size than {config.optim.batch_size} if that "
            "does not fit"
        )
    start = PRESETS[config.preset][1] if config.preset in PRESETS else Config()
    for name in changed_settings(start, config):
        owners = [other.name for other in Method.named.values() if _reads(other, name)]
        if owners and not _reads(kind, name):
            raise ValueError(
                f"{flag(name)} is a setting of {', '.join(sorted(owners))}, and this run's method is {kind.name}, "
                f"whose own settings are {', '.join(map(flag, sorted(kind.settings)))}"
            )


def _reads(kind: type[Method], name: str) -> bool:
    """Whether a field is among a method's own settings, or of a group that is."""
    return name in kind.settings or f"{name.partition('.')[0]}." in kind.settings


def flag(setting: str) -> str:
    """A setting's flag on the command line; "cluster." is all of a group."""
    name = "--" + setting.replace("_", "-")
    return f"{name}*" if name.endswith(".") else name
