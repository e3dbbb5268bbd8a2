"""How much of the machine a rank's loaders use."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from pcl_fast.config import DataConfig


@dataclass(frozen=True)
class Resources:
    """What the loaders of a rank use of its machine.

    workers: threads that read and decode (torchvision: processes; 0 is the training process itself).
    prefetch: batches at a time in each stage of the loader.
    gpu: the device on which DALI makes the views, or None for the CPU.
    decoder_mib: GPU memory that each of DALI's threads sets aside for decoding, in MiB.
    decode_on: "gpu" or "cpu", what decodes where there is a GPU.
    """

    workers: int
    prefetch: int
    gpu: torch.device | None
    decoder_mib: int
    decode_on: str = "gpu"

    @property
    def decodes_on_gpu(self) -> bool:
        """Return whether a GPU takes part in decoding."""
        return self.gpu is not None and self.decode_on == "gpu"

    @property
    def threads(self) -> int:
        """The number of threads that work for the training process, which is at least one."""
        return max(1, self.workers)


def pick_resources(config: DataConfig, device: torch.device) -> Resources:
    """Take what `config` says, and where it says nothing:

    - workers: this machine's cores divided among its ranks, at most 16.
    - prefetch: 2 batches a stage, 3 on a GPU of 32 GB or more. Each costs the memory of its images as they are before
      the crop: 36 MB for 64 of ImageNet's.
    - decoder memory: DALI's own 16 MiB a thread, but less where the threads of both loaders, for training and for
      clustering, would together take more than a fiftieth of the GPU's memory.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(1, min(cores, 16)) if config.workers is None else config.workers
    if device.type != "cuda":
        return Resources(workers, config.prefetch or 2, None, 0)
    memory = torch.cuda.get_device_properties(device).total_memory
    share = memory // 100 // 2**20 // max(1, workers)
    prefetch = config.prefetch or (3 if memory >= 32e9 else 2)
    decoder_mib = config.decoder_mib or max(1, min(16, share))
    return Resources(workers, prefetch, device, decoder_mib, config.decode_on)
