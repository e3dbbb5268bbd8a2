"""Which way the encoders compute in: the fastest that is right, the same on all ranks, and kept. Times are given."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from faults.tiny import tiny
from methods import crops  # noqa: F401, a method
from ranks import run_ranks
from steps import small_config
from torch import nn

from pcl_fast.captured import CapturedStep
from pcl_fast.config import Config
from pcl_fast.crop_sizes import Stage
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build
from pcl_fast.nn import fusion
from pcl_fast.nn.batch_norm import batch_norm_buffers
from pcl_fast.run import choices, fusion_choice
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.choices import Choices
from pcl_fast.run.encoder_passes import Passes
from pcl_fast.run.fusion_choice import choose_fusion
from pcl_fast.run.metrics import read_rows
from pcl_fast.train import run

ALONE = World(0, 1, torch.device("cpu"), None)
MANY = {small_config().data: 10**9}  # steps, so that there is time to compile
FEW = {small_config().data: 6000}


def config_with(**model) -> Config:
    config = small_config()
    return replace(config, model=replace(config.model, **model))


def encoders_of(config, world: World = ALONE) -> dict[str, nn.Module]:
    return build(config, world, 60).encoders()


@pytest.fixture
def encoders() -> dict[str, nn.Module]:
    return encoders_of(small_config())


class Ways:
    """Stands in for the ways on a GPU: what each does to an encoder, and the milliseconds that its passes take."""

    def __init__(self, monkeypatch):
        self.now, self.tried = "eager", []
        self.ms = {"eager": 10.0, "triton": 9.0, "compile": 8.0}
        self.does = {}
        monkeypatch.setattr(fusion_choice, "_has_choice", lambda world: True)
        monkeypatch.setattr(fusion_choice, "use", self.use)
        self.faster_captured = -1.0
        monkeypatch.setattr(Passes, "milliseconds", self.milliseconds)

    def milliseconds(self, *, captured: bool = False) -> float:
        return self.ms[self.now] - self.faster_captured * captured

    def use(self, way: str, encoder: nn.Module) -> None:
        vars(encoder).pop("forward", None)
        self.now = way
        self.tried.append(way)
        if way in self.does:
            self.does[way](encoder)


@pytest.fixture
def ways(monkeypatch) -> Ways:
    return Ways(monkeypatch)


def turn(encoder: nn.Module, angle: float) -> None:
    """Let it compute something else."""
    forward = encoder.forward
    encoder.forward = lambda images: forward(images) * torch.linspace(1, 1 + angle, 8)


def fail(encoder: nn.Module) -> None:
    raise RuntimeError("no kernel image\nis available")


def test_the_fastest_is_used(ways, encoders):
    choice = choose_fusion(small_config(), encoders, MANY, ALONE)
    assert (choice.way, ways.now, choice.kept) == ("compile", "compile", "compile")
    plain = {"eager": 10.0, "triton": 9.0, "compile": 8.0}
    assert choice.row["ms"] == plain | {f"{way}+graph": ms + 1.0 for way, ms in plain.items()}
    assert choice.row["left_out"] == {}
    assert choice.notes[0].startswith("the encoders compute by compile (eager 10.0 ms, eager+graph 11.0 ms, triton 9.0")


@pytest.mark.parametrize(("ms", "way"), [(9.7, "triton"), (9.9, "eager"), (11, "eager")])
def test_what_is_hardly_faster_is_not_worth_it(ways, encoders, ms, way):
    ways.ms |= {"triton": ms, "compile": 12.0}
    assert choose_fusion(small_config(), encoders, MANY, ALONE).way == way
    assert ways.now == way


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (functools.partial(turn, angle=0.05), "it is off by 0.0"),
        (functools.partial(turn, angle=float("nan")), "it is off by nan"),
        (fail, "no kernel image"),
    ],
)
def test_what_is_wrong_or_fails_is_left_out(ways, encoders, fault, said):
    ways.does["compile"] = fault
    choice = choose_fusion(small_config(), encoders, MANY, ALONE)
    assert (choice.way, ways.now) == ("triton", "triton")
    assert choice.row["left_out"]["compile"].startswith(said)
    assert "\n" not in choice.notes[1]
    assert choice.notes[1].startswith(f"not by compile: {said}")


class Sizes:
    """Milliseconds of each way at each size."""

    def __init__(self, monkeypatch, ways: Ways, ms: dict[str, dict[int, float]]):
        self.ways, self.ms = ways, ms
        monkeypatch.setattr(Passes, "milliseconds", lambda passes, *, captured=False: self.of(passes, captured))

    def of(self, passes: Passes, captured: bool) -> float:
        return self.ms[self.ways.now][passes.batches[0].shape[-1]] + captured


def left_of(sizes: dict[int, int]) -> dict:
    data = small_config().data
    return {replace(data, size=size): steps for size, steps in sizes.items()}


@pytest.mark.parametrize(
    ("left", "way", "eager", "triton"),
    [({12: 300, 20: 100}, "triton", 5.5, 5.25), ({12: 100, 20: 300}, "eager", 8.5, 9.75), ({20: 7}, "eager", 10, 12)],
)
def test_crops_that_grow_count_by_their_steps(ways, encoders, monkeypatch, left, way, eager, triton):
    """At the run's own size alone, eager would be the fastest."""
    Sizes(monkeypatch, ways, {"eager": {12: 4.0, 20: 10.0}, "triton": {12: 3.0, 20: 12.0}})
    choice = choose_fusion(small_config(), encoders, left_of(left), ALONE)
    assert choice.way == ways.now == way
    ms = {"eager": eager, "eager+graph": eager + 1, "triton": triton, "triton+graph": triton + 1}
    assert choice.row["ms"] == ms
    minutes = "a minute" if len(left) == 1 else "2 minutes for 2 sizes"
    assert choice.row["left_out"]["compile"].startswith(f"to compile takes {minutes}, and some 0 minutes")


