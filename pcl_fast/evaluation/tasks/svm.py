"""Linear SVMs on few images and on all: Tables 1 and 3."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from pcl_fast.data import ImageSet
from pcl_fast.data.sources.places import holds_places
from pcl_fast.data.sources.voc import VOC_CLASSES, VocSplit, holds_voc, read_split
from pcl_fast.distributed import all_gather_shards, main_first
from pcl_fast.evaluation import paper
from pcl_fast.evaluation.labelled import holds_labelled
from pcl_fast.evaluation.maps import encode_maps
from pcl_fast.evaluation.pictures import bars
from pcl_fast.evaluation.svm import (
    FAIR_COSTS,
    Precision,
    Presence,
    Workers,
    draw_labels,
    draw_voc,
    low_shot_accuracy,
    unit,
    voc_full,
    voc_low_shot,
)
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task


@dataclass(frozen=True, kw_only=True)
class Svm(Task, name="svm", scores="query"):
    """Train linear SVMs on few images of a class, and on all of VOC07 (Tables 1 and 3).

    --data is VOC's devkit, Places205 with its lists, or a folder with train and val.
    """

    protocol: Literal["pcl", "fair"] = "pcl"
    """VOC07's protocol. pcl: the official PCL code's. fair: the FAIR benchmark's, with features of 2 x 2 places, a cost
    that is chosen, and difficult objects ignored."""
    shots: tuple[int, ...] = paper.LOW_SHOT
    """Images of a class."""
    draws: int = 5
    """How many times these images are drawn."""
    full: bool = True
    """Train on all of VOC07's images, too."""
    jobs: int = os.cpu_count() or 1
    """SVMs that are trained at the same time."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        return None if holds_voc(data, 2007) else holds_labelled(data)

    def check(self) -> None:
        for flag, values in {"--shots": self.shots, "--draws": (self.draws,), "--jobs": (self.jobs,)}.items():
            if not values or min(values) < 1:
                raise ValueError(f"{flag} must be positive, got {values[0] if len(values) == 1 else values}")

    def run(self, context: Context) -> Outcome:
        return self._voc(context) if holds_voc(self.data, 2007) else self._single_labels(context)

    # --- VOC07 --------------------------------------------------------------------------------------------------------

    def _voc(self, context: Context) -> Outcome:
        splits = [
            main_first(partial(read_split, self.data, 2007, name), context.world) for name in ("trainval", "test")
        ]
        for split in splits:
            context.look_at(split.images)
        self._check_draws(partial(draw_voc, splits[0].presence, fair=self.protocol == "fair"), VOC_CLASSES)
        train, test = (self._presence(split, context) for split in splits)
        found = self._voc_scores(train, test, context) if context.world.is_main else []
        columns = [*map(str, self.shots), *(["full"] if self.full else [])]
        envelopes = [[score.envelope for score in scores] for scores in found]
        rows = [
            Row("mAP, envelope", tuple(map(np.mean, envelopes))),
            Row("its deviation over the draws", tuple(map(_deviation, envelopes))),
            Row("mAP, 11 points", tuple(np.mean([score.eleven for score in scores]) for scores in found)),
        ]
        published = {name: _by_column(scores) for name, scores in paper.LOW_SHOT_VOC07.items()}
        for name, (score,) in paper.SVM_VOC07.items():
            published[name]["full"] = score
        sizes = f"{len(train.features)} trainval and {len(test.features)} test images of VOC07"
        return self._outcome([f"{sizes}; {self._voc_protocol(context)}"], columns, rows, published, "mAP, %")

    def _voc_protocol(self, context: Context) -> str:
        data = self.reading(context.pretrained)
        if self.protocol == "pcl":
            return (
                f"the backbone's {context.pretrained.width} features of centre crops of {data.size} px (shorter side "
                f"{data.resize}), unit length; LinearSVC with C = 0.5 and weight 2 for positives; low-shot: up to k "
                "images of each class, all of them labelled for all classes; difficult objects are negatives"
            )
        return (
            f"the last map pooled to 2 x 2 ({4 * context.pretrained.width} features) of whole images resized to "
            f"{data.size} x {data.size}, unit length; LinearSVC with weight 2 for positives; low-shot: for each class "
            "k images with it and 19k without, the best C of the list on the test images, as the benchmark does; "
            "full: the best C of each class in 3 folds; difficult objects are ignored"
        )

    def _presence(self, split: VocSplit, context: Context) -> Presence:
        return Presence(self._features(split.images, context, maps=self.protocol == "fair"), split.presence)

    def _voc_scores(self, train: Presence, test: Presence, context: Context) -> list[list[Precision]]:
        fair = self.protocol == "fair"
        options = {"fair": fair, "costs": FAIR_COSTS if fair else (0.5,)}
        fits = len(VOC_CLASSES) * (len(self.shots) * self.draws * len(options["costs"]) + self.full)
        with context.progress("training SVMs", fits) as progress:
            workers = Workers(self.jobs, progress)
            low_shot = [
                voc_low_shot(train, test, shots, workers, draws=self.draws, seed=self.seed, **options)
                for shots in self.shots
            ]
            found = [*low_shot, *([[voc_full(train, test, workers, **options)]] if self.full else [])]
        _say_unconverged(workers, context)
        return found

    # --- single labels ------------------------------------------------------------------------------------------------

    def _single_labels(self, context: Context) -> Outcome:
        labelled = context.labelled(self.data, self.format)
        labels = labelled.train_labels.numpy()
        self._check_draws(lambda **draw: draw_labels(labels, **draw), labelled.classes)
        train, test = (self._features(images, context) for images in (labelled.train, labelled.test))
        found = []
        if context.world.is_main:
            with context.progress("training SVMs", len(self.shots) * self.draws) as progress:
                workers = Workers(self.jobs, progress)
                parts = (train, labels), (test, labelled.test_labels.numpy())
                options = {"draws": self.draws, "seed": self.seed}
                found = [low_shot_accuracy(*parts, shots, workers, **options) for shots in self.shots]
            _say_unconverged(workers, context)
        rows = [
            Row("top-1 accuracy", tuple(map(np.mean, found))),
            Row("its deviation over the draws", tuple(map(_deviation, found))),
        ]
        data = self.reading(context.pretrained)
        protocol = (
            f"{labelled.describe()}: the backbone's {context.pretrained.width} features of centre crops of {data.size} "
            f"px (shorter side {data.resize}), unit length; one multi-class LinearSVC with C = 0.5 on k images of each "
            "class, tested on all test images"
        )
        places = paper.LOW_SHOT_PLACES205 if holds_places(self.data) else {}
        published = {name: _by_column(scores) for name, scores in places.items()}
        return self._outcome([protocol], list(map(str, self.shots)), rows, published, "top-1 accuracy, %")

    # --- both ---------------------------------------------------------------------------------------------------------

    def _check_draws(self, draw: Callable[..., object], classes: Sequence[str]) -> None:
        """Refuse more images of a class than there are, before anything is encoded.

        Raises:
            ValueError: names the class, its images, and the flag.
        """
        for shots in self.shots:
            try:
                draw(shots=shots, seed=self.seed, draw=0)
            except ValueError as error:
                number = int(str(error).split()[1])
                raise ValueError(f"--shots {shots}: {error} ({classes[number]}); use smaller numbers") from error

    def _features(self, images: ImageSet, context: Context, *, maps: bool = False) -> np.ndarray:
        """Return the unit features of all images, on every rank."""
        data = self.reading(context.pretrained)
        if maps:
            with context.progress("encoding images", len(images) // context.world.size) as progress:
                shard = encode_maps(context.pretrained, images, data, context.world, progress).to(context.world.device)
        else:
            shard = context.encode(images, data, "images").backbone
        return unit(all_gather_shards(shard, context.world.group).float().cpu().numpy())

    def _outcome(
        self,
        protocol: list[str],
        columns: list[str],
        rows: list[Row],
        published: dict[str, dict[str, float | None]],
        label: str,
    ) -> Outcome:
        shown = [Row(name, tuple(scores.get(column) for column in columns)) for name, scores in published.items()]
        draws = f"mean and deviation over {self.draws} draws" if self.draws > 1 else "one draw"
        drawn = [row for row in rows if "deviation" not in row.name]
        protocol = [*protocol, f"columns: images of a class; {draws} by seed {self.seed}"]
        return Outcome(protocol, columns, rows, shown, partial(bars, columns=columns, rows=drawn, label=label))


def _by_column(low_shot: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(map(str, paper.LOW_SHOT), low_shot, strict=True))


def _deviation(scores: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample, None of a single score."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def _say_unconverged(workers: Workers, context: Context) -> None:
    if workers.unconverged:
        context.say(f"{workers.unconverged} of {workers.done} SVMs stopped at the protocol's limit of 2000 iterations")
