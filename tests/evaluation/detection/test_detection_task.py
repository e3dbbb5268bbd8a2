"""The task: its table, its protocol, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from coco_sets import write_coco
from detectors import shrunk, small_resnet
from launches import evaluate
from steps import small_config
from voc_sets import write_voc

import pcl_fast.evaluation.detection.training as training
import pcl_fast.evaluation.tasks.detection as module
from pcl_fast.config import Config, to_dict
from pcl_fast.evaluation.detection.model import build_detector
from pcl_fast.evaluation.detection.recipes import COCO, VOC_FROZEN, adapted
from pcl_fast.evaluation.tasks.detection import Detection
from pcl_fast.nn.encoder import Encoder
from pcl_fast.run.checkpoint import save_checkpoint

run = partial(evaluate, "detection")
SMALL = ("--min-size", 64, "--max-size", 96, "--workers", 0, "--batch-size", 2, "--lr", 2e-4, "--warmup", 2)


@pytest.fixture(autouse=True)
def _small(monkeypatch, one_thread):
    monkeypatch.setattr(module, "build_detector", lambda *args, **options: shrunk(build_detector(*args, **options)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run"), arch="resnet18")


def save(folder: Path, **model) -> Path:
    folder.mkdir(exist_ok=True)
    config: Config = small_config()
    config = replace(config, model=replace(config.model, **model))
    encoder = Encoder(config.model)
    if model == {"arch": "resnet18"}:
        encoder.backbone.load_state_dict(small_resnet().state_dict())
    save_checkpoint(folder, {"config": to_dict(config), "encoders": {"query": encoder.state_dict()}, "epoch": 3})
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    objects = [("cat", (4, 6, 24, 30), False), ("dog", (28, 10, 46, 36), False), ("cat", (1, 1, 4, 4), True)]
    folder = tmp_path_factory.mktemp("voc")
    for year in (2007, 2012):
        images = {f"{year}_{number:03d}": objects for number in range(2)}
        write_voc(folder, year, {"trainval": images, "test": images})
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


def test_voc(checkpoint, devkit, tmp_path, capsys):
    options = ("--output", tmp_path, "--epochs", 1, "--dataset", "voc07")
    assert run(checkpoint, "--data", devkit, *options, *SMALL) is None
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "trained on the 2 trainval images of VOC07 that have objects, without those that are marked difficult",
        "tested on VOC07's 2 test images",
        "with a feature pyramid on resnet18, frozen, its batch norm fixed",
        "batch 2, 1 epochs, learning rate 0.0002 after 2 steps of warm-up",
        "shorter side 64 px, longer side at most 96",
        "all 100 tensors of the frozen encoder are the checkpoint's after the training",
        "AP at an intersection over union of 0.5",
        "paper: PCL, VOC07, frozen",
    ):
        assert words in printed, words
    found = json.loads((tmp_path / "detection.json").read_text())
    assert [row["name"] for row in found["scores"]] == ["VOC07, frozen"]
    assert {row["name"]: row["mAP, 11 points"] for row in found["paper"]}["PCL, VOC07, frozen"] == 71.7
    assert found["details"]["envelope"]["cat"] >= 0
    assert found["details"]["envelope"]["sofa"] is None
    assert found["checkpoint"]["encoder"] == "query"
    assert (tmp_path / "detection.png").read_bytes().startswith(b"\x89PNG")


def test_voc_of_two_years_and_a_body_that_is_trained(checkpoint, devkit, tmp_path):
    options = ("--output", tmp_path, "--epochs", 1, "--body", "fine-tuned")
    assert run(checkpoint, "--data", devkit, *options, *SMALL) is None
    found = json.loads((tmp_path / "detection.json").read_text())
    assert [row["name"] for row in found["scores"]] == ["VOC07+12, fine-tuned"]
    assert "4 trainval images of VOC07+12" in found["protocol"][0]
    assert found["paper"] == []


def test_coco(checkpoint, coco, tmp_path):
    assert run(checkpoint, "--data", coco, "--output", tmp_path, "--epochs", 1, *SMALL) is None
    found = json.loads((tmp_path / "detection.json").read_text())
    (scores,) = found["scores"]
    assert scores.pop("name") == "COCO, fine-tuned"
    assert list(scores) == ["box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75"]
    assert all(0 <= score <= 100 for score in scores.values())
    assert found["paper"][0]["box AP"] == 41.0
    assert found["protocol"][0].endswith(
        "trained on the 4 images of train2017 that have objects; left out were crowds (1) and objects without an area "
        "(2); tested on the 5 images of val2017"
    )


def test_a_stopped_run_goes_on_with_the_same_command(checkpoint, devkit, tmp_path, monkeypatch, capsys):
    """A signal comes in the second of four steps. The table is that of a run that was left alone."""
    monkeypatch.setattr(training, "_LOOK_EVERY", 1)
    options = ("--data", devkit, "--dataset", "voc07", "--epochs", 4, *SMALL)
    assert run(checkpoint, *options, "--output", tmp_path / "alone") is None
    advance = training._Training.advance

    def signalling(self, *args):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "advance", signalling)
        assert run(checkpoint, *options, "--output", tmp_path / "stopped") is None
    assert "stopped by a signal, all is saved" in capsys.readouterr().out
    assert torch.load(tmp_path / "stopped" / "detection.part.pt", weights_only=True)["step"] == 2
    steps = []
    monkeypatch.setattr(
        training._Training, "advance", lambda self, *args: steps.append(self.step) or advance(self, *args)
    )
    assert run(checkpoint, *options, "--output", tmp_path / "stopped") is None
    assert steps == [2, 3]
    alone, stopped = (
        json.loads((tmp_path / name / "detection.json").read_text())["scores"] for name in ("alone", "stopped")
    )
    assert alone == stopped
    assert not (tmp_path / "stopped" / "detection.part.pt").exists()


def test_recipes_follow_what_is_given():
    assert adapted(VOC_FROZEN) == VOC_FROZEN
    assert adapted(VOC_FROZEN, batch_size=16).lr == pytest.approx(0.1)
    assert adapted(VOC_FROZEN, batch_size=16, lr=0.03).lr == 0.03
    assert adapted(COCO, epochs=13).milestones == (8, 11)
    assert adapted(COCO, epochs=13, milestones=(9,)).milestones == (9,)
    assert adapted(COCO, warmup=0, weight_decay=0.0).warmup == 0


def options_of(**changes) -> Detection:
    return Detection(checkpoint=Path("x"), data=Path("y"), **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "--epochs must be positive, got 0"),
        ({"batch_size": -2}, "--batch-size must be positive, got -2"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({"min_size": 0}, "--min-size must be positive"),
        ({"warmup": -1}, "--warmup must not be negative"),
        ({"weight_decay": float("nan")}, "--weight-decay must not be negative"),
        ({"milestones": (0, 5)}, "--milestones must be positive"),
    ],
)
def test_options_are_looked_at_first(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        options_of(**changes).check()


def test_what_is_refused(checkpoint, devkit, coco, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds neither VOC2007 nor COCO" in run(checkpoint, "--data", tmp_path / "empty")
    assert "holds no VOC2007" in run(checkpoint, "--data", coco, "--dataset", "voc07", "--output", tmp_path)
    assert "--min-size 700 is more than --max-size 650" in run(
        checkpoint, "--data", devkit, "--min-size", 700, "--max-size", 650, "--output", tmp_path
    )
    assert "--batch-size 99 is larger than the training set of 4 images" in run(
        checkpoint, "--data", devkit, *SMALL, "--batch-size", 99, "--output", tmp_path
    )
    small = save(tmp_path / "small", arch="resnet18", small_stem=True)
    assert "this one has the small stem" in run(small, "--data", devkit)


def test_obstacles(checkpoint, devkit, coco, tmp_path):
    assert Detection.obstacle(devkit, checkpoint) is None
    assert Detection.obstacle(coco, checkpoint) is None
    assert Detection.obstacle(coco, Path("somewhere/resnet50.pth")) is None
    (tmp_path / "empty").mkdir()
    assert "holds neither VOC2007 nor COCO" in Detection.obstacle(tmp_path / "empty", checkpoint)
    small = save(tmp_path / "small", arch="cifar_resnet8")
    for path in (small, small / "checkpoint.pt"):
        assert Detection.obstacle(devkit, path) == "the encoder is a small ResNet (cifar_resnet8)"
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    assert Detection.obstacle(devkit, tmp_path / "model.safetensors") is None
