"""What bounds the DALI loader: images/s of its stages one by one, of photographs of ImageNet's size.

    python bench/decoding.py [--batches 16] [--threads 16]

- reading: files and headers, without decoding, by one thread, by four, and by as many as the loader has.
- decoding: DALI's decoder alone, from bytes that are in memory, on the CPU; and where there is a GPU, on it, with each
  share of the hardware's engines (hw_decoder_load), and with PIL's way to enlarge colours (jpeg_fancy_upsampling, which
  the loader takes) or without.
- clustering views: the loader as it is, with --data.decode-on gpu and cpu.

The most that the engines for JPEG were busy is shown where the driver tells.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import device
import numpy as np
import recipe
import torch
from nvidia.dali import fn, pipeline_def, types

from pcl_fast.data import ImageFolder, clustering_loader
from pcl_fast.data.loaders.dali_decoder import for_dali
from pcl_fast.data.loaders.resources import pick_resources

BATCH, WARM_UP = 256 if device.CUDA else 32, 3
LOADS = (0.0, 0.65, 0.9, 1.0)


def reading(images: ImageFolder, batches: int, threads: int) -> float:
    """Return images/s of so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        count = sum(1 for _ in pool.map(lambda index: for_dali(images, index), places(len(images), batches)))
        return count / (time.perf_counter() - begin)


def places(images: int, batches: int) -> list[int]:
    """Return the images of so many batches, of which there may be fewer."""
    return [number % images for number in range(batches * BATCH)]


def decoding(encoded: list[np.ndarray], batches: int, threads: int, **options) -> float:
    """Return images/s of a pipeline that only decodes; options: fn.decoders.image's."""
    source = itertools.cycle([encoded[at : at + BATCH] for at in range(0, len(encoded), BATCH)])

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=0 if device.CUDA else None, prefetch_queue_depth=2)
    def pipeline():
        data = fn.external_source(source=lambda: next(source), dtype=types.UINT8, ndim=1, batch=True, no_copy=True)
        return fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False, **options)

    made = pipeline()
    made.build()
    return rate(made.run, batches)


def clustering_views(images: ImageFolder, batches: int, threads: int, decode_on: str) -> float:
    """Return images/s of the loader."""
    config = replace(recipe.pcl_v2(BATCH, "dali").data, workers=threads, decode_on=decode_on)
    loader = clustering_loader(images, config, batch_size=BATCH, world=recipe.WORLD)
    stream: Iterator[torch.Tensor] = itertools.chain.from_iterable(itertools.repeat(loader))
    return rate(lambda: next(stream), batches)


def rate(step: Callable[[], object], batches: int) -> float:
    """Return the images/s of a step that makes a batch."""
    for _ in range(WARM_UP):
        step()
    if device.CUDA:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(batches):
        step()
    if device.CUDA:
        torch.cuda.synchronize()
    return batches * BATCH / (time.perf_counter() - begin)


class Engines:
    """How busy the engines for JPEG were at most, in percent, by the driver; None where it does not tell."""

    def __init__(self) -> None:
        self.most: int | None = None
        self.tells = device.CUDA

    def look(self) -> None:
        """Ask once more, unless there has been no answer."""
        try:
            busy = _busy() if self.tells else None
        except Exception:  # the package is not there, or the driver does not tell
            self.tells, busy = False, None
        if busy is not None:
            self.most = max(busy, self.most or 0)


def _busy() -> int:
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetJpgUtilization(pynvml.nvmlDeviceGetHandleByIndex(0))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument(
        "--threads", type=int, default=pick_resources(recipe.pcl_v2(BATCH).data, recipe.WORLD.device).threads
    )
    arguments = parser.parse_args()
    batches, threads = arguments.batches, arguments.threads
    images = recipe.folder()[0].subset(list(range(8 * BATCH if device.CUDA else 2 * BATCH)))
    encoded = [np.frombuffer(images.encoded(index), np.uint8) for index in range(len(images))]
    cases: dict[str, Callable[[], float]] = {
        f"reading by {some} threads": lambda some=some: reading(images, batches, some)
        for some in sorted({1, 4, threads})
    }
    cases["decoding on the CPU"] = lambda: decoding(encoded, batches, threads, device="cpu")
    if device.CUDA:
        for load, fancy in itertools.product(LOADS, (True, False)):
            name = f"decoding on the GPU, {load:.0%} by its engines{'' if fancy else ', colours not interpolated'}"
            options = {"device": "mixed", "hw_decoder_load": load, "jpeg_fancy_upsampling": fancy}
            cases[name] = lambda options=options: decoding(encoded, batches, threads, **options)
    for decode_on in ("gpu", "cpu") if device.CUDA else ("cpu",):
        name = f"clustering views, decoded on the {decode_on.upper()}"
        cases[name] = lambda decode_on=decode_on: clustering_views(images, batches, threads, decode_on)
    print(f"{len(images)} photographs, {threads} threads, batches of {BATCH}")
    for name, case in cases.items():
        engines = Engines()
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(case)
            while not job.done():
                engines.look()
                time.sleep(0.05)
        busy = "" if engines.most is None else f", engines busy to {engines.most}%"
        print(f"{job.result():9,.0f} images/s  {name}{busy}", flush=True)


if __name__ == "__main__":
    main()
