"""A site of a few images with names that a page must not take for anything else, and how it is read without a
browser.
"""

from __future__ import annotations

import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from launches import run_here
from PIL import Image

from pcl_fast import explore as command
from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import to_dict, with_settings
from pcl_fast.demo import small
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build
from pcl_fast.run.checkpoint import save_checkpoint

ODD_NAMES = (
    "\"quoted\" 'twice'.png",
    "<img src=x onerror=document.title=1>.png",
    "<script>document.title=2<script>.png",
    "übermäßig 写真 \u2028 a&amp;b #1?.png",
)
CLASSES = ("<b>\"first\" & 'last'", "zweite Größe", "third")
KS = (3, 9)


def write_images(root: Path, count: int = 120, classes: tuple[str, ...] = CLASSES) -> Path:
    """Images of bright squares on noise, the first with odd names; the last is a copy of the one before it."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 60, (24, 24, 3), dtype=np.uint8)
        left, top = random.integers(0, 14, 2)
        pixels[top : top + 10, left : left + 10] = 150
        pixels[top : top + 10, left : left + 10, number % 3] = 230
        folder = root / classes[number % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        name = ODD_NAMES[number] if number < len(ODD_NAMES) else f"{number:03}.png"
        Image.fromarray(pixels).save(folder / name)
        if number == count - 1:
            Image.fromarray(pixels).save(folder / "copy.jpg", quality=95, subsampling=0)
    return root


def write_run(folder: Path, images: Path, preset: str = "demo", ks: tuple[int, ...] = KS) -> Path:
    """A run whose encoder has learned nothing; its prototypes, if its method has any, are random directions."""
    count = sum(1 for _ in images.rglob("*.*"))
    settings = {"data.root": images, "output": folder}
    if ks:
        settings["cluster.ks"] = ks
    if preset == "demo":
        settings["model.queue_size"] = 64
    world = World(0, 1, torch.device("cpu"), None)
    config = with_settings(small(preset), settings)
    method = build(config, world, count)
    if ks:
        random = torch.Generator().manual_seed(0)
        centres = [F.normalize(torch.randn(k, config.model.dim, generator=random), dim=1) for k in ks]
        nowhere = torch.zeros(count, dtype=torch.int32)
        method.prototypes.replace([PrototypeSet(c, torch.linspace(0.1, 0.3, len(c)), nowhere) for c in centres])
    folder.mkdir(parents=True)
    save_checkpoint(folder, {"config": to_dict(config), "epoch": 2, **Learner(method, config, world).state()})
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    rows = [
        {"kind": "epoch", "step": 9 * e, "epoch": e, "loss": 5 - e, "seconds": {"training": 2.0, "features": 0.5}}
        for e in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


run = functools.partial(run_here, command.main)


def data(site: Path, name: str) -> Any:
    """What one of the script files hands over; it must be a single call with JSON."""
    text = (site / "data" / f"{name}.js").read_text(encoding="utf-8")
    found = re.fullmatch(r'receive\("([\w/]+)",(.*)\);\n', text)
    assert found
    assert found[1] == name
    # Nothing that could end the script or a line of it.
    assert not re.search("[<\u2028\u2029]", found[2])
    return json.loads(found[2])


class Page(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.text += text

    def all(self, name: str) -> list[str]:
        """The values of an attribute, wherever it is."""
        return [attributes[name] for _, attributes in self.elements if attributes.get(name)]
