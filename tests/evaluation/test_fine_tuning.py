"""Fine-tuning against a slow version, on two ranks, after an interruption, and on labels that mean nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from coloured import CLASSES, READING, write_labelled
from ranks import run_ranks
from torch import nn

import pcl_fast.evaluation.fine_tuning as fine_tuning
from pcl_fast.config import ModelConfig, view_of
from pcl_fast.data import find_images, training_loader
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError, NonFiniteError
from pcl_fast.evaluation.fine_tuning import Classifier, Recipe, fine_tune, top_accuracies
from pcl_fast.nn.encoder import Encoder

ALONE = World(0, 1, torch.device("cpu"), None)
VIEW = view_of(READING)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def few(folder, count: int = 38):
    """Images of all classes, and their labels."""
    images = find_images(folder / "train")
    images = images.subset(torch.linspace(0, len(images) - 1, count).long().tolist())
    return images, torch.tensor(images.labels)


def untrained(**options) -> nn.Module:
    torch.manual_seed(0)
    return Encoder(ModelConfig(arch="cifar_resnet8", **options)).backbone.eval()


def without_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def tuned(folder, recipe, *, backbone=None, world=ALONE, count=38, **options) -> Classifier:
    images, labels = few(folder, count)
    backbone = untrained() if backbone is None else backbone
    return fine_tune(
        backbone, 64, images, labels, CLASSES, recipe, data=READING, view=VIEW, world=world, seed=3, **options
    )


def slow(folder, recipe: Recipe) -> nn.Module:
    """Every step written out: the same batches, everything else by hand."""
    images, labels = few(folder)
    size = recipe.batch_size
    loader = training_loader(images, READING, views=[VIEW], batch_size=size, seed=3, world=ALONE)
    model = Classifier(untrained(), 64, CLASSES, seed=3).train()
    speeds = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for epoch in range(recipe.epochs):
        drops = len([milestone for milestone in recipe.milestones if milestone <= epoch])
        batches = list(loader.epoch(epoch))
        assert len(batches) == 38 // size
        for batch in batches:
            pixels = ((batch.views[0].float() / 255 - mean) / std).permute(0, 3, 1, 2)
            logits = model.backbone(pixels) @ model.linear.weight.T + model.linear.bias
            right = logits[torch.arange(size), labels[batch.index]]
            loss = (logits.exp().sum(1).log() - right).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for (name, value), gradient in zip(model.named_parameters(), gradients, strict=True):
                    lr = recipe.head_lr if name.startswith("linear") else recipe.encoder_lr
                    lr *= size / 256 * recipe.drop**drops
                    speeds[name] = recipe.momentum * speeds[name] + gradient + recipe.weight_decay * value
                    value -= lr * speeds[name]
    return model


def test_equals_the_slow_version(folder):
    recipe = Recipe(batch_size=12, epochs=3, milestones=(1, 2), encoder_lr=0.2, head_lr=4.0, weight_decay=0.01)
    found, expected = tuned(folder, recipe), slow(folder, recipe)
    assert not found.training
    begin = Classifier(untrained(), 64, CLASSES, seed=3).state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-6, rtol=1e-5)
        assert not torch.equal(value, begin[name]), name  # all of it was trained


def test_the_pretrained_backbone_stays_as_it_is(folder):
    backbone = untrained(bn_splits=4).requires_grad_(False)  # as a momentum encoder, split as for pre-training
    before = copy.deepcopy(backbone.state_dict())
    model = tuned(folder, Recipe(batch_size=5, epochs=1), backbone=backbone)  # of which there are no four equal parts
    assert not backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not torch.equal(model.backbone[0].weight, backbone[0].weight)


def test_a_new_classifier():
    one, other = (Classifier(untrained(), 64, 1000, seed=seed) for seed in (0, 1))
    assert one.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(one.linear.weight.mean().item()) < 1e-4
    assert not one.linear.bias.any()
    assert not torch.equal(one.linear.weight, other.linear.weight)


def test_a_batch_that_does_not_fit():
    recipe = Recipe(batch_size=256)
    assert [recipe.fitted_batch(*sizes) for sizes in ((1000, 1), (50, 1), (50, 4), (1000, 3))] == [256, 50, 48, 255]
    assert recipe.factor(0, 50) == pytest.approx(50 / 256)
    with pytest.raises(ImageError, match=r"batch of 7 images is too small .* at least 2 on each of 4 ranks"):
        recipe.fitted_batch(7, 4)


@pytest.mark.parametrize(("rate", "epochs", "step"), [(1e30, 6, 3), (float("nan"), 1, 1)])
def test_learning_rates_that_are_too_high(folder, rate, epochs, step):
    """The first case has a huge loss before the first that is no number; in the second the only update spoils the
    weights, and no loss shows it.
    """
    recipe = Recipe(batch_size=10, epochs=epochs, head_lr=rate)
    message = (
        rf"step {step} of fine-tuning, .* learning rates, 0\.01 of the encoder and .* of the classifier, too high\?"
    )
    with pytest.raises(NonFiniteError, match=message):
        tuned(folder, recipe, count=15)


# --- interruptions ------------------------------------------------------------------------------------------------

# Looks after 4 and 8 steps, both within an epoch of 3; the rate drops in between.
LONG = Recipe(batch_size=12, epochs=4, milestones=(2,), encoder_lr=0.2)


def with_states(folder, world, state=None):
    """The tuned weights, and the states at all looks as they would be read from a file."""
    states = []

    def keep(done, state):
        file = io.BytesIO()
        torch.save(state(), file)
        file.seek(0)
        states.append((done, torch.load(file, weights_only=True)))

    before, fine_tuning.LOOK_EVERY = fine_tuning.LOOK_EVERY, 4
    try:
        model = tuned(folder, LONG, world=world, state=state, reached=keep)
    finally:
        fine_tuning.LOOK_EVERY = before
    return model.state_dict(), states


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_interruption_changes_nothing(folder):
    whole, states = with_states(folder, ALONE)
    assert [done for done, _ in states] == [4, 8, 12]
    for number, (_, state) in enumerate(states):
        again, later = with_states(folder, ALONE, state)
        assert same(whole, again)
        assert [done for done, _ in later] == [4, 8, 12][number + 1 :]


def interrupted(world, folder):
    whole, states = with_states(folder, world)
    again, _ = with_states(folder, world, states[0][1])
    return whole, again, states[0][1]["model"]


def test_ranks_end_with_the_same_weights_and_statistics(folder):
    """Although they have seen other images; after an interruption too, when the main rank's state is what all have."""
    (first, first_again, state), (second, second_again, other_state) = run_ranks(2, interrupted, folder)
    assert same(first, second)
    assert same(state, other_state)
    assert same(first, first_again)
    assert same(second, second_again)
    # A rank's statistics are of its own images, so this is not what one rank makes of the whole batch.
    assert not same(first, with_states(folder, ALONE)[0])


