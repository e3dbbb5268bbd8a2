"""Named tensors: how they are listed, compared with what a network has, and put into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from pcl_fast.errors import CheckpointError

_AT_MOST = 8
# Batch norm's counters came with PyTorch 0.4.1, and nothing that is computed here depends on them.
_COUNTER = "num_batches_tracked"


def listed(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return names and shapes; those of a part with more than two tensors together."""
    parts: dict[str, list[str]] = {}
    for name in tensors:
        parts.setdefault(name.partition(".")[0], []).append(name)
    words: list[str] = []
    for part, names in parts.items():
        if len(names) > 2:
            words.append(f"{part}.* ({len(names)} tensors)")
        else:
            words += [f"{name} {list(tensors[name].shape)}" for name in names]
    return shortened(words)


def shortened(words: Iterable[str]) -> str:
    """Return words with commas between them, of very many only the first."""
    words = list(words)
    rest = len(words) - _AT_MOST
    return ", ".join(words) if rest <= 0 else f"{', '.join(words[:_AT_MOST])} and {rest} more"


class Differences(NamedTuple):
    """What stands between tensors and a network: names, with shapes."""

    missing: list[str]
    left_over: list[str]
    reshaped: list[str]

    @property
    def count(self) -> int:
        """Return how many there are; 0 if the tensors fit."""
        return sum(map(len, self))

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "left over": self.left_over, "of another shape": self.reshaped}
        return "; ".join(f"{kind}: {shortened(words)}" for kind, words in kinds.items() if words)


def differences(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor], prefix: str = ""
) -> Differences:
    """Compare tensors with the shapes of a network's. Batch norm's counters may be missing.

    Args:
        prefix: of the tensors' names in their file, for the words.
    """
    missing = [name for name in expected if name not in tensors and not name.endswith(_COUNTER)]
    reshaped = [
        f"{prefix}{name} {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return Differences(
        [f"{prefix}{name} {list(expected[name])}" for name in missing],
        [f"{prefix}{name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in expected],
        reshaped,
    )


def fill(network: nn.Module, tensors: Mapping[str, torch.Tensor], *, file: Path, prefix: str = "") -> None:
    """Give a network these values, and memory on the CPU, float32, if it was built on the meta device.

    Raises:
        CheckpointError: the tensors are not exactly the network's; names those that differ.
    """
    expected = network.state_dict()
    found = differences(shapes_of(network), tensors, prefix)
    if found.count:
        raise CheckpointError(f"the tensors of {file} do not fit the network: {found}")
    if any(parameter.is_meta for parameter in network.parameters()):
        network.to_empty(device="cpu")
    counters = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith(_COUNTER)}
    network.load_state_dict({**counters, **tensors})


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all tensors of a network's state by name."""
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
