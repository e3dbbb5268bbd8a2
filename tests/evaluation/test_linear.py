"""Linear classification with a frozen encoder: against a slow version, on two ranks, stopped, and as a task."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from frozen import DATA, context, continuation, pretrained
from matplotlib.figure import Figure
from PIL import Image
from ranks import run_ranks
from torch import nn

import pcl_fast.evaluation.linear
import pcl_fast.evaluation.tasks.linear
from pcl_fast.augmentations import AUGMENTATIONS
from pcl_fast.data import find_images, training_loader
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.crops import encode_views
from pcl_fast.evaluation.features import frozen_backbone
from pcl_fast.evaluation.heads import Heads, Setting
from pcl_fast.evaluation.linear import Recipe, train_heads
from pcl_fast.evaluation.tasks.linear import Linear
from pcl_fast.run.signals import Stopped

VIEW = replace(AUGMENTATIONS["crop"], size=16)
# 53 images are 4 steps of 12.
RECIPE = Recipe((Setting(1.0, 0.0), Setting(4.0, 1e-3), Setting(16.0, 0.0)), 3, (1, 2), 12, seed=0)


def loader_of(folder, world, recipe=RECIPE):
    images = find_images(folder)
    batch = recipe.batch_size // world.size
    loader = training_loader(images, DATA, views=(VIEW,), batch_size=batch, seed=0, world=world)
    return loader, torch.tensor(images.labels)


def trained(world, folder, recipe=RECIPE, **options):
    loader, labels = loader_of(folder, world, recipe)
    encode = frozen_backbone(pretrained(), world.device)
    return train_heads(encode, loader, labels, recipe, width=64, classes=3, world=world, **options)


# Training.


@pytest.fixture(scope="module")
def whole(image_folder):
    return trained(World(0, 1, torch.device("cpu"), None), image_folder)


def test_training_is_that_of_a_slow_version(whole, image_folder, alone):
    loader, labels = loader_of(image_folder, alone)
    encode = frozen_backbone(pretrained(), alone.device)
    for number, setting in enumerate(RECIPE.settings):
        head = nn.Linear(64, 3)
        with torch.no_grad():
            first = Heads([setting], 64, 3, seed=0, device=alone.device).classifiers
            head.weight.copy_(first.weight[0])
            head.bias.copy_(first.bias[0])
        rate = setting.lr * 12 / 256
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, weight_decay=setting.weight_decay)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
        for epoch in range(RECIPE.epochs):
            losses = []
            for batch in loader.epoch(epoch):
                loss = F.cross_entropy(head(encode(batch.views[0])), labels[batch.index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            schedule.step()
        torch.testing.assert_close(whole.classifiers.weight[number], head.weight.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(whole.classifiers.bias[number], head.bias.detach(), rtol=1e-3, atol=1e-4)
        assert whole.losses[number].item() == pytest.approx(sum(losses) / 4, rel=1e-3)


def test_two_ranks_equal_one(whole, image_folder):
    one, other = run_ranks(2, trained, image_folder)
    for found in (one, other):
        torch.testing.assert_close(found.classifiers.weight, whole.classifiers.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.losses, whole.losses, rtol=1e-3, atol=1e-4)
    assert torch.equal(one.classifiers.weight, other.classifiers.weight)


def stop_and_go_on(world, folder, image_folder, at, going_on=False):
    """Train until `at` steps are done, or go on from there to the end."""
    pcl_fast.evaluation.linear.LOOK_EVERY = 1
    where = continuation(folder, world)

    def progress(done):
        where.signals.asked = done == at and not going_on and world.is_main

    try:
        return trained(world, image_folder, continuation=where, progress=progress)
    except Stopped:
        return None
    finally:
        pcl_fast.evaluation.linear.LOOK_EVERY = 50


@pytest.mark.parametrize("at", [5, 8, 12])
def test_what_was_stopped_goes_on_to_the_same_bits(at, whole, image_folder, tmp_path, alone):
    """In the middle of an epoch, at its end, and after the last step."""
    assert stop_and_go_on(alone, tmp_path, image_folder, at) is None
    found = stop_and_go_on(alone, tmp_path, image_folder, at, going_on=True)
    assert torch.equal(found.classifiers.weight, whole.classifiers.weight)
    assert torch.equal(found.classifiers.bias, whole.classifiers.bias)
    assert torch.equal(found.losses, whole.losses)


def test_two_ranks_go_on_with_what_one_has_begun(whole, image_folder, tmp_path, alone):
    assert stop_and_go_on(alone, tmp_path, image_folder, 5) is None
    for found in run_ranks(2, stop_and_go_on, tmp_path, image_folder, 5, True):
        torch.testing.assert_close(found.classifiers.weight, whole.classifiers.weight, rtol=1e-3, atol=1e-4)


def test_training_ends_when_every_head_has_diverged(image_folder, alone, monkeypatch):
    monkeypatch.setattr(pcl_fast.evaluation.linear, "LOOK_EVERY", 4)
    recipe = replace(RECIPE, settings=(Setting(1e38, 1.0), Setting(1e37, 1.0)), epochs=20, milestones=())
    with pytest.raises(ValueError, match=r"every linear head has diverged \(learning rates 1e\+37, 1e\+38\)"):
        trained(alone, image_folder, recipe, progress=lambda done: pytest.fail("it went on"))


# Random views.


def encoded(world, folder):
    encode = frozen_backbone(pretrained(), world.device)
    return encode_views(encode, find_images(folder), DATA, VIEW, 2, seed=0, world=world)


def test_views_of_every_image(image_folder, alone):
    """On two ranks they are the same; batches of 27 do not divide 53 images."""
    features, positions = encoded(alone, image_folder)
    assert torch.bincount(positions).tolist() == [2] * 53
    one, other = features[positions.argsort(stable=True)].view(53, 2, 64).unbind(1)
    assert not torch.equal(one, other)
    shards = run_ranks(2, encoded, image_folder)
    assert abs(len(shards[0][1]) - len(shards[1][1])) <= 2
    both, places = (torch.cat(parts) for parts in zip(*shards, strict=True))
    torch.testing.assert_close(both[places.argsort(stable=True)], features[positions.argsort(stable=True)])


# The task.


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """48 images of 3 classes, which have colours of their own but vary a lot."""
    root, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for label in range(3):
        (root / f"class_{label}").mkdir()
        for number in range(16):
            colour = 90 + 90 * np.eye(3)[label] + rng.normal(0, 15, 3)
            pixels = (colour + rng.normal(0, 30, (20, 20, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class_{label}" / f"{number:02d}.png")
    return root


@pytest.fixture
def labelled(coloured, tmp_path):
    """A folder with train and val, here the same images."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part in ("train", "val"):
        (folder / part).symlink_to(coloured)
    return folder


