"""Write the features of images into a table, and the clusters of a run's prototypes that they belong to.

    python -m pcl_fast.embed CHECKPOINT --data DIR --output FILE.parquet|FILE.npy [--flags]

The images may be others than the run has seen. A row is an image:

    path                  where it lies in DIR
    label                 its class folder, if there are any
    features              its features
    cluster_K, distance_K for every number K of prototypes that the checkpoint holds: the nearest one, and its distance
                          to the image's unit features; K_1, K_2, ... where several heads have K prototypes

FILE.npy holds the features alone, [n, d] float32, and FILE.csv beside it the other columns. One process does it all.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import Progress

from pcl_fast.clustering import PrototypeSet, pick_backend
from pcl_fast.clustering.lloyd import squared_distance
from pcl_fast.command import command
from pcl_fast.config import DataConfig
from pcl_fast.data import ImageFolder, ImageSet, check_headers, clustering_loader, open_set
from pcl_fast.distributed import World, connect
from pcl_fast.errors import MissingPackageError, UserError
from pcl_fast.evaluation.features import frozen_backbone
from pcl_fast.files import write_whole
from pcl_fast.pretrained import Pretrained, read_pretrained
from pcl_fast.schedule import encoded_at_a_time

PARQUET, NUMPY = ".parquet", ".npy"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is embedded, and how."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run's folder or one of its checkpoints, an official PCL or MoCo file, or the weights of a torchvision or timm
    ResNet."""
    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The images."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The table, .parquet or .npy."""
    features: Literal["head", "backbone"] | None = None
    """head: the unit features that the method learned; backbone: what downstream tasks build on. None: the head's where
    the checkpoint has one."""
    encoder: Literal["query", "momentum"] | None = None
    """Which of the checkpoint's encoders; None: momentum, whose features were clustered, where there is one."""
    size: int | None = None
    """Side of the centre crops, in pixels; None: what the encoder was trained with, or 224."""
    format: Literal["folder", "webdataset"] = "folder"
    """How images lie on disk, as in pcl_fast.train."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes and crops; auto is DALI wherever it can be imported."""
    workers: int | None = None
    """Threads or processes that read and decode, as in pcl_fast.train."""
    force: bool = False
    """Overwrite what is there."""


class Part(NamedTuple):
    """Images one after another.

    features: [n, d] float32.
    clusters: by what columns are called: (the nearest one [n] int32, the distance to it [n] float32).
    """

    features: np.ndarray
    clusters: dict[str, tuple[np.ndarray, np.ndarray]]


def main() -> None:
    with command("pcl_fast.embed"):
        embed(tyro.cli(Options, prog="pcl_fast.embed", description=__doc__))


def embed(options: Options) -> None:
    """Write the table.

    Raises:
        ValueError: an option cannot work; names it.
        UserError: the checkpoint or the images cannot be used, or something is there already.
        OSError: the output cannot be written.
    """
    _check(options)
    world = connect()
    if world.size > 1:
        raise ValueError("pcl_fast.embed is one process; start it without torchrun")
    which = options.encoder or "momentum"
    pretrained = read_pretrained(options.checkpoint, which, or_only=options.encoder is None).to(world.device)
    if options.features == "head" and pretrained.head is None:
        raise ValueError(f"--features head: {pretrained.path} has no projection head; use --features backbone")
    images = open_set(options.data, options.format, apart_from=options.output.parent)
    for line in check_headers(images):
        print(line)
    where = {"root": options.data, "format": options.format}
    data = pretrained.reading(options.size, loader=options.loader, workers=options.workers, cache=None, **where)
    print(f"{pretrained.source}: {pretrained.path}", *pretrained.notes, sep="\n  ")
    print(images.describe())
    kind = options.features or ("backbone" if pretrained.head is None else "head")
    parts = _shown(_parts(pretrained, images, data, kind, world), len(images))
    _WRITERS[options.output.suffix](options.output, _Names(images), parts)
    print(f"written: {options.output}")


def _check(options: Options) -> None:
    output = options.output
    if output.suffix not in _WRITERS:
        raise ValueError(f"--output {output} must end with {' or '.join(_WRITERS)}")
    if output.suffix == PARQUET:
        _pyarrow()
    written = [output, output.with_suffix(".csv")] if output.suffix == NUMPY else [output]
    for file in written:
        if file.exists() and not options.force:
            raise UserError(f"{file} is there already; choose another --output, or overwrite it with --force")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")


