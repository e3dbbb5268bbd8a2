"""The prototypes of a run: what the last E-step found, kept where every M-step reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pcl_fast.clustering.types import PrototypeSet


class Prototypes(nn.Module):
    """One PrototypeSet for every number of clusters; none before the first E-step.

    They lie in buffers whose addresses stay the same from one E-step to the next, so that a CUDA graph, which holds
    addresses, reads the new prototypes.
    """

    def __init__(self, ks: Sequence[int], dim: int, images: int, loss_dtype: torch.dtype):
        """
        Args:
            ks: numbers of clusters, one per granularity; may be empty.
            dim: d, length of a prototype.
            images: n, the number of images in the data set.
            loss_dtype: the type in which the loss reads prototypes; they are kept in float32 as well.
        """
        super().__init__()
        self.found = False
        self._loss_dtype = loss_dtype
        self.granularities = nn.ModuleList(_Granularity(k, dim, images, loss_dtype) for k in ks)

    def replace(self, sets: Sequence[PrototypeSet]) -> None:
        """Copy in what an E-step found: one set per granularity, in order."""
        for granularity, found in zip(self.granularities, sets, strict=True):
            granularity.fill(found)
        self.found = True

    def sets(self) -> list[PrototypeSet]:
        """Return the granularities in float32; an empty list before the first E-step."""
        return [granularity.set() for granularity in self.granularities] if self.found else []

    def for_loss(self) -> list[PrototypeSet]:
        """Return the granularities in the type in which the loss reads them; an empty list before the first E-step."""
        return [granularity.for_loss() for granularity in self.granularities] if self.found else []

    # PyTorch saves and loads this beside the buffers.

    def get_extra_state(self) -> bool:
        """Return whether there has been an E-step."""
        return self.found

    def set_extra_state(self, state: bool) -> None:
        """Take up what `get_extra_state` has returned."""
        self.found = state


def prototypes_in(method: Mapping[str, Any]) -> tuple[PrototypeSet, ...]:
    """Return the prototypes in the state_dict of a method that has `Prototypes` as its submodule `prototypes`; none if
    it has not, or before the first E-step.
    """
    if not method.get("prototypes._extra_state"):
        return ()
    sets = []
    while f"prototypes.granularities.{len(sets)}.centroids" in method:
        prefix = f"prototypes.granularities.{len(sets)}."
        sets.append(PrototypeSet(*(method[prefix + field] for field in PrototypeSet._fields)))
    return tuple(sets)


class _Granularity(nn.Module):
    """The buffers of one PrototypeSet."""

    def __init__(self, k: int, dim: int, images: int, loss_dtype: torch.dtype):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(k, dim))
        self.register_buffer("concentration", torch.ones(k))
        self.register_buffer("assignment", torch.zeros(images, dtype=torch.int32))
        rounded = None if loss_dtype is torch.float32 else torch.zeros(k, dim, dtype=loss_dtype)
        self.register_buffer("rounded", rounded, persistent=False)
        self.register_load_state_dict_post_hook(lambda *_: self._round())

    def fill(self, found: PrototypeSet) -> None:
        for buffer, value in zip(self.set(), found, strict=True):
            buffer.copy_(value)
        self._round()

    def set(self) -> PrototypeSet:
        return PrototypeSet(self.centroids, self.concentration, self.assignment)

    def for_loss(self) -> PrototypeSet:
        return self.set() if self.rounded is None else self.set()._replace(centroids=self.rounded)

    def _round(self) -> None:
        if self.rounded is not None:
            self.rounded.copy_(self.centroids)
