"""The seam between methods and everything else, by a method that uses all of it: see toy.py."""

from __future__ import annotations

import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launches import execute, same_rows, same_state
from toy import FROZEN_STEPS, recipe

from pcl_fast.config import PRESETS
from pcl_fast.methods import Method, build, check_method, method_class
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows

TOY = Path(__file__).with_name("toy.py")


def launch(*arguments: object, ranks: int = 2):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    return execute([sys.executable, *launcher, str(TOY), *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks."""
    output = tmp_path_factory.mktemp("toy")
    done = launch(image_folder, output)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(whole, image_folder, tmp_path):
    """The banks too, which are each rank's own."""
    done = launch(image_folder, tmp_path, 6, int(signal.SIGTERM))
    assert "stopped by a signal" in done.stdout, done.stdout + done.stderr
    state = load_checkpoint(tmp_path)
    assert state["epoch"] == 1
    assert 0 < state["step"] < 4
    assert launch(image_folder, tmp_path).returncode == 0
    same_state(whole, tmp_path)
    same_rows(whole, tmp_path)
    for one, other in zip(load_checkpoint(whole)["ranks"], load_checkpoint(tmp_path)["ranks"], strict=True):
        for name, value in one["method"].items():
            assert torch.equal(value, other["method"][name]), name


def test_what_is_one_rank_s_own_is_saved_for_each(whole):
    state = load_checkpoint(whole)
    first, second = (rank["method"] for rank in state["ranks"])
    assert first["seen"].any()
    assert second["seen"].any()
    assert not torch.equal(first["bank"], second["bank"])
    assert not any(name.startswith(("bank", "seen")) for name in state["method"])


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_in_words(whole, image_folder):
    done = launch(image_folder, whole, ranks=1)
    assert done.returncode != 0
    assert "the banks of 2 ranks cannot be taken up by 1; go on with 2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_frozen_head_stays_until_it_is_set_free(image_folder, whole, tmp_path, alone):
    """Stopped after five steps the head is what it was at first; at the end it is not."""
    done = launch(image_folder, tmp_path, 4, int(signal.SIGTERM))
    assert "stopped by a signal" in done.stdout, done.stdout + done.stderr
    stopped, end = load_checkpoint(tmp_path), load_checkpoint(whole)
    assert stopped["global_step"] <= FROZEN_STEPS
    initial = build(recipe(image_folder, tmp_path), alone, 53).head.weight
    assert torch.equal(stopped["method"]["head.weight"], initial)
    assert not torch.equal(end["method"]["head.weight"], initial)


def test_metrics_and_clusterings_carry_the_method_s_own_names(whole):
    rows = read_rows(whole)
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 12
    assert all(set(row) == {"kind", "step", "epoch", "loss", "agreement", "lr"} for row in steps)
    assert [row["epoch"] for row in rows if row["kind"] == "clustering"] == [1, 2, 3]
    assert [sorted(row["ami"]) for row in rows if row["kind"] == "evaluation"] == [[], ["4"], ["4"], ["4"]]
    # Warm-up: every step of the first epoch has a rate of its own.
    assert len({row["lr"] for row in steps[:4]}) == 4
    assert len({row["lr"] for row in steps[4:8]}) == 1
    assert (whole / "report.png").stat().st_size > 0


def test_unknown_methods_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=re.escape("there is no method 'pirl'; choose from ")) as raised:
        method_class("pirl")
    assert "pcl" in str(raised.value)


def test_a_setting_is_not_taken_for_one_that_begins_like_it(monkeypatch):
    monkeypatch.setattr(Method, "named", dict(Method.named))

    class Later(Method, name="later"):
        settings = ("model.mom",)

    config = replace(PRESETS["pcl_v1"][1], method="later")
    check_method(config)
    with pytest.raises(
        ValueError, match=r"--model\.momentum is a setting of byol, pcl, and this run's method is later"
    ):
        check_method(replace(config, model=replace(config.model, momentum=0.5)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_settings_of_other_methods(name):
    check_method(PRESETS[name][1])
