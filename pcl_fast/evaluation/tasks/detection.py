"""Detection of objects on VOC (Table 6) and COCO."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure

from pcl_fast.command_line import Integers
from pcl_fast.data import ImageSet
from pcl_fast.data.loaders.resources import pick_resources
from pcl_fast.data.sources.coco import holds_coco
from pcl_fast.data.sources.voc import VOC_CLASSES, holds_voc
from pcl_fast.distributed import all_or_none, gather_objects, main_first
from pcl_fast.errors import UserError
from pcl_fast.evaluation import paper
from pcl_fast.evaluation.detection.coco_ap import coco_average_precision
from pcl_fast.evaluation.detection.data import Annotated
from pcl_fast.evaluation.detection.detecting import Detections, detect
from pcl_fast.evaluation.detection.model import build_detector, check_backbone, check_body
from pcl_fast.evaluation.detection.recipes import COCO, COCO_SIZES, VOC_FROZEN, VOC_SIZES, VOC_TUNED, adapted
from pcl_fast.evaluation.detection.sets import open_coco, open_voc
from pcl_fast.evaluation.detection.training import Recipe, drawn, train_detector
from pcl_fast.evaluation.detection.voc_ap import voc_average_precision
from pcl_fast.evaluation.pictures import bars
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task
from pcl_fast.nn.timm_network import timm_name
from pcl_fast.seeds import Purpose

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Detection(Task, name="detection", scores="query"):
    """Train a detector on top of the encoder and find objects (Table 6).

    On VOC it is Faster R-CNN, on COCO Mask R-CNN, both with a feature pyramid, of torchvision. --data is VOC's devkit
    (VOC2007, and VOC2012 to train on both), or COCO's folder with annotations, train2017 and val2017; images are seen
    whole, so --size, --resize, --format, --loader and --cache do not matter. Settings marked "recalled" are remembered,
    not found in a source.
    """

    dataset: Literal["auto", "voc07", "voc07+12", "coco"] = "auto"
    """What is trained on; VOC is tested on VOC2007's test images, COCO on val2017. auto: VOC with all years that are
    there, or else COCO."""
    body: Literal["auto", "frozen", "fine-tuned"] = "auto"
    """Whether the encoder itself is trained too. Its batch norm never is (recalled). auto: frozen on VOC, as in Table
    6, and fine-tuned on COCO."""
    epochs: int | None = None
    """None: 15 on VOC (recalled), 23 if it is fine-tuned (MoCo's), 26 on COCO (torchvision's)."""
    milestones: Integers | None = None
    """Epochs at which the learning rate is divided by ten. None: 12 of 15 on VOC (recalled), 17 and 21 of 23 if it is
    fine-tuned, 16 and 22 of 26 on COCO; earlier or later with other --epochs."""
    batch_size: int | None = None
    """Images per step over all ranks together. None: 8 on VOC (recalled), 16 if it is fine-tuned and on COCO."""
    lr: float | None = None
    """Learning rate. None: 0.05 for 8 images on VOC (recalled), 0.02 for 16 if it is fine-tuned and on COCO; it grows
    with --batch-size."""
    weight_decay: float = 1e-4
    """Of everything that is trained (recalled)."""
    warmup: int | None = None
    """Steps in which the learning rate grows linearly, at most an epoch. None: 500 on VOC, 1000 on COCO."""
    min_size: int | None = None
    """Images are scaled to this shorter side, in pixels. None: 600 on VOC, 800 on COCO."""
    max_size: int | None = None
    """But not beyond this longer side. None: 1000 on VOC, 1333 on COCO."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        if not holds_voc(data, 2007) and holds_coco(data):
            return f"{data} holds neither VOC2007 nor COCO"
        return _small_encoder(checkpoint)

    def check(self) -> None:
        positive = {
            "--epochs": self.epochs, "--batch-size": self.batch_size, "--lr": self.lr, "--min-size": self.min_size,
            "--max-size": self.max_size,
        }  # fmt: skip
        for flag, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{flag} must be positive, got {value}")
        for flag, value in {"--warmup": self.warmup, "--weight-decay": self.weight_decay}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{flag} must not be negative, got {value}")
        if self.milestones and min(self.milestones) < 1:
            raise ValueError(f"--milestones must be positive, got {self.milestones}")

    def run(self, context: Context) -> Outcome:
        check_backbone(context.pretrained.backbone)
        dataset = self._dataset()
        return self._coco(context) if dataset == "coco" else self._voc(context, dataset)

    def _dataset(self) -> str:
        if self.dataset != "auto":
            return self.dataset
        if holds_voc(self.data, 2007):
            return "voc07+12" if holds_voc(self.data, 2012) else "voc07"
        if missing := holds_coco(self.data):
            raise UserError(f"{self.data} holds neither VOC2007 nor COCO ({missing})")
        return "coco"

    # --- VOC ----------------------------------------------------------------------------------------------------------

    def _voc(self, context: Context, dataset: str) -> Outcome:
        years, frozen = (2007, 2012)[: 1 + dataset.endswith("12")], self.body != "fine-tuned"
        plan = self._plan(VOC_FROZEN if frozen else VOC_TUNED, VOC_SIZES, frozen=frozen, masks=False)
        sets = main_first(partial(open_voc, self.data, years), context.world)
        found, protocol = self._find(context, plan, sets.train, sets.test, len(VOC_CLASSES))
        scores = _on_main(lambda: voc_average_precision(found, sets.truths, len(VOC_CLASSES)), context)
        name = "VOC07+12" if dataset.endswith("12") else "VOC07"
        protocol = (
            f"trained on the {len(sets.train)} trainval images of {name} that have objects, without those that are "
            f"marked difficult; tested on VOC07's {len(sets.test)} test images, where finding a difficult object is "
            "neither right nor wrong",
            *protocol,
            "mean over the classes of AP at an intersection over union of 0.5, of at most 100 detections an image with "
            "scores above 0.05; the paper does not say which of the two AP it is, VOC2007's own has 11 points",
        )
        rows = [Row(f"{name}, {plan.describe_body()}", tuple(float(np.nanmean(values)) for values in scores))]
        published = [
            Row(f"{encoder}, {name}, frozen", (row[len(years) - 1], None))
            for encoder, row in paper.DETECTION_VOC.items()
        ]
        details = {
            "11 points": dict(zip(VOC_CLASSES, map(_number, scores.eleven), strict=True)),
            "envelope": dict(zip(VOC_CLASSES, map(_number, scores.envelope), strict=True)),
        }
        draw = partial(_draw_classes, scores=details)
        columns = ("mAP, 11 points", "mAP, envelope")
        return Outcome(protocol, columns, rows, published if frozen else (), draw, details=details)

    # --- COCO ---------------------------------------------------------------------------------------------------------

    def _coco(self, context: Context) -> Outcome:
        frozen = self.body == "frozen"
        plan = self._plan(COCO, COCO_SIZES, frozen=frozen, masks=True)
        sets = main_first(partial(open_coco, self.data), context.world)
        numbers = [number for number, _ in sets.test.categories]
        found, protocol = self._find(context, plan, sets.train, sets.test.images, len(numbers))

        def score() -> tuple[float, ...]:
            of = partial(coco_average_precision, found, sets.test.ids, numbers, sets.test.annotations)
            return (*of(masks=False), *of(masks=True))

        scores = _on_main(score, context)
        protocol = (
            f"trained on the {len(sets.train)} images of train2017 that have objects; left out were crowds "
            f"({sets.crowds}) and objects without an area ({sets.degenerate}); tested on the {len(sets.test)} images "
            "of val2017",
            *protocol,
            "COCO's AP: mean over the categories and intersections over union of 0.5, 0.55, ..., 0.95, of at most 100 "
            "detections an image with scores above 0.05, by faster-coco-eval",
        )
        columns = tuple(f"{what} {score}" for what in ("box", "mask") for score in ("AP", "AP50", "AP75"))
        rows = [Row(f"COCO, {plan.describe_body()}", scores)]
        published = [Row(f"{name}, fine-tuned", row) for name, row in paper.DETECTION_COCO.items()]
        draw = partial(bars, columns=columns, rows=rows, label="AP, %")
        return Outcome(protocol, columns, rows, () if frozen else published, draw)

    # --- both ---------------------------------------------------------------------------------------------------------

    def _plan(self, recipe: Recipe, sizes: tuple[int, int], *, frozen: bool, masks: bool) -> _Plan:
        changed = adapted(
            recipe, epochs=self.epochs, milestones=self.milestones, batch_size=self.batch_size, lr=self.lr,
            weight_decay=self.weight_decay, warmup=self.warmup,
        )  # fmt: skip
        plan = _Plan(changed, self.min_size or sizes[0], self.max_size or sizes[1], frozen, masks)
        if plan.min_size > plan.max_size:
            raise ValueError(f"--min-size {plan.min_size} is more than --max-size {plan.max_size}")
        return plan

    def _find(
        self, context: Context, plan: _Plan, train: Annotated, test: ImageSet, classes: int
    ) -> tuple[list[Detections], list[str]]:
        """Train on some images and find the objects in others; return what was found in each, and what was done."""
        world, pretrained, recipe = context.world, context.pretrained, plan.recipe
        for images in (train.images, test):
            context.look_at(images)
        with drawn(world.device, self.seed, Purpose.EVALUATION):
            detector = build_detector(
                pretrained.backbone, classes, masks=plan.masks, frozen=plan.frozen, min_size=plan.min_size,
                max_size=plan.max_size,
            )  # fmt: skip
        detector.to(world.device, memory_format=torch.channels_last)
        protocol = plan.describe(pretrained.arch, given_lr=self.lr is not None)
        steps = recipe.epochs * (len(train) // recipe.batch_size)
        context.say(f"training on {len(train)} images, {steps} steps; learning rate {recipe.lr:g}")
        options = {"world": world, "resources": pick_resources(self.reading(pretrained), world.device)}
        continuation = context.continuation
        with continuation.saving():
            with context.progress("training", steps) as progress:
                state = train_detector(
                    detector, train, recipe, seed=self.seed, state=continuation.load(), reached=continuation.reached,
                    progress=progress, say=context.say, **options,
                )  # fmt: skip
            if plan.frozen:
                count = check_body(detector, pretrained.backbone)
                protocol.append(f"all {count} tensors of the frozen encoder are the checkpoint's after the training")
            with context.progress("testing", -(-len(test) // world.size)) as progress:
                found = detect(
                    detector, test, reached=lambda: continuation.reached(steps, state), progress=progress, **options
                )
        return found, protocol


class _Plan(NamedTuple):
    """A recipe, the sides of the images, and what is trained."""

    recipe: Recipe
    min_size: int
    max_size: int
    frozen: bool
    masks: bool

    def describe_body(self) -> str:
        return "frozen" if self.frozen else "fine-tuned"

    def describe(self, arch: str, *, given_lr: bool) -> list[str]:
        """Say what is trained, and how."""
        recipe = self.recipe
        scaled = "" if given_lr else " (it follows the batch)"
        drops = [str(milestone) for milestone in recipe.milestones if milestone < recipe.epochs]
        dropped = f", divided by ten after epochs {' and '.join(drops)}" if drops else ""
        return [
            f"{'Mask' if self.masks else 'Faster'} R-CNN of torchvision {version('torchvision')} with a feature "
            f"pyramid on {arch}, {self.describe_body()}, its batch norm fixed",
            f"SGD with momentum 0.9, weight decay {recipe.weight_decay:g}, batch {recipe.batch_size}, {recipe.epochs} "
            f"epochs, learning rate {recipe.lr:g}{scaled} after {recipe.warmup} steps of warm-up (at most an epoch)"
            f"{dropped}; shorter side {self.min_size} px, longer side at most {self.max_size}, half of the training "
            "images mirrored",
        ]


def _on_main(work: Callable[[], T], context: Context) -> T:
    """Run work() on the main rank and return its result on all of them."""
    world = context.world
    return gather_objects(all_or_none(lambda: work() if world.is_main else None, world), world)[0]


def _number(value: float) -> float | None:
    """JSON has no NaN, which a class without objects has."""
    return None if np.isnan(value) else float(value)


def _draw_classes(figure: Figure, *, scores: dict[str, dict[str, float | None]]) -> None:
    """Draw bars for every class, those with the best envelope above."""
    axes = figure.subplots()
    names = sorted(scores["envelope"], key=lambda name: scores["envelope"][name] or 0)
    for shift, (way, values) in zip((0.2, -0.2), scores.items(), strict=True):
        places = [place + shift for place in range(len(names))]
        axes.barh(places, [values[name] or 0 for name in names], height=0.4, label=way)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("AP, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _small_encoder(checkpoint: Path) -> str | None:
    """Say that a run's encoder is none for detection, or return None. Of other files nothing is known yet."""
    recipe = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    try:
        model = json.loads(recipe.read_text())["model"]
        if timm_name(model["arch"]) is not None:
            return f"the encoder is none of torchvision's ResNets ({model['arch']})"
        small = model["small_stem"] or model["arch"].startswith("cifar")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"the encoder is a small ResNet ({model['arch']})" if small else None
