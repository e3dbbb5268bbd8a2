"""timm's networks as backbones: `--model.arch timm/NAME`. Their weights are drawn, never downloaded."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pcl_fast.errors import MissingPackageError

_PREFIX = "timm/"


def timm_name(arch: str) -> str | None:
    """Return timm's own name of an architecture "timm/NAME", or None for those of other libraries."""
    return arch.removeprefix(_PREFIX) if arch.startswith(_PREFIX) else None


def build_timm(name: str) -> tuple[nn.Module, int]:
    """Return (timm's network without a classifier and pooled as it is by default, whose output is its features; how
    many features these are).

    A network for images of one size is built so that it takes others, wherever it can be, see `arguments`.

    Raises:
        ValueError: timm has no such network; names some that are called alike.
        MissingPackageError: timm is not installed.
    """
    network = _timm(name).create_model(name, pretrained=False, num_classes=0, **arguments(name))
    # What some put between pooling and classifier belongs to their features, and has a width of its own.
    return network, getattr(network, "head_hidden_size", None) or network.num_features


@functools.cache
def arguments(name: str) -> dict[str, Any]:
    """Return the arguments beside its name by which a network is built: dynamic_img_size, which interpolates the
    embeddings of positions, for those that are made for images of one size and know this argument.

    Raises:
        ValueError, MissingPackageError: see `build_timm`.
    """
    timm = _timm(name)
    if not timm.get_pretrained_cfg(name).fixed_input_size:
        return {}
    flexible = {"dynamic_img_size": True}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        try:
            timm.create_model(name, pretrained=False, num_classes=0, **flexible)
        except TypeError:  # of a class without this argument
            return {}
    return flexible


def own_size(name: str) -> int:
    """Return the side of the images that a network is made for, in pixels."""
    return _timm(name).get_pretrained_cfg(name).input_size[-1]


def has_one_size(name: str) -> bool:
    """Whether a network is made for images of one size, by embeddings of positions for instance."""
    return _timm(name).get_pretrained_cfg(name).fixed_input_size


def classifiers(name: str) -> tuple[str, ...]:
    """Return the names of the layers that make classes of a network's features."""
    found = _timm(name).get_pretrained_cfg(name).classifier or ()
    return (found,) if isinstance(found, str) else tuple(found)


def first_layer(name: str) -> Any:
    """Return timm's name, or names, of the layers that read the images."""
    return _timm(name).get_pretrained_cfg(name).first_conv


def check_image_sizes(arch: str, sizes: Iterable[int], flag: str | None = None) -> None:
    """Refuse images of a size that a network cannot take, and networks that cannot be trained here. It computes on the
    meta device, and looks at timm's networks alone: the others take any size.

    Args:
        flag: which flag gives a size that is not --data.size.

    Raises:
        ValueError: names the size, what stands against it and the size that the network is made for; or says what the
            network does that a backbone must not.
        MissingPackageError: timm is not installed.
    """
    name = timm_name(arch)
    if name is None:
        return
    for size in sizes:
        _check_size(name, size, flag)


@functools.cache
def _check_size(name: str, size: int, flag: str | None) -> None:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network, width = build_timm(name)
        own = own_size(name)
        advice = f"--data.size {own}, or --size in an evaluation," if flag is None else f"another {flag}"
        _try(network.train(), width, size, name, advice)


def _try(network: nn.Module, width: int, size: int, name: str, advice: str) -> None:
    arch = f"--model.arch {_PREFIX}{name}"
    try:
        features = network(torch.empty(2, 3, size, size))
    except Exception as error:  # networks assert, index and reshape
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            # Some operations do not exist on the meta device, which says nothing of the network or the size: such a
            # network is not tried before it trains.
            return
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{arch} does not take images of {size} px ({reason}); it is made for {own_size(name)} px: use "
            f"{advice} or another network"
        ) from error
    if not isinstance(features, torch.Tensor) or features.shape != (2, width):
        raise ValueError(f"{arch} does not map a batch of images to {width} features each when it is trained")
    features.sum().backward()
    unused = [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None]
    if unused:
        raise ValueError(f"{arch}: {len(unused)} of its parameters do not take part in its features ({unused[0]}, ...)")


def _timm(name: str) -> Any:
    """Return the package, which has a network of this name."""
    try:
        import timm
    except ImportError as error:
        raise MissingPackageError(
            f'--model.arch {_PREFIX}{name} needs the package timm ({error}): pip install "pcl-fast[timm]"'
        ) from error
    plain, _, tag = name.partition(".")
    if tag:
        raise ValueError(
            f"--model.arch {_PREFIX}{name}: {tag} names trained weights, which are not loaded; use {_PREFIX}{plain}"
        )
    if not timm.is_model(name):
        alike = difflib.get_close_matches(name, timm.list_models(), n=5) or ["resnet50d", "convnext_tiny"]
        raise ValueError(
            f"--model.arch {_PREFIX}{name}: timm {timm.__version__} has no {name}; it has, for instance, "
            f"{', '.join(alike)}"
        )
    return timm