# --- ranks --------------------------------------------------------------------------------------------------------

PLAIN = Recipe(batch_size=12, epochs=3, milestones=(1,), encoder_lr=0.5, head_lr=4.0)


def plain(world, folder):
    model = tuned(folder, PLAIN, backbone=without_batch_norm(), world=world)
    images = find_images(folder / "val")
    return model.state_dict(), top_accuracies(model, images, torch.tensor(images.labels), data=READING, world=world)


def test_two_ranks_equal_one(folder):
    """Without batch norm the mean of the ranks' gradients is the gradient of the whole batch."""
    whole, scores = plain(ALONE, folder)
    for found, its_scores in run_ranks(2, plain, folder):
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
        assert its_scores == pytest.approx(scores, abs=1.1)  # one image may be on the edge


# --- accuracies ---------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that are given, in the order of the images."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits, self.at = logits, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.at += len(images)
        return self.logits[self.at - len(images) : self.at]


@pytest.mark.parametrize("classes", [7, 3])
def test_accuracies_are_those_of_a_slow_count(folder, classes):
    images = find_images(folder / "val")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (len(images),), generator=generator)
    logits = torch.randn(len(images), classes, generator=generator)
    expected = []
    for k in (1, 2, 5):
        best = [sorted(range(classes), key=row.__getitem__, reverse=True)[:k] for row in logits.tolist()]
        expected.append(100 * sum(label in found for label, found in zip(labels.tolist(), best, strict=True)) / 100)
    told = []
    found = top_accuracies(
        Fixed(logits), images, labels, data=READING, world=ALONE, top=(1, 2, 5), progress=told.append
    )
    assert found == pytest.approx(expected)
    assert told == [64, 100]


def test_labels_that_mean_nothing_teach_nothing(folder):
    """Right labels are learned, and tested on other images; shuffled ones leave chance."""
    images, test = find_images(folder / "train"), find_images(folder / "val")
    labels, answers = torch.tensor(images.labels), torch.tensor(test.labels)
    recipe = Recipe(batch_size=20, epochs=4, milestones=(3,), encoder_lr=0.2, head_lr=2.0)

    def accuracy(taught: torch.Tensor) -> float:
        model = fine_tune(untrained(), 64, images, taught, CLASSES, recipe, data=READING, view=VIEW, world=ALONE)
        return top_accuracies(model, test, answers, data=READING, world=ALONE, top=(1,))[0]

    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert accuracy(labels) > 70
    assert accuracy(shuffled) < 35  # of 10 expected: images of a colour are classified alike
