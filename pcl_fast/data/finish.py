"""The last stage of both loaders: from the bytes of crops to what the encoder wants."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from pcl_fast.data.draws import Views
from pcl_fast.kernels import photometric, photometric_plain
from pcl_fast.kernels.photometric_plain import Op

# ImageNet's channel means and deviations, in units of a byte.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


class Finisher:
    """Colours, blurs and normalises crops."""

    def __init__(self, dtype: torch.dtype, threads: int):
        """
        Args:
            dtype: of what comes out.
            threads: that work side by side on a CPU.
        """
        self.dtype = dtype
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="finish", initializer=_one_core_each)

    @torch.inference_mode(False)  # the threads are not in that mode, and could not write to its tensors
    def __call__(self, images: torch.Tensor, views: Views | None = None) -> torch.Tensor:
        """uint8 [n, h, w, 3] -> [n, 3, h, w] on the same device, normalised with ImageNet's mean and deviation,
        channels_last.

        Args:
            views: whose colours and blur to apply; None only normalises.
        """
        n = len(images)
        ops = np.full((n, 1), Op.NONE, np.int32) if views is None else views.ops
        factors = np.zeros(ops.shape, np.float32) if views is None else views.factors
        sigma = np.zeros(n, np.float32) if views is None else views.sigma
        draws = (_beside(images, array) for array in (ops, factors, sigma))
        options = {"mean": _MEAN, "std": _STD, "dtype": self.dtype}
        if images.is_cuda:
            return photometric.photometric(images, *draws, **options)
        return photometric_plain.photometric(images, *draws, **options, pool=self._pool)


def _beside(images: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """The array on the images' device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else tensor


def _one_core_each() -> None:
    """Images are the parallel work; PyTorch's own threads, once more per thread, would only wait for each other."""
    torch.get_num_threads()  # sets the number for this thread at its first call, after which it stays as it is
    threadpool_limits(1, user_api="openmp")
