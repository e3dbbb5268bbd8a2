"""Training detectors: what stays as it was, how it goes on, and several ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from coco_sets import rectangles, write_coco
from detectors import shrunk, small_detector, small_resnet
from ranks import run_ranks

import pcl_fast.evaluation.detection.training as training
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.sources.coco import read_coco
from pcl_fast.distributed import World
from pcl_fast.errors import NonFiniteError
from pcl_fast.evaluation.detection.data import Annotated, TrainingImages
from pcl_fast.evaluation.detection.detecting import detect
from pcl_fast.evaluation.detection.model import check_body
from pcl_fast.evaluation.detection.training import Recipe, drawn, train_detector

RESOURCES = Resources(0, 2, None, 0)
ALONE = {"world": World(0, 1, torch.device("cpu"), None), "resources": RESOURCES}
RECIPE = Recipe(epochs=2, milestones=(1,), batch_size=2, lr=2e-4, weight_decay=1e-4, warmup=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


def open_annotated(folder, *, masks: bool = False) -> Annotated:
    split = read_coco(folder, "train2017")
    labels = [labels + 1 for labels in split.labels]
    return Annotated(split.images, split.boxes, labels, split.masks if masks else None).with_objects()


def tensors(detector) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in detector.state_dict().items()}


def changed(before, after, prefix: str = "") -> set[str]:
    return {name for name in before if name.startswith(prefix) and not torch.equal(before[name], after[name])}


def test_a_frozen_body_stays_and_the_rest_learns(folder):
    backbone = small_resnet()
    detector = small_detector(backbone, masks=True)
    before = tensors(detector)
    train_detector(detector, open_annotated(folder, masks=True), RECIPE, seed=0, **ALONE)
    assert check_body(detector, backbone) == 100
    rest = {name for name in before if not name.startswith("backbone.body.")}
    assert changed(before, tensors(detector)) == rest
    (item, *_) = detect(detector, open_annotated(folder).images, **ALONE)
    assert len(item.masks) == len(item.boxes) == len(item.scores) == len(item.labels)


def test_fine_tuning_moves_convolutions_and_leaves_batch_norm(folder):
    detector = small_detector(small_resnet(), frozen=False)
    before = tensors(detector)
    recipe = replace(RECIPE, epochs=1)
    train_detector(detector, open_annotated(folder), recipe, seed=0, **ALONE)
    moved = changed(before, tensors(detector), "backbone.body.")
    assert moved == {name for name in before if name.startswith("backbone.body.") and before[name].dim() == 4}


class StopError(Exception):
    pass


def test_a_stopped_training_goes_on_bit_for_bit(folder, monkeypatch):
    """It stops within an epoch, with momentum, and its state goes through a file."""
    monkeypatch.setattr(training, "_LOOK_EVERY", 1)
    backbone, annotated = small_resnet(), open_annotated(folder)
    kept = {}

    def stopping(step, state):
        if step == 3:
            kept.update(state())
            raise StopError

    options = {"seed": 3, **ALONE}
    whole, half, other = (small_detector(backbone) for _ in range(3))
    steps = []
    train_detector(whole, annotated, RECIPE, reached=lambda step, state: steps.append(step), **options)
    with pytest.raises(StopError):
        train_detector(half, annotated, RECIPE, reached=stopping, **options)
    torch.manual_seed(99)
    state = train_detector(other, annotated, RECIPE, state=kept, **options)
    assert steps == [1, 2, 3, 4]
    assert changed(tensors(whole), tensors(other)) == set()
    assert changed(kept["detector"], tensors(other)) != set()
    # What is trained to the end is not trained any more.
    train_detector(other, annotated, RECIPE, state=state(), reached=stopping, **options)
    assert changed(tensors(whole), tensors(other)) == set()


def test_the_loss_is_not_finite(folder):
    """In the third step and in those after it, which are not at fault."""
    annotated, detector, recipe = open_annotated(folder), small_detector(small_resnet()), replace(RECIPE, batch_size=1)
    steps = itertools.count()

    def spoil(module, inputs, losses):
        return {name: loss * (math.nan if next(steps) >= 8 else 1) for name, loss in losses.items()}

    detector.register_forward_hook(spoil)
    order = [batch.index[0] for batch in TrainingImages(annotated, batch_size=1, seed=0, **ALONE).epoch(0)]
    with pytest.raises(NonFiniteError, match=rf"images \S*00{order[2]}.jpg; use a smaller --lr"):
        train_detector(detector, annotated, recipe, seed=0, **ALONE)


def spoiled_on_rank(world, folder):
    detector = small_detector(small_resnet())
    steps = itertools.count()

    def spoil(module, inputs, losses):
        factor = math.nan if world.rank == 1 and next(steps) == 0 else 1
        return {name: loss * factor for name, loss in losses.items()}

    detector.register_forward_hook(spoil)
    annotated = open_annotated(folder)
    mine = next(TrainingImages(annotated, batch_size=1, seed=0, world=world, resources=RESOURCES).epoch(0)).index[0]
    try:
        train_detector(detector, annotated, RECIPE, seed=0, world=world, resources=RESOURCES)
    except NonFiniteError as error:
        return annotated.images.name(mine), str(error)


def test_the_rank_whose_loss_is_not_finite_is_at_fault(folder):
    """The others' is not finite either, but a step later."""
    (innocent, told), (guilty, also_told) = run_ranks(2, spoiled_on_rank, folder)
    assert told == also_told
    assert guilty in told
    assert innocent not in told


