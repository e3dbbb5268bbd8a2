"""Loaders built on DALI: an image is decoded once, and all its views are made on the GPU where there is one.

DALI does what changes an image's shape (decode, crop, resize, flip), the Finisher does the rest. Neither has any random
state: every number comes with the batch (see draws.py), so that a run can go on at any step of an epoch, and makes the
same batches with any number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from nvidia.dali import fn, types

from pcl_fast.augmentations import View
from pcl_fast.config import DataConfig
from pcl_fast.data.batch import Batch
from pcl_fast.data.loaders.dali_decoder import Decoder, Input, Read
from pcl_fast.data.loaders.order import EpochOrder
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.data.views.draws import Draws, draw_views
from pcl_fast.data.views.finish import Finisher

_CORNER = _EXTENT = Input(types.INT32)
_EDGES = Input(types.FLOAT)
_MATRIX = Input(types.FLOAT, 2)


class TrainingLoader:
    """A training loader makes the views of all images, in a new order every epoch."""

    def __init__(self, images: ImageSet, views: Sequence[View], order: EpochOrder, resources: Resources):
        self.images, self.views, self.order = images, views, order
        self.finisher = Finisher(resources.threads)
        self.steps = order.steps
        inputs = [_inputs(view) for view in views]

        def graph(decoded: types.DataNode, *given: types.DataNode) -> list[types.DataNode]:
            nodes = iter(given)
            own = (islice(nodes, len(kinds)) for kinds in inputs)
            return [_view(decoded, *geometry, size=view.size) for view, geometry in zip(views, own, strict=True)]

        self._decoder = Decoder(images, list(chain.from_iterable(inputs)), graph, order.batch_size, resources)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `first_step` on; those before it cost nothing."""
        drawn: deque[list[Draws]] = deque()

        def describe(read: Read) -> tuple[np.ndarray, ...]:
            drawn.append([self._draw(read, epoch, number) for number in range(len(self.views))])
            return tuple(array for draws in drawn[-1] for array in _geometry(draws))

        # To close this generator does not close the decoder's: in Python 3.12 that waits until nobody holds this one.
        with closing(self._decoder.run(self.order.batches(epoch, first_step), describe)) as decoded:
            for index, crops in decoded:
                views = (self.finisher(crop, draws) for crop, draws in zip(crops, drawn.popleft(), strict=True))
                yield Batch(tuple(views), torch.from_numpy(index))

    def _draw(self, read: Read, epoch: int, number: int) -> Draws:
        view, seed = self.views[number], self.order.seed
        return draw_views(view, read.sizes, seed=seed, epoch=epoch, number=number, index=read.index)


class ClusteringLoader:
    """A clustering loader makes the clustering view of a range of images, in order; its last batch is smaller."""

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        shard: range,
        resources: Resources,
        *,
        batch_size: int,
    ):
        self.config, self.shard, self.batch_size = config, shard, batch_size
        self._decoder = Decoder(
            images, [_EDGES, _EDGES], partial(_centre_crop, size=config.size), batch_size, resources
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.batches(range(0, len(self.shard), self.batch_size))

    def batches(self, starts: Iterable[int]) -> Iterator[torch.Tensor]:
        """Yield the batches that begin at these positions of the shard, which are asked for while it works."""
        indices = np.arange(self.shard.start, self.shard.stop)
        batches = (indices[at : at + self.batch_size] for at in starts)
        crops = partial(centre_crops, resize=self.config.shorter_side, size=self.config.size)
        with closing(self._decoder.run(batches, lambda read: crops(read.sizes))) as decoded:
            for _, (view,) in decoded:
                yield view


def _inputs(view: View) -> list[Input]:
    """Return the types of what `_geometry` returns for this view."""
    return [_CORNER, _EXTENT, _EDGES, _EDGES, *([] if view.distortion is None else [_MATRIX])]


def _geometry(draws: Draws) -> tuple[np.ndarray, ...]:
    """Return the inputs of `_view`: corner, extent, begin and end, and the matrix if there is one.

    A flip is a resize from the right edge to the left one.
    """
    height, width = draws.window[:, 2], draws.window[:, 3]
    nothing = np.zeros_like(width)
    arrays = [
        draws.window[:, :2].astype(np.int32),
        draws.window[:, 2:].astype(np.int32),
        np.stack([nothing, np.where(draws.flip, width, nothing)], axis=1).astype(np.float32),
        np.stack([height, np.where(draws.flip, nothing, width)], axis=1).astype(np.float32),
    ]
    if draws.matrix is not None:
        arrays.append(draws.matrix)
    return tuple(np.ascontiguousarray(array) for array in arrays)


def centre_crops(sizes: np.ndarray, resize: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where in the images the clustering views begin and end, float32 [n, 2] each.

    The resized image's size and the crop's corner are rounded as torchvision rounds them.

    Args:
        sizes: int64 [n, 2], heights and widths of the images.
        resize: length of the resized images' shorter side; size: of the crop.
    """
    resized = resize * sizes // sizes.min(axis=1, keepdims=True)
    corner = np.rint((resized - size) / 2)
    scale = sizes / resized
    return (corner * scale).astype(np.float32), ((corner + size) * scale).astype(np.float32)


def _view(
    decoded: types.DataNode,
    corner: types.DataNode,
    extent: types.DataNode,
    begin: types.DataNode,
    end: types.DataNode,
    matrix: types.DataNode | None = None,
    *,
    size: int,
) -> types.DataNode:
    if matrix is not None:
        decoded = fn.warp_affine(
            decoded, matrix=matrix, inverse_map=True, fill_value=0, interp_type=types.INTERP_LINEAR
        )
    # Resizing the region of interest alone would save this copy, but would look beyond the crop's edges.
    return _resize(fn.slice(decoded, corner, extent, axes=[0, 1]), begin, end, size)


def _centre_crop(
    decoded: types.DataNode, begin: types.DataNode, end: types.DataNode, *, size: int
) -> list[types.DataNode]:
    # Only what the crop keeps is resized. Its edges take in what lies beyond them, as if the whole image were resized
    # first.
    return [_resize(decoded, begin, end, size)]


def _resize(image: types.DataNode, begin: types.DataNode, end: types.DataNode, size: int) -> types.DataNode:
    return fn.resize(
        image, size=[size, size], roi_start=begin, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=True
    )
