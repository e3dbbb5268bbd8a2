"""Linear SVMs on few images of a class and on all: Tables 1 and 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from pcl_fast.command_line import Integers, Numbers
from pcl_fast.data import ImageSet
from pcl_fast.data.sources.places import holds_places
from pcl_fast.data.sources.voc import VOC_CLASSES, VocSplit, holds_voc, read_split
from pcl_fast.distributed import all_gather_shards, main_first
from pcl_fast.evaluation import paper
from pcl_fast.evaluation.labelled import Labelled, holds_labelled
from pcl_fast.evaluation.parallel import own_cores, spread
from pcl_fast.evaluation.pooled_maps import encode_maps
from pcl_fast.evaluation.svm import (
    ITERATIONS,
    PROTOCOLS,
    Chosen,
    Protocol,
    VocFeatures,
    choose_full,
    choose_low_shot,
    draw_labels,
    score_labels,
    score_voc,
    unit,
    voc_jobs,
)
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task

_YEAR, _FULL = 2007, "full"


@dataclass(frozen=True, kw_only=True)
class Svm(Task, name="svm", scores="query"):
    """Train linear SVMs on few images of a class, and on all of VOC07 (Tables 1 and 3).

    --data is VOC's devkit, Places205 with its lists, or a folder with train and val.
    """

    dataset: Literal["auto", "voc07", "folders"] = "auto"
    """What --data holds; auto is voc07 where the devkit is found. folders: images with a single label, Places205 among
    them."""
    protocol: Literal["pcl", "fair"] = "pcl"
    """How VOC07 is scored. pcl: as the official PCL code does. fair: as the FAIR self-supervision benchmark does, on
    features of 2 x 2 places, with a cost that is chosen, and without difficult objects in the tests. Scores of the two
    cannot be compared."""
    shots: Integers = paper.LOW_SHOT
    """k: numbers of images of a class to learn from."""
    draws: int = 5
    """How many times these images are drawn."""
    full: bool = True
    """Train on all of VOC07's images, too."""
    costs: Numbers = ()
    """Every C that is tried on VOC07. None given: the protocol's, which is 0.5 for pcl; fair tries decades from 1e-7 to
    100, and 0.5^4 to 0.5^19."""
    jobs: int | None = None
    """SVMs that a rank trains at the same time, each in a process of its own; None: this machine's cores divided among
    its ranks. The features of fair take 1 GB in each."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        return None if holds_voc(data, _YEAR) else holds_labelled(data)

    def check(self) -> None:
        if not (self.shots or self.full):
            raise ValueError("--shots names no number of images, and with --no-full there is nothing to train on")
        jobs = () if self.jobs is None else (self.jobs,)
        given = {"--shots": self.shots, "--draws": (self.draws,), "--costs": self.costs, "--jobs": jobs}
        for flag, values in given.items():
            if not all(value > 0 for value in values):
                raise ValueError(f"{flag} must be positive, got {' '.join(map(str, values))}")

    def run(self, context: Context) -> Outcome:
        if self.dataset == "voc07" or (self.dataset == "auto" and holds_voc(self.data, _YEAR)):
            return self._voc(context)
        return self._single_labels(context)

    # --- VOC07 --------------------------------------------------------------------------------------------------------

    def _voc(self, context: Context) -> Outcome:
        protocol = PROTOCOLS[self.protocol]
        protocol = replace(protocol, costs=self.costs or protocol.costs)
        train, test = (
            main_first(partial(read_split, self.data, _YEAR, name), context.world) for name in ("trainval", "test")
        )
        self._check_voc(train.presence, test.presence, protocol)
        for split in (train, test):
            context.look_at(split.images)
        saved = context.continuation.load()
        jobs = voc_jobs(protocol, self.shots, self.draws, len(VOC_CLASSES), full=self.full)
        features = VocFeatures(
            *(self._map_or_pooled(train, context), train.presence), *(self._map_or_pooled(test, context), test.presence)
        )
        found = self._train(partial(score_voc, features, protocol, self.seed), [(job,) for job in jobs], saved, context)
        chosen, stopped = self._choose(found, protocol)
        _say_stopped(stopped, sum(len(job.costs) for job in jobs), context)
        sentences = (
            f"VOC07: {len(train.ids)} trainval and {len(test.ids)} test images, {len(VOC_CLASSES)} classes",
            *self._voc_sentences(protocol, context),
        )
        return self._voc_outcome(sentences, chosen, stopped)

    def _check_voc(self, train: np.ndarray, test: np.ndarray, protocol: Protocol) -> None:
        """Refuse images of which a class has too few, before any is encoded.

        Raises:
            ValueError: names the class, how many it has, and how many are needed.
        """
        most = max(self.shots, default=0)
        least = max(1, protocol.folds) if self.full else 0
        others = (len(VOC_CLASSES) - 1) * most if protocol.own_images else 0
        for name, learned, tested in zip(VOC_CLASSES, train.T, test.T, strict=True):
            for what, count, needed, why in (
                ("trainval images that show it", (learned == 1).sum(), most, f"--shots {most}"),
                ("trainval images that do not", (learned == -1).sum(), others, f"--protocol fair with --shots {most}"),
                ("trainval images that show it", (learned == 1).sum(), least, "training on all of them"),
                ("test images that show it", (tested == 1).sum(), 1, "an average precision"),
            ):
                if count < needed:
                    raise ValueError(f"class {name} has {count} {what}, and {why} takes {needed}")

    def _map_or_pooled(self, split: VocSplit, context: Context) -> np.ndarray:
        if self.protocol == "pcl":
            return self._features(split.images, context)
        data = self.reading(context.pretrained)
        with context.progress("encoding images", len(split.images) // context.world.size) as progress:
            shard = encode_maps(context.pretrained, split.images, data, context.world, progress)
        return unit(all_gather_shards(shard, context.world.group).cpu().numpy())

    def _choose(self, found: list[Any], protocol: Protocol) -> tuple[dict[str, Chosen], int]:
        """Return what was found with the chosen costs, by column, and how many SVMs have not converged."""
        classes, costs, chosen = len(VOC_CLASSES), protocol.costs, {}
        each = self.draws * classes
        for number, shots in enumerate(self.shots):
            part = np.array(found[number * each : (number + 1) * each])
            chosen[_column(shots)] = choose_low_shot(part.reshape(self.draws, classes, len(costs), -1), costs)
        if self.full:
            part = np.array(found[len(self.shots) * each :])
            chosen[_FULL] = choose_full(part.reshape(classes, len(costs), -1), costs, protocol)
        return chosen, int(sum(scored[-1] for job in found for scored in job))

    def _voc_sentences(self, protocol: Protocol, context: Context) -> list[str]:
        data, width = self.reading(context.pretrained), context.pretrained.width
        costs = " ".join(f"{cost:g}" for cost in protocol.costs)
        several = len(protocol.costs) > 1
        machines = "LinearSVC of each class against all others (dual, l2, squared hinge, tolerance 1e-4, at most "
        machines += f"{ITERATIONS} iterations), positives weigh twice"
        if self.protocol == "pcl":
            return [
                f"protocol pcl: the backbone's {width} features of centre crops of {data.size} px (shorter side "
                f"{data.resize}), x / (|x| + 1e-5)",
                f"{machines}, C = {costs}{', the best on the test images' if several else ''}; low-shot: k images of "
                "each class, all labelled for all classes, twice if drawn for two; difficult objects are negatives",
            ]
        return [
            f"protocol fair: the last block's maps, pooled to 2 x 2 ({4 * width} features), of whole images resized to "
            f"{data.size} x {data.size} px (shorter side {data.resize} before), x / (|x| + 1e-5)",
            f"{machines}, C of {costs}; low-shot: k images with the class and {len(VOC_CLASSES) - 1} k without, the C "
            f"with the best mean on the test images, as the benchmark does; full: each class's best C in "
            f"{protocol.folds} folds, difficult objects are negatives there; all tests ignore them",
        ]

    def _voc_outcome(self, sentences: Sequence[str], chosen: dict[str, Chosen], stopped: int) -> Outcome:
        envelopes = {column: 100 * scores.envelope.mean(1) for column, scores in chosen.items()}
        elevens = {column: 100 * scores.eleven.mean(1) for column, scores in chosen.items()}
        published = {name: _by_column(scores) for name, scores in paper.LOW_SHOT_VOC07.items()}
        for name, (score,) in paper.SVM_VOC07.items():
            published[name][_FULL] = score
        details = {
            column: {
                "draws": envelopes[column].tolist(),
                "classes": dict(zip(VOC_CLASSES, (100 * scores.envelope.mean(0)).tolist(), strict=True)),
                "costs": dict(zip(VOC_CLASSES, scores.costs.tolist(), strict=True)),
            }
            for column, scores in chosen.items()
        }
        rows = [*self._rows("mAP", envelopes), *self._rows("mAP, 11 points", elevens)[:1]]
        return self._outcome(sentences, rows, published, "mAP, %", envelopes, {**details, "not converged": stopped})

    # --- single labels ------------------------------------------------------------------------------------------------

    def _single_labels(self, context: Context) -> Outcome:
        labelled = context.labelled(self.data, self.format)
        self._check_labels(labelled)
        labels, answers = labelled.train_labels.numpy(), labelled.test_labels.numpy()
        saved = context.continuation.load()
        drawn = [draw_labels(labels, *of) for of in product(self.shots, (self.seed,), range(self.draws))]
        # Of millions of images only these are encoded.
        needed = np.unique(np.concatenate(drawn))
        images = labelled.train.subset(needed.tolist())
        context.look_at(images)
        train, test = self._features(images, context, cache=False), self._features(labelled.test, context)
        jobs = [(np.searchsorted(needed, rows), labels[rows]) for rows in drawn]
        found = np.array(self._train(partial(score_labels, train, test, answers), jobs, saved, context))
        stopped = int(found[:, 1].sum())
        _say_stopped(stopped, len(found), context)
        scores = dict(zip(map(_column, self.shots), 100 * found[:, 0].reshape(-1, self.draws), strict=True))
        data = self.reading(context.pretrained)
        sentences = (
            labelled.describe(),
            f"the backbone's {context.pretrained.width} features of centre crops of {data.size} px (shorter side "
            f"{data.resize}), x / (|x| + 1e-5)",
            "one LinearSVC for all classes (C = 0.5, dual, l2, squared hinge, tolerance 1e-4, at most "
            f"{ITERATIONS} iterations) on k images of each, tested on all test images",
        )
        places = paper.LOW_SHOT_PLACES205 if holds_places(self.data) else {}
        published = {name: _by_column(accuracies) for name, accuracies in places.items()}
        details = {column: {"draws": values.tolist()} for column, values in scores.items()}
        rows = self._rows("top-1 accuracy", scores)
        details["not converged"] = stopped
        return self._outcome(sentences, rows, published, "top-1 accuracy, %", scores, details)

    def _check_labels(self, labelled: Labelled) -> None:
        """Refuse what is VOC07's alone, and classes that have too few images, before any is encoded.

        Raises:
            ValueError: names the option; or the class, its images, and how many are needed.
        """
        if self.protocol != "pcl" or self.costs:
            flag = f"--protocol {self.protocol}" if self.protocol != "pcl" else "--costs"
            raise ValueError(f"{flag} is for VOC07, and --data {self.data} holds images with a single label")
        if not self.shots:
            raise ValueError("--shots must name numbers of images; all images are trained on for VOC07 alone")
        if len(labelled.classes) < 2:
            raise ValueError(f"{self.data} has the class {labelled.classes[0]} alone, and an SVM wants two")
        counts, most = labelled.train_labels.bincount().tolist(), max(self.shots)
        for name, count in zip(labelled.classes, counts, strict=True):
            if count < most:
                raise ValueError(f"class {name} has {count} training images, and --shots {most} takes {most}")

    # --- both ---------------------------------------------------------------------------------------------------------

    def _features(self, images: ImageSet, context: Context, *, cache: bool = True) -> np.ndarray:
        """Return the backbone's unit features of all images, on every rank."""
        data = self.reading(context.pretrained)
        shard = context.encode(images, data if cache else replace(data, cache=None), "images").backbone
        return unit(all_gather_shards(shard, context.world.group).float().cpu().numpy())

    def _train(
        self, function: Callable[..., Any], jobs: Sequence[tuple], saved: dict[str, Any] | None, context: Context
    ) -> list[Any]:
        """Return function(*job) of all jobs as nested lists, from where an earlier run was stopped."""
        state = saved or {"found": []}
        found = state["found"]
        processes = self.jobs or own_cores()
        with context.progress("training SVMs", len(jobs)) as progress, context.continuation.saving():
            for part in spread(function, jobs[len(found) :], processes=processes, world=context.world):
                found += [np.asarray(result, dtype=np.float64).tolist() for result in part]
                progress(len(found))
                context.continuation.reached(len(found), lambda: state)
        return found

    def _rows(self, name: str, scores: dict[str, np.ndarray]) -> list[Row]:
        """Return the mean over the draws, and their deviation (of a population, as the official scripts compute it)."""
        means = tuple(float(values.mean()) for values in scores.values())
        deviations = tuple(float(values.std()) if len(values) > 1 else None for values in scores.values())
        return [Row(name, means), Row("  deviation", deviations)]

    def _outcome(
        self,
        sentences: Sequence[str],
        rows: list[Row],
        published: dict[str, dict[str, float]],
        label: str,
        scores: dict[str, np.ndarray],
        details: dict[str, Any],
    ) -> Outcome:
        columns = tuple(scores)
        shown = [Row(name, tuple(values.get(column) for column in columns)) for name, values in published.items()]
        sentences = (*sentences, f"low-shot: mean and deviation over {self.draws} draws of the seed {self.seed}")
        return Outcome(
            sentences, columns, rows, shown, partial(_draw, scores=scores, paper=shown, label=label), details=details
        )


def _column(shots: int) -> str:
    return f"k = {shots}"


def _by_column(scores: Sequence[float]) -> dict[str, float]:
    return dict(zip(map(_column, paper.LOW_SHOT), scores, strict=True))


def _say_stopped(stopped: int, machines: int, context: Context) -> None:
    if stopped:
        context.say(
            f"{stopped} of {machines} SVMs had not converged after {ITERATIONS} iterations, where all protocols stop"
        )


def _draw(figure: Figure, *, scores: dict[str, np.ndarray], paper: Sequence[Row], label: str) -> None:
    """Draw our means with their deviations above the columns, and the paper's scores as thin lines."""
    axes = figure.subplots()
    for row in paper:
        axes.plot(
            [np.nan if score is None else score for score in row.scores], lw=1, marker=".", label=f"paper: {row.name}"
        )
    means, deviations = ([function(values) for values in scores.values()] for function in (np.mean, np.std))
    axes.errorbar(
        range(len(means)), means, deviations, lw=2, marker="o", capsize=3, color="black", label="this encoder"
    )
    axes.set_xticks(range(len(scores)), scores)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
