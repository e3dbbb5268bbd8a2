"""When to do what: an E-step and an evaluation where an epoch asks for one, an M-step on every batch, saving, stopping.

What is learned, and how, is the method's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pcl_fast.clustering import FeatureShard
from pcl_fast.config import Config
from pcl_fast.crop_sizes import epoch_sides
from pcl_fast.data import Batch, GrowingLoader, GrowingView, ImageSet, describe_loader
from pcl_fast.distributed import World, all_or_none, check_same, shard_bounds
from pcl_fast.evaluation.online import evaluate_features, number_classes
from pcl_fast.learner import Learner
from pcl_fast.methods import build, method_class
from pcl_fast.pretrained.beginning import begin_with
from pcl_fast.run.choices import Choices
from pcl_fast.run.metrics import Recorder, StepMetrics, Stopwatch, describe
from pcl_fast.run.saving import Saver
from pcl_fast.run.signals import Stopped, StopSignals
from pcl_fast.schedule import (
    CLUSTERING_BATCH,
    check_sizes,
    encoded_at_a_time,
    evaluates_before,
    rank_batch,
    steps_left,
)


class Trainer:
    """Trains a method; goes on from the checkpoint in config.output, if any."""

    def __init__(self, config: Config, images: ImageSet, world: World):
        """
        Raises:
            ValueError: the data set or the number of ranks does not fit the recipe, the checkpoint is another run's, or
                k-means cannot run with the backend asked for.
            UserError: the checkpoint cannot be read, or a package is missing.
            OSError: there is no room for a checkpoint.
        """
        check_sizes(config, len(images), world.size, labelled=images.labels is not None)
        method_class(config.method).check(config, len(images), world.size)
        self.config, self.images, self.world = config, images, world
        # One machine may lack what others have, a package or room on its disk.
        self.method = all_or_none(lambda: build(config, world, len(images)), world)
        self.loader, self.clustering_view = all_or_none(self._loaders, world)
        self.learner = Learner(self.method, config, world)
        self.labels = number_classes(images.labels, world.device)
        self.watch, self.signals = Stopwatch(), StopSignals()
        self.saver = Saver(config, images.fingerprint(), world)
        self.progress, saved = self.saver.restore(self.learner)
        begun = [] if config.init is None else self._begin_with(config.init, new=not saved)
        resume_at = (saved["global_step"], self.progress.epoch, saved["metrics_length"]) if saved else None
        self.recorder = all_or_none(
            lambda: Recorder(config.output, self.method.metrics, enabled=world.is_main, resume_at=resume_at), world
        )
        for line in (describe_loader(config.data, world), *self.method.notes(), *begun, *self.saver.notes):
            self.recorder.say(line)
        if self._wants_features():
            _ = self.shard  # better too large for the device now than after the warm-up
        self.metrics = StepMetrics(self.recorder, images, world, batch_size=config.optim.batch_size)
        self.metrics.load(saved.get("epoch_metrics", {}))
        self.choices = Choices(saved.get("choices"))
        self._warned = self._has_stepped = False

    def _loaders(self) -> tuple[GrowingLoader, GrowingView]:
        """For training, and for the clustering view."""
        config, images, world = self.config, self.images, self.world
        training = GrowingLoader(
            images,
            config.data,
            views=self.method.views,
            batch_size=rank_batch(config, world.size),
            seed=config.seed,
            world=world,
            order=self.method.order,
        )
        return training, GrowingView(images, config.data, batch_size=CLUSTERING_BATCH, world=world)

    def _begin_with(self, path: Path, *, new: bool) -> list[str]:
        """Load the weights that a new run begins with; lines for the log. The learner holds the method's tensors, which
        stay in their places.
        """
        if not new:
            return [f"--init {path} is not read again: the run goes on from its own checkpoint"]
        lines, checksum = all_or_none(lambda: begin_with(path, self.method, self.config.model), self.world)
        advice = f"--init {path} must be the same file on every machine"
        check_same("the checkpoint whose weights they begin with", checksum, self.world, advice=advice)
        return lines

    def fit(self) -> bool:
        """Train to the end; False when a signal stopped it early, with everything saved.

        Raises:
            NonFiniteError: names the images of the batch; the last checkpoint stands.
        """
        # To the very end: a launcher may pass on a signal that has come already.
        with self.signals:
            try:
                return self._fit()
            except Stopped:
                return self._stopped()
            finally:
                self.recorder.close()

    def _fit(self) -> bool:
        progress = self.progress
        if progress.finished and progress.epoch == self.config.epochs:
            self.recorder.say(f"{self.config.output} is complete: nothing left to do")
            return True
        left = steps_left(self.config, self.loader.steps, self.global_step)
        rows = self.choices.make(self.config, self.learner, left, self._sizes(), self.world, self.recorder.say)
        self._step = self.choices.step_of(self.learner)
        if self.global_step:
            self.recorder.say(f"resuming after {progress.epoch} epochs and {progress.step} steps")
        for _ in range(self.saver.missing):
            self._save()  # if the disk does not take it, better now than after an epoch
        # Not before: a run with an empty record and a single, damaged checkpoint may begin anew.
        for kind, row in rows.items():
            self._row(kind, **row)
        while progress.epoch < self.config.epochs:
            # A run that is made longer has had the E-step of its former end.
            if progress.step == 0 and not progress.finished:
                self._before_epoch()
            progress.finished = False
            if not self._train_epoch():
                return self._stopped()
        self._before_epoch()  # of what would come next: the prototypes and scores of the last weights
        progress.finished = True
        # As after the last step, also where this process has done none.
        self.learner.set_rate(self.config.epochs - 1, self.loader.steps - 1, self.loader.steps)
        self._row("finished", seconds=self.watch.take())
        self._save()
        return True

    def _stopped(self) -> bool:
        self.recorder.say("stopped by a signal, all is saved; the same command goes on from here")
        return False

    @property
    def global_step(self) -> int:
        return self.progress.epoch * self.loader.steps + self.progress.step

    # --- between epochs: E-step and evaluation --------------------------------------------------------------------

    def _before_epoch(self) -> None:
        """E-step and evaluation, each if this epoch, or the end of training, asks for it.

        They can take minutes, longer than a launcher waits after a signal, and the checkpoint of the epoch before
        stands: a signal ends them at once.
        """
        with self.signals.at_once():
            epoch = self.progress.epoch
            expecting = self.method.expects(epoch)
            evaluating = self.labels is not None and evaluates_before(self.config, epoch)
            from_bank = self.method.features().from_bank
            features = self._features() if evaluating or (expecting and not from_bank) else None
            if expecting:
                self._expect(None if from_bank else features)
            if evaluating:
                self._evaluate(features, self.method.clusterings() if expecting else {})

    def _wants_features(self) -> bool:
        """Whether the images are ever encoded outside of training."""
        epochs = range(self.config.epochs + 1)
        evaluating = self.labels is not None and self.config.evaluation.every > 0
        from_bank = self.method.features().from_bank
        return evaluating or (not from_bank and any(self.method.expects(epoch) for epoch in epochs))

    def _sizes(self) -> list[int]:
        """The sizes that images may have in passes over them, in pixels, of a run that is made longer too; empty if
        there are no passes.
        """
        data = self.config.data
        return epoch_sides(data.sizes, data.size, [data.size]) if self._wants_features() else []

    @functools.cached_property
    def shard(self) -> FeatureShard:
        """This rank's features, allocated once, when they are first wanted."""
        begin, end = shard_bounds(len(self.images), self.world.rank, self.world.size)
        return FeatureShard(end - begin, self.method.features().width, self.world.device)

    def _features(self) -> torch.Tensor:
        """[n_local, width]: the pass over this rank's images."""
        rows = encoded_at_a_time(self.world.device)
        with self.watch.phase("features"):
            view = self.clustering_view.at(self.progress.epoch)
            features, rate = self.shard.fill(self.method.feature_encoder(), view, rows=rows)
        self._row("features", images_per_s=rate * self.world.size)
        return features

    def _expect(self, features: torch.Tensor | None) -> None:
        with self.watch.phase("clustering"):
            rows = self.method.expect(features, self.progress.epoch)
            self.learner.renew()
        for row in rows:
            self._row("clustering", **row)

    def _evaluate(self, features: torch.Tensor, clusterings: dict[str, torch.Tensor]) -> None:
        epoch = self.progress.epoch
        with self.watch.phase("evaluation"):
            scores = evaluate_features(features, self.labels, clusterings, self.config, epoch, self.world)
        if scores is not None:
            self._row("evaluation", **scores)
            values = {"kNN": scores["knn"], **{f"AMI({k})": value for k, value in scores["ami"].items()}}
            self.recorder.say(f"after {epoch} epochs: {describe(values)}")

    # --- an epoch of M-steps --------------------------------------------------------------------------------------

    def _train_epoch(self) -> bool:
        """Train the rest of the epoch and save; False when a signal asked to stop."""
        progress, steps, first = self.progress, self.loader.steps, self.progress.step
        title = f"epoch {progress.epoch + 1}/{self.config.epochs}"
        begin = time.perf_counter()
        with self.recorder.progress(title, steps, first), self.watch.phase("training"):
            for batch in self._timed(self.loader.epoch(progress.epoch, first)):
                lr = self.learner.set_rate(progress.epoch, progress.step, steps)
                values = self._step(batch, self.global_step)
                if not self._has_stepped:
                    self._say_first_step(time.perf_counter() - begin)
                progress.step += 1
                self.metrics.add(self.global_step, batch.index, values)
                votes = self._reduce_metrics(lr)
                if any(votes.values()) and progress.step < steps:
                    self._save()
                    if votes["stop"]:
                        return False
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.learner.end_epoch()
        self._end_epoch((steps - first) * self.config.optim.batch_size, lr)
        return not votes["stop"]

    def _say_first_step(self, seconds: float) -> None:
        """It compiles, and loaders start for it. A GPU, for which nobody waits, may still be at it."""
        self._has_stepped = True
        waiting = self.watch.seconds["waiting for data"]
        self.recorder.say(f"first step after {seconds:.2f} s, {waiting:.2f} s of which went by until its images came")

    def _reduce_metrics(self, lr: float) -> dict[str, bool]:
        """Every log_every steps begin to reduce the metrics, and end it a step later; at the epoch's end at once.

        Returns:
            Whether any rank votes to stop, and to save; nothing as long as none does. If one does, all steps so far
            have been looked at: what is saved is known to be finite.
        """
        progress = self.progress
        votes = self.metrics.end_reduction() or {}
        last = progress.step == self.loader.steps or any(votes.values())
        if last or progress.step % self.config.log_every == 0:
            # Once voted, voted until it is done.
            mine = {"stop": self.signals.asked, "save": self.saver.is_due()}
            self.metrics.begin_reduction(progress.epoch, progress.step, lr=lr, votes=mine)
        return self.metrics.end_reduction() if last else {}

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; counts the time that the step waits for them."""
        while True:
            with self.watch.phase("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _end_epoch(self, images: int, lr: float) -> None:
        seconds, epoch = self.watch.take(), self.progress.epoch
        means = self.metrics.epoch_means()
        rate = images / seconds["training"]
        self._row("epoch", **means, lr=lr, images_per_s=rate, seconds=seconds)
        # After the row, which belongs to the checkpoint; its own time counts for the next epoch.
        with self.watch.phase("checkpoint"):
            self._save(keep=self.saver.is_kept(epoch))
        self.recorder.epoch_line(epoch, self.config.epochs, means, rate, seconds)
        if not self._warned and (warning := self.method.warning(means, self.global_step)):
            self.recorder.say(f"warning: {warning}")
            self._warned = True

    def _row(self, kind: str, **values: Any) -> None:
        self.recorder.row(kind, self.global_step, self.progress.epoch, **values)

    def _save(self, *, keep: bool = False) -> None:
        record = {
            "global_step": self.global_step,
            "metrics_length": all_or_none(self.recorder.sync, self.world),
            "epoch_metrics": self.metrics.state(),
            "choices": self.choices.state(),
        }
        self.saver.save(self.learner, self.progress, record, keep=keep)
