"""Photographs without a download, for benchmarks and tests: pieces of the two that scikit-learn contains."""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

# The size of an average image of ImageNet, which has 110 KB. Pieces of photographs have that many bytes only if they
# are hardly compressed.
WIDTH, HEIGHT, QUALITY = 500, 375, 98


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(array) for array in load_sample_images().images)


def piece(seed: int, width: int, height: int, least: float = 0.4) -> Image.Image:
    """Return a random piece of a photograph, resized to width x height, and mirrored half of the time.

    Its sides are at least `least` times those of the largest piece of this shape.
    """
    rng = np.random.default_rng(seed)
    photo = photographs()[seed % 2]
    scale = rng.uniform(least, 1.0) * min(photo.width / width, photo.height / height)
    cut = (int(width * scale), int(height * scale))
    left, top = rng.integers(0, photo.width - cut[0] + 1), rng.integers(0, photo.height - cut[1] + 1)
    image = photo.crop((left, top, left + cut[0], top + cut[1])).resize((width, height), Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def write_pieces(folder: Path, images: int, width: int = 200, height: int = 150) -> None:
    """Write JPEGs 00.jpg, 01.jpg, ... of slightly different sizes."""
    for seed in range(images):
        piece(seed, width + seed % 3, height - seed % 4).save(folder / f"{seed:02d}.jpg", quality=92)


def write_photographs(folder: Path, images: int) -> float:
    """Write JPEGs of ImageNet's size, each the left of one piece beside the right of another; return their mean size in
    bytes.
    """
    with ProcessPoolExecutor() as pool:
        sizes = list(pool.map(_write_photograph, [folder] * images, range(images), chunksize=16))
    return sum(sizes) / images


def _write_photograph(folder: Path, number: int) -> int:
    left, right = (piece(2 * number + half, WIDTH, HEIGHT, least=0.85) for half in (0, 1))
    seam = int(np.random.default_rng(number).integers(WIDTH // 4, 3 * WIDTH // 4))
    left.paste(right.crop((seam, 0, WIDTH, HEIGHT)), (seam, 0))
    path = folder / f"{number:05d}.jpg"
    left.save(path, quality=QUALITY)
    return path.stat().st_size
