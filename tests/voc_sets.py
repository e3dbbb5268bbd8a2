"""Small sets that look like PASCAL VOC's devkit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pcl_fast.data.sources.voc import VOC_CLASSES

Objects = list[tuple[str, tuple[int, int, int, int], bool]]


def write_voc(
    root: Path, year: int, splits: dict[str, dict[str, Objects]], *, size: tuple[int, int] = (48, 40)
) -> Path:
    """Write root/VOCdevkit/VOC<year> and return root/VOCdevkit.

    splits: for every split its images, and on each the objects (class, box with pixels counted from 1, difficult).
    size: width and height of the images: noise, with a bright block where an object is, whose colour is its class's.
    """
    home = root / "VOCdevkit" / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (home / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(year)
    for split, images in splits.items():
        for name, objects in images.items():
            _write_image(home, name, objects, size, rng)
        for kind in VOC_CLASSES:
            lines = [f"{name} {_presence(kind, objects):2d}" for name, objects in images.items()]
            (home / "ImageSets" / "Main" / f"{kind}_{split}.txt").write_text("\n".join(lines) + "\n")
    return root / "VOCdevkit"


def _presence(kind: str, objects: Objects) -> int:
    marks = [difficult for name, _, difficult in objects if name == kind]
    return -1 if not marks else 0 if all(marks) else 1


def _write_image(home: Path, name: str, objects: Objects, size: tuple[int, int], rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    items = []
    for kind, (left, top, right, bottom), difficult in objects:
        number = VOC_CLASSES.index(kind)
        pixels[top - 1 : bottom, left - 1 : right] = 120 + 45 * np.array([number % 3, number // 3 % 3, number // 9])
        sides = zip(("xmin", "ymin", "xmax", "ymax"), (left, top, right, bottom), strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        items.append(
            f"<object><name>{kind}</name><difficult>{int(difficult)}</difficult><bndbox>{box}</bndbox></object>"
        )
    Image.fromarray(pixels).save(home / "JPEGImages" / f"{name}.jpg", quality=95)
    (home / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(items)}</annotation>")
