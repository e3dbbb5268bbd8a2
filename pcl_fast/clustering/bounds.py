"""The nearest centroids of the same points, again and again while the centroids move less and less, as in k-means.

After a few iterations hardly a point changes its cluster, and most can be shown not to without a look at the centroids
(Ding et al., Yinyang k-means, ICML 2015). The centroids are put into groups. For every point and group there is a lower
bound of the distance to the group's centroids, the point's own one excepted; for every point an upper bound of the
distance to its own. When a centroid moves by m, distances to it change by at most m. A point must be compared with a
group only if the group's lower bound has fallen to the point's upper bound.

The comparison is a matrix product in float32. Its rounding error is bounded, and whatever lies within that bound is
decided by distances in float64. So the result is exact: of all centroids the nearest in float64, and of equally near
ones the lowest index. It depends neither on the number of threads nor on what was searched for before.
"""

from __future__ import annotations

import functools

import torch

from pcl_fast.kernels import assign_plain

# Half the distance between 1 and the next larger float32: the relative error of a rounding.
_ULP = 2.0**-24
_UP, _DOWN = 1 + 4 * _ULP, 1 - 4 * _ULP  # for what was rounded a few times
# How many scores, and how many floats of gathered points, are held at once: what stays in a CPU's caches.
_CHUNK = 1 << 20
_FEWEST_GROUPS, _MOST_GROUPS, _IN_A_GROUP = 16, 128, 16
# To fetch a point for one group takes as long as to compare a point that is at hand with so many centroids.
_FETCH = 50
# From this many scores on (points times centroids) bounds are worth their overhead.
WORTHWHILE = 1 << 20