def test_the_small_crops_grow_in_proportion(ways, encoders, monkeypatch):
    seen, of_run = [], Passes.of_run
    monkeypatch.setattr(Passes, "of_run", lambda *given: seen.append(given[3]) or of_run(*given))
    choose_fusion(small_config(), encoders, left_of({12: 1, 20: 1}), ALONE, sides=[20, 9, 9])
    assert seen == [[12, 5, 5], [20, 9, 9]]


def test_a_way_must_be_right_at_every_size(ways, encoders):
    def wrong_if_small(encoder: nn.Module) -> None:
        forward = encoder.forward
        encoder.forward = lambda images: forward(images) * (1 + 0.05 * (images.shape[-1] < 20) * torch.arange(8))

    ways.does["compile"] = wrong_if_small
    assert choose_fusion(small_config(), encoders, MANY, ALONE).way == "compile"
    for left in ({12: 10**9, 20: 10**9}, {20: 10**9, 12: 10**9}):
        choice = choose_fusion(small_config(), encoders, left_of(left), ALONE)
        assert choice.way == "triton"
        assert choice.row["left_out"]["compile"].startswith("it is off by 0.")


def test_nothing_is_measured_where_no_step_is_left(ways, encoders):
    assert choose_fusion(small_config(), encoders, {}, ALONE) == ("eager", [], None, None)
    assert choose_fusion(small_config(), encoders, {}, ALONE, kept="triton") == ("triton", [], None, "triton")


@pytest.mark.parametrize(("slow", "tried"), [("eager", ["eager"]), ("triton", ["eager", "eager+graph", "triton"])])
def test_after_a_minute_no_other_way_is_begun(ways, encoders, monkeypatch, slow, tried):
    now = 0.0
    ways.does[slow] = lambda encoder: add_seconds(31)  # for both encoders
    monkeypatch.setattr(fusion_choice, "time", Mock(perf_counter=lambda: now))

    def add_seconds(seconds: float) -> None:
        nonlocal now
        now += seconds

    choice = choose_fusion(small_config(), encoders, MANY, ALONE)
    assert list(choice.row["ms"]) == tried
    assert choice.way == tried[-1]
    assert choice.row["left_out"]["compile"] == "the ways before it took 62 s, and after 60 none is begun"
    assert f"{slow}+graph" in choice.row["left_out"]
    now = 0.0
    assert not choose_fusion(small_config(), encoders, left_of({12: 10**9, 20: 10**9}), ALONE).row["left_out"]


def test_rounding_is_no_fault(ways, encoders):
    ways.does["compile"] = functools.partial(turn, angle=1e-6)
    assert choose_fusion(small_config(), encoders, MANY, ALONE).way == "compile"


def test_a_graph_is_taken_where_it_is_faster(ways, encoders, monkeypatch):
    ways.faster_captured = 2.0
    choice = choose_fusion(small_config(), encoders, MANY, ALONE)
    assert (choice.way, ways.now, choice.row["ms"]["compile+graph"]) == ("compile+graph", "compile", 6.0)
    ways.tried.clear()
    assert choose_fusion(small_config(), encoders, MANY, ALONE, kept="triton+graph").way == "triton+graph"
    assert set(ways.tried) == {"triton"}


