"""Nothing that is not finite is ever saved, and a run that diverged can go on."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from faults.tiny import tiny
from launches import same_state
from ranks import run_ranks
from steps import batch, learner_of, small_config

from pcl_fast.config import PRESETS, Config, to_dict, validate, with_settings
from pcl_fast.distributed import World
from pcl_fast.errors import NonFiniteError
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.continuing import check_taken_up
from pcl_fast.run.saving import Progress, Saver
from pcl_fast.train import run
from pcl_fast.trainer import Trainer

RECORD = {"global_step": 7, "metrics_length": 0, "epoch_metrics": {}}


def spoil(learner, what: str) -> None:
    """Make one entry of a learner's state infinite."""
    method = learner.method
    tensors = {
        "weight": next(method.encoder.parameters()),
        "momentum encoder": list(method.momentum_encoder.parameters())[-1],
        "queue": method.queue.keys,
        "batch norm of a rank": next(b for name, b in method.named_buffers() if name.endswith("running_var")),
        "momentum": next(iter(learner.optimizer.state.values()))["momentum_buffer"],
    }
    with torch.no_grad():
        tensors[what].select(0, -1).fill_(math.inf)


SPOILT = ["weight", "momentum encoder", "queue", "batch norm of a rank", "momentum"]


@pytest.mark.parametrize("what", SPOILT)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, alone, what):
    learner = learner_of(small_config(output=tmp_path), alone)
    learner.step(batch(), 0)
    saver = Saver(learner.config, "these images", alone)
    saver.save(learner, Progress(0, 1), RECORD)
    spoil(learner, what)
    with pytest.raises(NonFiniteError, match=r"after step 7 \d+ of the run's tensors are not finite, (\w+\.)+\w+ for"):
        saver.save(learner, Progress(0, 7), RECORD)
    assert load_checkpoint(tmp_path)["step"] == 1


def spoilt_on_one_rank(world: World, folder) -> str:
    learner = learner_of(small_config(output=folder), world)
    if world.rank == 1:
        spoil(learner, "batch norm of a rank")
    with pytest.raises(NonFiniteError) as raised:
        Saver(learner.config, "these images", world).save(learner, Progress(0, 7), RECORD)
    return str(raised.value)


def test_what_is_one_rank_s_own_is_looked_at_too(tmp_path):
    said = run_ranks(2, spoilt_on_one_rank, tmp_path)
    assert said[0] == said[1]
    assert "ranks.1.method" in said[0]


@pytest.mark.parametrize("last", [2, 4])
def test_the_last_step_of_an_epoch_and_of_a_run(tmp_path, image_folder, alone, monkeypatch, last):
    """Its gradient is finite, but not the weights that it makes."""
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *args: (step(self, *args), after(self))[0])
    steps = []

    def after(optimizer) -> None:
        steps.append(1)
        if len(steps) == last:
            optimizer.param_groups[0]["params"][0].detach()[0] = math.nan

    with pytest.raises(NonFiniteError, match=f"after step {last} .* not finite"):
        run(tiny(image_folder, tmp_path), alone)
    state = load_checkpoint(tmp_path)
    assert (state["global_step"], state["finished"]) == (last - 2, False)


def fields_of(kind, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(kind):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        found += fields_of(default, f"{field.name}.") if dataclasses.is_dataclass(default) else [prefix + field.name]
    return found


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_option_may_be_infinite(value):
    config = PRESETS["demo"][1]
    names = [name for name in fields_of(Config) if isinstance(_setting(config, name), float)]
    assert {"optim.lr", "optim.weight_decay", "loss.temperature", "cluster.alpha"} <= set(names)
    for name in names:
        with pytest.raises(ValueError, match=re.escape(f"--{name.replace('_', '-')} must be a finite number")):
            validate(with_settings(config, {name: value}))


def _setting(config: Config, name: str):
    group, _, field = name.rpartition(".")
    return getattr(getattr(config, group) if group else config, field)


# --- taking up a checkpoint -----------------------------------------------------------------------------------------


@pytest.fixture
def diverged(tmp_path, image_folder, alone):
    """A run that has kept its first epoch and ended in the next."""
    config = tiny(image_folder, tmp_path / "old", checkpoint__keep_every=1, epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_before_epoch", lambda self: diverge(self) if self.progress.epoch == 1 else None)
        with pytest.raises(NonFiniteError, match=r"--resume-from CHECKPOINT --output NEW --optim\.lr LESS"):
            run(config, alone)
    return tmp_path / "old" / "checkpoint-0001.pt"


def diverge(trainer: Trainer) -> None:
    next(trainer.method.encoder.parameters()).detach().fill_(math.nan)


def test_a_diverged_run_goes_on_with_another_learning_rate(tmp_path, image_folder, alone, diverged, capsys):
    changes = {"epochs": 3, "resume_from": diverged}
    new = tiny(image_folder, tmp_path / "new", **changes, optim__lr=0.001)
    run(new, alone)
    said = capsys.readouterr().out
    assert f"taken up from {diverged} after 1 epochs and 0 steps" in said
    assert "optim.lr: 0.06 -> 0.001" in said
    assert "learning rate of epoch 2: 0.06 -> 0.001" in said
    assert load_checkpoint(tmp_path / "new")["epoch"] == 3
    before = load_checkpoint(tmp_path / "new")["method"]
    diverged.unlink()  # the same command goes on with the new folder's own
    run(new, alone)
    assert "is complete" in capsys.readouterr().out
    assert all(
        torch.equal(before[name], value)
        for name, value in load_checkpoint(tmp_path / "new")["method"].items()
        if isinstance(value, torch.Tensor)
    )


def test_taken_up_without_a_change_it_is_the_same_run(tmp_path, image_folder, alone, diverged):
    run(tiny(image_folder, tmp_path / "whole", epochs=3), alone)
    run(tiny(image_folder, tmp_path / "new", epochs=3, resume_from=diverged), alone)
    same_state(tmp_path / "whole", tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        (
            {"model.dim": 32, "optim.lr": 0.01},
            "these",
            r"cannot go on from .*\n  model\.dim: 128 -> 32\nWhat may change: ",
        ),
        ({"method": "simclr"}, "these", "holds a run of the method pcl, not of simclr"),
        ({"epochs": 20}, "these", r"has come too far for --epochs 20: it must be 21 or more"),
        ({}, "those", "data set: these -> those"),
    ],
)
def test_what_cannot_be_taken_up_is_refused(tmp_path, changes, images, message):
    config = PRESETS["demo"][1]
    state = {"config": to_dict(config), "data": "these", "epoch": 20, "step": 0}
    with pytest.raises(ValueError, match=message):
        check_taken_up(state, with_settings(config, {**changes, "resume_from": tmp_path}), images)


@pytest.mark.parametrize(("place", "message"), [("new/kept.pt", "lies in --output"), ("no.pt", "is no checkpoint")])
def test_where_there_is_nothing_to_take_up(tmp_path, alone, place, message):
    config = small_config(output=tmp_path / "new", resume_from=tmp_path / place)
    with pytest.raises(ValueError, match=message):
        Saver(config, "these images", alone).restore(learner_of(config, alone))
