"""Checks that a step of ours and of the official way learn the same from the same, before their speed is compared."""

from __future__ import annotations

from dataclasses import replace

import official_step
import recipe
import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import Config
from pcl_fast.data import Batch, normalise
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build

_ROWS, _K, _SIZE, _CPU = 8, 16, 32, torch.device("cpu")


def small_recipe() -> Config:
    config = recipe.step_recipe(_ROWS)
    return replace(
        config,
        model=replace(config.model, arch="resnet18", queue_size=4 * _ROWS, momentum=0.9),
        loss=replace(config.loss, num_negatives=_K - _ROWS),
        # A small rate, so that rounding does not grow, and a decay large enough to be seen beside the gradient.
        optim=replace(config.optim, lr=1e-3, weight_decay=0.1),
        cluster=replace(config.cluster, ks=(_K, _K)),
    )


def small_learner(world: World) -> Learner:
    """Return our learner of the small recipe, with random prototypes, all of which are negatives."""
    config = small_recipe()
    config = replace(config, loss=replace(config.loss, num_negatives=None))
    learner = Learner(build(config, world, _K), config, world)
    learner.method.prototypes.replace(random_granularities(config.model.dim))
    learner.set_rate(0)
    return learner


def check_agreement() -> None:
    """Take two steps of either, from the same weights, queue and views, on the CPU in float32, and compare losses,
    weights and queues.

    The two losses are the same because no two rows have the same prototype and all other prototypes are negatives. This
    needs a process group.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    config = small_recipe()
    theirs = official_step.OfficialStep(config, _CPU)
    own = small_learner(World(0, 1, _CPU, None))
    method, granularities = own.method, own.method.prototypes.sets()
    theirs.start_from(method.encoder.state_dict(), method.queue.keys)
    start = flat(method.encoder)
    for number in range(2):
        views, index = random_views(), torch.arange(_ROWS) + number * _ROWS
        expected = theirs.step((*(normalise(view, torch.float32).contiguous() for view in views), index), granularities)
        found = own.step(Batch(tuple(views), index), number)["loss"].item()
        if abs(found / expected - 1) > 1e-4:
            raise AssertionError(f"step {number}: the official loss is {expected}, ours {found}")
    pairs = (method.encoder, theirs.module.query_encoder), (method.momentum_encoder, theirs.module.key_encoder)
    for name, (found, expected) in zip(("query", "momentum"), (map(flat, pair) for pair in pairs), strict=True):
        apart = torch.linalg.norm(found - expected) / torch.linalg.norm(expected - start)
        if not apart < 0.02:
            raise AssertionError(f"the {name} encoders are {apart:.3f} of their way apart")
    torch.testing.assert_close(method.queue.keys, theirs.module.queue.T, rtol=0, atol=1e-3)


def random_granularities(dim: int) -> list[PrototypeSet]:
    """Return two granularities of random prototypes, each of which belongs to one image."""
    return [
        PrototypeSet(
            F.normalize(torch.randn(_K, dim), dim=1), 0.1 + 0.2 * torch.rand(_K), torch.randperm(_K, dtype=torch.int32)
        )
        for _ in range(2)
    ]


def random_views() -> torch.Tensor:
    """Return random views uint8 [2, N, H, W, 3], the query's and the key's."""
    return torch.randint(256, (2, _ROWS, _SIZE, _SIZE, 3), dtype=torch.uint8)


def flat(encoder: torch.nn.Module) -> torch.Tensor:
    """Return all parameters of an encoder in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
