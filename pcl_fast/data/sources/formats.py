"""The forms in which a data set may lie on disk."""

from __future__ import annotations

from pathlib import Path

from pcl_fast.data.sources.folder import find_images
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.data.sources.shards import find_shards


def open_set(root: Path, format: str, *, strict: bool = True, apart_from: Path | None = None) -> ImageSet:
    """Open the data set in a folder.

    Args:
        root: the folder.
        format: "folder" (of class folders, or of images) or "webdataset" (of tar shards).
        strict: refuse a folder with empty image files or broken links.
        apart_from: a folder that must not lie among image files, see `find_images`.

    Raises:
        ImageError: the folder does not hold such a data set.
        ValueError: there is no such format.
    """
    if format == "folder":
        return find_images(root, strict=strict, apart_from=apart_from)
    if format == "webdataset":
        return find_shards(root)
    raise ValueError(f"--data.format must be folder or webdataset, got {format!r}")
