"""Whole runs with several crops of several sizes: as they grow, within a cache, and taken up within an epoch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from faults.tiny import tiny
from launches import same_rows, same_state
from methods import crops  # noqa: F401, a method

from pcl_fast.config import Config
from pcl_fast.crop_sizes import Stage
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.train import run


def recipe(data: Path, output: Path, **changes: Any) -> Config:
    """An epoch of 12 px and two of 20, four steps each, with kNN by the cached clustering view."""
    usual = {"method": "crops", "epochs": 3, "data__size": 20, "data__resize": 25, "data__sizes": (Stage(12, 1),)}
    usual |= {"optim__batch_size": 12, "evaluation__every": 1, "evaluation__neighbours": 5}
    return tiny(data, output, **usual | {"data__cache": data.parent / "cache-of-crops"} | changes)


def train(world: World, config: Config, signalled: int | None = None) -> list[list[int]]:
    """Train, or go on; the sides of all steps' views. SIGTERM comes with a step of this number."""
    sides, step = [], Learner.step

    def watched(self, batch, number):
        sides.append([view.shape[1] for view in batch.views])
        if number == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", watched)
        patch.setattr("pcl_fast.train.write_report", lambda *_: "not drawn")
        assert run(config, world) == (signalled is None)
    return sides


@pytest.mark.usefixtures("one_thread")
def test_a_stopped_run_goes_on_bit_for_bit(image_folder, tmp_path, alone):
    """Stopped among the large crops; small ones have 96/224 of their size all along."""
    whole, stopped = (recipe(image_folder, tmp_path / name) for name in ("whole", "stopped"))
    sides = train(alone, whole)
    assert sides == [[12, 12, 5, 5, 5]] * 4 + [[20, 20, 9, 9, 9]] * 8
    train(alone, stopped, 5)
    done = load_checkpoint(stopped.output)["global_step"]
    assert 5 < done < 8
    assert train(alone, stopped) == sides[done:]
    same_state(whole.output, stopped.output)
    same_rows(whole.output, stopped.output)


def test_views_that_a_network_does_not_take_are_refused(alone, tmp_path):
    pytest.importorskip("timm")
    config = recipe(tmp_path, tmp_path, model__arch="timm/mixer_s32_224", data__size=224, data__sizes=())
    with pytest.raises(ValueError, match=r"does not take images of 96 px .*use another size of its views"):
        build(config, alone, 60)
