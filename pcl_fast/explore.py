"""Write a site that shows what a run has found in its images: clusters, a map, neighbours, duplicates and outliers.

    python -m pcl_fast.explore RUN [--data DIR] --output DIR [--flags]

DIR/index.html opens in any browser, from the disk: no server, no network. The images may be others than the run has
seen. One process does it all, on a GPU if there is one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from pcl_fast.clustering import PrototypeSet, cluster
from pcl_fast.command import command
from pcl_fast.command_line import Integers
from pcl_fast.config import DataConfig
from pcl_fast.data import ImageSet, check_headers, clustering_loader, open_set
from pcl_fast.data.loaders.resources import pick_resources
from pcl_fast.distributed import World, connect
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.features import frozen_backbone
from pcl_fast.exploring.history import history_of
from pcl_fast.exploring.knowledge import gather
from pcl_fast.exploring.place import check_place, written_beside
from pcl_fast.exploring.progress import Bar
from pcl_fast.exploring.site import Story, templates, write_site
from pcl_fast.pretrained import Pretrained
from pcl_fast.pretrained.files import locate, read
from pcl_fast.pretrained.ours import is_ours
from pcl_fast.pretrained.reading import encoder_of
from pcl_fast.schedule import encoded_at_a_time

# Images per cluster of features that are clustered here, from coarse to fine.
_PER_CLUSTER = (300, 150, 75)
# The mean of their concentrations, the paper's.
_TEMPERATURE = 0.2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is shown, and where."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder or one of its checkpoints, or any other that pcl_fast.evaluate reads."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The site's folder."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The images; None: those that the run was trained on."""
    ks: Integers = ()
    """Cluster the features anew, into so many. Empty: the run's prototypes, or where it has none, numbers that go with
    the number of images."""
    images: int = 100_000
    """Of more images an evenly spaced sample of so many is shown."""
    on_map: int = 20_000
    """Of more images an evenly spaced sample of so many is on the map."""
    size: int | None = None
    """Side of the centre crops, in pixels; None: what the encoder was trained with, or 224."""
    format: Literal["folder", "webdataset"] | None = None
    """How images lie on disk, as in pcl_fast.train; None: as those that the run was trained on, or folder."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes and crops; auto is DALI wherever it can be imported."""
    workers: int | None = None
    """Threads or processes that read and decode, as in pcl_fast.train."""
    force: bool = False
    """Replace the site that is there. What is no site is never touched."""


def main() -> None:
    with command("pcl_fast.explore"):
        explore(tyro.cli(Options, prog="pcl_fast.explore", description=__doc__))


def explore(options: Options) -> None:
    """Write the site.

    Raises:
        ValueError: an option cannot work; names it.
        UserError: the checkpoint or the images cannot be used, or something is there already.
        OSError: the output cannot be written.
    """
    options = replace(options, output=Path(os.path.abspath(options.output)))
    _check(options)
    world, bar = connect(), Bar()
    if world.size > 1:
        raise ValueError("pcl_fast.explore is one process; start it without torchrun")
    pretrained, trained_on = _read(options.run)
    pretrained.to(world.device)
    images, data = _open(options, pretrained, trained_on)
    notes = [images.describe()]
    total = len(images)
    if total > options.images:
        places = np.linspace(0, total - 1, options.images).round().astype(int)
        images = images.subset(places.tolist())
        notes.append(f"Shown is a sample of {len(images)} of the {total} images, evenly spaced; all counts are of it.")
    print(f"{pretrained.source}: {pretrained.path}", *notes, sep="\n  ", flush=True)
    features = _features(pretrained, images, data, world, bar)
    prototypes, source = _prototypes(options, pretrained, features)
    notes.append(source)
    print(f"  {source}", flush=True)
    known = gather(images, features, prototypes, bar)
    story = Story(
        pretrained.path.parent.name,
        notes,
        history_of(pretrained),
        sampled=len(images) < total,
        complete=all(len(found.assignment) == len(images) == total for found in prototypes),
    )
    threads = pick_resources(data, world.device).threads
    with written_beside(options.output, force=options.force) as folder:
        write_site(folder, known, story, bar, on_map=options.on_map, threads=threads)
    print(f"written: {options.output / 'index.html'}")


