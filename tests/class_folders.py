"""Images in class folders, for tests."""

from __future__ import annotations

from pathlib import Path


def write_images(root: Path) -> Path:
    """53 JPEGs of 3 classes (18, 18, 17): smooth colour patterns of different sizes."""
    import numpy as np  # not above: tests of kernels run on machines that have neither
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(3):
        (root / f"class_{label}").mkdir(parents=True)
        for number in range(18 if label < 2 else 17):
            coarse = rng.integers(0, 256, (3 + label, 3 + label, 3), dtype=np.uint8)
            side = (36 + number % 3, 34 + number % 5)
            image = Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC)
            image.save(root / f"class_{label}" / f"{number:02d}.jpg")
    return root
