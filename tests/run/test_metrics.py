"""Recording, resuming a record, and losses that are not finite."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ranks import run_ranks

from pcl_fast.data import find_images
from pcl_fast.errors import NonFiniteError
from pcl_fast.learner import FINITE
from pcl_fast.run.metrics import Recorder, StepMetrics, Stopwatch, read_rows


def step_metrics(root, world, recorder=None) -> StepMetrics:
    recorder = recorder or Recorder(root, {}, enabled=False)
    return StepMetrics(recorder, find_images(root), world, batch_size=4)


def add(metrics: StepMetrics, step: int, loss: float, index: tuple[int, ...] = (0, 1), finite: float = 1.0) -> None:
    values = {"loss": loss, "accuracy": 10.0 * loss, FINITE: finite}
    metrics.add(step, torch.tensor(index), {name: torch.tensor(value) for name, value in values.items()})


def reduce(metrics: StepMetrics, *arguments, **options) -> dict[str, bool]:
    metrics.begin_reduction(*arguments, **options)
    return metrics.end_reduction()


def test_means_and_rows(tmp_path, image_folder, alone):
    recorder = Recorder(tmp_path, {})
    metrics = step_metrics(image_folder, alone, recorder)
    for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
        add(metrics, step, loss)
    assert reduce(metrics, 0, 3, lr=0.1, votes={"stop": False, "save": False}) == {"stop": False, "save": False}
    add(metrics, 4, 3.0)
    assert reduce(metrics, 0, 4, lr=0.1, votes={"stop": True, "save": False}) == {"stop": True, "save": False}
    assert metrics.epoch_means() == {"loss": 3.0, "accuracy": 30.0}
    recorder.close()
    rows = [(row["kind"], row["step"], row["loss"]) for row in read_rows(tmp_path)]
    assert rows == [("step", 3, 6.0), ("step", 4, 3.0)]


def test_a_reduction_is_of_the_steps_before_it_began(tmp_path, image_folder, alone):
    recorder = Recorder(tmp_path, {})
    metrics = step_metrics(image_folder, alone, recorder)
    assert metrics.end_reduction() is None
    add(metrics, 1, 1.0)
    metrics.begin_reduction(0, 1, lr=0.1, votes={"stop": True})
    add(metrics, 2, float("nan"))
    assert read_rows(tmp_path) == []
    assert metrics.end_reduction() == {"stop": True}
    assert metrics.end_reduction() is None
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [(1, 1.0)]
    with pytest.raises(NonFiniteError, match="step 2"):
        reduce(metrics, 0, 2, lr=0.1, votes={"stop": False})
    assert metrics.epoch_means()["loss"] == 1.0
    recorder.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's memory is used again while it works")
def test_what_a_reduction_reads_on_a_gpu_is_kept_for_it(tmp_path, image_folder, alone):
    recorder, device = Recorder(tmp_path, {}), torch.device("cuda", 0)
    metrics = step_metrics(image_folder, dataclasses.replace(alone, device=device), recorder)
    for step in range(1, 30):
        torch.cuda._sleep(10**7)
        metrics.add(
            step,
            torch.tensor([0, 1]),
            {"loss": torch.tensor(float(step)).to(device), FINITE: torch.ones((), device=device)},
        )
        metrics.begin_reduction(0, step, lr=0.1, votes={"stop": step % 2 == 0})
        for _ in range(50):  # as a step takes, of all small sizes
            torch.full((3,), torch.nan, device=device)
        assert metrics.end_reduction() == {"stop": step % 2 == 0}
    recorder.close()
    assert [row["loss"] for row in read_rows(tmp_path)] == list(range(1, 30))


def test_a_bad_loss_names_the_batch_of_its_step(image_folder, alone):
    metrics = step_metrics(image_folder, alone)
    add(metrics, 7, 1.0, (3, 4))
    add(metrics, 8, float("nan"), (20, 30))
    add(metrics, 9, float("nan"), (5, 6))
    with pytest.raises(NonFiniteError, match=r"loss of step 8 is nan.*\[20, 30\].*class_1/02\.jpg"):
        reduce(metrics, 0, 9, lr=0.1, votes={})


def test_a_bad_gradient_is_told_from_a_bad_loss(image_folder, alone):
    metrics = step_metrics(image_folder, alone)
    add(metrics, 1, 1.0)
    add(metrics, 2, 1.5, (20, 30), finite=0.0)
    with pytest.raises(NonFiniteError, match=r"a gradient of step 2 is not finite, .* though the loss is;.*\[20, 30\]"):
        reduce(metrics, 0, 2, lr=0.1, votes={})


def test_the_learner_s_flag_is_not_recorded(tmp_path, image_folder, alone):
    recorder = Recorder(tmp_path, {})
    metrics = step_metrics(image_folder, alone, recorder)
    add(metrics, 1, 1.0)
    reduce(metrics, 0, 1, lr=0.1, votes={})
    recorder.close()
    assert set(read_rows(tmp_path)[0]) == {"kind", "step", "epoch", "loss", "accuracy", "lr"}
    assert set(metrics.epoch_means()) == {"loss", "accuracy"}


def metrics_of_rank(world, root):
    metrics = step_metrics(root, world)
    add(metrics, 1, 1.0 + world.rank)
    stop = reduce(metrics, 0, 1, lr=0.1, votes={"a": world.rank == 1, "b": False, "c": world.rank == 0})
    means = metrics.epoch_means()
    add(metrics, 2, float("inf") if world.rank == 1 else 1.0)
    with pytest.raises(NonFiniteError) as raised:
        reduce(metrics, 0, 2, lr=0.1, votes={})
    return stop, means["loss"], str(raised.value)


def test_ranks_agree_on_means_stopping_and_bad_losses(image_folder):
    (stop, mean, said), (other_stop, other_mean, other_said) = run_ranks(2, metrics_of_rank, image_folder)
    assert stop == other_stop == {"a": True, "b": False, "c": True}
    assert mean == other_mean == 1.5
    assert "step 2 is not finite on another rank" in said
    assert "step 2 is inf" in other_said


def test_a_resumed_record_drops_what_came_after_the_checkpoint(tmp_path):
    recorder = Recorder(tmp_path, {})
    recorder.row("epoch", 1, 1, loss=1.0)
    kept = recorder.sync()
    recorder.row("epoch", 2, 2, loss=2.0)
    recorder.close()
    resumed = Recorder(tmp_path, {}, resume_at=(1, 1, kept))
    assert resumed.sync() == kept
    resumed.row("epoch", 2, 2, loss=3.0)
    resumed.close()
    assert [row["loss"] for row in read_rows(tmp_path)] == [1.0, 3.0]


def test_only_the_main_rank_writes(tmp_path):
    recorder = Recorder(tmp_path / "none", {}, enabled=False)
    recorder.row("epoch", 1, 1, loss=1.0)
    recorder.close()
    assert not (tmp_path / "none").exists()


def test_stopwatch_adds_up_and_starts_again():
    watch = Stopwatch()
    for _ in range(2):
        with watch.phase("a"):
            pass
    assert list(watch.take()) == ["a"]
    assert watch.take() == {}
