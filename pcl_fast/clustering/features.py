"""Features of the whole data set, each rank its own shard."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pcl_fast.data import normalise


class FeatureShard:
    """This rank's features [n_local, d] float32, allocated once and filled again before every E-step."""

    def __init__(self, length: int, dim: int, device: torch.device):
        self.features = torch.empty(length, dim, device=device)

    @torch.inference_mode()
    def fill(self, encoder: torch.nn.Module, batches: Iterable[torch.Tensor], autocast: torch.autocast) -> torch.Tensor:
        """Encode the clustering view in eval mode (running batch statistics); returns the buffer.

        Args:
            encoder: maps normalised images to unit features [N, d].
            batches: uint8 [N, 3, H, W], this rank's images in the data set's order.
            autocast: precision of the forward pass.

        Raises:
            RuntimeError: the batches do not hold exactly as many images as the shard.
        """
        training = encoder.training
        encoder.eval()
        filled = 0
        for images in batches:
            with autocast:
                features = encoder(normalise(images.to(self.features.device, non_blocking=True)))
            if filled + len(features) <= len(self.features):
                self.features[filled : filled + len(features)] = features
            filled += len(features)
        encoder.train(training)
        if filled != len(self.features):
            raise RuntimeError(f"the loader gave {filled} images for a shard of {len(self.features)}")
        return self.features
