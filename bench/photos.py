"""Photographs without a download: cuts of the two that ship with scikit-learn, for benchmarks and tests."""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

# An average image of ImageNet: 110 KB. That much detail takes fine cuts and little compression.
WIDTH, HEIGHT, QUALITY = 500, 375, 98


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(array) for array in load_sample_images().images)


def piece(seed: int, width: int, height: int, least: float = 0.4) -> Image.Image:
    """A random cut of a photograph, resized, mirrored half of the time; at least so large a share of the largest."""
    rng = np.random.default_rng(seed)
    photo = photographs()[seed % 2]
    scale = rng.uniform(least, 1.0) * min(photo.width / width, photo.height / height)
    cut = (int(width * scale), int(height * scale))
    left, top = rng.integers(0, photo.width - cut[0] + 1), rng.integers(0, photo.height - cut[1] + 1)
    image = photo.crop((left, top, left + cut[0], top + cut[1])).resize((width, height), Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def write_pieces(folder: Path, images: int, width: int = 200, height: int = 150) -> None:
    """JPEGs 00.jpg, 01.jpg, ... of slightly different sizes."""
    for seed in range(images):
        piece(seed, width + seed % 3, height - seed % 4).save(folder / f"{seed:02d}.jpg", quality=92)


def write_photographs(folder: Path, images: int) -> float:
    """So many JPEGs of ImageNet's size, each the left of one cut and the right of another; returns their mean bytes."""
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
