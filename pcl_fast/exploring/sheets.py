"""Thumbnails, many to a file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pcl_fast.data import ImageSet
from pcl_fast.exploring.findings import GREY_SIDE, grey

# A sheet has so many thumbnails a side; a chunk of data is about the images of a sheet.
ACROSS = 16
PER_SHEET = ACROSS * ACROSS
# Pixels a side, at most: photographs take about 2 KB each.
_MOST = 80
_QUALITY = 75


def tile_of(images: ImageSet) -> int:
    """Return the thumbnails' side in pixels: that of the images, up to a limit; judged by a few of them."""
    few = range(0, len(images), max(1, len(images) // 8))
    return min(_MOST, max(min(images.read(index).size) for index in few))


def write_sheets(
    images: ImageSet, folder: Path, tile: int, *, threads: int, progress: Callable[[int], None]
) -> np.ndarray:
    """Write folder/0.webp, folder/1.webp, ...: the images' centre squares, as the encoder sees about them too.

    Args:
        images: n of them, in the order of the site.
        folder: which is there.
        tile: the side of a thumbnail.
        threads: how many decode at once.
        progress: is told how many images are done.

    Returns:
        uint8 [n, GREY_SIDE, GREY_SIDE], see `grey`.

    Raises:
        ImageError: an image cannot be decoded; names it.
    """
    greys = np.zeros((len(images), GREY_SIDE, GREY_SIDE), np.uint8)

    def thumbnail(index: int) -> Image.Image:
        image = images.read(index)
        greys[index] = grey(image)
        return ImageOps.fit(image, (tile, tile), Image.Resampling.BICUBIC)

    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(images), PER_SHEET):
            end = min(begin + PER_SHEET, len(images))
            rows = -(-(end - begin) // ACROSS)
            sheet = Image.new("RGB", (ACROSS * tile, rows * tile))
            for place, image in enumerate(pool.map(thumbnail, range(begin, end))):
                sheet.paste(image, (place % ACROSS * tile, place // ACROSS * tile))
            sheet.save(folder / f"{begin // PER_SHEET}.webp", quality=_QUALITY)
            progress(end)
    return greys
