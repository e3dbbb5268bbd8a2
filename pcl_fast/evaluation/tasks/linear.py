"""Linear classification with a frozen encoder: Table 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from matplotlib.figure import Figure

from pcl_fast.augmentations import AUGMENTATIONS, View
from pcl_fast.command_line import Integers, Numbers
from pcl_fast.config import DataConfig, view_of
from pcl_fast.data import ImageSet, training_loader
from pcl_fast.distributed import shard_bounds
from pcl_fast.evaluation import paper
from pcl_fast.evaluation.classifiers import Accuracy, Classifiers, best
from pcl_fast.evaluation.crops import encode_views
from pcl_fast.evaluation.features import frozen_backbone
from pcl_fast.evaluation.heads import Setting
from pcl_fast.evaluation.held_out import hold_out, usual_share
from pcl_fast.evaluation.labelled import Labelled, holds_labelled
from pcl_fast.evaluation.linear import REFERENCE_BATCH, Recipe, Trained, train_heads
from pcl_fast.evaluation.logistic import ITERATIONS, WEIGHT_DECAYS, Bank, fit_chosen
from pcl_fast.evaluation.pictures import bars, sweep
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task
from pcl_fast.evaluation.unchanged import unchanged
from pcl_fast.nn.precision import encoder_dtype

_MIN_CROP_AREA = 0.08
_Augmentation = tyro.extras.literal_type_from_choices(AUGMENTATIONS)


@dataclass(frozen=True)
class _Protocol:
    """What a data set's linear classifiers are usually trained with, and the paper's scores."""

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    epochs: int
    milestones: tuple[int, ...]
    paper: dict[str, tuple[float]]


_PROTOCOLS = {
    "imagenet": _Protocol((5.0, 30.0), (0.0,), 100, (60, 80), paper.LINEAR_IMAGENET),
    "places205": _Protocol((0.01,), (1e-4,), 28, (7, 14, 21), paper.LINEAR_PLACES205),
}


class _Found(NamedTuple):
    """The outcome of a way to train: the winner (one classifier) and its name, one result for each of what was tried,
    and sentences.
    """

    classifier: Classifiers
    name: str
    tried: list[dict[str, Any]]
    protocol: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Linear(Task, name="linear", scores="query"):
    """Train linear classifiers on the frozen backbone (Table 3): the whole protocol, or in minutes with --fast.

    Several learning rates or weight decays cost little more than one: their classifiers are trained side by side, and
    the best on held-out training images is the one that the test images score.
    """

    protocol: Literal["imagenet", "places205"] = "imagenet"
    """What all flags below are unless they are given. imagenet: for any class folders, 100 epochs, a tenth of the
    learning rate from epochs 60 and 80 on, learning rates 5 (PCL's) and 30 (MoCo's), no weight decay. places205: 28
    epochs, drops at 7, 14 and 21, learning rate 0.01, weight decay 1e-4 (OpenSelfSup's)."""
    lr: Numbers = ()
    """Learning rates, for a batch of 256; another batch size scales them linearly. Exactly the paper's protocol, with
    nothing held out, is --lr 5."""
    weight_decay: Numbers = ()
    """Weight decays, each with every learning rate. With --fast those of logistic regression on standardised features,
    1e-6, 1e-5, ... 0.1 if none are given."""
    epochs: int | None = None
    """None: the protocol's."""
    milestones: Integers | None = None
    """Epochs from which on the learning rate is a tenth of what it was; None: the protocol's, or at the same shares of
    --epochs."""
    batch_size: int | None = None
    """Images per step over all ranks together; None: 256."""
    fast: bool = False
    """Compute the features once and fit logistic regression to them by L-BFGS, instead of training on new crops."""
    crops: int = 0
    """With --fast: fit so many random views of every image, instead of its centre crop."""
    views: _Augmentation | None = None
    """Augmentation of the training images. None: random crops of 0.08 to 1 of the image and flips; but the encoder's
    own where that never flips, as for handwriting."""
    held_out: float | None = None
    """Share of the training images on which the best of several is chosen; None: 10,000 images, but at most a tenth."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        return holds_labelled(data)

    @classmethod
    def among_all(cls, **given: Any) -> Task:
        return cls(**given, fast=True)

    def check(self) -> None:
        for rate in self.lr:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"--lr must be positive numbers, got {rate}")
        for decay in self.weight_decay:
            if not (math.isfinite(decay) and decay >= 0):
                raise ValueError(f"--weight-decay must be numbers that are not negative, got {decay}")
        for flag, value in {"--epochs": self.epochs, "--batch-size": self.batch_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be positive, got {value}")
        if self.milestones and min(self.milestones) < 1:
            raise ValueError(f"--milestones must be positive, got {self.milestones}")
        if self.crops < 0:
            raise ValueError(f"--crops must not be negative, got {self.crops}")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"--held-out is a share between 0 and 1, got {self.held_out}")
        if self.held_out is not None and self._only_one():
            raise ValueError("--held-out serves to choose among several classifiers, and here is a single one")
        self._check_ways()

    def _check_ways(self) -> None:
        """Refuse flags of the way to train that is not taken."""
        if self.crops and not self.fast:
            raise ValueError("--crops is for --fast; without it every epoch has new crops")
        of_sgd = {
            "--lr": self.lr or None,
            "--epochs": self.epochs,
            "--milestones": self.milestones,
            "--batch-size": self.batch_size,
            "--views": None if self.crops else self.views,
        }
        if self.fast and (given := [flag for flag, value in of_sgd.items() if value is not None]):
            raise ValueError(
                f"--fast fits features of {'random views' if self.crops else 'centre crops'} by L-BFGS and has no use "
                f"for {', '.join(given)}; leave that out, or --fast"
            )

    def run(self, context: Context) -> Outcome:
        labelled = context.labelled(self.data, self.format)
        data = self.reading(context.pretrained)
        held = self._hold_out(labelled.train_labels)
        found = (self._fit if self.fast else self._train)(context, labelled, data, held)
        test = _bank(context, labelled.test, labelled.test_labels, data, "test images")
        [accuracy] = found.classifier.accuracies(*test, context.world.group)
        rows = [Row(found.name, (100 * accuracy.top1, 100 * accuracy.top5))]
        theirs = [Row(name, (score, None)) for name, (score,) in _PROTOCOLS[self.protocol].paper.items()]
        protocol = (
            f"linear classification of {context.pretrained.width} pooled features, encoder frozen in eval mode, batch "
            f"norm folded, computing in {_name(encoder_dtype(context.device))}, classifiers in float32: "
            f"{labelled.describe()}",
            *found.protocol,
            *self._choice(found, held),
            f"test images: centre crops of {data.size} px (shorter side {data.resize}), scored once, by the winner",
            "no tensor of the encoder has changed",
        )
        columns = ("top-1, %", "top-5, %")
        draw = partial(_draw, columns=columns, rows=rows, tried=found.tried)
        return Outcome(protocol, columns, rows, theirs, draw, details={"classifiers": found.tried})

    # What is tried, and what is held out to choose among it.

    def _settings(self) -> tuple[Setting, ...]:
        usual = _PROTOCOLS[self.protocol]
        pairs = product(self.lr or usual.lr, self.weight_decay or usual.weight_decay)
        return tuple(dict.fromkeys(Setting(*pair) for pair in pairs))

    def _decays(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(self.weight_decay or WEIGHT_DECAYS))

    def _only_one(self) -> bool:
        return len(self._decays() if self.fast else self._settings()) == 1

    def _hold_out(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Return bool [n], what is held out of the training images; None if there is nothing to choose."""
        if self._only_one():
            return None
        return hold_out(labels, self.held_out or usual_share(len(labels)), self.seed)

    def _choice(self, found: _Found, held: torch.Tensor | None) -> list[str]:
        """Say how the winner was found."""
        if held is None:
            return ["a single classifier, trained on all training images; nothing was held out"]
        sentences = [
            f"{len(found.tried)} classifiers; the winner, {found.name}, is the best on {int(held.sum())} held-out "
            f"training images (of every class, drawn by --seed {self.seed})"
        ]
        if gone := [row["name"] for row in found.tried if row["held_out_top1"] is None]:
            sentences.append(f"{len(gone)} diverged and were left out of the choice: {'; '.join(gone)}")
        [winner] = [row for row in found.tried if row["name"] == found.name]
        for setting in ("lr", "weight_decay"):
            values = sorted({row[setting] for row in found.tried if setting in row})
            if len(values) > 2 and winner[setting] and winner[setting] in (values[0], values[-1]):
                sentences.append(
                    f"the winner is at an end of the values of {setting.replace('_', ' ')}; one beyond it may be better"
                )
        return sentences

    # The whole protocol.

    def _recipe(self) -> Recipe:
        usual = _PROTOCOLS[self.protocol]
        epochs = self.epochs or usual.epochs
        milestones = self.milestones
        if milestones is None:
            milestones = tuple(max(1, round(epochs * milestone / usual.epochs)) for milestone in usual.milestones)
        milestones = tuple(sorted({milestone for milestone in milestones if milestone < epochs}))
        return Recipe(self._settings(), epochs, milestones, self.batch_size or REFERENCE_BATCH, self.seed)

    def _train(self, context: Context, labelled: Labelled, data: DataConfig, held: torch.Tensor | None) -> _Found:
        recipe, images, labels = self._recipe(), labelled.train, labelled.train_labels
        if held is not None:
            images, labels = images.subset((~held).nonzero().view(-1).tolist()), labels[~held]
        trained = self._train_grid(context, recipe, images, labels, data)
        accuracies: Sequence[Accuracy | None] = [None] * len(recipe.settings)
        if held is not None:
            held_bank = self._held_bank(context, labelled, data, held)
            accuracies = trained.classifiers.accuracies(*held_bank, context.world.group)
        tried = [
            {"name": str(setting), **setting._asdict(), **_percent(found), "training_loss": _finite(loss)}
            for setting, found, loss in zip(recipe.settings, accuracies, trained.losses.tolist(), strict=True)
        ]
        winner = best(accuracies)
        sentences = self._say_recipe(recipe, context, data, len(images))
        return _Found(trained.classifiers.pick(winner), str(recipe.settings[winner]), tried, sentences)

    def _train_grid(
        self, context: Context, recipe: Recipe, images: ImageSet, labels: torch.Tensor, data: DataConfig
    ) -> Trained:
        world, pretrained = context.world, context.pretrained
        _check_batch(recipe.batch_size, len(images), world.size)
        loader = training_loader(
            images,
            data,
            views=(self._view(context, data),),
            batch_size=recipe.batch_size // world.size,
            seed=self.seed,
            world=world,
        )
        encode, steps = frozen_backbone(pretrained, context.device), recipe.epochs * loader.steps
        context.say(f"{len(recipe.settings)} classifiers learn from {len(images)} images in {steps} steps")

        def each_epoch(done: int, losses: Sequence[float]) -> None:
            # What has diverged has no number, and comes last.
            loss, setting = min(
                zip(losses, recipe.settings, strict=True), key=lambda found: (found[0] != found[0], found)
            )
            context.say(f"epoch {done} of {recipe.epochs}: the smallest training loss is {loss:.4f}, {setting}")

        with (
            unchanged(backbone=pretrained.backbone, head=pretrained.head, folded=encode.network),
            context.progress("training linear classifiers", steps) as progress,
            context.continuation.saving(),
        ):
            return train_heads(
                encode,
                loader,
                labels,
                recipe,
                width=pretrained.width,
                classes=int(labels.max()) + 1,
                world=world,
                continuation=context.continuation,
                progress=progress,
                each_epoch=each_epoch,
            )

    def _say_recipe(self, recipe: Recipe, context: Context, data: DataConfig, images: int) -> tuple[str, ...]:
        drops = (
            f"times 0.1 from epochs {', '.join(map(str, recipe.milestones))} on" if recipe.milestones else "constant"
        )
        sentences = [
            f"SGD with momentum 0.9, {recipe.epochs} epochs of {images} images, learning rates {drops}; batch "
            f"{recipe.batch_size}, an epoch's last incomplete one is dropped; first weights N(0, 0.01), bias 0",
            f"training views: {self._say_view(context, data)}",
        ]
        if recipe.batch_size != REFERENCE_BATCH:
            scale = recipe.batch_size / REFERENCE_BATCH
            sentences.append(
                f"learning rates are for a batch of {REFERENCE_BATCH}, so all were multiplied by {scale:g}"
            )
        return tuple(sentences)

    # --fast.

    def _fit(self, context: Context, labelled: Labelled, data: DataConfig, held: torch.Tensor | None) -> _Found:
        pretrained, decays = context.pretrained, self._decays()
        with unchanged(backbone=pretrained.backbone, head=pretrained.head):
            bank, positions = self._training_bank(context, labelled, data)
            rows = held_bank = None
            if held is not None:
                held_bank = self._held_bank(context, labelled, data, held)
                rows = ~held[positions].to(context.device)
        with context.progress("fitting", len(decays)) as progress:
            fitted = fit_chosen(
                bank, held_bank, len(labelled.classes), decays, rows=rows, group=context.world.group, progress=progress
            )
        accuracies = fitted.held_out or [None] * len(decays)
        tried = [
            {"name": _decay(decay), "weight_decay": decay, **_percent(found)}
            for decay, found in zip(decays, accuracies, strict=True)
        ]
        what = f"{self.crops} random views each: {self._say_view(context, data)}" if self.crops else "centre crops"
        protocol = [
            f"--fast: logistic regression by L-BFGS (at most {ITERATIONS} iterations) on standardised features of the "
            f"training images' {what}; this is not the paper's protocol",
        ]
        if held is not None:
            protocol.append("after the choice the winner was fitted to all training images, those held out included")
        return _Found(fitted.classifier, _decay(decays[fitted.winner]), tried, tuple(protocol))

    def _training_bank(self, context: Context, labelled: Labelled, data: DataConfig) -> tuple[Bank, torch.Tensor]:
        """Return (this rank's training features and labels; the images' positions, int64 on the CPU)."""
        images, labels, world = labelled.train, labelled.train_labels, context.world
        if not self.crops:
            bank = _bank(context, images, labels, data, "training images")
            return bank, torch.arange(*shard_bounds(len(images), world.rank, world.size))
        encode, view = frozen_backbone(context.pretrained, context.device), self._view(context, data)
        options = {"seed": self.seed, "world": world}
        with context.progress("encoding random views", len(images) // world.size) as progress:
            features, positions = encode_views(encode, images, data, view, self.crops, **options, progress=progress)
        return Bank(features, labels[positions].to(context.device)), positions

    # Images.

    def _held_bank(self, context: Context, labelled: Labelled, data: DataConfig, held: torch.Tensor) -> Bank:
        images = labelled.train.subset(held.nonzero().view(-1).tolist())
        return _bank(context, images, labelled.train_labels[held], data, "held-out images")

    def _view_name(self, context: Context) -> str:
        trained_on = context.pretrained.data
        if self.views is not None:
            return self.views
        return trained_on.views if trained_on and not AUGMENTATIONS[trained_on.views].flip_share else "crop"

    def _view(self, context: Context, data: DataConfig) -> View:
        return view_of(replace(data, views=self._view_name(context), min_crop_area=_MIN_CROP_AREA))

    def _say_view(self, context: Context, data: DataConfig) -> str:
        name = self._view_name(context)
        crops = "" if AUGMENTATIONS[name].distortion else f", crops of {_MIN_CROP_AREA} to 1 of the image"
        return f'{data.size} px by the augmentation "{name}"{crops}'


def _check_batch(batch: int, images: int, ranks: int) -> None:
    if batch % ranks:
        raise ValueError(f"--batch-size {batch} does not divide among {ranks} ranks; use a multiple of {ranks}")
    if batch > images:
        raise ValueError(f"--batch-size {batch} is larger than the {images} images to train on; make it smaller")


def _bank(context: Context, images: ImageSet, labels: torch.Tensor, data: DataConfig, what: str) -> Bank:
    """Return this rank's shard of the centre crops' features."""
    shard = slice(*shard_bounds(len(images), context.world.rank, context.world.size))
    return Bank(context.encode(images, data, what).backbone, labels[shard].to(context.device))


def _decay(decay: float) -> str:
    return f"L-BFGS, weight decay {decay:g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _percent(accuracy: Accuracy | None) -> dict[str, float | None]:
    top1, top5 = (None, None) if accuracy is None else (100 * accuracy.top1, 100 * accuracy.top5)
    return {"held_out_top1": top1, "held_out_top5": top5}


def _draw(figure: Figure, *, columns: Sequence[str], rows: Sequence[Row], tried: Sequence[dict[str, Any]]) -> None:
    """Draw the scores, and beside them how the choice depended on what was tried."""
    if len(tried) == 1:
        bars(figure, columns=columns, rows=rows, label="test images, %")
        return
    scores, choice = figure.subfigures(1, 2)
    bars(scores, columns=columns, rows=rows, label="test images, %")
    varied = ("lr", "weight_decay") if "lr" in tried[0] else ("weight_decay",)
    points = [(*(row[name] for name in varied), row["held_out_top1"]) for row in tried]
    sweep(choice, points, names=[name.replace("_", " ") for name in varied], label="top-1 on held-out images, %")
