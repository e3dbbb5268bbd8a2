"""Accuracy after fine-tuning on a part of the labels: Table 2."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from pcl_fast.augmentations import AUGMENTATIONS
from pcl_fast.command_line import Integers, Numbers
from pcl_fast.config import DataConfig, view_of
from pcl_fast.data import ImageSet
from pcl_fast.distributed import all_or_none, check_same
from pcl_fast.evaluation import paper
from pcl_fast.evaluation.fine_tuning import Classifier, Recipe, fine_tune, top_accuracies
from pcl_fast.evaluation.label_lists import draw_balanced, listed_images
from pcl_fast.evaluation.labelled import Labelled, holds_labelled
from pcl_fast.evaluation.pictures import bars
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task

# The shares whose top-5 accuracies the paper reports, in its order.
_PAPER = (0.01, 0.1)
# The classifier's learning rate follows from the share: that of 1% up to the geometric middle of 1% and 10%.
_FEW, _LR_OF_FEW, _LR_OF_MORE = 0.03, 1.0, 0.1


@dataclass(frozen=True)
class _Part:
    """A part of the training images, which is fine-tuned on.

    title: of its columns; share: of all training images, as it was asked for; origin: how it came about, in words.
    batch_size: images per step over all ranks.
    """

    title: str
    share: float
    origin: str
    images: ImageSet
    labels: torch.Tensor
    recipe: Recipe
    batch_size: int

    @property
    def steps(self) -> int:
        """The number of all steps."""
        return self.recipe.epochs * (len(self.images) // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Semi(Task, name="semi", scores="query"):
    """Fine-tune the whole encoder on 1% and on 10% of the labels, and classify the test images (Table 2).

    The recipe's values are recalled: they have not been checked against the paper's.
    """

    share: Numbers = _PAPER
    """Shares of the training images whose labels are used, a run for each: as many images of every class, drawn by
    the seed, at least one."""
    lists: Annotated[tuple[Path, ...], tyro.conf.arg(name="list", metavar="FILE ...")] = ()
    """Files with the names of those images instead, one a line, a run for each: SimCLR's 1percent.txt and
    10percent.txt for ImageNet. With them --share means nothing."""
    epochs: int = 20
    """Passes over these images (recalled)."""
    batch_size: int = 256
    """Images per step over all ranks (recalled); all images, if there are fewer."""
    encoder_lr: float = 0.01
    """The encoder's learning rate for a batch of 256, scaled linearly for another (recalled)."""
    head_lr: Numbers = ()
    """The classifier's, likewise: one for all runs, or one for each. Empty: 1 with up to 3% of the labels, 0.1 with
    more (recalled)."""
    milestones: Integers = (12, 16)
    """Epochs, from 0, at which the learning rates drop (recalled)."""
    drop: float = 0.2
    """The factor by which they drop (recalled)."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Of all parameters (recalled)."""
    views: tyro.extras.literal_type_from_choices(AUGMENTATIONS) = "crop"  # type: ignore[valid-type]
    """Augmentation of the training images; crop: random resized crop and flip. Digits must not be flipped: take
    digits."""
    min_crop_area: float = 0.08
    """Random resized crops cover at least this share of the image."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        return holds_labelled(data)

    def check(self) -> None:
        positive = {
            "--epochs": self.epochs, "--batch-size": self.batch_size, "--encoder-lr": self.encoder_lr,
            "--head-lr": min(self.head_lr, default=1.0),
        }  # fmt: skip
        for flag, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{flag} must be positive, got {value}")
        for flag, value in {"--drop": self.drop, "--min-crop-area": self.min_crop_area}.items():
            if not 0 < value <= 1:
                raise ValueError(f"{flag} must be in (0, 1], got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay must not be negative, got {self.weight_decay}")
        self._check_parts()

    def _check_parts(self) -> None:
        if not self.lists and not (self.share and min(self.share) > 0 and max(self.share) <= 1):
            raise ValueError(f"--share must be numbers in (0, 1], such as 0.01 for 1%, got {self.share}")
        titles = self._titles()
        title, count = Counter(titles).most_common(1)[0]
        if count > 1:
            flag = "list" if self.lists else "share"
            raise ValueError(f"--{flag} has {title} {count} times; they must have different names")
        if len(self.head_lr) not in (0, 1, len(titles)):
            runs = ", ".join(titles)
            raise ValueError(f"--head-lr must be one number, or one for each of {runs}; got {self.head_lr}")

    def _titles(self) -> list[str]:
        return [file.name for file in self.lists] or [f"{100 * share:.4g}%" for share in self.share]

    def run(self, context: Context) -> Outcome:
        world = context.world
        labelled = context.labelled(self.data, self.format)
        data = self.reading(context.pretrained)
        parts = all_or_none(lambda: self._parts(labelled, world.size), world)
        fingerprints = {part.title: part.images.fingerprint() for part in parts}
        advice = "all machines must have the same images and lists"
        check_same("the images whose labels are used", str(fingerprints), world, advice=advice)
        context.continuation.settings["images"] = {**fingerprints, "test": labelled.test.fingerprint()}
        with context.continuation.saving():
            found = self._scores(parts, labelled, data, context)
        columns = tuple(f"{part.title}: top-{k}" for part in parts for k in (1, 5))
        rows = [Row("fine-tuned", tuple(score for scores in found for score in scores))]
        published = _paper_rows(parts)
        return Outcome(
            self._protocol(parts, labelled, data, context),
            columns,
            rows,
            published,
            partial(bars, columns=columns, rows=[*rows, *published], label="accuracy, %"),
            details={"runs": [_details(part) for part in parts]},
        )

    def _parts(self, labelled: Labelled, ranks: int) -> list[_Part]:
        """Find the images of every part, and refuse all that cannot work, before the first is fine-tuned on."""
        parts = []
        for number, title in enumerate(self._titles()):
            if self.lists:
                chosen = listed_images(self.lists[number], labelled.train)
                share, origin = len(chosen) / len(labelled.train), f"the images that {self.lists[number]} lists"
            else:
                share, origin = self.share[number], f"a class-balanced draw by the seed {self.seed}"
                chosen = draw_balanced(labelled.train_labels, share, labelled.classes, seed=self.seed)
            recipe = self._recipe(number, share)
            size = recipe.fitted_batch(len(chosen), ranks)
            images = labelled.train.subset(chosen.tolist())
            parts.append(_Part(title, share, origin, images, labelled.train_labels[chosen], recipe, size))
        return parts

    def _recipe(self, number: int, share: float) -> Recipe:
        usual = _LR_OF_FEW if share <= _FEW else _LR_OF_MORE
        return Recipe(
            batch_size=self.batch_size,
            epochs=self.epochs,
            milestones=self.milestones,
            drop=self.drop,
            encoder_lr=self.encoder_lr,
            head_lr=self.head_lr[number % len(self.head_lr)] if self.head_lr else usual,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def _scores(
        self, parts: list[_Part], labelled: Labelled, data: DataConfig, context: Context
    ) -> list[tuple[float, ...]]:
        """Fine-tune on every part and test, from where a stopped call was; return each part's accuracies."""
        saved = context.continuation.load() or {"scores": [], "tuning": None}
        scores, tuning = saved["scores"], saved["tuning"]
        if tuning is not None:
            context.say(f"going on with {parts[len(scores)].title} after {tuning['done']} steps")
        for number in range(len(scores), len(parts)):
            part, before = parts[number], sum(part.steps for part in parts[:number])

            def reached(step: int, state: Callable[[], Any], before: int = before) -> None:
                context.continuation.reached(before + step, lambda: {"scores": scores, "tuning": state()})

            model = self._fine_tune(part, len(labelled.classes), data, context, tuning, reached)
            tuning = None
            scores.append(self._test(model, labelled, data, context))
            context.say("{}: top-1 {:.1f}, top-5 {:.1f}".format(part.title, *scores[-1]))
            reached(part.steps, lambda: None)
        return scores

    def _fine_tune(
        self,
        part: _Part,
        classes: int,
        data: DataConfig,
        context: Context,
        tuning: dict[str, Any] | None,
        reached: Callable[[int, Callable[[], Any]], None],
    ) -> Classifier:
        with context.progress(f"fine-tuning on {part.title}", part.steps) as progress:

            def show_and_save(step: int, state: Callable[[], Any]) -> None:
                progress(step)
                reached(step, state)

            return fine_tune(
                context.pretrained.backbone,
                context.pretrained.width,
                part.images,
                part.labels,
                classes,
                part.recipe,
                data=data,
                view=view_of(replace(data, views=self.views, min_crop_area=self.min_crop_area)),
                world=context.world,
                seed=self.seed,
                state=tuning,
                reached=show_and_save,
            )

    def _test(self, model: Classifier, labelled: Labelled, data: DataConfig, context: Context) -> tuple[float, ...]:
        mine = -(-len(labelled.test) // context.world.size)
        with context.progress("classifying test images", mine) as progress:
            return top_accuracies(
                model, labelled.test, labelled.test_labels, data=data, world=context.world, progress=progress
            )

    def _protocol(self, parts: list[_Part], labelled: Labelled, data: DataConfig, context: Context) -> list[str]:
        drops = f"times {self.drop:g} at epochs {' and '.join(map(str, self.milestones))} (from 0)"
        crops = "" if AUGMENTATIONS[self.views].distortion else f" (crops cover at least {self.min_crop_area:g})"
        return [
            f"the whole encoder and a new linear classifier on its backbone's {context.pretrained.width} features are "
            f"fine-tuned on a part of the labels: {labelled.describe()}",
            *(_describe(part, labelled) for part in parts),
            f"SGD with momentum {self.momentum:g} and weight decay {self.weight_decay:g} on all parameters, "
            f"{self.epochs} epochs, learning rates {drops if self.milestones else 'constant'}, given for a batch of "
            "256 and scaled linearly with the batch; the classifier begins with weights of N(0, 0.01) and a bias of 0",
            f"batch norm trains, with the statistics of a rank's own images (ranks: {context.world.size}); an epoch "
            "drops the images that do not fill its last batch, others each time",
            f"training images: augmentation {self.views} of {data.size} px{crops}; test images: centre crops of "
            f"{data.size} px (shorter side {data.resize})",
            "the recipe's usual values are recalled, not checked against the paper's",
        ]


def _describe(part: _Part, labelled: Labelled) -> str:
    recipe, counts = part.recipe, part.labels.bincount(minlength=len(labelled.classes))
    fewest, most, missing = int(counts.min()), int(counts.max()), int((counts == 0).sum())
    each = f"{fewest} of each class" if fewest == most else f"{fewest} to {most} of a class"
    if missing:
        each += f" ({missing} of {len(counts)} classes have none)"
    batches = f"batches of {part.batch_size}"
    if part.batch_size != recipe.batch_size:
        batches += f", because {recipe.batch_size} are more than there are or do not divide among the ranks"
    return (
        f"{part.title}: {part.origin}, {len(part.images)} images, {each}; {batches}; {part.steps} steps; learning "
        f"rates of the encoder {recipe.encoder_lr:g} and of the classifier {recipe.head_lr:g}, times "
        f"{recipe.factor(0, part.batch_size):g} for the batch"
    )


def _details(part: _Part) -> dict[str, Any]:
    return {
        "name": part.title,
        "labelled": part.images.fingerprint(),
        "batch_size": part.batch_size,
        "steps": part.steps,
        "encoder_lr": part.recipe.encoder_lr,
        "head_lr": part.recipe.head_lr,
    }


def _paper_rows(parts: list[_Part]) -> list[Row]:
    """Return the paper's top-5 accuracies where the shares are the paper's; none if no share is."""
    places = [
        next((place for place, share in enumerate(_PAPER) if math.isclose(part.share, share, rel_tol=1e-3)), None)
        for part in parts
    ]
    if all(place is None for place in places):
        return []
    return [
        Row(name, tuple(score for place in places for score in (None, None if place is None else top_5[place])))
        for name, top_5 in paper.SEMI.items()
    ]
