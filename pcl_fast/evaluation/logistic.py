"""Multinomial logistic regression on features that are computed once: a linear classifier in minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from pcl_fast.distributed import all_reduce_sum
from pcl_fast.evaluation.classifiers import Accuracy, Classifiers, best
from pcl_fast.evaluation.held_out import hold_out, usual_share

# Of standardised features; which is best depends on their number and on that of the images.
WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ITERATIONS = 200
# The largest entry of the gradient at which the search ends.
TOLERANCE = 1e-5
# How many features, or logits, are held at once beside the bank.
_CHUNK = 1 << 25


class Bank(NamedTuple):
    """Labelled features, this rank's share.

    features: [n_local, width] of any floating type.
    labels: int64 [n_local].
    """

    features: torch.Tensor
    labels: torch.Tensor


def fit_logistic(
    bank: Bank,
    classes: int,
    weight_decays: Sequence[float],
    *,
    rows: torch.Tensor | None = None,
    start: Classifiers | None = None,
    group: dist.ProcessGroup | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    progress: Callable[[int], None] = lambda done: None,
) -> Classifiers:
    """Fit one classifier for every weight decay, by L-BFGS with a strong Wolfe line search.

    It minimises mean cross entropy + weight_decay / 2 |W|^2, where W belongs to the standardised features (x - mean) /
    deviation and the bias is not decayed. That is scikit-learn's LogisticRegression with C = 1 / (weight_decay n).
    Every fit starts from that of the next larger decay. Products are float32, sums and the search float64.

    Args:
        bank: the training images' features.
        classes: C.
        weight_decays: not negative, in any order.
        rows: bool [n_local], the images to fit; None: all.
        start: one classifier, from which the first fit starts instead of zeros.
        group: the ranks that hold the bank; None for this process alone.
        iterations: of L-BFGS, at most, for each weight decay.
        tolerance: the largest entry of the gradient at which it ends.
        progress: is told how many weight decays are done.

    Returns:
        Classifiers of the features as they are (not standardised), in the order of the weight decays.
    """
    problem = _Problem(bank, classes, rows, group)
    found: dict[float, torch.Tensor] = {}
    point = problem.point(start)
    for done, decay in enumerate(sorted(set(weight_decays), reverse=True)):
        point = _minimise(lambda at, decay=decay: problem.loss(at, decay), point, iterations, tolerance)
        found[decay] = point
        progress(done + 1)
    return problem.classifiers([found[decay] for decay in weight_decays])


def _minimise(
    loss: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    start: torch.Tensor,
    iterations: int,
    tolerance: float,
) -> torch.Tensor:
    """Return where L-BFGS ends; `loss` returns value and gradient at a point."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> torch.Tensor:
        value, point.grad = loss(point)
        return value

    optimizer.step(closure)
    return point.detach()


