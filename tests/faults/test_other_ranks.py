"""A run goes on with another number of ranks, or is refused in words, whatever its state is made of."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launches import interrupt, train
from methods.toy import recipe
from ranks import run_ranks
from steps import batch, part, small_config

from pcl_fast.config import PRESETS, Config
from pcl_fast.data.loaders.order import EpochOrder
from pcl_fast.distributed import World
from pcl_fast.learner import FINITE, Learner
from pcl_fast.methods import build
from pcl_fast.nn.batch_norm import batch_norm_buffers
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.rows import read_rows
from pcl_fast.run.saving import Progress, Saver

EPOCH = {"names": ["loss"], "steps": [[1.5], [2.5]]}


def config_of(method: str, output: Path) -> Config:
    config = small_config(output=output)
    if method == "simclr":
        simclr = PRESETS["simclr"][1]
        config = replace(config, method="simclr", model=replace(config.model, sync_bn=True), optim=simclr.optim)
        config = replace(config, optim=replace(config.optim, batch_size=6))
    return config


def learner_of(config: Config, world: World) -> Learner:
    learner = Learner(build(config, world, 6), config, world)
    learner.set_rate(0)
    return learner


def step(learner: Learner, number: int) -> float:
    """With this rank's part of the batch; whether all was finite."""
    rows = 6 // learner.world.size
    own = part(batch(number), slice(learner.world.rank * rows, (learner.world.rank + 1) * rows))
    return learner.step(own, number)[FINITE].item()


def everything(learner: Learner) -> dict[str, torch.Tensor]:
    statistics = {name for name, _ in batch_norm_buffers(learner.method)}
    return {
        name: value.clone()
        for name, value in learner.method.state_dict().items()
        if name not in statistics and isinstance(value, torch.Tensor)
    }


def save(world: World, method: str, output: Path) -> dict[str, torch.Tensor]:
    """Two steps into an epoch."""
    learner = learner_of(config_of(method, output), world)
    for number in range(2):
        step(learner, number)
    record = {"global_step": 2, "metrics_length": 0, "epoch_metrics": EPOCH}
    Saver(learner.config, "these images", world).save(learner, Progress(0, 2), record)
    return everything(learner)


def take_up(world: World, method: str, output: Path) -> tuple:
    learner = learner_of(config_of(method, output), world)
    progress, record = Saver(learner.config, "these images", world).restore(learner)
    state = everything(learner)
    statistics = {name: value.clone() for name, value in learner.method.own_state().items()}
    return progress, record["epoch_metrics"], state, statistics, step(learner, 2)


@pytest.mark.parametrize("method", ["pcl", "simclr"])
@pytest.mark.parametrize("before", [1, 2])
def test_all_that_ranks_share_and_what_is_their_own(tmp_path, alone, method, before):
    """In the midst of an epoch, where batch norm's statistics are each rank's own."""
    if before == 1:
        saved, taken = save(alone, method, tmp_path), run_ranks(2, take_up, method, tmp_path)
    else:
        saved, taken = run_ranks(2, save, method, tmp_path)[0], [take_up(alone, method, tmp_path)]
    ranks = load_checkpoint(tmp_path)["ranks"]
    assert len(ranks) == before
    for number, (progress, epoch, state, statistics, finite) in enumerate(taken):
        assert (progress, epoch, finite) == (Progress(0, 2), EPOCH, 1.0)
        assert state.keys() == saved.keys()
        assert all(torch.equal(saved[name], value) for name, value in state.items())
        expected = ranks[number % before]["method"]
        assert all(torch.equal(expected[name], value) for name, value in statistics.items())


@pytest.mark.parametrize(("ranks", "before"), [(5, 2), (2, 3)])
def test_every_rank_finds_a_state_of_its_own(alone, ranks, before):
    """Also where there are more ranks than there were, or fewer."""
    learner = learner_of(small_config(), alone)
    own = []
    for number in range(before):
        step(learner, number)
        torch.manual_seed(number)
        own.append(learner.own_state())
        own[-1] = {**own[-1], "method": {name: value.clone() for name, value in own[-1]["method"].items()}}
    for rank in range(ranks):
        other = learner_of(small_config(), alone)
        other.world = other.method.world = replace(alone, rank=rank, size=ranks)
        other.load(learner.state(), own)
        expected = own[rank % before]
        assert torch.equal(torch.get_rng_state(), expected["rng"])
        assert all(torch.equal(expected["method"][name], value) for name, value in other.method.own_state().items())


def test_no_image_of_the_epoch_is_missed_or_seen_twice(alone):
    """The steps of an epoch have the same images, however many ranks there are."""

    def seen(ranks: int, first: int) -> list[list[int]]:
        worlds = [replace(alone, rank=rank, size=ranks) for rank in range(ranks)]
        orders = [EpochOrder(53, batch_size=12 // ranks, seed=0, world=world) for world in worlds]
        steps = zip(*(order.batches(1, first) for order in orders), strict=True)
        return [sorted(np.concatenate(batches).tolist()) for batches in steps]

    whole = seen(1, 0)
    assert len(whole) == 4
    for ranks in (2, 3, 4, 6):
        assert seen(ranks, 1) == whole[1:]


def take_up_banks(world: World, data: Path, output: Path) -> str:
    config = recipe(data, output)
    learner = Learner(build(config, world, 6), config, world)
    with pytest.raises(ValueError, match="banks of 1 ranks") as raised:
        Saver(config, "these images", world).restore(learner)
    return str(raised.value)


def test_what_cannot_be_divided_is_refused_in_words_on_all_ranks(tmp_path, alone, image_folder):
    config = recipe(image_folder, tmp_path)
    record = {"global_step": 0, "metrics_length": 0, "epoch_metrics": {}}
    learner = Learner(build(config, alone, 6), config, alone)
    Saver(config, "these images", alone).save(learner, Progress(), record)
    said = run_ranks(2, take_up_banks, image_folder, tmp_path)
    assert said == ["the banks of 1 ranks cannot be taken up by 2; go on with 1"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_stopped_within_an_epoch_goes_on_with_other_ranks(image_folder, tmp_path, before, after):
    run = tmp_path / "run"
    interrupt(5, signal.SIGTERM, tmp_path, image_folder, run, ranks=before)
    state = load_checkpoint(run)
    assert state["step"] > 0
    assert len(state["ranks"]) == before
    train(image_folder, run, ranks=after)
    rows = read_rows(run)
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 13))
    assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2, 3]
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    means = [row["loss"] for row in rows if row["kind"] == "epoch"]
    assert means == pytest.approx([sum(losses[begin : begin + 4]) / 4 for begin in (0, 4, 8)])
    assert len(load_checkpoint(run)["ranks"]) == after
