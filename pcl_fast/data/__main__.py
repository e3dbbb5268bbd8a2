"""Look after a data set before training on it: python -m pcl_fast.data check DIR"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from pcl_fast.command import command
from pcl_fast.data.sources.check import find_broken
from pcl_fast.data.sources.formats import open_set
from pcl_fast.data.sources.images import ImageSet


def main() -> None:
    with command("pcl_fast.data"):
        tyro.extras.subcommand_cli_from_dict({"check": check}, prog="pcl_fast.data", description=__doc__)


def check(
    folder: tyro.conf.Positional[Path],
    format: Literal["folder", "webdataset"] = "folder",
    threads: int = os.cpu_count() or 1,
) -> None:
    """Decode every image and print those that cannot be decoded. The command exits with 1 if there are any.

    Args:
        folder: class folders of images, a flat folder of images, or tar shards.
        format: webdataset for tar shards.
        threads: how many images are decoded at once.
    """
    images = open_set(folder, format, strict=False)
    print(images.describe(), flush=True)
    broken = _decode(images, threads)
    for index, reason in broken.items():
        print(f"{images.name(index)}: {reason}")
    if broken:
        print(f"{len(broken)} of {len(images)} images cannot be decoded")
        sys.exit(1)
    print(f"all {len(images)} images can be decoded")


def _decode(images: ImageSet, threads: int) -> dict[int, str]:
    """Run `find_broken`, with a progress bar where the output is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return find_broken(images, threads=threads)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("decoding", total=len(images))
        return find_broken(images, threads=threads, progress=lambda done: bar.update(task, completed=done))


if __name__ == "__main__":
    main()
