"""--cluster.features keys: the E-step clusters what a loop over the epoch's steps puts in the images' places."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faults.tiny import tiny
from launches import same, same_state
from ranks import run_ranks

from pcl_fast.config import PRESETS, Config
from pcl_fast.distributed import World
from pcl_fast.methods import build
from pcl_fast.methods import pcl as module
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows
from pcl_fast.train import run

# Four steps of 12 images an epoch; of the 53 images it drops five.
STEPS, DROPPED = 4, 5
# A signal after so many steps stops a run a step later, in the midst of the third epoch.
SIGNALLED = 9


class Seen(NamedTuple):
    """What one rank did: in its order the steps' (index, key), and of every E-step (features, what was clustered, the
    whole bank).
    """

    steps: list[tuple[torch.Tensor, torch.Tensor]]
    e_steps: dict[int, tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]


def recipe(data: Path, output: Path, **changes: Any) -> Config:
    """An E-step before the second and the third epoch, and after it."""
    usual = {"epochs": 3, "optim__batch_size": 12, "cluster__ks": (3, 5), "cluster__warmup_epochs": 1}
    return tiny(data, output, **usual | {"cluster__features": "keys"} | changes)


def observe(world: World, config: Config, stop_after: int | None = None) -> Seen:
    """Train, or go on; SIGTERM comes to the main rank after so many of this process's steps."""
    seen, clustered = Seen([], {}), []
    cluster, expect, after_update = module.cluster, module.PCL.expect, module.PCL.after_update

    def watched_cluster(features, *arguments, **options):
        clustered.append(features.clone())
        return cluster(features, *arguments, **options)

    def watched_expect(self, features, epoch):
        rows = expect(self, features, epoch)
        given = None if features is None else features.clone()
        seen.e_steps[len(seen.steps)] = (given, clustered[-1], self.bank.keys.clone())
        return rows

    def watched_update(self, carry, applied):
        after_update(self, carry, applied)
        key, index = carry
        seen.steps.append((index.clone(), key.clone()))
        if len(seen.steps) == stop_after and world.is_main:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "cluster", watched_cluster)
        patch.setattr(module.PCL, "expect", watched_expect)
        patch.setattr(module.PCL, "after_update", watched_update)
        patch.setattr("pcl_fast.train.write_report", lambda *_: "not drawn")
        assert run(config, world) == (stop_after is None)
    return seen


def check(ranks: list[Seen], bank: torch.Tensor | None = None) -> int:
    """Compare every E-step with a loop over all ranks' steps, which begins with `bank` if the run went on; returns how
    many images have kept a key of an earlier epoch at an E-step.
    """
    kept, begun = 0, bank is not None
    fresh: set[int] = set()
    for number in range(len(ranks[0].steps) + 1):
        if number in ranks[0].e_steps:
            shards = [seen.e_steps[number] for seen in ranks]
            if bank is None:
                bank = torch.cat([features for features, _, _ in shards])
            else:
                assert all(features is None for features, _, _ in shards)
            kept += begun and len(bank) - len(fresh)
            begun, fresh = True, set()
            assert torch.equal(torch.cat([found for _, found, _ in shards]), bank)
            assert all(torch.equal(whole, bank) for _, _, whole in shards)
        if number < len(ranks[0].steps):
            for index, key in (seen.steps[number] for seen in ranks):
                for image, row in zip(index.tolist(), key, strict=True):
                    fresh.add(image)
                    if bank is not None:
                        bank[image] = row
    return kept


