"""The check of the kernels with which a run begins on a GPU, by itself: each kernel against its plain twin.

    python bench/self_check.py

The exit code is 1 if a kernel is wrong or cannot be launched. Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
import time

import device
import torch

if not device.CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

from pcl_fast.kernels.switches import KERNELS

from pcl_fast.run.self_check import find_faults

DIM, GRANULARITIES = 128, 3  # the paper's


def main() -> int:
    where, wrong = torch.device("cuda", 0) if device.CUDA else torch.device("cpu"), {}
    for name in KERNELS:
        for again in (False, True):  # the second time is compiled already
            begin = time.perf_counter()
            faults = find_faults([name], where, dim=DIM, granularities=GRANULARITIES)
            seconds = time.perf_counter() - begin
            print(f"{name:12} {faults.get(name, 'right')}, {seconds:.2f} s{', compiled' if again else ''}", flush=True)
            wrong |= faults
            if not device.CUDA:
                break
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