def test_a_way_can_be_the_slowest_from_the_host_and_the_fastest_in_a_graph(ways, encoders, monkeypatch):
    def milliseconds(passes, *, captured=False) -> float:
        times = {"eager": (36.2, 22.8), "triton": (64.8, 16.0), "compile": (40.0, 30.0)}
        return times[ways.now][captured]

    monkeypatch.setattr(Passes, "milliseconds", milliseconds)
    assert choose_fusion(small_config(), encoders, MANY, ALONE).way == "triton+graph"
    assert ways.now == "triton"


def test_a_graph_that_cannot_be_captured_is_left_out(ways, encoders, monkeypatch):
    def no_capture(passes, *, captured=False) -> float:
        return fail(None) if captured else ways.ms[ways.now]

    monkeypatch.setattr(Passes, "milliseconds", no_capture)
    choice = choose_fusion(small_config(), encoders, MANY, ALONE)
    assert choice.way == "compile"
    assert choice.row["left_out"] == {f"{way}+graph": "RuntimeError: no kernel image" for way in ways.ms}


def test_a_short_run_does_not_wait_for_a_compiler(ways, encoders):
    choice = choose_fusion(small_config(), encoders, FEW, ALONE)
    assert choice.way == "triton"
    assert choice.row["left_out"] == {"compile": "to compile takes a minute, and some 1 minutes of encoding are left"}


def test_a_compiler_wants_an_hour_for_every_size(ways, encoders):
    hour = 360_000  # steps
    assert "compile" in choose_fusion(small_config(), encoders, left_of({20: 1.5 * hour}), ALONE).row["ms"]
    assert "compile" in choose_fusion(small_config(), encoders, left_of({12: hour, 20: hour}), ALONE).row["ms"]
    left_out = choose_fusion(small_config(), encoders, left_of({12: hour, 20: 0.5 * hour}), ALONE).row["left_out"]
    assert left_out["compile"] == "to compile takes 2 minutes for 2 sizes, and some 90 minutes of encoding are left"


def test_nothing_can_be_timed(ways, encoders, monkeypatch):
    monkeypatch.setattr(Passes, "reference", fail)
    choice = choose_fusion(small_config(), encoders, MANY, ALONE)
    assert (choice.way, ways.now, choice.row["ms"], choice.kept) == ("eager", "eager", {}, None)
    assert choice.row["left_out"] == {"eager": "RuntimeError: no kernel image"}


def test_a_way_that_is_asked_for(ways, encoders):
    config = config_with(fusion="triton")
    for kept in (None, "compile+graph"):
        assert choose_fusion(config, encoders, MANY, ALONE, kept=kept) == ("triton", [], None, kept)
    ways.does["triton"] = fail
    with pytest.raises(ValueError, match=r"--model\.fusion triton: no kernel image$"):
        choose_fusion(config, encoders, MANY, ALONE)
    assert ways.now == "eager"


def test_a_way_that_is_kept(ways, encoders):
    assert choose_fusion(small_config(), encoders, MANY, ALONE, kept="triton") == ("triton", [], None, "triton")
    ways.does["triton"] = fail
    choice = choose_fusion(small_config(), encoders, MANY, ALONE, kept="triton")
    assert (choice.way, ways.now, choice.kept) == ("eager", "eager", "eager")
    (note,) = choice.notes
    assert note.startswith(
        "warning: so far the encoders computed by triton, which does not work here (no kernel image)"
    )


def test_deterministic_runs_and_cpus_have_no_choice(ways, encoders, monkeypatch):
    """What a GPU has chosen before is kept, for where there is a choice again."""
    for config in (small_config(deterministic=True), small_config()):
        for kept in (None, "triton"):
            assert choose_fusion(config, encoders, MANY, ALONE, kept=kept) == ("eager", [], None, kept)
        monkeypatch.undo()


def choice_of_rank(world: World) -> tuple:
    """Rank 1 cannot use triton, and is slow by compile."""
    with pytest.MonkeyPatch.context() as patch:
        ways = Ways(patch)
        ways.ms["compile"] = [8.0, 9.9][world.rank]
        if world.rank == 1:
            ways.does["triton"] = fail
        choice = choose_fusion(small_config(), encoders_of(small_config(), world), MANY, world)
        return choice.way, choice.row["ms"], choice.row["left_out"], ways.now


def test_all_ranks_choose_together():
    first, second = run_ranks(2, choice_of_rank)
    assert first == second
    times = {"eager": 10.0, "eager+graph": 11.0, "compile": 9.9, "compile+graph": 10.9}
    assert first == ("eager", times, {"triton": "no kernel image"}, "eager")