class BoundedSearch:
    """The search for the nearest centroids of these points, which remembers bounds from call to call.

    Where more pairs of a point and a centroid are nearly tied than there are points (as where all points are equal),
    ties are not decided one by one: the plain search decides, up to float32's rounding.

    Args:
        features: [n, d] float16 or float32, on a CPU. They are kept, and must not change.
        k: number of centroids.

    It takes up to 5 * 128 bytes of memory a point, a little more than float32 features of 128 dimensions.
    """

    def __init__(self, features: torch.Tensor, k: int):
        self._features, self._k = features, k
        n, d = features.shape
        # Centroid j is number j // groups of group j % groups: so the maxima of all groups are those of the columns of
        # a table, which takes a twentieth of the time of the product.
        groups = -(-k // _IN_A_GROUP) // 32 * 32
        self._groups = min(_MOST_GROUPS, max(_FEWEST_GROUPS, groups))
        self._size = -(-k // self._groups)
        self._unused = self._size * self._groups - k
        # The relative error of a sum of d squares, in whatever order.
        self._rounding = (d + 8) * _ULP
        self._rows = max(1, min(n, _CHUNK // d))
        self._squares = torch.cat([rows.float().square().sum(1) for rows in features.split(self._rows)])
        # What the rounding of a score and of a squared norm depend on the point: see `_take`.
        self._error = self._rounding * self._squares
        self._lower, self._upper = torch.empty(self._groups, n), torch.empty(n)
        self._assignment = torch.zeros(n, dtype=torch.int64)
        self._before: torch.Tensor | None = None
        # Memory is kept from call to call: to get some from the system costs as much as the work that is done in it.
        self._is_open = torch.empty(self._groups, n, dtype=torch.bool)
        self._gathered = [torch.empty(self._rows, d) for _ in range(2)]
        self._scores = torch.empty(self._rows, self._size)
        width = self._groups * self._size
        self._all_scores = torch.full((max(1, min(n, _CHUNK // width)), width), -torch.inf)

    def __call__(self, centroids: torch.Tensor) -> torch.Tensor:
        """Return the index of each point's nearest centroid, int64 [n], for centroids [k, d] float32."""
        squares = self._take(centroids)
        # The longest distance that there has been.
        reach = self._squares.max().sqrt() + squares.max().sqrt()
        self._reach = reach if self._before is None else torch.maximum(self._reach, reach)
        if self._before is None:
            self._search_all()
        else:
            self._move(centroids - self._before)
        self._before = centroids.clone()
        if self._search_open():
            return self._assignment.clone()
        self._before = None
        return assign_plain.nearest(self._features, centroids)

    def _take(self, centroids: torch.Tensor) -> torch.Tensor:
        """Lay the centroids out in groups, and return their squared norms. What a group lacks is a centroid that is
        never the nearest.
        """
        # A score is x.c - |c|^2 / 2. A sum of d products, rounded at every step, is off by at most d ulp |x| |c|, and
        # so by d ulp (|x|^2 + |c|^2) / 2, the offset by d ulp |c|^2 / 2, their sum by some ulp more. The centroid's
        # part is added here, so that a score is too low by the point's part at most, and a centroid that is far away
        # does not blur the scores of the others.
        squares = centroids.square().sum(1)
        self._blur = self._rounding * squares
        self._table = torch.cat([centroids, centroids.new_zeros(self._unused, centroids.shape[1])])
        self._offset = torch.cat([self._blur - 0.5 * squares, centroids.new_full((self._unused,), -torch.inf)])
        return squares

    def _move(self, steps: torch.Tensor) -> None:
        """Widen the bounds by how far the centroids moved."""
        # The factor covers the rounding of the norms, the other term that of sums with bounds, which are at most as
        # large as the longest distance that there has been.
        moved = torch.linalg.vector_norm(steps, dim=1) * (1 + self._rounding) + 4 * _ULP * self._reach
        by_group = torch.cat([moved, moved.new_zeros(self._unused)]).view(self._size, self._groups).amax(0)
        self._lower -= by_group[:, None]
        self._upper += moved.index_select(0, self._assignment)
        self._tighten((self._lower.amin(0) <= self._upper).nonzero().view(-1))

    def _tighten(self, points: torch.Tensor) -> None:
        """Compute the distances of some points to their own centroids anew."""
        for part in points.split(self._rows):
            own = self._assignment.index_select(0, part)
            centroids = torch.index_select(self._table, 0, own, out=self._gathered[1][: len(part)])
            distance = torch.linalg.vector_norm(self._gather(part).sub_(centroids), dim=1)
            self._upper.index_copy_(0, part, distance.mul_(1 + self._rounding))

    def _gather(self, points: torch.Tensor) -> torch.Tensor:
        """Return the features of some points, float32, until the next call."""
        out = self._gathered[0][: len(points)]
        if self._features.dtype == torch.float32:
            return torch.index_select(self._features, 0, points, out=out)
        return out.copy_(self._features.index_select(0, points))

    def _search_all(self) -> None:
        """Compare all points with all centroids: set bounds, and the assignment up to rounding."""
        groups, scores = self._groups, self._all_scores
        by_column, offset = self._table[: self._k].T.contiguous(), self._offset[: self._k]
        count = torch.arange(len(scores))
        for begin in range(0, len(self._features), len(scores)):
            chunk = self._features[begin : begin + len(scores)].float()
            here, row, window = scores[: len(chunk)], count[: len(chunk)], slice(begin, begin + len(chunk))
            torch.addmm(offset, chunk, by_column, out=here[:, : self._k])
            members = here.view(len(chunk), self._size, groups)
            if groups >= 32:
                largest = members.amax(1)
            else:  # for so few columns amax takes four times as long
                largest = functools.reduce(torch.maximum, members.unbind(1)[1:], members[:, 0].clone())
            best, group = largest.max(1)
            of_best = members[row, :, group]
            place = of_best.max(1).indices
            largest[row, group] = of_best.scatter_(1, place[:, None], -torch.inf).max(1).values
            torch.add(group, place, alpha=groups, out=self._assignment[window])
            squares, error = self._squares[window], self._error[window]
            best -= 2 * self._blur.index_select(0, self._assignment[window])
            self._upper[window] = (squares - 2 * best + 2 * error).clamp_(min=0).sqrt_().mul_(_UP)
            self._lower[:, window] = _least_distance_(squares[:, None], error[:, None], largest).T

    def _search_open(self) -> bool:
        """Compare points with those groups of which the bounds do not tell that they are farther. Return False if there
        are too many near ties.
        """
        pair = self._open()
        if len(pair) * (self._size + _FETCH) > self._size * self._lower.numel():
            self._search_all()  # which is faster, as it need not fetch
            pair = self._open()
        n = len(self._upper)
        group = pair // n
        point = pair - group * n
        rivals, found = [], 0
        for some in zip(group.split(self._rows), point.split(self._rows), strict=True):
            rivals.append(self._compare(*some))
            found += len(rivals[-1][0])
            if found > n:
                return False
        if found:
            self._decide(*(torch.cat(parts) for parts in zip(*rivals, strict=True)))
        return True

    def _open(self) -> torch.Tensor:
        """Return the pairs that must be compared, as group * n + point, in order."""
        return torch.le(self._lower, self._upper, out=self._is_open).view(-1).nonzero().view(-1)

    def _compare(self, group: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Renew the lower bounds of pairs, which are in order of groups. Return (points, centroids): rivals of the
        points' own centroids.
        """
        rows, scores = self._gather(point), self._scores[: len(point)]
        table = self._table.view(self._size, self._groups, -1)
        offset = self._offset.view(self._size, self._groups)
        present, counts = group.unique_consecutive(return_counts=True)
        end = 0
        for number, count in zip(present.tolist(), counts.tolist(), strict=True):
            begin, end = end, end + count
            torch.addmm(offset[:, number], rows[begin:end], table[:, number].T, out=scores[begin:end])
        own = self._assignment.index_select(0, point)
        mine = (own % self._groups == group).nonzero().view(-1)
        scores[mine, own[mine] // self._groups] = -torch.inf
        squares, error, upper = (x.index_select(0, point) for x in (self._squares, self._error, self._upper))
        best = scores.max(1).values  # amax takes ten times as long for so few columns
        least = 0.5 * (squares - upper.square()) - 2 * error
        near = (best >= least).nonzero().view(-1)
        self._lower[group, point] = _least_distance_(squares, error, best)
        group, point, scores = group[near], point[near], scores[near]
        # What is surely farther than the best of its group is no rival.
        best, place = scores.max(1)
        blur = self._blur[place * self._groups + group]
        least = torch.maximum(least[near], best - 2 * (error[near] + blur))
        which, place = (scores >= least[:, None]).nonzero().unbind(1)
        return point[which], place * self._groups + group[which]

    def _decide(self, point: torch.Tensor, centroid: torch.Tensor) -> None:
        """Give points to the nearest of these centroids and their own, by distances in float64."""
        points, which = point.unique(return_inverse=True)
        own = self._assignment[points]
        before = self._distance(points, own)
        distance = torch.cat([self._distance(point, centroid), before])
        centroid, which = torch.cat([centroid, own]), torch.cat([which, torch.arange(len(points))])
        least = before.scatter_reduce(0, which, distance, "amin")
        centroid = torch.where(distance == least[which], centroid, self._k)
        nearest = own.scatter_reduce(0, which, centroid, "amin", include_self=False)
        self._assignment[points] = nearest
        self._upper[points] = least.float() * _UP
        # What a point left is now one of the others of its group. What it took still counts among its own group's
        # others; that is a bound as well, and is renewed when that group is compared next.
        left = (nearest != own).nonzero().view(-1)
        place = own[left] % self._groups, points[left]
        self._lower[place] = torch.minimum(self._lower[place], before[left].float() * _DOWN)

    def _distance(self, points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        """Return distances between points and centroids, given by index, float64."""
        return torch.cat(
            [
                (self._features[some].double() - self._table[others].double()).square_().sum(1).sqrt_()
                for some, others in zip(points.split(self._rows), centroids.split(self._rows), strict=True)
            ]
        )


def _least_distance_(squares: torch.Tensor, error: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Turn scores into the least distances that they can stand for: |x - c|^2 = |x|^2 - 2 score."""
    return score.mul_(-2).add_(squares - 2 * error).clamp_(min=0).sqrt_().mul_(_DOWN)
