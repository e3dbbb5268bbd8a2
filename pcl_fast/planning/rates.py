"""What a GPU, and its share of the machine around it, can do: machines.py's figures, unless a GPU's own record says."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np

from pcl_fast.nn.fusion import WAYS
from pcl_fast.planning.figures import Constant, Record, Records
from pcl_fast.planning.machines import CLUSTERING, HELPED, MACHINES, MEASURED, ON_HOST

_SI = {"images_per_s": 1.0, "tflop_per_s": 1e12, "median_ms": 1e-3, "estimated_paper_ms": 1e-3, "share_of_sum": 1.0}


# PyTorch's training on a V100 is 1.5% slower with 128 images than with 256, of which it does 1200 a second: 128 / 1182
# = 128 a + overhead, 256 / 1200 = 256 a + overhead. Rates of inference by their batch say nothing of it: those that are
# published of an A100 do not even grow with the batch.
STEP_OVERHEAD = Constant(
    "of a step, whatever its images",
    2 * 128 / (0.985 * 1200) - 256 / 1200,
    "s",
    "assumed: 3.2 ms a step, which explain PyTorch's 1.5% between 128 and 256 images (published: NVIDIA "
    "DeepLearningExamples, PyTorch resnet50v1.5, V100); less than 128 are published nowhere",
)


class Precision(NamedTuple):
    """How fast a GPU is in one precision: supervised training in images/s of all GPUs of one machine by their number,
    with `batch` images per GPU and step; a forward pass in images/s by its batch; products in FLOP/s; bytes a number.
    """

    by_gpus: dict[int, float]
    batch: int
    training_source: str
    by_batch: dict[int, float]
    forward_source: str
    peak: float
    itemsize: int

    def training(self, gpus: int) -> Constant:
        """Images/s of each GPU, on a straight line between the numbers that were measured; beyond them as the nearest.

        What is lost on the way to 8 GPUs is taken as published. An all-reduce does not explain it: 102 MB of gradients
        take less than 2 ms, most of it beside the backward pass, but NVIDIA's steps with 8 V100s take 33 ms longer.
        """
        each = {number: total / number for number, total in self.by_gpus.items()}
        name = f"training, {gpus} GPU{'s' * (gpus > 1)} of a machine, batch {self.batch} each"
        having = "" if gpus in each else f", which has {', '.join(map(str, each))} GPUs"
        return Constant(name, _between(each, gpus), "images/s per GPU", self.training_source + having)

    def forward(self, batch: int) -> Constant:
        """Images/s of a forward pass. Seconds of a batch lie on a straight line between the measured ones; a smaller
        batch than these takes as long as the smallest, and images of a larger one as long as those of the largest.
        """
        rows = min(batch, max(self.by_batch))
        seconds = _between({size: size / rate for size, rate in self.by_batch.items()}, rows)
        return Constant(f"forward pass, batch {batch}", rows / seconds, "images/s per GPU", self.forward_source)

    def share(self, batch: int, of: int) -> Constant:
        """The speed of training with `batch` by that with `of`: a step takes as long as its images, and STEP_OVERHEAD.

        With seconds an image a = 1 / rate - overhead / of it is (1 / rate) / (a + overhead / batch).
        """
        image = 1 / self.training(1).value
        each = image - STEP_OVERHEAD.value / of
        value = image / (each + STEP_OVERHEAD.value / batch)
        return Constant(f"speed with batch {batch} by that with {of}", value, "", STEP_OVERHEAD.source)


def _between(points: dict[int, float], at: int) -> float:
    return float(np.interp(at, list(points), list(points.values())))


class MeasuredStep(NamedTuple):
    """Query forward and backward, key forward on one GPU: images/s, with which batch, in which of fusion's ways, and
    whether as a CUDA graph.
    """

    rate: Constant
    batch: int
    way: str
    captured: bool


@dataclass(frozen=True)
class Machine:
    """A GPU, and its share of the machine around it: constants, with what tables call them and their units."""

    name: str
    half: Precision  # mixed precision, channels last
    single: Precision  # float32; from the A100 on TF32, which PyTorch takes for convolutions
    fused: Precision | None  # as half, with batch norm, shortcut and ReLU in one operation, where that is published
    vector_peak: Annotated[Constant, "true float32", "FLOP/s"]
    bandwidth: Annotated[Constant, "the GPU's memory", "B/s"]
    host_link: Annotated[Constant, "host memory to GPU", "B/s"]
    gpu_link: Annotated[Constant, "all-reduce within a machine", "B/s per GPU"]
    node_link: Annotated[Constant, "between machines, of each", "B/s"]
    cores: Annotated[Constant, "cores per GPU", ""]
    decoded: Annotated[Constant, "DALI, decoding on the GPU", "images/s per core"]
    pair: Annotated[Constant, "PIL, two views", "images/s per core"]
    view: Annotated[Constant, "PIL, one view", "images/s per core"]
    clustering: Annotated[Constant, "k-means, ours", "FLOP/s per GPU"]
    sampling: Annotated[Constant, "choosing negatives of 25k, 50k and 100k, official", "s"]
    loops: Annotated[Constant, "concentration of 1,281,167 images, official", "s"]
    helped: Annotated[Constant, "cache and cores at once, of the sum of their rates", ""]
    loss: Annotated[Constant | None, "loss and gradient of 64 rows, by the columns", "s"] = None
    official_estep: Annotated[Constant | None, "the paper's E-step, official", "s"] = None
    forward: Annotated[Constant | None, "forward pass, batch 256, fused", "images/s per GPU"] = None
    cache: Annotated[Constant | None, "reading the clustering view's cache, each machine", "B/s"] = None
    steps: tuple[MeasuredStep, ...] = ()


_QUANTITIES = {
    field: hint.__metadata__
    for field, hint in get_type_hints(Machine, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}


def constant(field: str, value: float, source: str) -> Constant:
    """The constant of a field of Machine, with its name and unit."""
    name, unit = _QUANTITIES[field]
    return Constant(name, value, unit, source)


def machine(gpu: str, records: Records) -> Machine:
    """What is known of `gpu`: published, and measured where a record's machine has that word in its name.

    Raises:
        ValueError: nothing is known of it, or no record has what no publication says.
    """
    if gpu not in MACHINES:
        raise ValueError(f"--gpu {gpu}: nothing is known of it; choose from {', '.join(MACHINES)}")
    published, own = MACHINES[gpu], records.of_gpu(gpu)
    half, single = (
        Precision(*published[f"{kind}_training"], *published[f"{kind}_forward"], published[f"{kind}_peak"], itemsize)
        for kind, itemsize in (("half", 2), ("single", 4))
    )
    fused = (
        half._replace(**dict(zip(Precision._fields, published["fused_training"], strict=False)))
        if ("fused_training" in published)
        else None
    )
    figures = {field: published[field] for field in _QUANTITIES if field in published}
    figures["helped"] = HELPED
    figures["clustering"] = (CLUSTERING[0] * half.peak, CLUSTERING[1])
    for field, (benchmark, *question, divisor) in MEASURED.items():
        record = own.get(benchmark)
        if field in ON_HOST and field not in published:
            record = records.find(benchmark, *question, first=gpu)
        value = record and record.figure(*question)
        if value is not None:
            by = record.cases[question[0]][divisor] if divisor else 1
            figures[field] = (_SI[question[-1]] * value / by, record.source)
    constants = {field: constant(field, *figure) for field, figure in figures.items()}
    steps = _measured_steps(own["step"]) if "step" in own else ()
    return Machine(name=published["name"], half=half, single=single, fused=fused, steps=steps, **constants)


def _measured_steps(record: Record) -> tuple[MeasuredStep, ...]:
    """The encoder's part of a step, in the ways of which a run chooses one by itself."""
    found = []
    for batch, way, captured in itertools.product((256, 64), WAYS, (False, True)):
        provider = "encoder-only" + f", {way}" * (way != WAYS[0]) + "+graph" * captured
        rate = record.figure(f"resnet50, 224 px, batch {batch}, loader off", provider, "images_per_s")
        if rate is not None:
            name = f"query forward and backward and key forward, by {way}{' in a graph' * captured}, batch {batch}"
            constant = Constant(name, rate, "images/s per GPU", record.source)
            found.append(MeasuredStep(constant, batch, way, captured))
    return tuple(found)
