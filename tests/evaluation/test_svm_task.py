"""The command on small sets: VOC07 by both protocols, class folders, Places205, bad input, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from class_folders import write_images
from launches import evaluate as run
from ranks import run_ranks
from rich.console import Console
from test_command import ALONE, run_folder  # noqa: F401  a fixture
from voc_sets import write_voc

import pcl_fast.evaluation.tasks.svm
from pcl_fast.data.sources.voc import VOC_CLASSES
from pcl_fast.distributed import World
from pcl_fast.evaluation.continuation import Continuation
from pcl_fast.evaluation.tasks import Context, Outcome
from pcl_fast.evaluation.tasks.svm import Svm
from pcl_fast.pretrained import read_pretrained
from pcl_fast.run.signals import Stopped, StopSignals

HOW = ("--jobs", 1, "--workers", 0)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """Every image has two classes; the second's object is difficult on one image of three."""
    splits = {}
    for split, first in (("trainval", 0), ("test", 100)):
        splits[split] = {
            f"{first + number:06d}": [
                (VOC_CLASSES[number % 20], (3, 3, 22, 36), False),
                (VOC_CLASSES[(number * 7 + 3) % 20], (26, 5, 46, 30), number % 3 == 0),
            ]
            for number in range(60)
        }
    return write_voc(tmp_path_factory.mktemp("voc"), 2007, splits)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    for part in ("train", "val"):
        write_images(folder / part)
    return folder


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "svm.json").read_text())


def test_voc_by_the_official_protocol(devkit, run_folder, tmp_path, capsys):  # noqa: F811
    assert run("svm", run_folder, "--data", devkit, "--output", tmp_path, "--shots", 1, 2, "--draws", 2, *HOW) is None
    printed = capsys.readouterr().out
    assert "VOC07: 60 trainval and 60 test images, 20 classes" in printed
    assert "protocol pcl: the backbone's 64 features of centre crops of 20 px" in printed
    assert "C = 0.5; low-shot" in printed
    assert "not converged" not in printed
    found = result(tmp_path)
    assert found["checkpoint"]["encoder"] == "query"
    assert [row["name"] for row in found["scores"]] == ["mAP", "  deviation", "mAP, 11 points"]
    mean, deviation, _ = found["scores"]
    assert mean["full"] > mean["k = 1"] > 0
    assert deviation["full"] is None
    few = found["details"]["k = 2"]
    assert len(few["draws"]) == 2
    assert (np.mean(few["draws"]), np.std(few["draws"])) == pytest.approx((mean["k = 2"], deviation["k = 2"]))
    assert np.mean(list(found["details"]["full"]["classes"].values())) == pytest.approx(mean["full"])
    published = {row["name"]: row for row in found["paper"]}
    assert published["PCL v1"] == {"name": "PCL v1", "k = 1": 46.9, "k = 2": 56.4, "full": 82.3}
    assert published["supervised"]["full"] is None
    assert (tmp_path / "svm.png").read_bytes().startswith(b"\x89PNG")


def test_voc_by_the_fair_protocol(devkit, run_folder, tmp_path, capsys):  # noqa: F811
    """One cost is so large that liblinear does not converge."""
    options = ("--protocol", "fair", "--size", 28, "--resize", 32, "--costs", "0.1", "1e6", "--shots", 1, 2)
    assert run("svm", run_folder, "--data", devkit, "--output", tmp_path, *options, "--draws", 1, *HOW) is None
    printed = capsys.readouterr().out
    assert "protocol fair: the last block's maps, pooled to 2 x 2 (256 features)" in printed
    assert "C of 0.1 1e+06" in printed
    assert "SVMs had not converged after 2000 iterations" in printed
    found = result(tmp_path)
    assert found["scores"][1] == {"name": "  deviation", "k = 1": None, "k = 2": None, "full": None}
    assert set(found["details"]["full"]["costs"].values()) <= {0.1, 1e6}
    assert found["details"]["not converged"] > 0


def test_single_labels(folders, run_folder, tmp_path, capsys):  # noqa: F811
    options = ("--output", tmp_path, "--shots", 1, 16, "--draws", 2, *HOW)
    assert run("svm", run_folder, "--data", folders, *options) is None
    assert "53 training and 53 test images of 3 classes" in capsys.readouterr().out
    found = result(tmp_path)
    assert [row["name"] for row in found["scores"]] == ["top-1 accuracy", "  deviation"]
    assert found["scores"][0]["k = 16"] > 50
    assert found["paper"] == []


