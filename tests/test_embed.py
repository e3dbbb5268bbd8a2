"""The table of features and clusters, against the encoder and the prototypes."""

from __future__ import annotations

import csv
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from launches import run_here, train

from pcl_fast import embed as command
from pcl_fast.data import clustering_loader, find_images, normalise
from pcl_fast.distributed import World
from pcl_fast.pretrained import Pretrained, read_pretrained

run = functools.partial(run_here, command.main)
# Of a row's length. GPUs compute in half precision, in which rows are off by 0.007; other images' are 0.09 away.
TOLERANCE = 0.03 if torch.cuda.is_available() else 1e-5


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory) -> Path:
    """A run with 3 and 9 prototypes."""
    folder = tmp_path_factory.mktemp("run")
    train(image_folder, folder)
    return folder


@torch.no_grad()
def expected(run: Path, folder: Path) -> tuple[Pretrained, torch.Tensor, torch.Tensor]:
    """Return the encoder, features of its backbone and of its head at unit length, in full precision."""
    encoder = read_pretrained(run, "momentum")
    views = torch.cat(
        list(
            clustering_loader(
                find_images(folder), encoder.data, batch_size=500, world=World(0, 1, torch.device("cpu"), None)
            )
        )
    )
    backbone = encoder.backbone(normalise(views, torch.float32))
    return encoder, backbone, F.normalize(encoder.head(backbone), dim=1)


def assert_rows(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Every row is as it should be, up to rounding."""
    assert found.shape == wanted.shape
    assert ((found - wanted).norm(dim=1) <= TOLERANCE * wanted.norm(dim=1)).all()


def distances(unit: torch.Tensor, encoder: Pretrained) -> list[torch.Tensor]:
    """Return the distances to all prototypes of every set, of features as they were found."""
    return [torch.cdist(unit.double(), found.centroids.double()) for found in encoder.prototypes]


def test_numpy_s_file_and_its_table(trained, image_folder, tmp_path, capsys):
    file = tmp_path / "features.npy"
    assert run(trained, "--data", image_folder, "--output", file) is None
    encoder, _, unit = expected(trained, image_folder)
    found = np.load(file)
    assert found.dtype == np.float32
    assert_rows(torch.from_numpy(found), unit)
    images = find_images(image_folder)
    rows = list(csv.DictReader(file.with_suffix(".csv").open(newline="")))
    assert [row["path"] for row in rows] == list(images.keys())
    assert [row["label"] for row in rows] == [images.classes[label] for label in images.labels]
    for of_set in distances(torch.from_numpy(found), encoder):
        k = of_set.shape[1]
        cluster = torch.tensor([int(row[f"cluster_{k}"]) for row in rows])
        distance = torch.tensor([float(row[f"distance_{k}"]) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(distance, of_set.min(1).values, atol=1e-5, rtol=0)
        torch.testing.assert_close(of_set[torch.arange(len(rows)), cluster], of_set.min(1).values, atol=1e-6, rtol=0)
    assert f"written: {file}" in capsys.readouterr().out


def test_parquet_s_file_in_row_groups(trained, image_folder, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(command, "encoded_at_a_time", lambda device: 7)
    file = tmp_path / "table.parquet"
    assert run(trained, "--data", image_folder, "--output", file, "--features", "backbone") is None
    table = parquet.read_table(file)
    assert table.column_names == ["path", "label", "features", "cluster_3", "distance_3", "cluster_9", "distance_9"]
    encoder, backbone, _ = expected(trained, image_folder)
    found = torch.from_numpy(np.stack(table["features"].to_numpy()))
    assert_rows(found, backbone)
    with torch.no_grad():
        unit = F.normalize(encoder.head(found), dim=1)
    np.testing.assert_allclose(table["distance_9"], distances(unit, encoder)[1].min(1).values, atol=1e-5)
    assert table["path"].to_pylist() == list(find_images(image_folder).keys())
    assert parquet.ParquetFile(file).num_row_groups == -(-len(backbone) // 7)


def test_an_encoder_without_head_has_features_of_its_backbone(image_folder, tmp_path):
    weights, file = tmp_path / "r18.pth", tmp_path / "features.npy"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    line = [weights, "--data", image_folder, "--output", file, "--size", 32]
    assert "has no projection head; use --features backbone" in run(*line, "--features", "head")
    assert run(*line) is None
    assert np.load(file).shape == (len(find_images(image_folder)), 512)
    assert file.with_suffix(".csv").read_text().splitlines()[0] == "path,label"


def test_what_is_there_is_kept(trained, image_folder, tmp_path):
    file = tmp_path / "features.npy"
    file.with_suffix(".csv").write_text("mine")
    line = trained, "--data", image_folder, "--output", file
    assert run(*line) == (
        f"pcl_fast.embed: {tmp_path}/features.csv is there already; choose another --output, or overwrite it with "
        "--force"
    )
    assert not file.exists()
    assert run(*line, "--force") is None
    assert file.with_suffix(".csv").read_text() != "mine"


@pytest.mark.parametrize(
    ("output", "fault"),
    [("x.txt", "must end with .parquet or .npy"), ("none/x.npy", "there is no folder"), ("x.parquet", "pip install")],
)
def test_outputs_that_cannot_be_written_are_refused_first(output, fault, image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert fault in run(tmp_path / "no checkpoint", "--data", image_folder, "--output", tmp_path / output)


def test_an_output_among_the_images_is_refused(trained, image_folder):
    assert "lies inside" in run(trained, "--data", image_folder, "--output", image_folder / "x.npy")
    assert not (image_folder / "x.npy").exists()


def test_a_broken_image_leaves_nothing(trained, image_folder, tmp_path):
    broken = tmp_path / "images" / "a"
    broken.mkdir(parents=True)
    (broken / "x.jpg").write_bytes(next(image_folder.glob("*/*")).read_bytes()[:-400])
    assert "x.jpg" in run(trained, "--data", broken.parent, "--output", tmp_path / "x.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