@pytest.fixture
def shuffled(labelled, coloured, tmp_path):
    """The same with test images of wrong classes."""
    folder = tmp_path / "shuffled"
    (folder / "val").mkdir(parents=True)
    (folder / "train").symlink_to(coloured)
    for number in range(3):
        (folder / "val" / f"class_{(number + 1) % 3}").symlink_to(coloured / f"class_{number}")
    return folder


def task(data, **options) -> Linear:
    usual = {"epochs": 2, "batch_size": 12} if not options.get("fast") else {}
    found = Linear(checkpoint=data, data=data, loader="torchvision", workers=0, **{**usual, **options})
    found.check()
    return found


WAYS = {
    "grid": {"epochs": 4, "lr": (1.0, 8.0, 1e38), "weight_decay": (0.0, 1.0), "held_out": 0.3},
    "fast": {"fast": True, "weight_decay": (1e-3, 1e-1, 1e1), "held_out": 0.3},
    "crops": {"fast": True, "crops": 2, "weight_decay": (1e-3, 1e-1, 1e1), "held_out": 0.3},
}


@pytest.mark.parametrize("way", WAYS)
def test_test_labels_choose_nothing(way, labelled, shuffled, tmp_path, alone):
    right, wrong = (task(data, **WAYS[way]).run(context(tmp_path, alone)) for data in (labelled, shuffled))
    assert right.rows[0].name == wrong.rows[0].name
    assert right.details == wrong.details
    assert right.rows[0].scores[0] > 60 > 40 > wrong.rows[0].scores[0]
    # The winner is one of the best on what is held out, 5 images of each class.
    tops = {row["name"]: row["held_out_top1"] for row in right.details["classifiers"]}
    assert tops[right.rows[0].name] == max(top for top in tops.values() if top is not None)
    assert "is the best on 15 held-out training images" in " ".join(right.protocol)
    json.dumps(right.details, allow_nan=False)
    right.draw(Figure())