def _check(options: Options) -> None:
    for name in ("images", "on_map"):
        if getattr(options, name) < 2:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 2, not {getattr(options, name)}")
    if any(k < 1 for k in options.ks) or len(set(options.ks)) < len(options.ks):
        raise ValueError(f"--ks must be different positive numbers, not {' '.join(map(str, options.ks))}")
    templates()
    check_place(options.output, force=options.force)


def _read(path: Path) -> tuple[Pretrained, dict[str, str]]:
    """Read the encoder whose features are clustered, the momentum encoder where there are two; and the root and format
    of the images that it was trained on, where the file says them.
    """
    file = locate(path)
    content = read(file)
    data = content["config"]["data"] if is_ours(content) else {}
    trained_on = {name: data[name] for name in ("root", "format") if data.get(name)}
    return encoder_of(content, "momentum", file, or_only=True), trained_on


def _open(options: Options, pretrained: Pretrained, trained_on: dict[str, str]) -> tuple[ImageSet, DataConfig]:
    """Return the images, and how they are read and cropped.

    Raises:
        ValueError: no images are named, or the encoder does not take images of this size.
        ImageError: they are not where they were, or cannot be used.
    """
    if options.data is None and "root" not in trained_on:
        raise ValueError(f"{pretrained.path} does not say what it was trained on; name the images with --data DIR")
    root = options.data or Path(trained_on["root"])
    if options.data is None and not root.is_dir():
        raise ImageError(
            f"the run was trained on images in {root}, which is not there any more; say with --data DIR where they are"
        )
    format = options.format or (trained_on.get("format") if options.data is None else None) or "folder"
    images = open_set(root, format, apart_from=options.output)
    if len(images) < 2:
        raise ImageError(f"{root} has one image; there is nothing to compare it with")
    for line in check_headers(images):
        print(line, flush=True)
    where = {"root": root, "format": format}
    return images, pretrained.reading(options.size, loader=options.loader, workers=options.workers, cache=None, **where)


@torch.inference_mode()
def _features(pretrained: Pretrained, images: ImageSet, data: DataConfig, world: World, bar: Bar) -> torch.Tensor:
    """Return float32 [n, d] of unit length: the head's features, or the backbone's where there is no head."""
    encode, head = frozen_backbone(pretrained, world.device), pretrained.head or torch.nn.Identity()
    rows = encoded_at_a_time(world.device)
    parts, done = [], 0
    with bar.phase("features", len(images)) as progress:
        for batch in clustering_loader(images, data, batch_size=rows, world=world):
            parts.append(F.normalize(head(encode(batch)).float(), dim=1))
            done += len(batch)
            progress(done)
    return torch.cat(parts).contiguous()


def _prototypes(options: Options, pretrained: Pretrained, features: torch.Tensor) -> tuple[list[PrototypeSet], str]:
    """Return what the clusters are, and say where it comes from."""
    if pretrained.prototypes and not options.ks:
        by_number = {len(found.centroids): found for found in reversed(pretrained.prototypes)}
        several = len(by_number) < len(pretrained.prototypes)
        others = " Of heads with equally many, the first one's are shown." if several else ""
        return list(by_number.values()), f"The clusters are those of the run's prototypes.{others}"
    ks = options.ks or tuple(sorted({max(2, round(len(features) / images)) for images in _PER_CLUSTER}))
    if max(ks) > len(features):
        raise ValueError(f"--ks {max(ks)} is more than the {len(features)} images")
    why = "As --ks asks" if pretrained.prototypes else "The checkpoint has no prototypes"
    numbers = ", ".join(map(str, sorted(ks)))
    sets = cluster(features, sorted(ks), temperature=_TEMPERATURE)
    return sets, f"{why}: its features were clustered by k-means for these pages, into {numbers} clusters."


if __name__ == "__main__":
    main()
