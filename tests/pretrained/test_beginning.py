"""Runs that begin with the weights of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from foreign import official, resnet, without_classifier
from ranks import run_ranks
from steps import small_config

from pcl_fast.config import PRESETS, Config, validate, with_settings
from pcl_fast.data import find_images
from pcl_fast.distributed import World
from pcl_fast.errors import CheckpointError
from pcl_fast.methods import Method, build
from pcl_fast.pretrained import read_pretrained
from pcl_fast.pretrained.beginning import begin_with
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.train import run
from pcl_fast.trainer import Trainer

# What foreign.py writes.
NETWORK = {"model.arch": "resnet18", "model.small_stem": False, "model.head": "linear", "model.dim": 16}


def recipe(**changes) -> Config:
    """MoCo with such networks and a queue of 64 keys; in names of changes a double underscore is a dot."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return with_settings(small_config(), NETWORK | {"model.queue_size": 64} | changed)


def begun(path: Path, alone: World, **changes) -> tuple[Method, list[str]]:
    config = recipe(**changes)
    method = build(config, alone, 20)
    return method, begin_with(path, method, config.model)[0]


def holds(encoder: torch.nn.Module, path: Path, name: str) -> bool:
    """Whether an encoder's tensors are those of a file, bit for bit."""
    found = read_pretrained(path, name)
    pairs = [(encoder.backbone, found.backbone), *([(encoder.head, found.head)] if found.head is not None else [])]
    return all(
        torch.equal(tensor, theirs.state_dict()[key])
        for ours, theirs in pairs
        for key, tensor in ours.state_dict().items()
    )


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_official_file_gives_both_encoders_and_the_queue(head, tmp_path, alone):
    path = official(resnet(1, mlp=head == "mlp"), resnet(2, mlp=head == "mlp"), tmp_path / "checkpoint.pth.tar")
    method, lines = begun(path, alone, model__head=head)
    assert holds(method.encoder, path, "query")
    assert holds(method.momentum_encoder, path, "momentum")
    assert not any(p.requires_grad for p in method.momentum_encoder.parameters())
    theirs = torch.load(path, weights_only=True)["state_dict"]["module.queue"]
    assert torch.equal(method.queue.keys, theirs.T)
    head = "linear, 512 -> 16" if head == "linear" else "MLP, 512 -> 512 -> 16"
    assert lines == [
        f"beginning with the weights of a checkpoint in the format of the official PCL and MoCo: {path}",
        f"  query encoder: the backbone, resnet18, and the projection head, {head}",
        f"  momentum encoder: the backbone, resnet18, and the projection head, {head}",
        "  queue: 64 keys",
        "  all else begins anew",
    ]


def test_the_queue_goes_on_where_it_was(tmp_path, alone):
    path = official(resnet(1), resnet(2), tmp_path / "checkpoint.pth.tar")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["module.queue_ptr"] = torch.tensor([48])
    torch.save(content, path)
    assert begun(path, alone)[0].queue.position == 48


def test_a_queue_of_another_size_is_new(tmp_path, alone):
    path = official(resnet(1), resnet(2), tmp_path / "checkpoint.pth.tar")
    method, lines = begun(path, alone, model__queue_size=50)
    assert torch.equal(method.queue.keys, build(recipe(model__queue_size=50), alone, 20).queue.keys)
    assert "  queue: new, because that of the file is 64 x 16 and this run's is 50 x 16" in lines


def test_a_backbone_alone_leaves_the_head_as_it_was_drawn(tmp_path, alone):
    path = tmp_path / "resnet18.pth"
    torch.save(without_classifier(resnet(3)), path)
    method, lines = begun(path, alone)
    drawn = build(recipe(), alone, 20)
    for encoder in (method.encoder, method.momentum_encoder):
        assert holds(encoder, path, "query")
        assert torch.equal(encoder.head.weight, drawn.encoder.head.weight)
    assert lines[1:4] == [
        "  query encoder: the backbone, resnet18, and a new projection head",
        "  momentum encoder: the backbone, resnet18, and a new projection head",
        "  queue: new, there is none in the file",
    ]


def test_a_method_without_momentum_encoder_takes_the_query_encoder(tmp_path, alone):
    path = official(resnet(1), resnet(2), tmp_path / "checkpoint.pth.tar")
    config = with_settings(PRESETS["simclr"][1], NETWORK)
    method = build(config, alone, 20)
    lines, _ = begin_with(path, method, config.model)
    assert holds(method.encoder, path, "query")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__arch": "resnet34"},
            "holds a resnet18, and this run trains a resnet34; train with --model.arch resnet18 --model.no-small-stem",
        ),
        ({"model__small_stem": True}, "trains a resnet18 with the stem for small images; "),
        (
            {"model__head": "mlp"},
            r"linear, 512 -> 16, and this run's is MLP, 512 -> 512 -> 16 \(missing: 0.weight .*--model.head",
        ),
        ({"model__dim": 8}, r"of another shape: weight \[16, 512\], not \[8, 512\].*pcl_fast.export"),
    ],
)
def test_other_networks_are_refused_by_name(changes, message, tmp_path, alone):
    path = official(resnet(1), resnet(2), tmp_path / "checkpoint.pth.tar")
    with pytest.raises(CheckpointError, match=message):
        begun(path, alone, **changes)


def test_it_is_not_a_way_to_go_on(tmp_path):
    with pytest.raises(ValueError, match=r"--init a begins a new run .* --resume-from b goes on .*; give one of them"):
        validate(replace(recipe(), init=Path("a"), resume_from=Path("b")))


def test_a_run_begins_with_another_and_then_goes_on_by_itself(image_folder, tmp_path, alone, capsys):
    """Bit for bit: at a learning rate of next to nothing the weights stay what they were."""
    settings = {"data.root": image_folder, "data.size": 16, "data.resize": 20, "data.loader": "torchvision"}
    settings |= {"data.workers": 0, "optim.batch_size": 24, "epochs": 1, "model.momentum": 1.0, "evaluation.every": 0}
    first = with_settings(small_config(output=tmp_path / "first"), settings)
    second = replace(first, output=tmp_path / "second", init=first.output, seed=5, optim=replace(first.optim, lr=1e-30))
    assert run(first, alone)
    assert run(second, alone)
    printed = capsys.readouterr().out
    assert "beginning with the weights of a run of pcl_fast with the preset demo" in printed
    assert "  queue: 12 keys" in printed
    before, after = (load_checkpoint(config.output)["encoders"] for config in (first, second))
    for name in before:
        for key, tensor in before[name].items():
            assert torch.equal(tensor, after[name][key]) or "running" in key or "tracked" in key, (name, key)
    assert run(second, alone)
    printed = capsys.readouterr().out
    assert f"--init {first.output} is not read again: the run goes on from its own checkpoint" in printed
    assert "is complete" in printed


def begin_on_ranks(world: World, data: Path, folder: Path) -> str:
    config = recipe(output=folder / "run", data__root=data, init=folder / f"{world.rank}.pth")
    try:
        Trainer(config, find_images(data), world)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_find_different_files_are_told(image_folder, tmp_path):
    for rank in range(2):
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / f"{rank}.pth")
    for message in run_ranks(2, begin_on_ranks, image_folder, tmp_path):
        assert "the ranks differ in the checkpoint whose weights they begin with" in message