@pytest.fixture(scope="module", autouse=True)
def one_thread_all_along() -> Iterator[None]:
    """As the fixture `one_thread`, for the fixtures here too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory) -> dict[int, tuple[Path, list[Seen]]]:
    """Runs that nothing stopped, on one rank and on two."""
    outputs = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    seen = [observe(World(0, 1, torch.device("cpu"), None), recipe(image_folder, outputs[1]))]
    return {
        1: (outputs[1], seen),
        2: (outputs[2], run_ranks(2, observe, recipe(image_folder, outputs[2]))),
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_clustered_is_what_a_loop_over_the_epoch_s_keys_gives(whole, ranks):
    """The first E-step's is what the pass gave; an image that an epoch dropped keeps its key."""
    output, seen = whole[ranks]
    assert list(seen[0].e_steps) == [STEPS, 2 * STEPS, 3 * STEPS]
    assert check(seen) == 2 * DROPPED
    assert [row["kind"] for row in read_rows(output)].count("features") == 1
    assert torch.equal(load_checkpoint(output)["method"]["bank.keys"], seen[0].e_steps[3 * STEPS][2])


def test_keys_are_of_unit_length_and_of_augmented_views(whole):
    _, (seen,) = whole[1]
    for _, clustered, _ in seen.e_steps.values():
        torch.testing.assert_close(clustered.norm(dim=1), torch.ones(53))
    first, last = seen.e_steps[STEPS][2], seen.e_steps[3 * STEPS][2]
    assert ((first - last).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(whole, image_folder, tmp_path, alone, ranks):
    config = recipe(image_folder, tmp_path)
    if ranks == 1:
        observe(alone, config, SIGNALLED)
    else:
        run_ranks(2, observe, config, SIGNALLED)
    state = load_checkpoint(tmp_path)
    assert (state["epoch"], state["step"]) == (2, 2)
    seen = [observe(alone, config)] if ranks == 1 else run_ranks(2, observe, config)
    check(seen, state["method"]["bank.keys"])
    same_state(whole[ranks][0], tmp_path)


@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)])
def test_the_unfinished_bank_is_taken_up_by_another_number_of_ranks(image_folder, tmp_path, alone, before, after):
    config = recipe(image_folder, tmp_path)
    if before == 1:
        observe(alone, config, SIGNALLED)
    else:
        run_ranks(2, observe, config, SIGNALLED)
    bank = load_checkpoint(tmp_path)["method"]["bank.keys"]
    seen = [observe(alone, config)] if after == 1 else run_ranks(2, observe, config)
    assert list(seen[0].e_steps) == [2]
    check(seen, bank)


def test_evaluation_has_a_pass_of_its_own_and_changes_nothing(whole, image_folder, tmp_path, alone):
    evaluated = recipe(image_folder, tmp_path, evaluation__every=3, evaluation__neighbours=5)
    check([observe(alone, evaluated)])
    rows = [(row["kind"], row["epoch"]) for row in read_rows(tmp_path) if row["kind"] in ("features", "evaluation")]
    assert rows == [("features", 0), ("evaluation", 0), ("features", 1), ("features", 3), ("evaluation", 3)]
    same_state(whole[1][0], tmp_path)


def test_during_warm_up_no_key_is_kept(image_folder, tmp_path, alone):
    """They would be replaced by the first E-step's features anyway."""
    assert run(recipe(image_folder, tmp_path, epochs=1, cluster__warmup_epochs=2), alone)
    assert not load_checkpoint(tmp_path)["method"]["bank.keys"].any()


@pytest.mark.parametrize("changes", [{"features": "pass"}, {"features": "keys", "ks": ()}])
def test_there_is_no_bank_unless_it_is_asked_for(alone, changes):
    config = PRESETS["demo"][1]
    config = replace(config, cluster=replace(config.cluster, **changes))
    assert not any(name.startswith("bank") for name in build(config, alone, 60).state_dict())


def test_the_recipe_s_features_are_not_changed_within_a_run(whole, image_folder, alone):
    with pytest.raises(ValueError, match=r"cluster\.features: keys -> pass"):
        run(recipe(image_folder, whole[1][0], cluster__features="pass"), alone)
    same(load_checkpoint(whole[1][0])["method"]["bank.keys"], whole[1][1][0].e_steps[3 * STEPS][2], "bank")
