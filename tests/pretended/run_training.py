"""pcl_fast.train on a pretended GPU, as a program: run_training.py PRESET --data DIR --output DIR [--flags]."""

from __future__ import annotations

from gpu import PretendedGPU

from pcl_fast.train import main

if __name__ == "__main__":
    with PretendedGPU():
        main()
