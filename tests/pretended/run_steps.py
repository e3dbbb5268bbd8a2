"""Whole steps and the E-step of every method on a pretended GPU, as a program: run_steps.py RANKS.

Prints a JSON object: what was seen, by case. With four ranks there is this one, and a process group that exchanges
nothing (PyTorch's "fake").
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import torch
import torch.distributed as dist
from gpu import DEVICE, PretendedGPU
from methods.every import METHODS, reads, tiny
from pcl_fast.kernels import switches
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import pcl_fast.learner
from pcl_fast.clustering import FeatureShard
from pcl_fast.config import Config
from pcl_fast.data import Batch
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import Method, build, check_method, method_class
from pcl_fast.schedule import rank_batch

IMAGES = 80  # of every rank's shard
# DistributedDataParallel settles its buckets in the second step, for which the host waits.
SETTLED = 2
STEPS = 2
data_parallel = pcl_fast.learner._data_parallel


def world_of(ranks: int) -> World:
    if ranks == 1:
        return World(0, 1, DEVICE, None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return World(0, ranks, DEVICE, dist.group.WORLD)


def with_gradients_reduced(method: Method) -> DistributedDataParallel:
    """As the learner's own, with what the fake group cannot do: tell DistributedDataParallel what it has reduced. Nor
    does that time its first ten steps, for which the host waits.
    """
    parallel = data_parallel(method)
    parallel.logger = Mock()

    def reduce(group, bucket):
        dist.all_reduce(bucket.buffer(), group=group)
        future = torch.futures.Future(devices=[DEVICE])
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(method.world.group, reduce)
    return parallel


def recipes(ranks: int) -> Iterator[tuple[str, Config]]:
    """A small recipe of every method; with batch norm of the whole batch and of its fourths, where the method divides
    it, with keys as features, where it can cluster these, and with steps in two parts, where it can take these.
    """
    for name in METHODS:
        for splits, features, parts in ((1, "pass", 1), (4, "pass", 1), (1, "keys", 1), (1, "pass", 2)):
            if parts > 1 and method_class(name).accumulation is None:
                continue
            if splits > 1 and not reads(name, "model.bn_splits"):
                continue
            if features == "keys" and not reads(name, "cluster.features"):
                continue
            config = tiny(
                name,
                model__dim=16,
                optim__batch_size=32,
                optim__accumulate=parts,
                model__bn_splits=splits,
                cluster__features=features,
            )
            check_method(config)
            method_class(name).check(config, IMAGES * ranks, ranks)
            others = ", keys as features" * (features == "keys") + f", {parts} parts" * (parts > 1)
            yield f"{name}, bn_splits {splits}{others}", config


def batch_of(method: Method, rows: int) -> Batch:
    views = tuple(torch.zeros(rows, view.size, view.size, 3, dtype=torch.uint8, device=DEVICE) for view in method.views)
    return Batch(views, torch.arange(rows))


def steps(gpu: PretendedGPU, learner: Learner, config: Config, settle: int = 0) -> dict[str, Any]:
    """What is seen of STEPS steps, after `settle` others."""
    batch = batch_of(learner.method, rank_batch(config, learner.world.size))
    for number in range(settle + STEPS):
        if number == settle:
            gpu.forget()
        learner.set_rate(0, number, settle + STEPS)
        values = learner.step(batch, number)
    metrics = {name: (str(value.device), value.ndim) for name, value in values.items()}
    return {**gpu.seen(), "metrics": metrics}


def expectation(gpu: PretendedGPU, method: Method, config: Config, epoch: int) -> dict[str, Any]:
    """What is seen of an E-step, from the images on. PCL's has Triton's kernels, which make all images alike and put
    them into one cluster; others may refuse that, and have plain PyTorch.
    """
    gpu.forget()
    if config.method != "pcl":
        switches.switch_off(("normalise", "assign", "assign_held", "segment"))
    try:
        return _expectation(gpu, method, config, epoch)
    finally:
        switches.switch_off(())


def _expectation(gpu: PretendedGPU, method: Method, config: Config, epoch: int) -> dict[str, Any]:
    spec, side, features = method.features(), config.data.size, None
    if not spec.from_bank:
        images = torch.randint(256, (IMAGES, side, side, 3), dtype=torch.uint8).to(DEVICE)
        shard = FeatureShard(IMAGES, spec.width, DEVICE)
        features, _ = shard.fill(method.feature_encoder(), images.split(30), rows=60)
    rows = method.expect(features, epoch)
    return {**gpu.seen(), "clusters": [row["k"] for row in rows]}


def case(gpu: PretendedGPU, config: Config, world: World) -> dict[str, Any]:
    method = build(config, world, IMAGES * world.size)
    learner = Learner(method, config, world)
    seen, epochs = {}, [epoch for epoch in range(config.epochs + 1) if method.expects(epoch)]
    if 0 not in epochs:
        seen["steps"] = steps(gpu, learner, config, SETTLED)
    if epochs:
        seen["E-step"] = expectation(gpu, method, config, epochs[0])
        seen["steps after it"] = steps(gpu, learner, config, 0 if "steps" in seen else SETTLED)
    if epochs and world.group is None:  # it may need what ranks have exchanged in steps
        seen["second E-step"] = expectation(gpu, method, config, epochs[1])
    gpu.forget()
    learner.end_epoch()
    state = learner.state(), [learner.own_state()] * world.size
    learner.load(*state)
    seen["between epochs"] = gpu.seen()
    return seen


def attempt(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return work(*arguments)
    except Exception:
        return {"error": traceback.format_exc(limit=-6)}


def start(ranks: int) -> tuple[World, PretendedGPU]:
    world = world_of(ranks)
    pcl_fast.learner._data_parallel = with_gradients_reduced
    return world, PretendedGPU()


if __name__ == "__main__":
    world, gpu = start(int(sys.argv[1]))
    with gpu:
        print(json.dumps({name: attempt(case, gpu, config, world) for name, config in recipes(world.size)}))