def test_steps_that_cannot_be_captured_are_not_tried_so(ways, encoders):
    ways.faster_captured = 5.0
    choice = choose_fusion(small_config(), encoders, MANY, ALONE, graphs=False)
    assert (choice.way, choice.row["ms"]) == ("compile", ways.ms)


@pytest.mark.parametrize(
    ("way", "group", "divisible", "captured"),
    [
        ("triton+graph", None, False, True),
        ("triton+graph", object(), True, True),
        ("triton+graph", object(), False, False),  # goes on from a single rank's run
        ("triton", None, True, False),
    ],
)
def test_whose_steps_are_captured(way, group, divisible, captured):
    chosen = Choices(None)
    chosen._way = way
    learner = Mock()
    learner.method.world.group, learner.method.divisible = group, divisible
    step = chosen.step_of(learner)
    assert isinstance(getattr(step, "__self__", None), CapturedStep) == captured
    assert (step is learner.step) != captured


def captured_of_rank(world: World) -> tuple:
    """Rank 1 cannot capture triton, and is slow by eager in a graph."""
    with pytest.MonkeyPatch.context() as patch:
        ways = Ways(patch)
        milliseconds = ways.milliseconds

        def of_rank(*, captured: bool = False) -> float:
            if captured and world.rank == 1 and ways.now == "triton":
                fail(None)
            return 7.0 + world.rank if captured and ways.now == "eager" else milliseconds(captured=captured)

        patch.setattr(Passes, "milliseconds", lambda passes, **how: of_rank(**how))
        choice = choose_fusion(small_config(), encoders_of(small_config(), world), FEW, world)
        return choice.way, choice.row["ms"], choice.row["left_out"].get("triton+graph"), ways.now


def test_all_ranks_capture_or_none():
    """The slowest counts."""
    first, second = run_ranks(2, captured_of_rank)
    assert first == second
    assert first == (
        "eager+graph",
        {"eager": 10.0, "eager+graph": 8.0, "triton": 9.0},
        "RuntimeError: no kernel image",
        "eager",
    )


def test_ranks_do_not_wait_for_each_other_in_batch_norm(encoders):
    norm = next(module for module in encoders["query"].modules() if isinstance(module, nn.BatchNorm2d))
    norm.group = group = object()
    with Passes(encoders, [torch.zeros(2, 3, 8, 8)]).undisturbed():
        assert norm.group is None
    assert norm.group is group


@pytest.mark.parametrize("splits", [1, 2])
def test_passes_leave_nothing_behind(splits):
    config = config_with(bn_splits=splits)
    encoders = encoders_of(config)
    passes = Passes.of_run(config, encoders, ALONE)
    before = copy.deepcopy({name: encoder.state_dict() for name, encoder in encoders.items()})
    state = torch.get_rng_state()
    with passes.undisturbed():
        reference = passes.reference()
        assert passes.error(reference) == 0
        moved = [buffer for _, buffer in batch_norm_buffers(encoders["query"])]
        assert any(not torch.equal(a, b) for a, b in zip(moved, _buffers(before["query"]), strict=False))
    for name, encoder in encoders.items():
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, before[name][key]), key
    assert all(parameter.grad is None for parameter in encoders["query"].parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(images) for images in passes.batches] == [config.optim.batch_size]


def _buffers(state):
    return [value for name, value in state.items() if "running" in name or "tracked" in name]


