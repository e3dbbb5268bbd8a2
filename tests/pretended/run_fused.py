"""Steps with encoders that are rewritten for fused batch norm, on a pretended GPU of four ranks, as a program.

Prints a JSON object: what was seen, by recipe.
"""

from __future__ import annotations

import json
from typing import Any

from gpu import PretendedGPU
from run_steps import IMAGES, SETTLED, attempt, recipes, start, steps

from pcl_fast.config import Config
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build
from pcl_fast.nn.fused_batch_norm import fuse_batch_norm

RECIPES = "pcl, bn_splits 4", "simclr, bn_splits 1"  # of parts of the batch, and of all ranks


def fused_steps(gpu: PretendedGPU, config: Config, world: World) -> dict[str, Any]:
    method = build(config, world, IMAGES * world.size)
    norms = fuse_batch_norm(method)
    return {**steps(gpu, Learner(method, config, world), config, SETTLED), "norms": norms}


if __name__ == "__main__":
    world, gpu = start(4)
    with gpu:
        print(json.dumps({n: attempt(fused_steps, gpu, config, world) for n, config in recipes(4) if n in RECIPES}))
