"""InstDisc: instance discrimination (Wu et al., CVPR 2018). Every image is a class of its own.

A bank holds a feature of every image. One view of an image is told from noise by noise-contrastive estimation: its own
feature in the bank is right, those of other images, drawn at random, are wrong. For sets that are small enough the view
is told from all images of the bank by a softmax, as the authors do for CIFAR (--loss.num-negatives None). Then the
image's feature in the bank moves half of the way to the new one. There is no momentum encoder and no E-step; an image
meets its former views.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pcl_fast.augmentations import View
from pcl_fast.config import PRESETS, Config, setting, view_of
from pcl_fast.data import Batch
from pcl_fast.distributed import World, all_gather_rows
from pcl_fast.losses import estimate_log_partition, nce, pseudo_label_loss, sample_negatives
from pcl_fast.methods.base import Inputs, Method, Metric, Step
from pcl_fast.nn.bank import KeyBank
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.precision import loss_dtype
from pcl_fast.nn.single_images import check_single_images
from pcl_fast.schedule import part_batch
from pcl_fast.seeds import Purpose, mix_seeds


class Seen(NamedTuple):
    """What a step has seen: positions of images int64 [N], their features in the bank, and those that the encoder made,
    both [N, dim].
    """

    index: torch.Tensor
    before: torch.Tensor
    features: torch.Tensor


class InstDisc(Method, name="instdisc"):
    """An encoder, and a bank of all images, the same on all ranks.

    log_partition: log Z, the constant of NCE; see losses/nce.py. The softmax needs none.
    estimated: whether it is there yet: the first step estimates it, by its first part where it has several.
    """

    metrics: ClassVar = {
        "loss": Metric("instance discrimination", "loss"),
        "similarity": Metric("an image and its place in the bank", "cosine similarity"),
    }
    settings = ("loss.temperature", "loss.num_negatives", "model.bank_momentum")
    accumulation = "mean"
    divisible = True

    def __init__(self, config: Config, world: World, images: int):
        """
        Raises:
            ValueError: an unknown architecture.
        """
        super().__init__(config, world, images)
        self.encoder = Encoder(config.model)
        self.bank = KeyBank(images, config.model.dim, loss_dtype(world.device))
        self.bank.keys.copy_(_unit_vectors(images, config.model.dim))
        self.register_buffer("log_partition", torch.zeros(()))
        self.estimated = False

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        negatives, momentum = config.loss.num_negatives, config.model.bank_momentum
        if negatives is not None and negatives > images:
            raise ValueError(
                f"--loss.num-negatives {negatives} is more than the {images} images that they are drawn from; use at "
                f"most {images}, or None for a softmax over all"
            )
        check_single_images(config, part_batch(config, ranks))
        if not 0 <= momentum < 1:
            raise ValueError(
                f"--model.bank-momentum {momentum}: the bank keeps this share of an image's old feature, from 0 up to "
                "but not 1, with which it would stay at random for ever; use 0.5"
            )

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        # What is too fast for the bank, whose features are up to an epoch old, does not learn: see docs/methods.md.
        weight_decay = setting(PRESETS["demo"][1], "optim.weight_decay")
        return {"loss.num_negatives": None, "optim.lr": 0.01, "optim.weight_decay": weight_decay}

    @property
    def views(self) -> tuple[View, ...]:
        """A single one: the other views of an image are in the bank."""
        return (view_of(self.config.data),)

    def draw(self, batch: Batch, number: int) -> dict[str, torch.Tensor | int]:
        """The seed of the negatives, each rank's own."""
        return {"seed": mix_seeds(self.config.seed, Purpose.NEGATIVES, number, self.world.rank)}

    def forward(self, inputs: Inputs) -> Step:
        query = self.encode(self.encoder, inputs.views[0])
        own = self.bank.keys.index_select(0, inputs.index)
        if self.config.loss.num_negatives is None:
            loss = pseudo_label_loss(query, self.bank.keys, inputs.index, self.config.loss.temperature).loss.mean()
        else:
            loss = self._nce(query, own, inputs).mean()
        query = query.detach()
        similarity = (query * own).sum(1).mean()
        return Step(loss, {"loss": loss.detach(), "similarity": similarity}, Seen(inputs.index, own, query))

    def _nce(self, query: torch.Tensor, own: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The loss of every row, with noise that is drawn."""
        temperature, images = self.config.loss.temperature, self.images
        noise = self.bank.keys.index_select(0, self._noise(inputs))
        if not self.estimated:
            found = estimate_log_partition(query, noise, temperature, images=images, group=self.world.group)
            self.log_partition.copy_(found)
            self.estimated = True
        return nce(query, own, noise, temperature, images=images, log_partition=self.log_partition)

    def _noise(self, inputs: Inputs) -> torch.Tensor:
        """Distinct images, uniform over all of them, those of the batch too: that is the noise of the loss."""
        nobody = inputs.index.new_empty(0)
        return sample_negatives(self.images, self.config.loss.num_negatives, nobody, seed=inputs.drawn["seed"])

    def phase(self, number: int) -> bool:
        """The first step estimates Z."""
        return self.estimated

    def after_update(self, carry: Seen, applied: torch.Tensor) -> None:
        """The bank takes all ranks' features, whether or not the update was applied: they are good features."""
        momentum = self.config.model.bank_momentum
        moved = F.normalize(momentum * carry.before.float() + (1 - momentum) * carry.features.float(), dim=1)
        rows = all_gather_rows(moved.to(self.bank.keys.dtype), self.world.group)
        self.bank.put(rows, all_gather_rows(carry.index, self.world.group))

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder}

    # PyTorch saves and loads this beside the buffers.

    def get_extra_state(self) -> bool:
        """Whether Z has been estimated."""
        return self.estimated

    def set_extra_state(self, state: bool) -> None:
        """Take up what `get_extra_state` has returned."""
        self.estimated = state


def _unit_vectors(number: int, dim: int) -> torch.Tensor:
    """[number, dim], random, by PyTorch's generator; in the memory of one such matrix, for there may be millions."""
    rows = torch.randn(number, dim)
    return F.normalize(rows, dim=1, out=rows)
