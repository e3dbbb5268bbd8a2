"""Beginning a run with the weights of a checkpoint: a run's, the official PCL's or MoCo's, or another library's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pcl_fast.config import ModelConfig
from pcl_fast.errors import CheckpointError
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.queue import KeyQueue
from pcl_fast.pretrained.encoder import THE_ONLY_ONE, Pretrained
from pcl_fast.pretrained.files import locate, read
from pcl_fast.pretrained.formats import find_queue
from pcl_fast.pretrained.head import describe
from pcl_fast.pretrained.ours import is_ours
from pcl_fast.pretrained.reading import encoder_of, names_in
from pcl_fast.pretrained.tensors import differences, shapes_of

if TYPE_CHECKING:
    from pcl_fast.methods import Method


class Weights(NamedTuple):
    """What a run can begin with.

    encoders: by "query" and "momentum", those that the file has; one that has no name is the query encoder.
    queue: keys [size, dim], unit vectors, and the place of the next one; None where the file has none.
    """

    encoders: dict[str, Pretrained]
    queue: tuple[torch.Tensor, int] | None


def begin_with(path: Path, method: Method, model: ModelConfig) -> tuple[list[str], str]:
    """Load a checkpoint's encoders into those of a method, in place, and its queue where both have one.

    A momentum encoder that the file does not have begins as the query encoder, as it does in every new run, and the
    other way round. A file without projection heads leaves those of the method as they were drawn, but alike.

    Args:
        path: a file or a folder that the evaluation reads.
        method: of the new run.
        model: the recipe by which its encoders were built.

    Returns:
        Lines for the log, which say what was loaded and what is new; and the file's SHA-256.

    Raises:
        CheckpointError: the file cannot be read, or its networks are others than the method's; says which flags would
            make them alike.
        OSError: the file cannot be opened.
    """
    weights = read_weights(path)
    first = next(iter(weights.encoders.values()))
    lines = [f"beginning with the weights of {first.source}: {first.path}"]
    for name, encoder in method.encoders().items():
        found = weights.encoders.get(name, first)
        _check_backbone(found, model)
        _load_encoder(encoder, found)
        lines.append(f"  {name} encoder: {_described(found, name)}")
    queue = method.key_queue()
    if queue is not None:
        lines.append(f"  queue: {_load_queue(queue, weights.queue if first.head is not None else None)}")
    return [*lines, "  all else begins anew"], first.checksum


def read_weights(path: Path) -> Weights:
    """Read what a run can begin with; see `begin_with` for what is raised."""
    file = locate(path)
    content = read(file)
    ours = is_ours(content)
    names = names_in(content, file)
    encoders = {"query" if name == THE_ONLY_ONE else name: encoder_of(content, name, file) for name in names}
    return Weights(encoders, _our_queue(content["method"]) if ours else find_queue(content))


def _our_queue(method: Mapping[str, Any]) -> tuple[torch.Tensor, int] | None:
    """Return the queue in the state of a method that has a KeyQueue as its submodule `queue`."""
    return (method["queue.keys"], int(method["queue.position"])) if "queue.keys" in method else None


def _check_backbone(found: Pretrained, model: ModelConfig) -> None:
    if (found.arch, found.small_stem) != (model.arch, model.small_stem):
        theirs, ours = (_network(arch, stem) for arch, stem in ((found.arch, found.small_stem), _of(model)))
        flag = "--model.small-stem" if found.small_stem else "--model.no-small-stem"
        raise CheckpointError(
            f"--init {found.path} holds a {theirs}, and this run trains a {ours}; train with --model.arch {found.arch} "
            f"{flag}, or begin with another checkpoint"
        )


def _of(model: ModelConfig) -> tuple[str, bool]:
    return model.arch, model.small_stem


def _network(arch: str, small_stem: bool) -> str:
    return f"{arch} with the stem for small images" if small_stem else arch


def _load_encoder(encoder: nn.Module, found: Pretrained) -> None:
    """Copy the weights into an encoder, in place; of a file without projection head only the backbone's."""
    assert isinstance(encoder, Encoder)
    if found.head is not None:
        differing = differences(shapes_of(encoder.head), found.head.state_dict())
        if differing.count:
            raise CheckpointError(
                f"the projection head in --init {found.path} is {describe(found.head)}, and this run's is "
                f"{describe(encoder.head)} ({differing}); train with its --model.head and --model.dim, or begin with "
                "the backbone alone, which python -m pcl_fast.export --to torchvision writes"
            )
        encoder.head.load_state_dict(found.head.state_dict())
    encoder.backbone.load_state_dict(found.backbone.state_dict())


def _described(found: Pretrained, name: str) -> str:
    """Say what was loaded into the encoder `name`."""
    head = "a new projection head" if found.head is None else f"the projection head, {describe(found.head)}"
    origin = "" if found.encoder in (name, THE_ONLY_ONE) else f"the file's {found.encoder} encoder, "
    return f"{origin}the backbone, {_network(found.arch, found.small_stem)}, and {head}"


def _load_queue(queue: KeyQueue, found: tuple[torch.Tensor, int] | None) -> str:
    """Fill the queue, if keys of its size were found; return what has become of it."""
    if found is None:
        return "new, there is none in the file"
    keys, position = found
    if keys.shape != queue.keys.shape:
        size, ours = (" x ".join(map(str, shape)) for shape in (keys.shape, queue.keys.shape))
        return f"new, because that of the file is {size} and this run's is {ours}"
    queue.keys.copy_(keys)
    queue.position.fill_(position % len(keys))
    return f"{len(keys)} keys"
