"""The command: tables, files, which encoder, and errors in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from class_folders import write_images
from launches import evaluate as run
from ranks import run_ranks
from steps import small_config

from pcl_fast.config import DataConfig, to_dict
from pcl_fast.data import clustering_loader, find_images, normalise
from pcl_fast.distributed import World, all_gather_shards
from pcl_fast.evaluation.features import encode_set
from pcl_fast.evaluation.tasks.ami import Ami
from pcl_fast.evaluation.tasks.knn import Knn
from pcl_fast.methods import build
from pcl_fast.pretrained import read_pretrained
from pcl_fast.run.checkpoint import save_checkpoint

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for part in ("train", "val"):
        write_images(folder / part)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run's folder with what of a checkpoint an encoder needs; the two encoders differ."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config()
    method = build(config, ALONE, 60)
    encoders = {name: encoder.state_dict() for name, encoder in method.encoders().items()}
    encoders["momentum"] = {
        name: value * 1.5 if value.is_floating_point() else value for name, value in encoders["query"].items()
    }
    save_checkpoint(folder, {"config": to_dict(config), "encoders": encoders, "epoch": 3})
    return folder


def test_knn_leaves_a_table_a_file_and_a_picture(data, run_folder, tmp_path, capsys):
    assert run("knn", run_folder, "--data", data, "--output", tmp_path, "--k", 3, "--temperature", "0.1") is None
    printed = capsys.readouterr().out
    assert "knn scores the momentum encoder of" in printed
    assert "paper: PCL" in printed
    assert "54.5" in printed
    found = json.loads((tmp_path / "knn.json").read_text())
    assert [row["name"] for row in found["scores"]] == ["head (8-d), k 3, tau 0.1", "backbone (64-d), k 3, tau 0.1"]
    assert found["settings"]["k"] == [3]
    assert found["checkpoint"]["encoder"] == "momentum"
    assert found["checkpoint"]["epoch"] == 3
    assert len(found["checkpoint"]["sha256"]) == 64
    # The test images are the training images, and the first neighbour of each is itself.
    assert all(row["top-1, %"] > 40 for row in found["scores"])
    assert (tmp_path / "knn.png").read_bytes().startswith(b"\x89PNG")


def test_the_encoder_can_be_chosen(data, run_folder, tmp_path):
    for encoder in ("query", "momentum"):
        assert run("knn", run_folder, "--data", data, "--output", tmp_path / encoder, "--encoder", encoder) is None
    query, momentum = (json.loads((tmp_path / name / "knn.json").read_text()) for name in ("query", "momentum"))
    assert query["checkpoint"]["encoder"] == "query"
    assert query["scores"] != momentum["scores"]


def test_ami_takes_a_folder_of_classes(data, run_folder, tmp_path, capsys):
    assert run("ami", run_folder, "--data", data / "train", "--output", tmp_path, "--k", 3, 9) is None
    assert "paper: PCL, k = 25000" in capsys.readouterr().out
    found = json.loads((tmp_path / "ami.json").read_text())
    assert [row["name"] for row in found["scores"]] == ["head's 8-d, k = 3", "head's 8-d, k = 9"]
    assert run("ami", run_folder, "--data", data, "--output", tmp_path, "--k", 60) == (
        "pcl_fast.evaluate: cannot make 60 clusters of 53 images; use a smaller --k"
    )


def test_results_lie_beside_the_checkpoint(data, run_folder, tmp_path):
    copied = shutil.copytree(run_folder, tmp_path / "run")
    assert run("knn", copied / "checkpoint.pt", "--data", data) is None
    assert (copied / "evaluation" / "knn.json").exists()


def test_bad_input(data, run_folder, tmp_path):
    assert "nowhere holds no checkpoint" in run("knn", tmp_path / "nowhere", "--data", data)
    assert "train is missing; --data wants" in run("knn", run_folder, "--data", tmp_path)
    assert "--k must be positive numbers, got (0, 5)" in run("knn", run_folder, "--data", data, "--k", 0, 5)
    assert "nowhere is not a folder" in run("all", run_folder, "--data", tmp_path / "nowhere")
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "val" / "class_1" / "03.jpg").write_bytes(b"no image")
    assert "03.jpg: no known image format" in run("knn", run_folder, "--data", broken, "--output", tmp_path)


def test_results_among_the_images_are_refused(data, run_folder, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")
    for task, inside in (("knn", copied / "val" / "scores"), ("ami", copied / "train")):
        assert f"--output {inside} lies inside --data" in run(task, run_folder, "--data", copied, "--output", inside)
    assert sorted(copied.rglob("*")) == sorted(copied / path.relative_to(data) for path in data.rglob("*"))
    assert run("knn", run_folder, "--data", copied, "--output", copied) is None  # beside train and val, not in them


def test_a_task_is_done_once_at_a_time(data, run_folder, tmp_path, monkeypatch):
    """Others may write into the same folder meanwhile."""
    monkeypatch.setattr("pcl_fast.run.ownership._PATIENCE", 0.0)
    script = "import sys; from pathlib import Path; from pcl_fast.run.ownership import owned\n"
    script += "with owned(Path(sys.argv[1]), 'knn'): print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"mine\n"
        said = run("knn", run_folder, "--data", data, "--output", tmp_path)
        assert f"{tmp_path} is in use by process {other.pid}" in said
        assert run("ami", run_folder, "--data", data, "--output", tmp_path, "--k", 4) is None
        other.stdin.close()
    assert run("knn", run_folder, "--data", data, "--output", tmp_path) is None
    assert not list(tmp_path.glob("*owner.json"))


def test_all_says_what_it_leaves_out(run_folder, tmp_path):
    (tmp_path / "data").mkdir()
    text = run("all", run_folder, "--data", tmp_path / "data")
    assert "the data allow no task" in text
    assert "knn: " in text


def features(world: World, folder: Path, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    found = encode_set(read_pretrained(folder, "query"), find_images(data), DataConfig(size=12, resize=12), world)
    return all_gather_shards(found.backbone, world.group), all_gather_shards(found.head, world.group)


def test_features_are_the_encoder_s_on_any_number_of_ranks(run_folder, data):
    images = find_images(data / "train")
    method = build(small_config(), ALONE, 60)
    method.encoder.load_state_dict(torch.load(run_folder / "checkpoint.pt")["encoders"]["query"])
    encoder = method.encoder.eval()
    views = torch.cat(list(clustering_loader(images, DataConfig(size=12, resize=12), batch_size=53, world=ALONE)))
    with torch.no_grad():
        backbone = encoder.backbone(normalise(views, torch.float32))
        head = F.normalize(encoder.head(backbone), dim=1)
    for found in (features(ALONE, run_folder, data / "train"), *run_ranks(2, features, run_folder, data / "train")):
        torch.testing.assert_close(found[0], backbone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], head, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "wrong"), [(Knn, {"temperature": (0.0,)}), (Ami, {"redo": 0}), (Ami, {"k": (0,)})])
def test_options_are_looked_at_first(kind, wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f"--{name} must be positive"):
        kind(checkpoint=Path("x"), data=Path("y"), **wrong).check()


@pytest.mark.parametrize(
    ("size", "resize", "cropped"),
    [(None, None, (20, 20)), (20, None, (20, 20)), (96, None, (96, 110)), (None, 24, (20, 24)), (96, 100, (96, 100))],
)
def test_images_are_cropped_as_the_encoder_saw_them_or_in_proportion_to_another_size(run_folder, size, resize, cropped):
    task = Knn(checkpoint=run_folder, data=run_folder, size=size, resize=resize)
    reading = task.reading(read_pretrained(run_folder, "query"))
    assert (reading.size, reading.resize) == cropped
