"""Two steps of the official way and of ours must learn the same from the same, before anyone compares their speed."""

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
        # Small, so that rounding does not grow; and a decay that can be seen beside the gradient.
        optim=replace(config.optim, lr=1e-3, weight_decay=0.1),
        cluster=replace(config.cluster, ks=(_K, _K)),
    )


def small_learner(world: World) -> Learner:
    """Ours, with random prototypes, and all of them as negatives."""
    config = small_recipe()
    config = replace(config, loss=replace(config.loss, num_negatives=None))
    learner = Learner(build(config, world, _K), config, world)
    learner.method.prototypes.replace(random_granularities(config.model.dim))
    learner.set_rate(0)
    return learner


def check_agreement() -> None:
    """From the same weights, queue and views, on the CPU in float32. Without rows that share a prototype, and with as
    many negatives as there are, the two losses are the same. Needs a process group.
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
    return [
        PrototypeSet(
            F.normalize(torch.randn(_K, dim), dim=1), 0.1 + 0.2 * torch.rand(_K), torch.randperm(_K, dtype=torch.int32)
        )
        for _ in range(2)
    ]


def random_views() -> torch.Tensor:
    """uint8 [2, N, H, W, 3]: the query's and the key's."""
    return torch.randint(256, (2, _ROWS, _SIZE, _SIZE, 3), dtype=torch.uint8)


def flat(encoder: torch.nn.Module) -> torch.Tensor:
    """All its parameters."""
    return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
