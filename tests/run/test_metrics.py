"""Recording, resuming a record, and losses that are not finite."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ranks import run_ranks

from pcl_fast.data import find_images
from pcl_fast.errors import NonFiniteLossError
from pcl_fast.run.metrics import Recorder, StepMetrics, Stopwatch, read_rows


def step_metrics(root, world, recorder=None) -> StepMetrics:
    recorder = recorder or Recorder(root, enabled=False)
    return StepMetrics(recorder, find_images(root), world, batch_size=4)


def add(metrics: StepMetrics, step: int, loss: float, index: tuple[int, ...] = (0, 1)) -> None:
    metrics.add(step, torch.tensor(index), {"loss": torch.tensor(loss), "accuracy": torch.tensor(10.0 * loss)})


def look(metrics: StepMetrics, *arguments, **options) -> list[bool]:
    metrics.begin_look(*arguments, **options)
    return metrics.end_look()


def test_means_and_rows(tmp_path, image_folder, alone):
    recorder = Recorder(tmp_path)
    metrics = step_metrics(image_folder, alone, recorder)
    for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
        add(metrics, step, loss)
    assert look(metrics, 0, 3, lr=0.1, wishes=(False, False)) == [False, False]
    add(metrics, 4, 3.0)
    assert look(metrics, 0, 4, lr=0.1, wishes=(True, False)) == [True, False]
    assert metrics.epoch_means() == {"loss": 3.0, "accuracy": 30.0}
    recorder.close()
    rows = [(row["kind"], row["step"], row["loss"]) for row in read_rows(tmp_path)]
    assert rows == [("step", 3, 6.0), ("step", 4, 3.0)]


def test_a_look_is_of_the_steps_before_it_began(tmp_path, image_folder, alone):
    recorder = Recorder(tmp_path)
    metrics = step_metrics(image_folder, alone, recorder)
    assert metrics.end_look() is None
    add(metrics, 1, 1.0)
    metrics.begin_look(0, 1, lr=0.1, wishes=(True,))
    add(metrics, 2, float("nan"))
    assert read_rows(tmp_path) == []
    assert metrics.end_look() == [True]
    assert metrics.end_look() is None
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [(1, 1.0)]
    with pytest.raises(NonFiniteLossError, match="step 2"):
        look(metrics, 0, 2, lr=0.1, wishes=(False,))
    assert metrics.epoch_means()["loss"] == 1.0
    recorder.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's memory is used again while it works")
def test_what_a_look_reads_on_a_gpu_is_kept_for_it(tmp_path, image_folder, alone):
    recorder, device = Recorder(tmp_path), torch.device("cuda", 0)
    metrics = step_metrics(image_folder, dataclasses.replace(alone, device=device), recorder)
    for step in range(1, 30):
        torch.cuda._sleep(10**7)
        metrics.add(step, torch.tensor([0, 1]), {"loss": torch.tensor(float(step)).to(device)})
        metrics.begin_look(0, step, lr=0.1, wishes=(step % 2 == 0,))
        for _ in range(50):  # as a step takes, of all small sizes
            torch.full((3,), torch.nan, device=device)
        assert metrics.end_look() == [step % 2 == 0]
    recorder.close()
    assert [row["loss"] for row in read_rows(tmp_path)] == list(range(1, 30))


def test_a_bad_loss_names_the_batch_of_its_step(image_folder, alone):
    metrics = step_metrics(image_folder, alone)
    add(metrics, 7, 1.0, (3, 4))
    add(metrics, 8, float("nan"), (20, 30))
    add(metrics, 9, float("nan"), (5, 6))
    with pytest.raises(NonFiniteLossError, match=r"loss of step 8 is nan.*\[20, 30\].*class_1/02\.jpg"):
        look(metrics, 0, 9, lr=0.1, wishes=())


def metrics_of_rank(world, root):
    metrics = step_metrics(root, world)
    add(metrics, 1, 1.0 + world.rank)
    stop = look(metrics, 0, 1, lr=0.1, wishes=(world.rank == 1, False, world.rank == 0))
    means = metrics.epoch_means()
    add(metrics, 2, float("inf") if world.rank == 1 else 1.0)
    with pytest.raises(NonFiniteLossError) as raised:
        look(metrics, 0, 2, lr=0.1, wishes=())
    return stop, means["loss"], str(raised.value)


def test_ranks_agree_on_means_stopping_and_bad_losses(image_folder):
    (stop, mean, said), (other_stop, other_mean, other_said) = run_ranks(2, metrics_of_rank, image_folder)
    assert stop == other_stop == [True, False, True]
    assert mean == other_mean == 1.5
    assert "step 2 is not finite on another rank" in said
    assert "step 2 is inf" in other_said


def test_a_resumed_record_drops_what_came_after_the_checkpoint(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.row("epoch", 1, 1, loss=1.0)
    kept = recorder.length()
    recorder.row("epoch", 2, 2, loss=2.0)
    recorder.close()
    resumed = Recorder(tmp_path, resume_at=(1, kept))
    assert resumed.length() == kept
    resumed.row("epoch", 2, 2, loss=3.0)
    resumed.close()
    assert [row["loss"] for row in read_rows(tmp_path)] == [1.0, 3.0]


def test_only_the_main_rank_writes(tmp_path):
    recorder = Recorder(tmp_path / "none", enabled=False)
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
