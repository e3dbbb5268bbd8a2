"""A guard for protocols that must leave the encoder as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(**networks: nn.Module | None) -> Iterator[None]:
    """Make sure that what happens in this context changes no parameter and no buffer of the networks.

    Raises:
        RuntimeError: it did; names the tensors. After an error of another kind nothing is compared.
    """
    present = {name: network for name, network in networks.items() if network is not None}
    before = {name: tensor.clone() for name, tensor in _tensors(present)}
    yield
    after = dict(_tensors(present))
    if changed := [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]:
        raise RuntimeError(
            f"{len(changed)} of {len(before)} tensors of the frozen encoder have changed: "
            f"{', '.join(sorted(changed)[:5])}; these scores are not of the encoder that was given"
        )


def _tensors(networks: dict[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            yield f"{name}.{key}", tensor


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