def test_heads_that_diverge_are_named(labelled, tmp_path, alone):
    outcome = task(labelled, **WAYS["grid"]).run(context(tmp_path, alone))
    [sentence] = [line for line in outcome.protocol if "diverged" in line]
    assert sentence.startswith("1 diverged and were left out of the choice: lr 1e+38, weight decay 1")
    assert len([row for row in outcome.details["classifiers"] if row["held_out_top1"] is None]) == 1


def test_a_grid_does_not_learn_from_what_is_held_out(labelled, tmp_path, alone):
    outcome = task(labelled, **WAYS["grid"]).run(context(tmp_path, alone))
    assert "4 epochs of 33 images" in " ".join(outcome.protocol)


@pytest.mark.parametrize("crops", [0, 2])
def test_a_fit_does_not_learn_from_what_is_held_out(crops, labelled, tmp_path, alone, monkeypatch):
    seen, fit = [], pcl_fast.evaluation.tasks.linear.fit_chosen

    def seeing(bank, held, classes, decays, *, rows, **options):
        seen.append((bank, held, rows))
        return fit(bank, held, classes, decays, rows=rows, **options)

    monkeypatch.setattr(pcl_fast.evaluation.tasks.linear, "fit_chosen", seeing)
    task(labelled, fast=True, crops=crops, held_out=0.3).run(context(tmp_path, alone))
    [(bank, held, rows)] = seen
    views = max(1, crops)
    assert (len(held.labels), len(rows), int(rows.sum())) == (15, 48 * views, 33 * views)
    if not crops:
        torch.testing.assert_close(bank.features[~rows], held.features)
        assert torch.equal(bank.labels[~rows], held.labels)


def test_a_winner_at_an_end_is_said_to_be_there(labelled, tmp_path, alone):
    outcome = task(labelled, fast=True, weight_decay=(1e3, 1e4, 1e5), held_out=0.3).run(context(tmp_path, alone))
    assert "the winner is at an end of the values of weight decay; one beyond it may be better" in outcome.protocol


@pytest.mark.parametrize("way", [{"lr": (4.0,)}, {"fast": True, "weight_decay": (1e-2,)}])
def test_a_single_classifier_learns_from_everything(way, labelled, tmp_path, alone):
    outcome = task(labelled, **way).run(context(tmp_path, alone))
    text = " ".join(outcome.protocol)
    assert "nothing was held out" in text
    assert "2 epochs of 48 images" in text or "fast" in way
    assert outcome.rows[0].scores[1] == 100
    outcome.draw(Figure())


def scores(world, data, folder, options):
    outcome = task(data, **options).run(context(folder, world))
    return outcome.rows, outcome.details


@pytest.mark.parametrize("way", ["grid", "crops"])
def test_two_ranks_score_what_one_does(way, labelled, tmp_path, alone):
    rows, details = scores(alone, labelled, tmp_path, WAYS[way])
    for found, more in run_ranks(2, scores, labelled, tmp_path, WAYS[way]):
        assert [row.name for row in found] == [row.name for row in rows]
        assert found[0].scores == pytest.approx(rows[0].scores, abs=2)
        tops = [[row["held_out_top1"] for row in these["classifiers"]] for these in (more, details)]
        assert tops[0] == pytest.approx(tops[1], abs=7)


@pytest.mark.parametrize("victim", ["given", "folded"])
def test_an_encoder_that_changes_is_noticed(victim, labelled, tmp_path, alone, monkeypatch):
    given, train = pretrained(), pcl_fast.evaluation.tasks.linear.train_heads

    def spoiling(encode, *arguments, **options):
        network = given.backbone if victim == "given" else encode.network
        with torch.no_grad():
            next(network.parameters())[0] += 1e-3
        return train(encode, *arguments, **options)

    monkeypatch.setattr(pcl_fast.evaluation.tasks.linear, "train_heads", spoiling)
    with pytest.raises(RuntimeError, match=r"1 of .* tensors of the frozen encoder have changed: (backbone|folded)"):
        task(labelled, lr=(1.0,)).run(context(tmp_path, alone, given))


