"""The EM loop: an E-step before every epoch after warm-up, an M-step on every batch."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pcl_fast.clustering import FeatureShard, PrototypeSet, cluster, obstacle, pick_backend
from pcl_fast.config import Config, to_dict, view_of
from pcl_fast.data import Batch, ImageSet, TrainingLoader, clustering_loader, describe_loader, training_loader
from pcl_fast.distributed import World, gather_objects, shard_bounds, together
from pcl_fast.evaluation import adjusted_mutual_information, knn_accuracy
from pcl_fast.learner import Learner
from pcl_fast.run.checkpoint import check_same_run, load_same_checkpoint, save_checkpoint
from pcl_fast.run.metrics import Recorder, StepMetrics, Stopwatch, describe
from pcl_fast.schedule import CLUSTERING_BATCH, ENCODED_ON_GPU, clusters_before, evaluates_before, rank_batch
from pcl_fast.seeds import Purpose, mix_seeds


class _Stopped(BaseException):
    """A signal asked to stop where nothing new is to be saved.

    Not an Exception, which code that reads images would turn into the image's fault.
    """


class Trainer:
    """Trains an encoder by PCL (without granularities: MoCo); goes on from the checkpoint in config.output, if any."""

    def __init__(self, config: Config, images: ImageSet, world: World):
        """
        Raises:
            ValueError: the data set does not fit batch or numbers of clusters, the checkpoint is another recipe's, or
                k-means cannot run with the backend asked for.
            UserError: the checkpoint cannot be read, or a package is missing.
        """
        check_sizes(config, len(images), world.size)
        self.config, self.images, self.world = config, images, world
        self.learner = Learner(config, world)
        begin, end = shard_bounds(len(images), world.rank, world.size)
        self.shard = FeatureShard(end - begin, config.model.dim, world.device)
        # One machine may lack what others have, a package or room on its disk.
        self.loader, self.clustering_view = together(self._loaders, world)
        self.labels = _classes(images, world)

        self.prototypes: list[PrototypeSet] = []
        self.epoch, self.step = 0, 0  # epochs done, and steps done in the one under way
        self.finished = False
        self.watch = Stopwatch()
        self._signalled = False
        self._saved = time.monotonic()
        self._in_expectation = False
        resume_at, epoch_metrics = self._restore()
        self.recorder = together(lambda: Recorder(config.output, enabled=world.is_main, resume_at=resume_at), world)
        self.recorder.say(describe_loader(config.data, world))
        if world.device.type == "cuda" and config.cluster.backend == "auto":
            reason = obstacle(world.device, self.shard.features.dtype, config.model.dim)
            if reason and config.cluster.ks:
                self.recorder.say(f"k-means runs in plain PyTorch, which is slower: its kernels' backend {reason}")
        self.metrics = StepMetrics(self.recorder, images, world, batch_size=config.optim.batch_size)
        self.metrics.load(epoch_metrics)

    def _loaders(self) -> tuple[TrainingLoader, Iterable[torch.Tensor]]:
        """For training and clustering. What cannot be used for k-means is better said now too than at the first one."""
        config, images, world = self.config, self.images, self.world
        pick_backend(config.cluster.backend, world.device, self.shard.features.dtype, config.model.dim)
        rows = rank_batch(config, world.size)
        views = (view_of(config.data),) * 2
        training = training_loader(images, config.data, views=views, batch_size=rows, seed=config.seed, world=world)
        return training, clustering_loader(images, config.data, batch_size=CLUSTERING_BATCH, world=world)

    def fit(self) -> bool:
        """Train to the end; False when SIGTERM or SIGINT stopped it early, with everything saved.

        Raises:
            NonFiniteLossError: names the images of the batch; the last checkpoint stands.
        """
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._fit()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.recorder.close()

    def _fit(self) -> bool:
        if self.finished:
            self.recorder.say(f"{self.config.output} is complete: nothing left to do")
            return True
        if self.global_step:
            self.recorder.say(f"resuming after {self.epoch} epochs and {self.step} steps")
        try:
            while self.epoch < self.config.epochs:
                if self.step == 0:
                    self._expectation()
                if not self._maximisation():
                    return self._stopped()
            self._expectation()
        except _Stopped:
            return self._stopped()
        self.finished = True
        self._row("finished", seconds=self.watch.take())
        self._save()
        return True

    def _stopped(self) -> bool:
        self.recorder.say("stopped by a signal, all is saved; the same command goes on from here")
        return False

    @property
    def global_step(self) -> int:
        return self.epoch * self.loader.steps + self.step

    # --- E-step: prototypes and evaluation from the momentum features ----------------------------------------------

    def _expectation(self) -> None:
        """Cluster and evaluate, each if this epoch, or the end of training, asks for it.

        It can take minutes, longer than a launcher waits after a signal, and the checkpoint of the epoch before stands:
        a signal ends it at once.
        """
        if self._signalled:
            raise _Stopped
        clustering = clusters_before(self.config, self.epoch)
        evaluating = self.labels is not None and evaluates_before(self.config, self.epoch)
        if not (clustering or evaluating):
            return
        self._in_expectation = True
        with self.watch.phase("features"):
            features, rate = self.shard.fill(
                self.learner.feature_encoder(),
                self.clustering_view,
                rows=ENCODED_ON_GPU if self.world.device.type == "cuda" else CLUSTERING_BATCH,
            )
        self._row("features", images_per_s=rate * self.world.size)
        if clustering:
            with self.watch.phase("clustering"):
                self._cluster(features)
        if evaluating:
            with self.watch.phase("evaluation"):
                self._evaluate(features, self.prototypes if clustering else [])
        self._in_expectation = False

    def _cluster(self, features: torch.Tensor) -> None:
        options = self.config.cluster
        warm = options.init == "previous" and bool(self.prototypes)
        self.prototypes = cluster(
            features,
            options.ks,
            temperature=self.config.loss.temperature,
            iterations=options.warm_iterations if warm else options.iterations,
            redo=1 if warm else options.redo,
            alpha=options.alpha,
            seed=mix_seeds(self.config.seed, Purpose.CLUSTERING, self.epoch),
            init=[granularity.centroids for granularity in self.prototypes] if warm else None,
            group=self.world.group,
            backend=options.backend,
        )
        for centroids, _, assignment in self.prototypes:
            sizes = torch.bincount(assignment, minlength=len(centroids)).float()
            deciles = torch.quantile(sizes, torch.linspace(0, 1, 11, device=sizes.device)).tolist()
            self._row("clustering", k=len(centroids), empty=int((sizes == 0).sum()), size_deciles=deciles)

    def _evaluate(self, features: torch.Tensor, prototypes: list[PrototypeSet]) -> None:
        options = self.config.evaluation
        queries = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[: options.queries]
        knn = knn_accuracy(
            features,
            self.labels,
            queries,
            neighbours=options.neighbours,
            temperature=self.config.loss.temperature,
            group=self.world.group,
        )
        if self.world.is_main:
            ami = {
                f"{len(centroids)}": adjusted_mutual_information(assignment, self.labels)
                for centroids, _, assignment in prototypes
            }
            self._row("evaluation", knn=knn, ami=ami)
            values = {"kNN": knn, **{f"AMI({k})": value for k, value in ami.items()}}
            self.recorder.say(f"after {self.epoch} epochs: {describe(values)}")

    # --- M-step -----------------------------------------------------------------------------------------------------

    def _maximisation(self) -> bool:
        """Train the rest of the epoch and save; False when a signal asked to stop."""
        epochs, steps = self.config.epochs, self.loader.steps
        lr = self.learner.begin_epoch(self.epoch)
        prototypes = self.learner.for_loss(self.prototypes)
        first = self.step
        with (
            self.recorder.progress(f"epoch {self.epoch + 1}/{epochs}", steps, first),
            self.watch.phase("training"),
        ):
            for batch in self._timed(self.loader.epoch(self.epoch, first)):
                values = self.learner.step(batch, prototypes, self.global_step)
                self.step += 1
                self.metrics.add(self.global_step, batch.index, values)
                stop, save = self._look(lr)
                if (stop or save) and self.step < steps:
                    self._save()
                    if stop:
                        return False
        self.epoch, self.step = self.epoch + 1, 0
        self.learner.end_epoch()
        self._end_epoch((steps - first) * self.config.optim.batch_size, lr)
        return not stop

    def _look(self, lr: float) -> tuple[bool, bool]:
        """Every log_every steps begin to look at the metrics, and end it a step later; at the epoch's end at once.

        Returns:
            Whether any rank wishes to stop, and to save. Then all steps so far have been looked at: what is saved is
            known to be finite.
        """
        stop, save = self.metrics.end_look() or (False, False)
        last = self.step == self.loader.steps or stop or save
        if last or self.step % self.config.log_every == 0:
            wishes = (self._signalled, self._save_is_due())  # once wished, wished until it is done
            self.metrics.begin_look(self.epoch, self.step, lr=lr, wishes=wishes)
        return tuple(self.metrics.end_look()) if last else (False, False)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; counts the time that the step waits for them."""
        while True:
            with self.watch.phase("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _end_epoch(self, images: int, lr: float) -> None:
        seconds = self.watch.take()
        means = self.metrics.epoch_means()
        rate = images / seconds["training"]
        self._row("epoch", **means, lr=lr, images_per_s=rate, seconds=seconds)
        self.recorder.epoch_line(self.epoch, self.config.epochs, means, rate, seconds)
        # After the row, which belongs to the checkpoint; its own time counts for the next epoch.
        every = self.config.checkpoint.keep_every
        with self.watch.phase("checkpoint"):
            self._save(f"checkpoint-{self.epoch:04d}.pt" if every and self.epoch % every == 0 else None)

    def _row(self, kind: str, **values: Any) -> None:
        self.recorder.row(kind, self.global_step, self.epoch, **values)

    def _save_is_due(self) -> bool:
        """By the main rank's clock, whose last checkpoint it is."""
        minutes = self.config.checkpoint.every_minutes
        return self.world.is_main and minutes > 0 and time.monotonic() - self._saved >= 60 * minutes

    # --- stopping and resuming --------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: Any) -> None:
        """Noted here, agreed upon by all ranks at the next look at the metrics.

        Again and again if need be: a launcher passes on what the terminal has already sent.
        """
        self._signalled = True
        if self._in_expectation:
            self._in_expectation = False
            raise _Stopped

    def _save(self, keep_as: str | None = None) -> None:
        """Returns on all ranks when the file is there: where one rank is gone, a launcher may end the others."""
        ranks = gather_objects(self.learner.rank_state(), self.world)
        together(lambda: self._write(ranks, keep_as) if self.world.is_main else None, self.world)

    def _write(self, ranks: list[dict[str, Any]], keep_as: str | None) -> None:
        state = {
            "config": to_dict(self.config),
            "data": self.images.fingerprint(),
            "epoch": self.epoch,
            "step": self.step,
            "global_step": self.global_step,
            "finished": self.finished,
            "metrics_length": self.recorder.length(),
            "learner": self.learner.state(),
            "ranks": ranks,
            "epoch_metrics": self.metrics.state(),
            "prototypes": [granularity._asdict() for granularity in self.prototypes],
        }
        save_checkpoint(self.config.output, state, keep_as=keep_as)
        self._saved = time.monotonic()

    def _restore(self) -> tuple[tuple[int, int] | None, dict[str, list]]:
        """Take up the last checkpoint.

        Returns:
            ((global step, length of metrics.jsonl) to go on from, state of the metrics).
        """
        state = load_same_checkpoint(self.config.output, self.world)
        if state is None:
            return None, {}
        check_same_run(state, self.config, self.images.fingerprint())
        self.epoch, self.step, self.finished = state["epoch"], state["step"], state["finished"]
        self.learner.load(state["learner"], state["ranks"][self.world.rank % len(state["ranks"])])
        device = self.world.device
        self.prototypes = [
            PrototypeSet(**{name: tensor.to(device) for name, tensor in granularity.items()})
            for granularity in state["prototypes"]
        ]
        return (state["global_step"], state["metrics_length"]), state["epoch_metrics"]


def _classes(images: ImageSet, world: World) -> torch.Tensor | None:
    """int64 [n] labels, numbered without gaps: evaluation counts votes for every number up to the largest."""
    if images.labels is None:
        return None
    return torch.as_tensor(images.labels).unique(return_inverse=True)[1].to(world.device)


def check_sizes(config: Config, images: int, ranks: int) -> None:
    """Whether the data set is large enough for the recipe.

    Raises:
        ValueError: names both numbers and the flag.
    """
    batch = config.optim.batch_size
    if batch % ranks:
        raise ValueError(f"--optim.batch-size {batch} does not divide among {ranks} ranks; use a multiple of {ranks}")
    splits = config.model.bn_splits
    if batch // ranks % splits:
        raise ValueError(
            f"--model.bn-splits {splits} does not divide a rank's batch of {batch // ranks}; use a divisor of it, or "
            f"an --optim.batch-size that is a multiple of {ranks * splits}"
        )
    if batch > images:
        raise ValueError(f"--optim.batch-size {batch} is larger than the data set of {images} images; make it smaller")
    if config.cluster.ks and max(config.cluster.ks) > images:
        raise ValueError(
            f"cannot make {max(config.cluster.ks)} clusters of {images} images; set --cluster.ks to smaller numbers, "
            f"for instance {images // 200 or 1} {images // 100 or 1} {images // 50 or 1}"
        )
