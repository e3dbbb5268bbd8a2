"""The planner: published times that it was not fitted to, measured steps, and the command line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from measured_steps import measured_steps
from PIL import Image

from pcl_fast import plan
from pcl_fast.planning.figures import DEFAULT, KINDS, Records
from pcl_fast.planning.job import ENCODER, FEATURES, PHASES
from pcl_fast.planning.machines import MACHINES
from pcl_fast.planning.rates import machine

RECORDS = Records(DEFAULT)
STEPS = list(measured_steps(RECORDS))


def options(preset: str, **changes) -> plan.Options:
    return replace(plan.CHOICES[preset][1], **changes)


def hours(preset: str, **changes) -> tuple[float, float]:
    """(ours, official)."""
    found = plan.plan(options(preset, **changes))
    return plan.hours(found.ours), plan.hours(found.official)


# --- what was published, and is no input ----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["moco_v1", "moco_v2"])
def test_moco_takes_53_hours_on_8_v100(preset):
    """facebookresearch/moco's README: 200 epochs, both recipes alike."""
    assert hours(preset, gpu="v100", gpus=8)[1] == pytest.approx(53, rel=0.15)


@pytest.mark.parametrize("preset", ["pcl_v1", "pcl_v2"])
@pytest.mark.parametrize("cores", [20, 32])
def test_pcl_takes_5_to_7_days_on_4_v100(preset, cores):
    """5 days: the paper; a week: its author in salesforce/PCL issue 2. How many cores they had is not known."""
    assert 5 * 24 <= hours(preset, gpu="v100", gpus=4, cores=cores)[1] <= 7 * 24


def test_training_rates_that_are_no_input():
    v100 = machine("v100", RECORDS)
    # sandeepkumar-skb/pytorch_experiments, torchvision's ResNet-50, batch 128: 110.93 ms mixed, channels last; 342.37
    # ms float32, channels first.
    half = v100.half.training(1).value * v100.half.share(128, 256).value
    assert half == pytest.approx(128 / 0.11093, rel=0.05)
    assert v100.single.training(1).value == pytest.approx(128 / 0.34237, rel=0.05)
    # Four GPUs by one: NVIDIA's MXNet 3.89 mixed, Oneflow-Inc/DLPerf 3.95 float32.
    for precision, scaling in ((v100.half, 3.89), (v100.single, 3.95)):
        one, four = (precision.training(gpus).value for gpus in (1, 4))
        assert 4 * four / one == pytest.approx(scaling, rel=0.05)


# --- what was measured ----------------------------------------------------------------------------------------------


def test_there_are_measured_steps():
    assert len(STEPS) >= 2


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_measured_steps(step):
    assert abs(step.error) < 0.1


# --- the model's directions -----------------------------------------------------------------------------------------


def test_more_of_anything_takes_no_longer():
    four = hours("pcl_v2", gpu="v100", gpus=4, cores=64)
    assert hours("pcl_v2", gpu="v100", gpus=8, cores=64) < four
    assert hours("pcl_v2", gpu="a100", gpus=4, cores=64) < four
    assert hours("pcl_v2", gpu="v100", gpus=4, cores=8)[0] > 1.5 * four[0]
    assert hours("pcl_v2", gpu="v100", gpus=4, cores=64, epochs=100)[0] < 0.5 * four[0]
    assert hours("moco_v2", gpu="v100", gpus=4, cores=64) < four


def test_slow_links_show():
    fast = hours("moco_v2", gpus=4, nodes=2, cores=64)
    slow = hours("moco_v2", gpus=4, nodes=2, cores=64, node_link=0.5)
    slow_within = hours("moco_v2", gpus=4, nodes=2, cores=64, gpu_link=0.5)
    assert slow[0] > 1.2 * fast[0]
    assert slow_within[0] > 1.2 * fast[0]
    assert slow[1] > fast[1]


def test_a_cache_of_the_clustering_view_is_as_fast_as_it_was_said_to_be():
    plain, slow, fast = (plan.plan(options("pcl_v2", cache=rate)).ours[FEATURES] for rate in (None, 0.5, 2))
    assert fast.seconds < slow.seconds < plain.seconds
    assert "assumed: --cache" in [constant.source for constant in fast.constants]
    assert "assumed: --cache" not in [constant.source for constant in plain.constants]


def test_blame():
    found = plan.plan(options("pcl_v2"))
    text = plan.blame(found.ours, 10)
    named = re.findall(r"(\w[\w, ]*?) ([\d.]+) h \((\d+)%\)", text.partition("To blame: ")[2])
    assert named[0][0] == "encoder"
    assert sum(int(share) for _, _, share in named) > 80
    assert plan.blame(found.ours, 1000) == "Within the goal of 1000 h."


# --- the command ----------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()


def test_presets_of_methods_without_a_model_of_their_costs_are_not_offered():
    assert set(plan.CHOICES) == {"pcl_v1", "pcl_v2", "pcl_v2_fast", "moco_v1", "moco_v2"}


@pytest.mark.parametrize("gpu", MACHINES)
@pytest.mark.parametrize("preset", plan.CHOICES)
def test_every_line_says_where_its_numbers_come_from(preset, gpu):
    found = plan.plan(options(preset, gpu=gpu, gpus=8))
    for phases in (found.ours, found.projected, found.official):
        assert tuple(phases) == PHASES
        for phase in phases.values():
            assert phase.seconds >= 0
            assert phase.constants or not phase.seconds
            assert all(constant.kind in KINDS for constant in phase.constants)