@torch.inference_mode()
def _parts(
    pretrained: Pretrained, images: ImageSet, data: DataConfig, kind: Literal["head", "backbone"], world: World
) -> Iterator[Part]:
    """Yield the images' features and clusters, in order."""
    encode, device = frozen_backbone(pretrained, world.device), world.device
    sets = {} if pretrained.head is None else _searches(pretrained.prototypes, device)
    rows = encoded_at_a_time(device)
    for batch in clustering_loader(images, data, batch_size=rows, world=world):
        backbone = encode(batch)
        unit = None if pretrained.head is None else F.normalize(pretrained.head(backbone), dim=1).contiguous()
        features = backbone if kind == "backbone" else unit
        yield Part(features.float().cpu().numpy(), {name: found(unit) for name, found in sets.items()})


def _searches(prototypes: Sequence[PrototypeSet], device: torch.device) -> dict[str, _Nearest]:
    """Return a search in every set, by what its columns are called."""
    ks = [len(found.centroids) for found in prototypes]
    names = [f"{k}" if ks.count(k) == 1 else f"{k}_{head}" for head, k in enumerate(ks, 1)]
    return {name: _Nearest(found, device) for name, found in zip(names, prototypes, strict=True)}


class _Nearest:
    """The nearest of some prototypes."""

    def __init__(self, prototypes: PrototypeSet, device: torch.device):
        self._centroids = prototypes.centroids.to(device)
        self._search = pick_backend("auto", device, torch.float32, self._centroids.shape[1]).nearest

    def __call__(self, unit: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest prototypes [n] int32 and the distances to them [n] float32, of unit features [n, d]."""
        nearest = self._search(unit, self._centroids)
        distance = squared_distance(unit, self._centroids, nearest.long()).sqrt()
        return nearest.int().cpu().numpy(), distance.cpu().numpy()


def _shown(parts: Iterator[Part], images: int) -> Iterator[Part]:
    """Yield the parts, with a progress bar where the output is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("embedding", total=images)
        for part in parts:
            yield part
            bar.advance(task, len(part.features))


class _Names:
    """Where images lie, and their classes, as text for tables."""

    def __init__(self, images: ImageSet):
        self._paths, self._labels = images.keys(), images.labels
        self._classes = images.classes if isinstance(images, ImageFolder) else None
        self.count = len(images)

    def columns(self, begin: int, end: int) -> dict[str, Sequence[str]]:
        """Return the columns of these images, by name."""
        found = {"path": [_text(path) for path in self._paths[begin:end]]}
        if self._labels is not None:
            found["label"] = [self._class(label) for label in self._labels[begin:end]]
        return found

    def _class(self, label: int) -> str:
        return str(label) if self._classes is None else _text(self._classes[label])


def _text(path: str) -> str:
    """Return a path as text. Bytes that are no UTF-8, which file systems allow and tables do not, become question
    marks.
    """
    return path.encode("utf-8", "replace").decode()


def _of_clusters(part: Part) -> dict[str, np.ndarray]:
    """Return the columns of a part's clusters, by name."""
    return {
        f"{name}_{of}": values
        for of, found in part.clusters.items()
        for name, values in zip(("cluster", "distance"), found, strict=True)
    }


def _to_parquet(file: Path, names: _Names, parts: Iterator[Part]) -> None:
    """Write a row group for every part, so that no more than one is held in memory."""
    arrow, parquet = _pyarrow()

    def write(out: BinaryIO) -> None:
        writer, begin = None, 0
        for part in parts:
            end = begin + len(part.features)
            features = arrow.FixedSizeListArray.from_arrays(part.features.ravel(), part.features.shape[1])
            table = arrow.table({**names.columns(begin, end), "features": features, **_of_clusters(part)})
            writer = writer or parquet.ParquetWriter(out, table.schema)
            writer.write_table(table)
            begin = end
        writer.close()

    write_whole(file, write)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            'a .parquet file needs the package pyarrow: pip install "pcl-fast[parquet]"; or write a .npy file'
        ) from error
    return pyarrow, pyarrow.parquet


def _to_numpy(file: Path, names: _Names, parts: Iterator[Part]) -> None:
    text = io.StringIO(newline="")
    rows = csv.writer(text)

    def write(out: BinaryIO) -> None:
        begin = 0
        for part in parts:
            end = begin + len(part.features)
            columns = {**names.columns(begin, end), **_of_clusters(part)}
            if not begin:
                _write_header(out, (names.count, part.features.shape[1]))
                rows.writerow(columns)
            out.write(part.features.astype("<f4").tobytes())
            rows.writerows(zip(*columns.values(), strict=True))
            begin = end

    write_whole(file, write)
    write_whole(file.with_suffix(".csv"), lambda out: out.write(text.getvalue().encode()))


def _write_header(out: BinaryIO, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})


_WRITERS = {PARQUET: _to_parquet, NUMPY: _to_numpy}


if __name__ == "__main__":
    main()