def test_of_places_only_what_is_drawn_is_encoded(folders, run_folder, tmp_path, monkeypatch):  # noqa: F811
    for part in ("train", "val"):
        lines = [f"{part}/class_{number % 3}/{number // 3:02d}.jpg {7 * (number % 3)}\n" for number in range(51)]
        (tmp_path / f"{part}_places205.csv").write_text("".join(lines))
        (tmp_path / part).symlink_to(folders / part)
    encoded = []
    encode = Context.encode
    monkeypatch.setattr(
        Context, "encode", lambda self, images, *rest: encoded.append(len(images)) or encode(self, images, *rest)
    )
    assert run("svm", run_folder, "--data", tmp_path, "--output", tmp_path, "--shots", 2, "--draws", 1, *HOW) is None
    assert encoded == [6, 51]
    assert {row["name"]: row["k = 2"] for row in result(tmp_path)["paper"]}["PCL v2"] == 17.5


def message(run_folder: Path, data: Path, output: Path, *options: str | int) -> str:  # noqa: F811
    return run("svm", run_folder, "--data", data, "--output", output, *HOW, *options)


def test_bad_input_is_refused_before_anything_is_encoded(devkit, folders, run_folder, tmp_path, monkeypatch):  # noqa: F811
    all_classes = [(name, (1, 1, 5, 5), False) for name in VOC_CLASSES]
    halves = {"without": {"1": all_classes[1:]}, "with": {"2": all_classes}}
    bare, untested = (
        write_voc(tmp_path / name, 2007, {"trainval": halves[name], "test": halves["without"]}, size=(8, 8))
        for name in ("without", "with")
    )
    monkeypatch.setattr(pcl_fast.evaluation.tasks.svm, "encode_maps", None)
    monkeypatch.setattr(Context, "encode", None)
    for data, options, text in (
        (devkit, ("--shots", 7), "class aeroplane has 5 trainval images that show it, and --shots 7 takes 7"),
        (
            devkit,
            ("--shots", 3, "--protocol", "fair"),
            "class aeroplane has 54 trainval images that do not, and --protocol fair with --shots 3 takes 57",
        ),
        (folders, ("--shots", 1, 18), "class class_2 has 17 training images, and --shots 18 takes 18"),
        (folders, ("--protocol", "fair"), "--protocol fair is for VOC07"),
        (folders, ("--costs", 1), "--costs is for VOC07"),
        (folders, ("--shots",), "--shots must name numbers of images"),
        (folders, ("--dataset", "voc07"), "holds no VOC2007"),
        (devkit, ("--dataset", "folders"), "train is missing"),
        (devkit, ("--shots", "--no-full"), "--shots names no number of images, and with --no-full"),
        (devkit, ("--shots", 0, 2), "--shots must be positive, got 0 2"),
        (untested, ("--shots", 1), "class aeroplane has 0 test images that show it, and an average precision takes 1"),
        (bare, ("--shots",), "class aeroplane has 0 trainval images that show it, and training on all of them takes 1"),
        (devkit, ("--jobs", 0), "--jobs must be positive, got 0"),
    ):
        assert text in message(run_folder, data, tmp_path, *options), options


def outcome(world: World, run_folder: Path, devkit: Path, output: Path, stop_after: int = -1) -> Outcome:  # noqa: F811
    """What the task finds; as if a signal came after so many turns."""
    task = Svm(
        checkpoint=run_folder, data=devkit, shots=(1,), draws=1, protocol="fair", costs=(0.5, 0.1), size=28, resize=32,
        workers=0, jobs=1,
    )  # fmt: skip
    signals, turns = StopSignals(), []
    continuation = Continuation(output / "svm.part.pt", task.settings(), signals, world)
    reached = continuation.reached

    def counted(step, state):
        turns.append(step)
        signals.asked = len(turns) == stop_after
        reached(step, state)

    continuation.reached = counted
    context = Context(world, read_pretrained(run_folder, "query"), None, output, continuation, Console(quiet=True))
    found = task.run(context)
    continuation.finish()
    return found.rows, found.details, len(turns)


def test_two_ranks_equal_one(run_folder, devkit, tmp_path):  # noqa: F811
    rows, details, turns = outcome(ALONE, run_folder, devkit, tmp_path)
    assert turns == 8  # 20 jobs of few images and 40 of all, 8 at a time
    for found, other, _ in run_ranks(2, outcome, run_folder, devkit, tmp_path):
        assert [row.scores for row in found] == [pytest.approx(row.scores, abs=0.1) for row in rows]
        assert other["full"]["costs"] == details["full"]["costs"]


def test_stopped_work_goes_on(run_folder, devkit, tmp_path):  # noqa: F811
    whole = outcome(ALONE, run_folder, devkit, tmp_path)
    with pytest.raises(Stopped):
        outcome(ALONE, run_folder, devkit, tmp_path, stop_after=5)
    rows, details, turns = outcome(ALONE, run_folder, devkit, tmp_path)
    assert (rows, details) == whole[:2]
    assert turns == 3
    assert not (tmp_path / "svm.part.pt").exists()
