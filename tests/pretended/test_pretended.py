"""Whole steps of every method, and the E-step, on a pretended GPU: what would crash or wait on a real one.

Which GPU is pretended depends on the installed stack: Volta's has V100 (`make check-v100`), the other one Turing, which
computes in fp16 with a scaled loss too, and Hopper.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from building import run_pretended
from gpu import Collective, Recorder
from launches import FLAGS
from methods.every import METHODS, tiny
from pcl_fast.kernels.tiles import OLD_TRITON
from ranks import run_ranks
from steps import batch_for

from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build, method_class
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows

# For which there are Triton's kernels.
NEWEST = 70 if OLD_TRITON else 90
CASES = [(NEWEST, 1), (NEWEST, 4)] if OLD_TRITON else [(75, 4), (NEWEST, 1), (NEWEST, 4)]


def ran(done) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "sm_{} x {}".format(*case))
def seen(request, pretended_gpu) -> tuple[int, int, dict[str, Any]]:
    """The capability, the number of ranks, and what run_steps.py saw, by case and part."""
    capability, ranks = request.param
    cases = ran(run_pretended(pretended_gpu, "run_steps.py", str(ranks), capability=capability))
    errors = [f"{name}: {case['error']}" for name, case in cases.items() if "error" in case]
    assert not errors, "\n".join(errors)
    return capability, ranks, cases


def parts(cases: dict[str, Any], *names: str):
    return [(name, part, case[part]) for name, case in cases.items() for part in names if case.get(part)]


STEPS = "steps", "steps after it"


def test_every_method_is_there(seen):
    cases = seen[2]
    assert {name.partition(",")[0] for name in cases} == set(METHODS)
    assert {"pcl, bn_splits 4", "pcl, bn_splits 1, keys as features", "simclr, bn_splits 1, 2 parts"} <= set(cases)
    assert cases["pcl, bn_splits 4"]["E-step"]["clusters"] == [3, 5, 7]
    assert "prototype_loss" in cases["pcl, bn_splits 4"]["steps after it"]["metrics"]


def test_a_step_makes_the_host_wait_for_nothing(seen):
    for name, part, found in parts(seen[2], *STEPS):
        assert found["waits"] == [], (name, part)
        assert set(map(tuple, found["metrics"].values())) == {("cuda:0", 0)}


def test_the_fused_optimiser_gets_what_it_takes(seen):
    for name, part, found in parts(seen[2], *STEPS):
        assert found["updates"], (name, part)
        assert all(count and not faults for count, faults in found["updates"]), (name, part, found["updates"])


def test_products_are_in_the_gpu_s_half_precision(seen):
    half, other = "torch.float16", "torch.bfloat16"
    if seen[0] >= 80:
        half, other = other, half
    for name, part, found in parts(seen[2], *STEPS, "E-step"):
        assert half in found["products"], (name, part)
        assert other not in found["products"], (name, part)


def test_nccl_takes_every_collective(seen):
    for name, part, found in parts(seen[2], *STEPS, "E-step", "second E-step", "between epochs"):
        assert found["misfits"] == [], (name, part)
        assert bool(found["collectives"]) == (seen[1] > 1), (name, part)


def test_kernels_are_launched_where_the_gpu_has_them(seen):
    capability, _, cases = seen
    for name, part, found in parts(cases, *STEPS):
        assert "shift_and_scale" in found["launches"], (name, part)
    loss, clustering = {"stream", "draw", "combine", "weigh"}, {"prepare", "sweep", "settle"}
    launched = set(cases["pcl, bn_splits 1"]["steps after it"]["launches"])
    clustered = set(cases["pcl, bn_splits 1"]["E-step"]["launches"])
    assert "add_segments" in clustered
    if capability == NEWEST:
        assert (loss - launched, clustering - clustered) == (set(), set())
    else:
        assert (loss & launched, clustering & clustered) == (set(), set())


def test_the_feature_pass_can_be_fused(pretended_gpu):
    """All layers but the stem and the shortcuts'; no operator is refused, and the host waits at the end alone."""
    found = ran(run_pretended(pretended_gpu, "run_features.py", capability=NEWEST))
    assert len(found["layers"]) == 16
    assert not [name for name in found["layers"] if "downsample" in name or name == "backbone.conv1"]
    assert (found["pooled first"], found["plain biases"]) == (1, [])
    assert found["products"] == ["torch.float16" if NEWEST < 80 else "torch.bfloat16"]
    assert len(found["waits"]) == 1
    assert found["error"] < 0.02
    assert found["difference"] is None
    # Times mean nothing here.
    assert not [reason for reason in found["unfit"].values() if not reason.startswith("is not faster")]


