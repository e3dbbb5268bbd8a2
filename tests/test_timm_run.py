"""A run with one of timm's networks, from training to another library."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from faults.tiny import tiny

from pcl_fast.config import DataConfig
from pcl_fast.data import find_images
from pcl_fast.distributed import World
from pcl_fast.errors import CheckpointError, UserError
from pcl_fast.evaluation.detection.model import check_backbone
from pcl_fast.evaluation.pooled_maps import encode_maps
from pcl_fast.evaluation.tasks import detection
from pcl_fast.export import export
from pcl_fast.pretrained import read_pretrained
from pcl_fast.train import run

timm = pytest.importorskip("timm", reason="timm is not installed")

ALONE = World(0, 1, torch.device("cpu"), None)


NETWORKS = [
    pytest.param("timm/resnet10t", marks=pytest.mark.slow),
    pytest.param("timm/convnext_atto", marks=pytest.mark.slow),
    "timm/vit_tiny_patch16_224",
]


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request, image_folder, tmp_path_factory):
    """(the network, the folder of a run with it): an epoch, and another with an E-step before it in a second call."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"model__arch": request.param, "model__head": "mlp", "data__size": 32, "data__resize": 32}
    changes |= {"cluster__ks": (3, 5), "cluster__warmup_epochs": 1, "optim__lr": 0.001}
    assert run(tiny(image_folder, folder, epochs=1, **changes), ALONE)
    again = tmp_path_factory.mktemp("runs") / "again"
    assert run(tiny(image_folder, again, epochs=2, resume_from=folder, **changes), ALONE)
    return request.param, again


def test_a_run_goes_on_and_is_evaluated_and_exported(trained, image_folder, tmp_path):
    arch, folder = trained
    found = read_pretrained(folder, "query")
    assert (found.arch, [len(each.centroids) for each in found.prototypes]) == (arch, [3, 5])
    for part in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / part).symlink_to(image_folder)
    command = [sys.executable, "-m", "pcl_fast.evaluate", "knn", str(folder), "--data", str(tmp_path / "data")]
    told = subprocess.run(
        [*command, "--output", str(tmp_path / "scores"), "--workers", "0"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    export(folder, to="timm", output=tmp_path / "timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(network(images), found.backbone(images))
    with pytest.raises(UserError, match=f"torchvision has no {arch}; --to timm and --to onnx write"):
        export(folder, to="torchvision", output=tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="ResNet"):  # of others' files these alone are read
        read_pretrained(tmp_path / "timm", "query")


def test_tasks_that_want_a_resnet_refuse_it(trained, image_folder, monkeypatch):
    arch, folder = trained
    monkeypatch.setattr(detection, "holds_voc", lambda *data: True)
    assert (
        detection.Detection.obstacle(image_folder, folder) == f"the encoder is none of torchvision's ResNets ({arch})"
    )
    encoder = read_pretrained(folder, "query")
    with pytest.raises(CheckpointError, match="detection wants a ResNet with torchvision's layers"):
        check_backbone(encoder.backbone)
    data = DataConfig(size=32, resize=32, workers=0)
    maps = (
        "that pools feature maps; this one has none" if "vit" in arch else r"feature maps of 7 x 7, and images of 32 px"
    )
    with pytest.raises(UserError, match=f"--protocol fair wants .*{maps}"):
        encode_maps(encoder, find_images(image_folder), data, ALONE)