class _Problem:
    """The loss of classifiers [C, width + 1] of standardised features, whose last column is the bias."""

    def __init__(self, bank: Bank, classes: int, rows: torch.Tensor | None, group: dist.ProcessGroup | None):
        self.bank, self.rows, self.group = bank, rows, group
        self.classes, self.width = classes, bank.features.shape[1]
        self.chunk = max(1, _CHUNK // max(classes, self.width))
        self.total, self.mean, self.deviation = self._moments()

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for begin in range(0, len(self.bank.labels), self.chunk):
            features, labels = (part[begin : begin + self.chunk] for part in self.bank)
            if self.rows is not None:
                mask = self.rows[begin : begin + self.chunk]
                features, labels = features[mask], labels[mask]
            yield features.float(), labels

    def _moments(self) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Return (number of images; mean and deviation of every feature over all ranks' images, float32 [width])."""
        sums = torch.zeros(self.width + 1, dtype=torch.float64, device=self.bank.features.device)
        for features, _ in self._chunks():
            sums[:-1] += features.sum(0, dtype=torch.float64)
            sums[-1] += len(features)
        all_reduce_sum(sums, self.group)
        mean = sums[:-1] / sums[-1]
        squares = torch.zeros_like(mean)
        for features, _ in self._chunks():
            squares += (features - mean.float()).square().sum(0, dtype=torch.float64)
        deviation = (all_reduce_sum(squares, self.group) / sums[-1]).sqrt()
        # A feature that never changes is 0 once its mean is taken away, whatever it is divided by.
        return float(sums[-1]), mean.float(), torch.where(deviation > 0, deviation, 1.0).float()

    def loss(self, point: torch.Tensor, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (mean cross entropy + decay / 2 |W|^2, its gradient), float64, the same on all ranks."""
        weight, bias = point[:, :-1].float(), point[:, -1].float()
        sums = torch.zeros(point.numel() + 1, dtype=torch.float64, device=point.device)
        value, gradient = sums[-1:], sums[:-1].view_as(point)
        for features, labels in self._chunks():
            features = (features - self.mean) / self.deviation
            log_shares = torch.addmm(bias, features, weight.T).log_softmax(1)
            value -= log_shares.gather(1, labels[:, None]).sum(dtype=torch.float64)
            shares = log_shares.exp_()
            shares.scatter_add_(1, labels[:, None], shares.new_full((len(labels), 1), -1.0))
            gradient[:, :-1] += shares.T @ features
            gradient[:, -1] += shares.sum(0, dtype=torch.float64)
        all_reduce_sum(sums, self.group).div_(self.total)
        gradient[:, :-1] += decay * point[:, :-1]
        return value[0] + decay / 2 * point[:, :-1].square().sum(), gradient.clone()

    def point(self, classifier: Classifiers | None) -> torch.Tensor:
        """Return the point that stands for one classifier of features that are not standardised; None: zeros."""
        point = torch.zeros(self.classes, self.width + 1, dtype=torch.float64, device=self.mean.device)
        if classifier is not None:
            weight, bias = classifier.weight[0].double(), classifier.bias[0].double()
            point[:, :-1], point[:, -1] = weight * self.deviation, bias + weight @ self.mean.double()
        return point

    def classifiers(self, points: Sequence[torch.Tensor]) -> Classifiers:
        """Return them as classifiers of features that are not standardised."""
        weight = torch.stack([point[:, :-1] for point in points]) / self.deviation.double()
        bias = torch.stack([point[:, -1] for point in points]) - weight @ self.mean.double()
        return Classifiers(weight.float(), bias.float())


class Fitted(NamedTuple):
    """The outcome of `fit_chosen`.

    classifier: the winner, one classifier fitted to all training images.
    winner: the place of its weight decay.
    held_out: the accuracy of every weight decay on the held-out images, from a fit to the others; empty if there was
        nothing to choose.
    """

    classifier: Classifiers
    winner: int
    held_out: list[Accuracy]


def fit_chosen(
    bank: Bank,
    held: Bank | None,
    classes: int,
    weight_decays: Sequence[float],
    *,
    rows: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Fitted:
    """Choose the weight decay by the held-out images' top-1 accuracy, then go on with that fit to all training images.

    Args:
        bank: all training images, the held-out ones included.
        held: the held-out images, with the features they are to be judged by; None, with a single weight decay.
        classes: C.
        weight_decays: not negative.
        rows: bool [n_local], False for the held-out images of `bank`.
        group: the ranks that hold the banks; None for this process alone.
        progress: is told how many fits are done.
    """
    winner, accuracies, start = 0, [], None
    if held is not None:
        tried = fit_logistic(bank, classes, weight_decays, rows=rows, group=group, progress=progress)
        accuracies = tried.accuracies(*held, group)
        winner = best(accuracies)
        start = tried.pick(winner)
    final = fit_logistic(bank, classes, weight_decays[winner : winner + 1], start=start, group=group)
    return Fitted(final, winner, accuracies)


def linear_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    held_out: float | None = None,
    seed: int = 0,
) -> Accuracy:
    """Return the test accuracy of logistic regression, its weight decay chosen on held-out training images.

    Args:
        train: [n, width] features of any floating type.
        train_labels: int64 [n], classes from 0 without gaps.
        test, test_labels: the same of the test images, of no other classes.
        weight_decays: those to choose from, see `fit_logistic`.
        held_out: share of every class that is held out; None: see `usual_share`.
        seed: of the held-out part.

    Raises:
        ImageError: a class has a single training image, and there are several weight decays to choose from.
        ValueError: the share is not between 0 and 1.
    """
    bank, held, rows = Bank(train, train_labels), None, None
    if len(weight_decays) > 1:
        out = hold_out(train_labels.cpu(), held_out or usual_share(len(train)), seed).to(train.device)
        held, rows = Bank(train[out], train_labels[out]), ~out
    fitted = fit_chosen(bank, held, int(train_labels.max()) + 1, weight_decays, rows=rows)
    return fitted.classifier.accuracies(test, test_labels)[0]