def test_fused_batch_norm_is_launched_and_waits_for_nothing(pretended_gpu):
    cases = ran(run_pretended(pretended_gpu, "run_fused.py", capability=NEWEST))
    assert set(cases) == {"pcl, bn_splits 4", "simclr, bn_splits 1"}
    forward = {"partial_statistics", "merge_statistics", "normalise_rows"}
    for name, found in cases.items():
        assert "error" not in found, found["error"]
        assert found["norms"] > 0
        assert found["waits"] == [], name
        assert found["misfits"] == [], name
        assert forward | {"partial_sums", "merge_sums", "differentiate_rows"} <= set(found["launches"]), name


def test_a_run_trains_clusters_evaluates_and_saves(pretended_gpu, image_folder, tmp_path):
    """The whole command; its loss is 0, for Triton's kernels do nothing."""
    done = run_pretended(
        pretended_gpu,
        "run_training.py",
        *("demo", "--data", str(image_folder), "--output", str(tmp_path), "--data.loader", "torchvision"),
        *(*FLAGS, "--data.workers", "0", "--epochs", "2", "--deterministic"),
        capability=NEWEST,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deterministic" not in done.stderr  # no operation that has no such algorithm
    kinds = [row["kind"] for row in read_rows(tmp_path)]
    (checked,) = (row for row in read_rows(tmp_path) if row["kind"] == "kernels")
    assert (checked["checked"], checked["faults"]) == (["contrast", "assign", "segment", "normalise"], {})
    assert {"features", "clustering", "evaluation", "step", "epoch", "finished"} <= set(kinds)
    assert load_checkpoint(tmp_path)["epoch"] == 2


# --- breaks that only a GPU would notice --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(pretended_gpu) -> dict[str, Any]:
    return ran(run_pretended(pretended_gpu, "run_broken.py", capability=NEWEST))


def test_a_learner_that_is_not_broken_passes(broken):
    assert "error" not in broken["nothing"]
    found = broken["nothing"]
    assert (found["waits"], found["misfits"]) == ([], [])
    assert all(not faults for _, faults in found["updates"])


def test_a_flag_that_the_host_looks_at_is_noticed(broken):
    assert "cudaStreamSynchronize at" in broken["a flag is looked at"]["waits"][0]


def test_inputs_that_are_not_pinned_are_noticed(broken):
    assert "memory that is not pinned at" in broken["inputs are not pinned"]["waits"][0]


def test_an_index_that_stays_on_the_host_is_noticed(broken):
    assert "which are not on the GPU" in broken["the index stays on the host"]["error"]


def test_momentum_in_another_order_than_the_weights_is_noticed(broken):
    case = broken["momentum is not in the weights' order"]
    assert "error" in case or any(faults for _, faults in case["updates"])


def test_collectives_of_the_host_s_memory_are_noticed(broken):
    found = broken["keys are gathered by the host"]
    assert {device for _, tensors in found["misfits"] for _, _, device in tensors} == {"cpu"}


def test_types_that_nccl_does_not_take_are_noticed(broken):
    found = broken["keys are gathered as 16-bit integers"]
    assert {dtype for _, tensors in found["misfits"] for _, dtype, _ in tensors} == {"torch.int16"}


def test_an_autocast_that_is_forgotten_is_noticed(broken):
    assert re.search("RuntimeError: .*type", broken["autocast is forgotten"]["error"])


# --- the same collectives on all ranks ----------------------------------------------------------------------------


def collectives_of(world: World, name: str, parts: int) -> list[Collective]:
    """Of two epochs of two steps, with E-steps if the method has any. Shards differ in length."""
    config = tiny(name, optim__accumulate=parts)
    method = build(config, world, 41)
    learner = Learner(method, config, world)
    generator, width = torch.Generator().manual_seed(world.rank), method.features().width
    features = torch.nn.functional.normalize(torch.randn(20 + world.rank, width, generator=generator), dim=1)
    with Recorder() as recorder:
        for number in range(4):
            # Epochs of two steps; the first E-step of some comes before the first of all.
            if number % 2 == 0 and method.expects(number // 2):
                method.expect(None if method.features().from_bank else features, number // 2)
            learner.step(batch_for(method, seed=world.rank + 2 * number), number)
        learner.end_epoch()
    return recorder.collectives


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_all_ranks_call_the_same_collectives(name, parts):
    if parts > 1 and method_class(name).accumulation is None:
        pytest.skip("takes a step as a whole")
    one, other = run_ranks(2, collectives_of, name, parts)
    assert one
    assert one == other
