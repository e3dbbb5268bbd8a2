"""A tiny data set in COCO's form: bright rectangles on a dark ground."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

# Height and width of the images, and the rectangles of the first of them: x1, y1, x2, y2 and a class.
SIZE = (40, 56)
RECTANGLES = [((4, 6, 30, 26), 0), ((32, 10, 52, 36), 1)]


def rectangles(number: int) -> list[tuple[tuple[int, int, int, int], int]]:
    """Those of image `number`, a little elsewhere in each."""
    return [((x1 + number % 3, y1, x2 + number % 3, y2), label) for (x1, y1, x2, y2), label in RECTANGLES]


def picture(number: int) -> Image.Image:
    """A red one is of class 0, a green one of class 1."""
    pixels = np.full((*SIZE, 3), 20 + number, np.uint8)
    for (x1, y1, x2, y2), label in rectangles(number):
        pixels[y1:y2, x1:x2] = (220, 40, 40) if label == 0 else (40, 220, 40)
    return Image.fromarray(pixels)


# COCO's numbers have gaps; these come in another order than by number.
CATEGORIES = [{"id": 7, "name": "green"}, {"id": 3, "name": "red"}]


def write_coco(root: Path, images: int = 4) -> Path:
    """train2017 and val2017 with the same images: numbers from 10 on, with two objects each, one of them given by a
    run-length code. The first image has a crowd and two objects without an area too, and one more image has nothing.
    """
    (root / "annotations").mkdir(parents=True)
    entries = [
        {"id": 10 + number, "file_name": f"{number:012d}.jpg", "height": SIZE[0], "width": SIZE[1]}
        for number in range(images + 1)
    ]
    objects = [
        {"image_id": 10 + number, "category_id": (3, 7)[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0,
         "area": (x2 - x1) * (y2 - y1), "segmentation": _code(box) if label else _polygon(box)}
        for number in range(images)
        for box, label in rectangles(number)
        for x1, y1, x2, y2 in [box]
    ]  # fmt: skip
    crowd = {"image_id": 10, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1, "area": 81}
    nothing = {"image_id": 10, "category_id": 3, "bbox": [5, 5, 0, 8], "iscrowd": 0, "area": 0}
    objects.append({**crowd, "segmentation": _code((0, 0, 9, 9))})
    objects.append({**nothing, "segmentation": _polygon((5, 5, 6, 13))})
    objects.append({**nothing, "bbox": [5, 5, 3, 8], "segmentation": [[5, 5, 8, 13]]})
    content = {
        "images": entries[::-1],
        "categories": CATEGORIES,
        "annotations": [{"id": 100 + number, **item} for number, item in enumerate(objects)],
    }
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for number, entry in enumerate(entries):
            image = picture(number) if number < images else Image.new("RGB", SIZE[::-1])
            image.save(root / split / entry["file_name"], quality=95)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _polygon(box: tuple[int, int, int, int]) -> list[list[int]]:
    """In two parts, as where something hides the middle."""
    x1, y1, x2, y2 = box
    middle = (y1 + y2) // 2
    return [[x1, y1, x2, y1, x2, middle, x1, middle], [x1, middle, x2, middle, x2, y2, x1, y2]]


def _code(box: tuple[int, int, int, int]) -> dict:
    """Runs of zeros and ones down the columns, which begin with zeros."""
    x1, y1, x2, y2 = box
    counts = [x1 * SIZE[0] + y1]
    for _ in range(x2 - x1):
        counts += [y2 - y1, SIZE[0] - (y2 - y1)]
    counts[-1] = SIZE[0] * SIZE[1] - sum(counts[:-1])
    return {"size": list(SIZE), "counts": counts}


def change_coco(root: Path, split: str, change) -> None:
    """Let `change` alter what the annotations of a split say."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
