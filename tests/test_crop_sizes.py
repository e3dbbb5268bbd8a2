"""--data.sizes: how it is written, which size an epoch has, and what is refused."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import tyro
from faults.tiny import tiny
from launches import same_rows, same_state

from pcl_fast.clustering import FeatureShard
from pcl_fast.config import PRESETS, Config, doubts, recipe_differences, to_dict, validate
from pcl_fast.crop_sizes import Stage, describe_stages, epoch_sides, in_proportion, size_at
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.train import run

STAGES = (Stage(160, 120), Stage(192, 160))


def parse(*arguments: str) -> Config:
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


def of(*stages: Stage, size: int = 224, **changes: Any) -> Config:
    config = PRESETS["pcl_v2"][1]
    return replace(config, data=replace(config.data, sizes=stages, size=size), **changes)


def test_an_epoch_s_size_is_that_of_its_stage():
    sizes = [size_at(STAGES, 224, epoch) for epoch in range(201)]
    assert sizes == [160] * 120 + [192] * 40 + [224] * 41
    assert size_at((), 224, 0) == 224


def test_small_crops_grow_in_proportion():
    assert [in_proportion(96, size, 224) for size in (160, 192, 224)] == [69, 82, 96]
    assert in_proportion(2, 12, 96) == 1
    assert epoch_sides(STAGES, 224, [224, 96, 224]) == [69, 82, 96, 160, 192, 224]
    assert epoch_sides((), 224, [96]) == [96]


@pytest.mark.parametrize("words", [("160:120", "192:160"), ("160:120,192:160",), ("160:120 192:160",)])
def test_sizes_on_the_command_line(words):
    config = parse("pcl_v2", "--data.sizes", *words)
    assert config.data.sizes == STAGES
    validate(config)
    assert parse("pcl_v2", "--data.sizes").data.sizes == ()


@pytest.mark.parametrize("word", ["160", "160:", "160:120:3", "small:3", "160-120"])
def test_what_is_no_stage_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        parse("pcl_v2", "--data.sizes", word)
    message = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert f"'{word}' is no size and number of epochs, as in 160:120" in message


@pytest.mark.parametrize(
    ("stages", "size", "message"),
    [
        (((160, 9), (128, 16)), 224, "160:9 128:16 with --data.size 224: crops must grow, and 160 px are followed by"),
        (((160, 120), (192, 160)), 128, "crops must grow, and 192 px are followed by 128"),
        (((160, 120), (160, 160)), 224, "crops must grow, and 160 px are followed by 160"),
        (((160, 9), (192, 9)), 224, "192:9 ends with epoch 9, and it begins after epoch 9; each needs a larger number"),
        (((160, 0),), 224, "160:0 ends with epoch 0, and it begins after epoch 0"),
        (((0, 10),), 224, "0:10: a size must be positive"),
        (((-32, 10),), 224, "-32:10: a size must be positive"),
    ],
)  # fmt: skip
def test_sizes_that_shrink_or_stand_still_are_refused(stages, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(of(*(Stage(*stage) for stage in stages), size=size))


def test_a_size_that_the_encoder_rounds_up_is_doubted_where_it_does():
    odd = of(Stage(150, 100))
    validate(odd)
    [line] = doubts(odd)
    assert "150 px is no multiple of 32" in line
    assert "resnet50 rounds its smaller maps up to those of 160 px" in line
    assert doubts(of(*STAGES)) == []
    for model in (replace(odd.model, small_stem=True), replace(odd.model, arch="cifar_resnet8")):
        assert doubts(replace(odd, model=model)) == []


@pytest.mark.parametrize("epochs", [100, 160])
def test_a_run_that_never_has_the_last_size_is_doubted(epochs):
    [line] = doubts(of(*STAGES, epochs=epochs))
    assert f"192:160 lasts to the end of --epochs {epochs}: no epoch has the crops of --data.size 224" in line
    assert doubts(of(*STAGES, epochs=161)) == []


def test_the_shorter_side_goes_with_the_size():
    data = of(*STAGES).data
    assert [(data.at(epoch).size, data.at(epoch).shorter_side) for epoch in (0, 120, 160, 200)] == [
        (160, 183), (192, 219), (224, 256), (224, 256),
    ]  # fmt: skip
    assert data.at(3).sizes == ()
    assert replace(data, resize=224).at(0).shorter_side == 160
    assert PRESETS["pcl_v2"][1].data.at(7) is PRESETS["pcl_v2"][1].data


def test_sizes_are_part_of_the_recipe():
    assert recipe_differences(to_dict(of()), to_dict(of(*STAGES))) == ["data.sizes: [] -> [[160, 120], [192, 160]]"]
    assert describe_stages(STAGES, 224) == "crops of 160 px up to epoch 120, 192 px up to epoch 160, then 224 px"


# --- in a run ---------------------------------------------------------------------------------------------------------


def recipe(data: Path, output: Path, **changes: Any) -> Config:
    """12 px in the first epoch, 16 px in the second, then 20 px; clustered before the second and the third, and after
    it.
    """
    usual = {"epochs": 3, "data__size": 20, "data__resize": 25, "data__sizes": (Stage(12, 1), Stage(16, 2))}
    usual |= {"optim__batch_size": 12, "cluster__ks": (3,), "cluster__warmup_epochs": 1}
    return tiny(data, output, **usual | changes)


class Sides(NamedTuple):
    """Of the views of every step, and of the images of every pass."""

    steps: list[int]
    passes: list[int]


def watched_run(config: Config, signalled: int | None = None) -> Sides:
    """Train on one rank, or go on; SIGTERM comes with a step of this number."""
    sides, step, fill = Sides([], []), Learner.step, FeatureShard.fill

    def watched_step(self, batch, number):
        sides.steps.extend({side for view in batch.views for side in view.shape[1:3]})
        if number == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    def watched_fill(self, encode, batches, **options):
        batches = list(batches)
        sides.passes.extend({side for images in batches for side in images.shape[1:3]})
        return fill(self, encode, batches, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", watched_step)
        patch.setattr(FeatureShard, "fill", watched_fill)
        patch.setattr("pcl_fast.train.write_report", lambda *_: "not drawn")
        assert run(config, World(0, 1, torch.device("cpu"), None)) == (signalled is None)
    return sides


@pytest.fixture(scope="module", autouse=True)
def one_thread_all_along() -> Iterator[None]:
    """As the fixture `one_thread`, for the fixtures here too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory) -> tuple[Path, Sides]:
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    return output, watched_run(recipe(image_folder, output))


