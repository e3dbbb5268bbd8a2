"""Where others' files keep their ResNets.

official PCL and MoCo           state_dict: module.encoder_q.*, module.encoder_k.*, with the projection head as fc
DINO, whole                     student and teacher: module.backbone.*
Barlow Twins and VICReg, whole  model: module.backbone.*
SwAV, DeepCluster-v2            module.*, with projection_head and prototypes beside it
torchvision, timm, and what DINO, VICReg and Barlow Twins publish: bare names
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pcl_fast.errors import CheckpointError
from pcl_fast.pretrained.encoder import THE_ONLY_ONE
from pcl_fast.pretrained.tensors import listed, shortened

_CONTAINERS = ("state_dict", "model", "teacher", "student")
_TWINS = {"query": "encoder_q.", "momentum": "encoder_k."}
_STUDENT_AND_TEACHER = {"query": "student", "momentum": "teacher"}
_SINGLE = ("backbone.", "")
_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# Where a ResNet has no prefix of its own, other parts may stand beside its own. All else would be a layer of it that
# torchvision's has not.
_BESIDE = ("fc", "head", "classifier", "projector", "predictor", "projection_head", "prototypes")


@dataclass(frozen=True)
class Found:
    """An encoder in a file.

    encoder: "query", "momentum" or THE_ONLY_ONE.
    kind: what such a file is, in words.
    prefix: of the tensors' names in the file.
    backbone: the ResNet's tensors, by torchvision's names.
    head: the projection head's, by the names in it; empty if there is none.
    left_out: all else in the file, in words.
    facts: plain values that the file says of itself.
    """

    encoder: str
    kind: str
    prefix: str
    backbone: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    left_out: str
    facts: dict[str, Any]


class _State(NamedTuple):
    """Tensors by name, all without the `wrapper` that their names begin with; key: under which they stand."""

    key: str | None
    wrapper: str
    tensors: dict[str, torch.Tensor]


class _Place(NamedTuple):
    """A ResNet: names in a state that begin with a prefix."""

    state: _State
    prefix: str
    kind: str


def find_encoder(content: Any, name: Literal["query", "momentum"], file: Path) -> Found:
    """Find an encoder in what a file holds.

    Args:
        content: what `files.read` returned.
        name: which encoder to take from a file that has two.
        file: for words.

    Raises:
        CheckpointError: there is no ResNet, or not this encoder, or it cannot be told which; names what there is.
    """
    states, places = _searched(content, file)
    encoder = THE_ONLY_ONE if THE_ONLY_ONE in places else name
    if encoder not in places:
        raise CheckpointError(f"{file} has no {name} encoder, only {', '.join(places)}; it has {_contents(states)}")
    return _taken(content, encoder, places[encoder])


def encoder_names(content: Any, file: Path) -> list[str]:
    """Return which encoders a file holds: "query" and "momentum" or one of them, or THE_ONLY_ONE.

    Raises:
        CheckpointError: there is no ResNet, or several of which nothing says which is which.
    """
    return list(_searched(content, file)[1])


def find_queue(content: Mapping[str, Any]) -> tuple[torch.Tensor, int] | None:
    """Return the queue of an official PCL or MoCo file: keys [size, dim], as our queue has them, and the place of the
    next one; None where there is none.
    """
    for state in _states(content):
        queue, place = (state.tensors.get(name) for name in ("queue", "queue_ptr"))
        if queue is not None and place is not None and queue.dim() == 2:
            return queue.T, int(place)
    return None


def _searched(content: Any, file: Path) -> tuple[list[_State], dict[str, _Place]]:
    """Return what a file holds, and where in it the encoders are."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not tensors by name")
    states = list(_states(content))
    if not any(state.tensors for state in states):
        raise CheckpointError(f"{file} holds no tensors by name; it has {shortened(map(str, content)) or 'nothing'}")
    places = _places(states, file)
    if not places:
        raise CheckpointError(
            f"{file} holds no ResNet with torchvision's names, it has {_contents(states)}. Names may begin with "
            "module., backbone., encoder_q. and encoder_k. and stand under state_dict, model, teacher or student"
        )
    return states, places


def _states(content: Mapping[str, Any]) -> Iterator[_State]:
    nested = [key for key in _CONTAINERS if isinstance(content.get(key), Mapping)]
    for key in nested or [None]:
        entries = content if key is None else content[key]
        tensors = {str(name): value.detach() for name, value in entries.items() if isinstance(value, torch.Tensor)}
        wrapper = ""
        while tensors and all(name.startswith(f"{wrapper}module.") for name in tensors):
            wrapper += "module."
        yield _State(key, wrapper, {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()})


def _places(states: list[_State], file: Path) -> dict[str, _Place]:
    """Return where the encoders are, by "query" and "momentum" or by THE_ONLY_ONE.

    Raises:
        CheckpointError: there are several of which nothing says which is which.
    """
    by_key = {state.key: state for state in states}
    if by_key.keys() >= set(_STUDENT_AND_TEACHER.values()):
        kind = "a checkpoint with a student (query) and a teacher (momentum), like DINO's"
        return {
            name: _Place(by_key[key], prefix, kind)
            for name, key in _STUDENT_AND_TEACHER.items()
            for prefix in _single(by_key[key])
        }
    for state in states:
        kind = "a checkpoint in the format of the official PCL and MoCo"
        twins = {name: _Place(state, prefix, kind) for name, prefix in _TWINS.items() if _holds(state, prefix)}
        if twins:
            return twins
    singles = [_Place(state, prefix, "a ResNet's weights") for state in states for prefix in _single(state)]
    if len(singles) > 1:
        keys = " and ".join(str(place.state.key) for place in singles)
        raise CheckpointError(f"{file} holds a ResNet under {keys}; write the one that is meant into a file of its own")
    return {THE_ONLY_ONE: singles[0]} if singles else {}


def _single(state: _State) -> list[str]:
    """Return the prefix of the ResNet in a state that has one, or nothing."""
    return [prefix for prefix in _SINGLE if _holds(state, prefix)][:1]


def _holds(state: _State, prefix: str) -> bool:
    return any(name.startswith(tuple(f"{prefix}{part}." for part in _PARTS)) for name in state.tensors)


def _taken(content: Mapping[str, Any], encoder: str, place: _Place) -> Found:
    state, prefix, kind = place
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}
    apart = ("fc",) if prefix else _BESIDE
    backbone = {name: tensor for name, tensor in inside.items() if name.partition(".")[0] not in apart}
    # In twins it is what maps to the features that are contrasted, elsewhere a classifier.
    has_head = prefix in _TWINS.values()
    head = {name: tensor for name, tensor in inside.items() if has_head and name.startswith("fc.")}
    used = {f"{prefix}{name}" for name in (*backbone, *head)}
    rest = {name: tensor for name, tensor in state.tensors.items() if name not in used}
    facts = {key: content[key] for key in ("epoch", "arch") if isinstance(content.get(key), (int, str))}
    others = [
        str(key)
        for key, value in content.items()
        if key != state.key and key not in facts and not (state.key is None and isinstance(value, torch.Tensor))
    ]
    return Found(
        encoder=encoder,
        kind=kind,
        prefix=f"{state.wrapper}{prefix}",
        backbone=backbone,
        head={name.removeprefix("fc."): tensor for name, tensor in head.items()},
        left_out=", ".join(words for words in (listed(rest), shortened(others)) if words),
        facts=facts,
    )


def _contents(states: list[_State]) -> str:
    return "; ".join(
        f"{state.key}: {listed(state.tensors)}" if state.key else listed(state.tensors) for state in states
    )