def test_statistics_that_change_are_noticed(labelled, tmp_path, alone, monkeypatch):
    given = pretrained()
    monkeypatch.setattr(given.backbone[1], "momentum", 0.5)
    encode = pcl_fast.evaluation.tasks.base.encode_set

    def spoiling(of, *arguments):
        of.backbone.train()(torch.randn(4, 3, 16, 16))
        of.backbone.eval()
        return encode(of, *arguments)

    monkeypatch.setattr(pcl_fast.evaluation.tasks.base, "encode_set", spoiling)
    with pytest.raises(RuntimeError, match="running_mean"):
        task(labelled, fast=True).run(context(tmp_path, alone, given))


def test_protocols():
    paper = task("x", epochs=None, batch_size=None)._recipe()
    assert paper == Recipe((Setting(5.0, 0.0), Setting(30.0, 0.0)), 100, (60, 80), 256, 0)
    assert [round(paper.factor(epoch), 6) for epoch in (0, 59, 60, 79, 80, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    places = task("x", protocol="places205", epochs=None, batch_size=None)._recipe()
    assert places == Recipe((Setting(0.01, 1e-4),), 28, (7, 14, 21), 256, 0)
    assert task("x", epochs=50)._recipe().milestones == (30, 40)
    assert task("x", epochs=1)._recipe().milestones == ()
    assert task("x", batch_size=1024)._recipe().factor(0) == 4
    assert task("x", milestones=(1,), lr=(1.0, 1.0))._recipe() == Recipe((Setting(1.0, 0.0),), 2, (1,), 12, 0)


def test_what_must_not_be_flipped_is_not(tmp_path, alone):
    def view(trained_on, **options):
        given = context(tmp_path, alone, pretrained(trained_on))
        one = task("x", **options)
        return one._view(given, one.reading(given.pretrained))

    assert view(DATA) == replace(AUGMENTATIONS["crop"], size=16, min_area=0.08)
    assert view(None).size == 224
    assert view(replace(DATA, views="digits")).flip_share == 0
    assert view(replace(DATA, views="digits"), views="v2").blur_share == 0.5


def test_a_batch_that_does_not_fit(labelled, tmp_path, alone):
    with pytest.raises(ValueError, match=r"--batch-size 64 is larger than the 48 images to train on"):
        task(labelled, lr=(1.0,), batch_size=64).run(context(tmp_path, alone))
    two = replace(alone, size=2)
    with pytest.raises(ValueError, match=r"--batch-size 13 does not divide among 2 ranks"):
        task(labelled, lr=(1.0,), batch_size=13).run(context(tmp_path, two))


def test_a_class_of_a_single_image(image_folder, tmp_path, alone):
    for part in ("train", "val"):
        for name in ("class_0", "class_1"):
            (tmp_path / part / name).mkdir(parents=True)
            first = sorted((image_folder / name).iterdir())
            for image in first if name == "class_0" else first[:1]:
                shutil.copy(image, tmp_path / part / name)
    with pytest.raises(ImageError, match=r"\(number 1\) have a single training image"):
        task(tmp_path, lr=(1.0, 2.0)).run(context(tmp_path, alone))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": (1.0, 0.0)}, "--lr must be positive numbers, got 0.0"),
        ({"lr": (float("nan"),)}, "--lr must be positive numbers, got nan"),
        ({"weight_decay": (-1e-4,)}, "--weight-decay must be numbers that are not negative, got -0.0001"),
        ({"epochs": 0}, "--epochs must be positive, got 0"),
        ({"batch_size": 0}, "--batch-size must be positive, got 0"),
        ({"milestones": (0, 3)}, r"--milestones must be positive, got \(0, 3\)"),
        ({"held_out": 1.0}, "--held-out is a share between 0 and 1, got 1.0"),
        ({"held_out": 0.1, "lr": (1.0,)}, "--held-out serves to choose among several classifiers"),
        ({"crops": 2}, "--crops is for --fast"),
        ({"fast": True, "crops": -1}, "--crops must not be negative, got -1"),
        ({"fast": True, "lr": (1.0,), "epochs": 3}, "has no use for --lr, --epochs; leave that out, or --fast"),
        ({"fast": True, "views": "v1"}, "has no use for --views"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        task("x", **options)