def test_every_epoch_has_its_size_and_so_has_the_clustering_before_it(whole):
    _, sides = whole
    assert sides.steps == [12] * 4 + [16] * 4 + [20] * 4
    assert sides.passes == [16, 20, 20]


@pytest.mark.parametrize("signalled", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_run_stopped_within_any_epoch_goes_on_bit_for_bit(whole, image_folder, tmp_path, signalled):
    """In the first epoch, and in the second, whose size is not that with which loaders begin."""
    config = recipe(image_folder, tmp_path)
    watched_run(config, signalled)
    state = load_checkpoint(tmp_path)
    assert (state["epoch"], state["step"] > 0) == (signalled // 4, True)
    sides = watched_run(config)
    assert sides.steps == whole[1].steps[state["global_step"] :]
    same_state(whole[0], tmp_path)
    same_rows(whole[0], tmp_path)


def test_a_size_reached_by_growth_is_that_size(image_folder, tmp_path):
    """Bit for bit what a run of that size alone learns, E-step and all."""
    plain = recipe(image_folder, tmp_path / "plain", data__sizes=(), data__size=12, data__resize=15, epochs=1)
    watched_run(plain)
    grown = recipe(image_folder, tmp_path / "grown", data__sizes=(Stage(12, 2),), epochs=1)
    watched_run(grown)
    same_state(plain.output, grown.output)


def test_a_run_is_taken_up_with_other_sizes(whole, image_folder, tmp_path):
    """Where the largest crops do not fit into the GPU's memory, say."""
    kept = tmp_path / "kept"
    kept.mkdir()
    config = recipe(image_folder, kept)
    watched_run(config, 1)
    config = replace(config, output=tmp_path / "new", resume_from=kept)
    config = replace(config, data=replace(config.data, sizes=(Stage(12, 1), Stage(18, 9))))
    with pytest.raises(ValueError, match=r"data\.sizes: \[\[12, 1\], \[16, 2\]\] -> "):
        run(replace(config, output=kept, resume_from=None), World(0, 1, torch.device("cpu"), None))
    assert watched_run(config).steps == [12] + [18] * 8


def test_keys_and_sizes_together(image_folder, tmp_path):
    """As pcl_v2_fast has them: one pass, at the size of the epoch that comes next."""
    sides = watched_run(recipe(image_folder, tmp_path, cluster__features="keys", cluster__init="previous", epochs=2))
    assert (sides.steps, sides.passes) == ([12] * 4 + [16] * 4, [16])