def test_command(monkeypatch, tmp_path, capsys):
    picture = tmp_path / "plan.png"
    run(monkeypatch, "pcl_v2", "--gpus", "4", "--gpu", "v100", "--price", "2", "--output", str(picture))
    said = capsys.readouterr().out
    found = plan.plan(options("pcl_v2", gpus=4, gpu="v100"))
    for phases in (found.ours, found.official):
        assert f"{plan.hours(phases):.2f}" in said
        assert f"{plan.hours(phases) * 4 * 2:,.0f}" in said
    for phase in PHASES:
        assert phase in said
    assert "Over the goal of 24 h" in said
    assert "measured: bench/results/amd-epyc-cpu-2-threads/loss.json" in said
    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > len(PHASES)


def test_the_picture_stacks_the_phases_of_either_way(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    run(monkeypatch, "pcl_v2", "--output", str(tmp_path / "plan.png"))
    found = plan.plan(options("pcl_v2"))
    pieces = [bar.patches for bar in drawn[0].axes[0].containers]
    for row, phases in enumerate((found.official, found.ours)):
        hours = [phase.hours for phase in phases.values()]
        assert [piece[row].get_width() for piece in pieces] == pytest.approx(hours)
        assert [piece[row].get_x() for piece in pieces] == pytest.approx([sum(hours[:n]) for n in range(len(hours))])


def test_flags_change_the_recipe(monkeypatch, tmp_path, capsys):
    flags = "--epochs 10 --batch-size 64 --ks 100 200 --images 100000 --gpus 1 --gpu h200 --cores 3"
    run(monkeypatch, "pcl_v2", *flags.split(), "--output", str(tmp_path / "plan.png"))
    said = capsys.readouterr().out
    assert "10 epochs of 100,000 images on 1 H200" in said
    assert "3 cores, 64 images per GPU" in said
    assert "does not run on one GPU" in said


def test_a_step_in_parts_is_said(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "moco_v2", "--batch-size", "4096", "--accumulate", "8", "--output", str(tmp_path / "plan.png"))
    said = capsys.readouterr().out
    assert "1024 images per GPU and step in 8 parts" in " ".join(said.split())
    assert "official code takes a step as a whole" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu b300", "--gpu b300: nothing is known of it; choose from v100"),
        ("--gpus 0", "--gpus must be positive, got 0"),
        ("--gpus 3", "--batch-size 256 does not divide among 3 GPUs; use a multiple of 3"),
        ("--cores 0", "--cores must be positive"),
        ("--accumulate 0", "--accumulate must be positive, got 0"),
        ("--accumulate 7", "--accumulate 7 does not divide a GPU's 64 images; use a divisor of it"),
        ("--images 100", "--batch-size 256 is larger than the data set, --images 100"),
        ("--images 9000", "--ks: cannot make 100000 clusters of 9000 images"),
        ("--ks 10 0", "--ks must be positive"),
        ("--epochs -1", "--epochs must be positive, got -1"),
        ("--price -3", "--price must be positive, got -3"),
        ("--gpu-link 0", "--gpu-link must be positive, got 0"),
        ("--price inf", "--price must be finite, got inf"),
        ("--goal nan", "--goal must be positive, got nan"),
        ("--cache 0", "--cache must be positive, got 0"),
        ("--results /nowhere", "--results /nowhere is no folder"),
        ("--output /nowhere/plan.png", "cannot write /nowhere/plan.png: No such file or directory"),
        ("--output /nowhere.xyz", "Format 'xyz' is not supported"),
    ],
)
def test_errors_for_people(monkeypatch, tmp_path, flags, message):
    output = () if "--output" in flags else ("--output", str(tmp_path / "plan.png"))
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(monkeypatch, "pcl_v2", *flags.split(), *output)


def test_an_empty_folder_of_records(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r'no record in .* "sampling alone", official.*make bench'):
        run(monkeypatch, "pcl_v2", "--results", str(tmp_path))


def test_a_gpu_with_records_is_planned_by_them(tmp_path):
    """A100: a step of 64 images at 4000 images/s, by fused batch norm in a graph at 5000, which several GPUs do not
    take; a forward pass at 20,000.
    """
    shutil.copytree(DEFAULT, tmp_path, dirs_exist_ok=True)
    own = tmp_path / "nvidia-a100"
    own.mkdir()
    rates = {"encoder-only": 4000.0, "encoder-only, triton+graph": 5000.0, "encoder-only, triton": 3000.0}
    providers = {name: {"images_per_s": rate} for name, rate in rates.items()}
    cases = {"resnet50, 224 px, batch 64, loader off": {"providers": providers}}
    (own / "step.json").write_text(json.dumps({"machine": "NVIDIA A100", "cases": cases}))
    cases = {"resnet50, 224 px, 256 images": {"providers": {"fused": {"images_per_s": 20_000.0}}}}
    (own / "features.json").write_text(json.dumps({"machine": "NVIDIA A100", "cases": cases}))
    given = {"gpu": "a100", "epochs": 1, "cores": 1000, "results": tmp_path}
    found = plan.plan(options("moco_v1", gpus=1, batch_size=64, **given))
    encoder = found.ours[ENCODER]
    assert encoder.seconds == pytest.approx(1281167 // 64 * 64 / 5000, rel=0.01)
    assert [constant.kind for constant in encoder.constants] == ["measured"]
    assert encoder.constants[0].source == f"measured: {own / 'step.json'}"
    assert found.ours[FEATURES].seconds == pytest.approx(2 * 1281167 / 20_000, rel=0.01)
    assert found.projected[ENCODER].seconds == encoder.seconds  # it is fused already
    two = plan.plan(options("moco_v1", gpus=2, batch_size=128, **given))
    one = 1281167 // 128 * 64 / 4000
    assert one < two.ours[ENCODER].seconds < 1.1 * one
    assert two.projected[ENCODER].seconds < two.ours[ENCODER].seconds
