"""The last stage of the DALI loader: colours, blur and solarise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from pcl_fast.data.views.draws import Draws
from pcl_fast.kernels import photometric, photometric_plain, switches


class Finisher:
    """A finisher colours, blurs and solarises crops."""

    def __init__(self, threads: int):
        """Take so many threads, which share the images of a batch among them where there is no GPU."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="finish", initializer=_one_core_each)

    @torch.inference_mode(False)  # the threads are not in that mode, and could not write to its tensors
    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Return what `draws` makes of crops that are flipped already: uint8 [n, h, w, 3], as `images`."""
        slots = draws.ops, draws.factors, draws.sigma
        if images.is_cuda and not switches.is_off("photometric"):
            views = photometric.photometric(images, *(_beside(images, array) for array in slots))
        else:  # its plain twin is for the CPU, wherever the crops are
            on_host = photometric_plain.photometric(images.cpu(), *map(torch.from_numpy, slots), pool=self._pool)
            views = on_host.to(images.device)
        if draws.solarise.any():
            _solarise(views, draws.solarise)
        return views


def _solarise(views: torch.Tensor, chosen: np.ndarray) -> None:
    """Replace x by the lesser of x and 255 - x in the chosen views, in place: only from 128 on does that change x."""
    inverting = _beside(views, np.where(chosen, 255, 0).astype(np.uint8))
    torch.minimum(views, views ^ inverting[:, None, None, None], out=views)


def _beside(images: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """Send an array to the images' device, without waiting for its arrival."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else tensor


def _one_core_each() -> None:
    """Keep PyTorch from starting threads for each of these threads: they would only wait for each other."""
    torch.get_num_threads()  # its first call in a thread sets the thread's number, which then stays as it is
    threadpool_limits(1, user_api="openmp")
