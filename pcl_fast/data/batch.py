"""What loaders hand to the step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """Two views of each of N images, ready for the encoder.

    query_view, key_view: [N, 3, H, W], normalised, channels_last, of the encoder's precision and on its device.
    index: int64 [N], positions in the data set, on the CPU.
    """

    query_view: torch.Tensor
    key_view: torch.Tensor
    index: torch.Tensor
