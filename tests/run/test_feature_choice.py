"""Which layers of the feature pass are fused: the same on all ranks, and kept. On a CPU, as if it had the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from faults.tiny import tiny
from ranks import run_ranks
from steps import small_config

from pcl_fast.crop_sizes import Stage
from pcl_fast.distributed import World
from pcl_fast.methods import build
from pcl_fast.nn.feature_pass import fused_encoder, fused_layers
from pcl_fast.nn.fused_batch_norm import fuse_batch_norm
from pcl_fast.run import feature_choice
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.feature_choice import choose_layers
from pcl_fast.run.metrics import read_rows
from pcl_fast.train import run

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setattr(feature_choice, "encoded_at_a_time", lambda device: 4)


@pytest.fixture
def as_gpu(monkeypatch):
    monkeypatch.setattr(feature_choice, "_on_gpu", lambda device: True)


def method_of(world: World = ALONE):
    torch.manual_seed(0)
    return build(small_config(), world, 60)


def choose(method, world: World = ALONE, config=None, **given):
    given = {"kept": None, **given}
    sizes = given.pop("sizes", [20])
    return choose_layers(config or small_config(), method.encoders()["momentum"], sizes, world, **given)


def test_layers_that_fit_are_fused():
    method = method_of()
    choice = choose(method)
    assert choice.plain == []
    assert choice.row["fused"] == fused_layers(fused_encoder(method.momentum_encoder)) != []
    assert choice.notes[0].startswith(f"in the feature pass {len(choice.row['fused'])} layers are fused")


def test_layers_that_do_not_are_left_out(monkeypatch):
    method = method_of()
    name = fused_layers(fused_encoder(method.momentum_encoder))[1]
    monkeypatch.setattr(feature_choice, "unfit_layers", lambda *given: {name: "is not faster"})
    choice = choose(method)
    assert choice.plain == [name]
    assert name not in choice.row["fused"]
    assert choice.row["plain"] == {name: "is not faster"}


def test_layers_must_fit_at_every_size(monkeypatch):
    method = method_of()
    first, second = fused_layers(fused_encoder(method.momentum_encoder))[:2]
    unfit = {12: {first: "is not faster"}, 20: {first: "is slow", second: "is wrong"}, 16: {}}
    monkeypatch.setattr(feature_choice, "unfit_layers", lambda encoder, images: unfit[images.shape[-1]])
    choice = choose(method, sizes=[12, 16, 20])
    assert choice.plain == sorted([first, second])
    assert choice.row["plain"] == {first: "is not faster", second: "is wrong"}
    wrong = {12: None, 16: "is wrong: 1 of 4 features", 20: None}
    monkeypatch.setattr(feature_choice, "find_difference", lambda encoder, images, plain: wrong[images.shape[-1]])
    assert choose(method, sizes=[12, 16, 20]).row["fault"] == "is wrong: 1 of 4 features"
    assert choose(method, sizes=[12, 20]).row["fault"] == ""


def fail(*_):
    raise RuntimeError("no engine\nfor this")


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("find_difference", lambda *given: "is wrong: 3 of 8 features differ", "is wrong: 3 of 8 features differ"),
        ("find_difference", fail, "cannot be fused (no engine)"),
        ("unfit_layers", fail, "cannot be fused (no engine)"),
    ],
)
def test_nothing_is_fused_if_the_whole_is_wrong(monkeypatch, name, fault, said):
    monkeypatch.setattr(feature_choice, name, fault)
    choice = choose(method_of())
    assert choice.plain is None
    assert (choice.row["fused"], choice.row["fault"]) == ([], said)
    assert f"no layer is fused: the encoder {said}" in choice.notes[0]


def test_where_there_is_no_choice():
    """What a GPU has decided before stays for when there is one again."""
    method, eager = method_of(), small_config()
    eager = replace(eager, model=replace(eager.model, fusion="eager"))
    for kept in (None, ["a"], "all"):
        assert choose(method, config=eager, kept=kept) == (None, [], None, kept)
        assert choose(method, sizes=[], kept=kept) == (None, [], None, kept)


def test_a_gpu_s_decision_is_kept(as_gpu, monkeypatch):
    method = method_of()
    name = fused_layers(fused_encoder(method.momentum_encoder))[1]
    monkeypatch.setattr(feature_choice, "unfit_layers", lambda *given: {name: "is not faster"})
    assert choose(method).kept == [name]
    monkeypatch.setattr(feature_choice, "unfit_layers", fail)
    assert choose(method, kept=["b", "a"]) == (["a", "b"], [], None, ["b", "a"])
    assert choose(method, kept="all") == (None, [], None, "all")
    assert choose(method).kept == "all"
    for kept in (None, ["a"]):
        assert choose(method, config=small_config(deterministic=True), kept=kept) == (None, [], None, kept)


def test_a_cpu_finds_the_same_at_every_start(monkeypatch):
    """With --deterministic too; what a GPU has decided is not used, and kept for it."""
    method = method_of()
    for config in (small_config(), small_config(deterministic=True)):
        for kept in (None, ["backbone.0"], "all"):
            choice = choose(method, config=config, kept=kept)
            assert (choice.plain, choice.kept) == ([], kept)
            assert choice.row["fused"]


def choice_of_rank(world: World):
    """Rank 1 cannot do with one layer, rank 0 with another."""
    method = method_of(world)
    names = fused_layers(fused_encoder(method.momentum_encoder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_choice, "encoded_at_a_time", lambda device: 4)
        patch.setattr(feature_choice, "unfit_layers", lambda *given: {names[world.rank]: f"rank {world.rank}"})
        choice = choose(method, world)
    return choice.plain, choice.row["plain"], names


def test_all_ranks_choose_together():
    first, second = run_ranks(2, choice_of_rank)
    assert first == second
    plain, reasons, names = first
    assert plain == sorted(names[:2])
    assert reasons == {names[0]: "rank 0", names[1]: "rank 1"}


@pytest.mark.parametrize("way", ["eager", "triton", "compile"])
def test_features_are_the_same_whichever_way_the_encoder_trains_by(way):
    method = method_of()
    images = torch.randint(256, (4, 20, 20, 3), dtype=torch.uint8)
    with torch.inference_mode():
        plain = method.feature_encoder()(images)
        method.unfused_layers = ()
        if way == "triton":
            fuse_batch_norm(method.momentum_encoder)
        elif way == "compile":
            method.momentum_encoder._compiled_call_impl = fail
        found = method.feature_encoder()(images)
    torch.testing.assert_close(found, plain)


def test_a_run_tries_layers_at_every_size_that_a_pass_will_have(image_folder, tmp_path, alone, monkeypatch):
    """Also at those that only a longer run has."""
    seen, draw = [], feature_choice.draw_images
    monkeypatch.setattr(feature_choice, "draw_images", lambda *given: seen.append(given[3]) or draw(*given))
    grows = tiny(image_folder, tmp_path, epochs=2, evaluation__every=1)
    grows = replace(grows, data=replace(grows.data, sizes=(Stage(8, 1), Stage(12, 2))))
    assert run(grows, alone)
    assert seen == [8, 12, 16]
    seen.clear()
    assert run(replace(grows, epochs=3), alone)
    assert seen == [8, 12, 16]


def test_a_run_without_a_pass_tries_nothing(image_folder, tmp_path, alone, monkeypatch):
    monkeypatch.setattr(feature_choice, "draw_images", fail)
    assert run(tiny(image_folder, tmp_path, epochs=1), alone)
    assert load_checkpoint(tmp_path)["choices"]["unfused_layers"] is None


def test_a_run_records_its_choice_and_a_gpu_keeps_it(as_gpu, image_folder, tmp_path, alone, monkeypatch):
    assert run(tiny(image_folder, tmp_path, epochs=1, evaluation__every=1), alone)
    (row,) = (row for row in read_rows(tmp_path) if row["kind"] == "feature_pass")
    assert row["fused"]
    assert load_checkpoint(tmp_path)["choices"]["unfused_layers"] == []
    monkeypatch.setattr(feature_choice, "unfit_layers", fail)
    assert run(tiny(image_folder, tmp_path, epochs=2, evaluation__every=1), alone)
    assert load_checkpoint(tmp_path)["choices"]["unfused_layers"] == []
    changes = {"epochs": 3, "evaluation__every": 1, "resume_from": tmp_path / "checkpoint.pt"}
    assert run(tiny(image_folder, tmp_path / "other", **changes), alone)
    assert load_checkpoint(tmp_path / "other")["choices"]["unfused_layers"] == "all"
