"""A kernel that is wrong on a GPU: named, left to its plain twin on all ranks, and left so when the run goes on.

Without a GPU no kernel is used, and with one others are too; the runs here are made to believe that they use two, which
Triton's interpreter does where there is no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pcl_fast.kernels import segment, segment_plain, switches
from ranks import run_ranks
from steps import small_config
from test_previous import Halt, stop_after
from tiny import tiny

import pcl_fast.data.batch
from pcl_fast.clustering.backends import obstacle, pick_backend, pick_sums
from pcl_fast.config import Config
from pcl_fast.data import normalise
from pcl_fast.data.views.draws import Draws
from pcl_fast.data.views.finish import Finisher
from pcl_fast.distributed import World
from pcl_fast.losses.contrast import takes_kernels
from pcl_fast.run import kernel_choice
from pcl_fast.run.checkpoint import load_checkpoint, save_checkpoint
from pcl_fast.run.kernel_choice import choose_kernels
from pcl_fast.run.metrics import read_rows
from pcl_fast.train import run

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def all_on_again():
    yield
    switches.switch_off(())


@pytest.fixture
def used(monkeypatch):
    """Two kernels are used, of which segment leaves out a point."""
    sums = segment.segment_sums

    def broken(values, clusters, k):
        total, counts = sums(values, clusters, k)
        total[clusters[7]] -= values[7].float()
        return total, counts

    monkeypatch.setattr(kernel_choice, "used_kernels", lambda *given: ["segment", "normalise"])
    monkeypatch.setattr(segment, "segment_sums", broken)


@pytest.fixture
def one_rank() -> World:
    """Where kernels compute."""
    return World(0, 1, DEVICE, None)


def eager(data: Path, output: Path, **changes) -> Config:
    """On a GPU every run would else begin by timing other ways to compute."""
    return tiny(data, output, model__fusion="eager", **changes)


def test_a_run_goes_on_without_it_and_stays_so(used, image_folder, tmp_path, one_rank, capsys):
    assert run(eager(image_folder, tmp_path, epochs=1), one_rank)
    assert "the kernel segment (the sums over clusters) is wrong: " in (printed := capsys.readouterr().out)
    assert "Plain PyTorch takes its place" in printed
    assert load_checkpoint(tmp_path)["choices"]["kernels_off"] == ["segment"]
    (row,) = (row for row in read_rows(tmp_path) if row["kind"] == "kernels")
    assert (row["checked"], list(row["faults"]), row["off"]) == (["segment", "normalise"], ["segment"], ["segment"])

    # Whatever it would be found to be now.
    segment.segment_sums = None
    assert run(eager(image_folder, tmp_path, epochs=2), one_rank)
    printed = capsys.readouterr().out
    assert "kernels that were found wrong when this run began stay off: segment" in printed
    assert "warning: the kernel" not in printed
    assert load_checkpoint(tmp_path)["choices"]["kernels_off"] == ["segment"]
    last = [row for row in read_rows(tmp_path) if row["kind"] == "kernels"][-1]
    assert (last["checked"], last["faults"], last["off"]) == (["normalise"], {}, ["segment"])

    # Another run decides anew.
    segment.segment_sums = segment_plain.segment_sums
    other = tmp_path / "other"
    assert run(eager(image_folder, other, epochs=3, resume_from=tmp_path / "checkpoint.pt"), one_rank)
    assert load_checkpoint(other)["choices"]["kernels_off"] == []


def test_a_run_that_was_killed_between_its_first_two_checkpoints_begins_anew(
    used, image_folder, tmp_path, one_rank, monkeypatch, capsys
):
    """What was found of the kernels is not in the record before there are two."""
    stop_after(1, monkeypatch)
    with pytest.raises(Halt):
        run(eager(image_folder, tmp_path, epochs=1), one_rank)
    monkeypatch.setattr("pcl_fast.run.saving.save_checkpoint", save_checkpoint)
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    assert run(eager(image_folder, tmp_path, epochs=1), one_rank)
    assert "the run begins anew" in capsys.readouterr().out
    assert [row["off"] for row in read_rows(tmp_path) if row["kind"] == "kernels"] == [["segment"]]


def test_without_a_gpu_nothing_is_checked(alone):
    assert choose_kernels(small_config(), ("loss.backend",), alone) == ([], [], None)


def test_strict_kernels_ends_the_run(used, image_folder, tmp_path, one_rank):
    with pytest.raises(ValueError, match="--strict-kernels: the kernel segment is wrong"):
        run(eager(image_folder, tmp_path, strict_kernels=True), one_rank)
    assert run(eager(image_folder, tmp_path, epochs=1), one_rank)
    with pytest.raises(ValueError, match="the kernel segment was found wrong when this run began"):
        run(eager(image_folder, tmp_path, epochs=2, strict_kernels=True), one_rank)


@pytest.mark.parametrize(("name", "group"), [("contrast", "loss"), ("assign", "cluster")])
def test_a_kernel_that_is_asked_for_is_not_replaced(monkeypatch, alone, name, group):
    monkeypatch.setattr(kernel_choice, "used_kernels", lambda *given: [name])
    monkeypatch.setattr(kernel_choice, "find_faults", lambda *given, **sizes: {name: "is wrong"})
    config = small_config()
    assert choose_kernels(config, (), alone).off == [name]
    backend = replace(getattr(config, group), backend="triton")
    with pytest.raises(
        ValueError, match=f"--{group}.backend triton: the kernel {name} is wrong; --{group}.backend auto"
    ):
        choose_kernels(small_config(**{group: backend}), (), alone)


def test_the_other_sweep_takes_the_place_of_points_held_in_registers(monkeypatch, alone):
    monkeypatch.setattr(kernel_choice, "used_kernels", lambda *given: ["assign_held", "assign"])
    monkeypatch.setattr(kernel_choice, "find_faults", lambda *given, **sizes: {"assign_held": "is wrong"})
    config = small_config()
    choice = choose_kernels(replace(config, cluster=replace(config.cluster, backend="triton")), (), alone)
    assert choice.off == ["assign_held"]
    assert choice.notes[-1].endswith("is wrong. The kernel assign takes its place, which is slower")
    assert obstacle(DEVICE, torch.float16, 4) is None


def choice_of_rank(world: World):
    """Rank 1 finds two kernels wrong, one of which rank 0 finds wrong for another reason."""
    faults = [{"segment": "is A"}, {"segment": "is B", "assign": "is C"}][world.rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "used_kernels", lambda *given: ["assign", "segment", "normalise"])
        patch.setattr(kernel_choice, "find_faults", lambda *given, **sizes: faults)
        choice = choose_kernels(small_config(), (), world)
    off = [name for name in switches.KERNELS if switches.is_off(name)]
    switches.switch_off(())
    return choice.off, choice.row["faults"], off


def test_all_ranks_decide_together():
    first, second = run_ranks(2, choice_of_rank)
    assert first == second
    off, faults, switched = first
    assert off == ["assign", "segment"]
    assert switched == ["assign", "segment"]
    assert faults["segment"].startswith("is A (rank 0, on ")
    assert faults["assign"].startswith("is C (rank 1, on ")


class OnGPU(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


def test_what_is_switched_off_is_not_used(monkeypatch):
    gpu, query = torch.device("cuda", 0), torch.ones(2, 4, device=DEVICE)
    assert takes_kernels("triton", query, query)
    assert pick_sums(gpu) is segment.segment_sums
    switches.switch_off(["contrast", "assign", "segment", "normalise", "photometric"])
    with pytest.raises(ValueError, match="is switched off"):
        takes_kernels("triton", query, query)
    assert "is switched off" in obstacle(DEVICE, torch.float16, 4)
    assert pick_sums(gpu) is segment_plain.segment_sums
    switches.switch_off(["segment"])
    assert pick_backend("triton", DEVICE, torch.float16, 4).sums is segment_plain.segment_sums
    switches.switch_off(["normalise", "photometric"])
    images = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8)
    on_gpu = images.as_subclass(OnGPU)
    monkeypatch.setattr(pcl_fast.data.batch, "_normalise", None)
    assert torch.equal(normalise(on_gpu, torch.float32), normalise(images, torch.float32))
    monkeypatch.setattr("pcl_fast.data.views.finish.photometric", None)
    nothing = np.zeros(2, dtype=bool)
    draws = Draws(
        window=np.zeros((2, 4), dtype=np.int64),
        flip=nothing,
        ops=np.array([[1], [0]], dtype=np.int32),
        factors=np.full((2, 1), 0.5, dtype=np.float32),
        sigma=np.array([0.0, 1.0], dtype=np.float32),
        solarise=nothing,
        matrix=None,
    )
    finisher = Finisher(1)
    assert torch.equal(finisher(on_gpu, draws), finisher(images, draws))