def test_the_reference_is_of_cudnn_in_true_float32(encoders, monkeypatch):
    seen = []

    def compute(passes, *, exact=False):
        seen.append((exact, torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return []

    monkeypatch.setattr(Passes, "compute", compute)
    Passes.of_run(small_config(), encoders, ALONE).reference()
    assert seen == [(True, True, False)]


def test_passes_are_those_of_a_step(encoders):
    config = small_config()
    passes = Passes.of_run(config, encoders, ALONE)
    found = passes.compute()
    query, momentum = encoders["query"], encoders["momentum"]
    (images,) = passes.batches
    features = query(images)
    upstream = torch.linspace(-1, 1, features.numel()).view_as(features)
    features.backward(upstream)
    expected = [features, momentum(images), *(parameter.grad for parameter in query.parameters())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_passes_have_all_sizes_of_a_step_in_proportion(encoders):
    """Of two large views and six small ones; where all are alike, as many images as a rank has."""
    config, rows = small_config(), small_config().optim.batch_size
    passes = Passes.of_run(config, encoders, ALONE, [20, 20, *[9] * 6])
    assert [tuple(images.shape) for images in passes.batches] == [(rows, 3, 20, 20), (3 * rows, 3, 9, 9)]
    features, momentum, *gradients = passes.compute()
    assert len(features) == len(momentum) == 4 * rows
    assert passes.error([features, momentum, *gradients]) == 0
    whole = [Passes.of_run(config, encoders, ALONE, sides).batches for sides in ((), (20,), (20, 20))]
    assert all(len(batches) == 1 and torch.equal(batches[0], whole[0][0]) for batches in whole)


def test_a_run_is_timed_with_the_sizes_of_its_views(ways, monkeypatch):
    seen, of_run = [], Passes.of_run
    monkeypatch.setattr(Passes, "of_run", lambda *given: seen.append(given[3]) or of_run(*given))
    config = small_config(method="crops")
    learner = Learner(build(config, ALONE, 60), config, ALONE)
    Choices(None).make(config, learner, MANY, [20], ALONE, lambda line: None)
    assert seen == [[20, 20, 9, 9, 9]]


def test_a_run_counts_the_steps_of_every_size_and_their_parts(ways, image_folder, tmp_path, alone, monkeypatch):
    """Two steps an epoch, of two parts each; some that are done already are not counted."""
    seen, choose = [], choices.choose_fusion
    monkeypatch.setattr(choices, "choose_fusion", lambda *given, **how: seen.append(given[2]) or choose(*given, **how))
    Sizes(monkeypatch, ways, {"eager": {8: 4.0, 16: 10.0}, "triton": {8: 3.0, 16: 12.0}})
    config = tiny(image_folder, tmp_path, epochs=4, optim__accumulate=2, data__sizes=(Stage(8, 3),))
    assert run(config, alone)
    assert [{data.size: steps for data, steps in left.items()} for left in seen] == [{8: 12, 16: 4}]
    (row,) = (row for row in read_rows(tmp_path) if row["kind"] == "fusion")
    assert row["ms"] == {"eager": 5.5, "eager+graph": 6.5, "triton": 5.25, "triton+graph": 6.25}


def test_a_run_records_its_choice_and_keeps_it(ways, image_folder, tmp_path, alone, capsys):
    ways.ms["triton"] = 5.0
    assert run(tiny(image_folder, tmp_path, epochs=1), alone)
    times = "eager 10.0 ms, eager+graph 11.0 ms, triton 5.0 ms, triton+graph 6.0 ms; "
    assert f"the encoders compute by triton ({times}" in capsys.readouterr().out
    (row,) = (row for row in read_rows(tmp_path) if row["kind"] == "fusion")
    assert row["way"] == "triton"
    assert row["ms"] == {"eager": 10.0, "eager+graph": 11.0, "triton": 5.0, "triton+graph": 6.0}
    assert load_checkpoint(tmp_path)["choices"]["fusion"] == "triton"

    ways.ms["triton"], ways.tried[:] = 50.0, []
    assert run(tiny(image_folder, tmp_path, epochs=2), alone)
    assert (ways.now, set(ways.tried)) == ("triton", {"triton"})
    assert load_checkpoint(tmp_path)["choices"]["fusion"] == "triton"

    # Another run decides anew.
    other = tmp_path / "other"
    assert run(tiny(image_folder, other, epochs=3, resume_from=tmp_path / "checkpoint.pt"), alone)
    assert load_checkpoint(other)["choices"]["fusion"] == "eager"


def test_ways_are_used_and_taken_back(encoders, monkeypatch):
    """Compiled without a compiler: only that it is this encoder's passes, and no longer, is looked at."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: setattr(self, "_compiled_call_impl", fail))
    encoder, images = encoders["query"], torch.randn(4, 3, 20, 20)
    plain = encoder(images)
    fusion.use("compile", encoder)
    with pytest.raises(RuntimeError, match="no kernel image"):
        encoder(images)
    names = list(encoder.state_dict())
    for way in ("triton", "eager"):
        fusion.use(way, encoder)
        assert list(encoder.state_dict()) == names
        torch.testing.assert_close(encoder(images), plain, rtol=0, atol=0)  # kernels are for GPUs
    with pytest.raises(ValueError, match="none of the patterns of torchvision's ResNets is found"):
        fusion.use("triton", nn.Linear(2, 2))


@pytest.mark.slow
def test_compiled_passes_agree(encoders):
    """By PyTorch's tracer without code of its own; a compiler takes a minute."""
    for encoder in encoders.values():
        encoder.compile(dynamic=False, backend="aot_eager")
    passes = Passes.of_run(small_config(), encoders, ALONE)
    with passes.undisturbed():
        compiled = passes.compute()
        for encoder in encoders.values():
            fusion.use("eager", encoder)
        assert passes.error(compiled) < 1e-5