def test_what_is_drawn_depends_on_the_seeds_alone():
    before = torch.get_rng_state()
    found = []
    for seeds in ((1, 2), (1, 3), (1, 2)):
        with drawn(torch.device("cpu"), *seeds):
            found.append(torch.rand(3).tolist())
    assert found[0] == found[2] != found[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_learning_rates():
    recipe = Recipe(epochs=6, milestones=(3, 5), batch_size=8, lr=0.05, weight_decay=0, warmup=2)
    rates = [recipe.rate(step, 3) for step in range(18)]
    assert rates[:9] == pytest.approx([0.025] + [0.05] * 8)
    assert rates[9:15] == pytest.approx([0.005] * 6)
    assert rates[15:] == pytest.approx([0.0005] * 3)
    assert replace(recipe, warmup=0).rate(0, 3) == 0.05
    # It ends with the first epoch.
    assert [replace(recipe, warmup=500).rate(step, 4) for step in range(5)] == pytest.approx(
        [0.0125, 0.025, 0.0375, 0.05, 0.05]
    )


@pytest.mark.parametrize(("batch", "sentence"), [(5, "larger than the training set of 4 images")])
def test_batches_that_do_not_fit(folder, batch, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_detector(None, open_annotated(folder), replace(RECIPE, batch_size=batch), seed=0, **ALONE)  # fmt: skip


def train_on_rank(world, folder, recipe, twins):
    backbone, annotated = small_resnet(), open_annotated(folder)
    detector = small_detector(backbone)
    if twins:
        annotated = twins_of(annotated)
        everywhere(detector)
    seen = []
    original = training._Recent.add

    def add(self, loss, batch):
        seen.extend(batch.index)
        original(self, loss, batch)

    training._Recent.add = add
    try:
        train_detector(detector, annotated, recipe, seed=0, world=world, resources=RESOURCES)
    finally:
        training._Recent.add = original
    found = detect(detector, annotated.images, world=world, resources=RESOURCES)
    rest = {name: tensor.numpy() for name, tensor in detector.state_dict().items() if "body" not in name}
    return seen, rest, [item.scores for item in found]


def twins_of(annotated: Annotated) -> Annotated:
    """Two images that are the same and mirror images of themselves, as far as mirroring goes: it is left out."""
    return Annotated(annotated.images.subset([0, 0]), [annotated.boxes[0]] * 2, [annotated.labels[0]] * 2)


def everywhere(detector) -> None:
    """Nothing is drawn: all anchors and proposals are learned from."""
    for sampler in (detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 10000, 0.5
    detector.rpn._pre_nms_top_n["training"] = detector.rpn._post_nms_top_n["training"] = 24


def test_ranks_share_the_images_and_have_the_same_weights(folder):
    (seen, weights, scores), (others, other_weights, other_scores) = run_ranks(
        2, train_on_rank, folder, replace(RECIPE, epochs=1), False
    )
    assert sorted(seen + others) == [0, 1, 2, 3]
    assert weights.keys() == other_weights.keys()
    assert all(np.array_equal(array, other_weights[name]) for name, array in weights.items())
    assert all(np.array_equal(a, b) for a, b in zip(scores, other_scores, strict=True))


def test_two_ranks_learn_what_one_does(folder):
    """With the same image twice. torchvision divides losses by the number of places that it draws in the whole batch,
    so with two different images a rank's own mean weighs them otherwise, if one has fewer places.
    """
    recipe = replace(RECIPE, epochs=1)
    begin = {name: tensor.numpy() for name, tensor in tensors(small_detector(small_resnet())).items()}
    found = run_ranks(2, train_on_rank, folder, recipe, True)
    _, expected, scores = train_on_rank(ALONE["world"], folder, recipe, True)
    for _, weights, theirs in found:
        for name, array in expected.items():
            # Of how far it has moved.
            moved = np.linalg.norm(array - begin[name])
            assert np.linalg.norm(weights[name] - array) < 1e-3 * moved, name
        for mine, other in zip(scores, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-3)


@pytest.mark.slow
def test_it_learns_to_find_what_it_has_seen(folder):
    annotated = open_annotated(folder)
    recipe = Recipe(epochs=60, milestones=(45,), batch_size=2, lr=0.001, weight_decay=1e-4, warmup=4)
    detector = shrunk(small_detector(small_resnet()), places=48)
    train_detector(detector, annotated, recipe, seed=0, **ALONE)
    for number, item in enumerate(detect(detector, annotated.images, **ALONE)):
        for box, label in rectangles(number):
            sure = item.boxes[(item.labels == label + 1) & (item.scores > 0.5)]
            assert any(math.dist(box, other) < 8 for other in sure.tolist())
