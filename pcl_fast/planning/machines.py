"""What GPUs and the machines around them can do: published, until a record says more.

Rates are those of ResNet-50 at 224 px. NVIDIA's are of the DeepLearningExamples' READMEs (PyTorch: resnet50v1.5, MXNet:
RN50v1.5), Lambda's of lambdal/deeplearning-benchmark, which runs a fork of the same PyTorch code. Lambda's A100 makes
1582 images/s where NVIDIA's makes 2470: so H100 and H200, of which NVIDIA has published none, are rather too slow here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from pcl_fast.planning.constants import Constant
from pcl_fast.planning.records import Record, Records

_PYTORCH = "published: NVIDIA DeepLearningExamples, PyTorch resnet50v1.5"
_MXNET = "published: NVIDIA DeepLearningExamples, MXNet RN50v1.5"
_LAMBDA = "published: lambdal/deeplearning-benchmark, PyTorch"
_SHEET = "published: NVIDIA's data sheet"


class Training(NamedTuple):
    """Supervised training: images/s of all GPUs of one machine together, by their number; images per GPU and step."""

    by_gpus: dict[int, float]
    batch: int
    source: str

    def per_gpu(self, gpus: int) -> Constant:
        """Images/s of each, on a straight line between the numbers that were measured; beyond them as the nearest.

        What is lost on the way to 8 GPUs is taken as published. An all-reduce does not explain it: 102 MB of gradients
        take less than 2 ms, most of it beside the backward pass, but NVIDIA's steps with 8 V100s take 33 ms longer.
        """
        each = {number: total / number for number, total in self.by_gpus.items()}
        name = f"training, {gpus} GPU{'s' * (gpus > 1)} of a machine, batch {self.batch} each"
        source = self.source
        if gpus not in each:
            source += f", which has {', '.join(map(str, sorted(each)))} GPUs"
        return Constant(name, _between(each, gpus), "images/s per GPU", source)


class Inference(NamedTuple):
    """Images/s of a forward pass by its batch."""

    by_batch: dict[int, float]
    source: str

    def rate(self, batch: int) -> Constant:
        """Seconds of a batch lie on a straight line between the measured ones. A smaller batch than these takes as long
        as the smallest, and images of a larger one as long as those of the largest.
        """
        largest = max(self.by_batch)
        if batch > largest:
            value = self.by_batch[largest]
        else:
            value = batch / _between({size: size / rate for size, rate in self.by_batch.items()}, batch)
        return Constant(f"forward pass, batch {batch}", value, "images/s per GPU", self.source)

    def share(self, batch: int, of: int) -> Constant:
        """Rate with `batch` by that with `of`."""
        value = self.rate(batch).value / self.rate(of).value
        kind, _, where = self.source.partition(": ")
        source = f"assumed: a training step loses as a forward pass does ({kind}: {where})"
        return Constant(f"speed with batch {batch} by that with {of}", value, "", source)


class Precision(NamedTuple):
    """peak: products in FLOP/s, as the data sheet has it."""

    training: Training
    inference: Inference
    peak: Constant
    itemsize: int


class HostRates(NamedTuple):
    """Images/s that one core makes with PIL: two training views of each, or one view."""

    pair: Constant
    view: Constant


@dataclass(frozen=True)
class Machine:
    """A GPU, and its share of the machine around it.

    half: mixed precision, channels last. single: float32 (TF32 from the A100 on, which PyTorch takes for convolutions).
    vector_peak: true float32. bandwidth: of the GPU's memory. host_link: from the host's memory to the GPU's. gpu_link:
    what an all-reduce moves between the GPUs of a machine. node_link: between machines, of each. cores: per GPU.
    decoded: what DALI makes. clustering: k-means of ours. host: what PIL makes. cache: what a machine reads of the
    clustering view from its disk, if it keeps it there.
    measured_step: query forward and backward and key forward on one GPU, and the batch. measured_loss: ours, and its
    columns. measured_official_estep: the paper's.
    """

    name: str
    half: Precision
    single: Precision
    vector_peak: Constant
    bandwidth: Constant
    host_link: Constant
    gpu_link: Constant
    node_link: Constant
    cores: Constant
    decoded: Constant
    clustering: Constant
    measured_step: tuple[Constant, int] | None = None
    measured_loss: tuple[Constant, int] | None = None
    measured_official_estep: Constant | None = None
    host: HostRates | None = None
    cache: Constant | None = None


def _between(points: dict[int, float], at: int) -> float:
    """On a straight line between neighbouring points; at the ends their values."""
    known = sorted(points)
    if at <= known[0] or at >= known[-1]:
        return points[known[0] if at <= known[0] else known[-1]]
    right = next(point for point in known if point >= at)
    left = known[known.index(right) - 1]
    return points[left] + (points[right] - points[left]) * (at - left) / (right - left)


# Mixed precision and FP32 by batch, one V100 16 GB.
_V100_HALF = {8: 595, 16: 1178, 32: 2146, 64: 2984, 128: 3249, 256: 3382}
_V100_SINGLE = {8: 709, 16: 1023, 32: 1127, 64: 1200, 128: 1229, 256: 1261}
# Mixed precision, loading included, and TF32 by its published ratio, one A100 80 GB. Smaller batches were faster.
_A100_HALF = {32: 2964, 64: 4547, 128: 5530, 256: 6120}
_A100_SINGLE = {32: 2964 / 1.51, 64: 4547 / 1.80, 128: 5530 / 1.94, 256: 6120 / 2.19}
# By which Lambda's training is faster than on its A100 SXM: 1582 images/s mixed, 1066 TF32.
_H100_GAIN, _H200_GAIN = (2791 / 1582, 1895 / 1066), (3079 / 1582, 2259 / 1066)
# One V100 in evaluation: 3362 images/s with 10 of DALI's threads; one A100: 6198.
_V100_DECODED, _A100_DECODED = 336, 620
# Of 125 TFLOP/s, the lower of the two rates that bench/results/NOTES.md expects of a V100.
_CLUSTERING_SHARE = 60 / 125


def _faster(rates: dict[int, float], gain: float) -> Inference:
    source = (
        "assumed: an A100's (published: NVIDIA DeepLearningExamples, MXNet RN50v1.5) by the ratio of training rates"
    )
    return Inference({batch: rate * gain for batch, rate in rates.items()}, source)


def _gpu(
    name: str,
    *,
    half: tuple[Training, Inference, float],
    single: tuple[Training, Inference, float],
    vector_peak: float,
    bandwidth: float,
    host_link: Constant,
    gpu_link: Constant,
    node: tuple[float, int, str],
    decoded: Constant,
) -> Machine:
    """node: GB/s between machines, cores per GPU, which machine."""
    half_peak = Constant("half-precision products", 1e12 * half[2], "FLOP/s", _SHEET)
    node_link, cores, system = node
    return Machine(
        name=name,
        half=Precision(half[0], half[1], half_peak, 2),
        single=Precision(single[0], single[1], Constant("float32 products", 1e12 * single[2], "FLOP/s", _SHEET), 4),
        vector_peak=Constant("true float32", 1e12 * vector_peak, "FLOP/s", _SHEET),
        bandwidth=Constant("the GPU's memory", 1e9 * bandwidth, "B/s", _SHEET),
        host_link=host_link,
        gpu_link=gpu_link,
        node_link=Constant("between machines, of each", 1e9 * node_link, "B/s", f"published: data sheet of {system}"),
        cores=Constant("cores per GPU", cores, "", f"published: data sheet of {system}"),
        decoded=decoded,
        clustering=Constant(
            "k-means, ours",
            _CLUSTERING_SHARE * half_peak.value,
            "FLOP/s per GPU",
            "assumed: 0.48 of the data sheet's products, as bench/results/NOTES.md expects of a V100",
        ),
    )


def _pcie(gigabytes: float, source: str) -> Constant:
    return Constant("host memory to GPU", 1e9 * gigabytes, "B/s", source)


def _nvlink(gigabytes: float, source: str) -> Constant:
    return Constant("all-reduce within a machine", 1e9 * gigabytes, "B/s per GPU", source)


def _dali(rate: float, source: str) -> Constant:
    return Constant("DALI, one view, decoding on the GPU, at least", rate, "images/s per core", source)


_NEWER = "assumed: as an A100's, which has the same kind of hardware decoder"
_NVLINK4 = _nvlink(370, "published: NVIDIA/nccl-tests issue 212, NVLink 4 after the protocol's overhead")
_PCIE5 = _pcie(54.8, "published: aigatech/vpbenchmarking, H100")

MACHINES: dict[str, Machine] = {
    "v100": _gpu(
        "V100 (SXM2 16 GB)",
        half=(Training({1: 1200, 8: 8322}, 256, _PYTORCH), Inference(_V100_HALF, _PYTORCH), 125),
        single=(Training({1: 367, 8: 2855}, 128, _PYTORCH), Inference(_V100_SINGLE, _PYTORCH), 15.7),
        vector_peak=15.7,
        bandwidth=900,
        host_link=_pcie(12, "published: faiss wiki, Comparing GPU vs CPU, PCIe 3"),
        gpu_link=_nvlink(
            120, "assumed: 0.8 of NVLink's 150 GB/s a direction, as nccl-tests issue 212 says of NVLink 4"
        ),
        node=(50, 5, "DGX-1: four links of 100 Gbit/s, 40 cores, 8 GPUs"),
        decoded=_dali(_V100_DECODED, f"{_MXNET}, evaluation, 10 threads"),
    ),
    "a100": _gpu(
        "A100 (SXM4 80 GB)",
        half=(Training({1: 2470, 8: 16621}, 256, _PYTORCH), Inference(_A100_HALF, _MXNET), 312),
        single=(Training({1: 938, 8: 7248}, 256, _PYTORCH), Inference(_A100_SINGLE, _MXNET), 156),
        vector_peak=19.5,
        bandwidth=2039,
        host_link=_pcie(24, "assumed: twice PCIe 3 (published: faiss wiki, Comparing GPU vs CPU)"),
        gpu_link=_nvlink(200, "published: NVIDIA/nccl-tests issue 149"),
        node=(200, 16, "DGX A100: eight links of 200 Gbit/s, 128 cores, 8 GPUs"),
        decoded=_dali(_A100_DECODED, f"{_MXNET}, evaluation, 10 threads"),
    ),
    "h100": _gpu(
        "H100 (SXM5 80 GB)",
        half=(
            Training({1: 2791, 2: 5526, 4: 11057, 8: 22059}, 256, _LAMBDA),
            _faster(_A100_HALF, _H100_GAIN[0]),
            989,
        ),
        single=(
            Training({1: 1895, 2: 3745, 4: 7493, 8: 14969}, 256, _LAMBDA),
            _faster(_A100_SINGLE, _H100_GAIN[1]),
            495,
        ),
        vector_peak=67,
        bandwidth=3350,
        host_link=_PCIE5,
        gpu_link=_NVLINK4,
        node=(400, 14, "DGX H100: eight links of 400 Gbit/s, 112 cores, 8 GPUs"),
        decoded=_dali(_A100_DECODED, _NEWER),
    ),
    "h200": _gpu(
        "H200 (SXM 141 GB)",
        half=(Training({1: 3079, 8: 24479}, 256, _LAMBDA), _faster(_A100_HALF, _H200_GAIN[0]), 989),
        single=(Training({1: 2259, 8: 17947}, 256, _LAMBDA), _faster(_A100_SINGLE, _H200_GAIN[1]), 495),
        vector_peak=67,
        bandwidth=4800,
        host_link=_PCIE5,
        gpu_link=_NVLINK4,
        node=(400, 14, "DGX H200: eight links of 400 Gbit/s, 112 cores, 8 GPUs"),
        decoded=_dali(_A100_DECODED, _NEWER),
    ),
}

# One view (random crop, flip, normalised) by PIL and torchvision, one worker process of a Xeon Gold 5118, with 8 of
# them for 8 V100s: 1070 images/s.
_XEON_VIEW = Constant(
    "PIL, one view",
    1070.37 / 8,
    "images/s per core",
    "published: Oneflow-Inc/DLPerf, PyTorch resnet50v1.5, 8 V100, 8 worker processes",
)

# Images/s with two training views by those with the clustering view: 0.27, 0.29 and 0.30 in three runs of bench/data.py
# on two EPYC cores. What MoCo takes is as sensitive to it as that.
_PAIR_BY_VIEW = 0.29


def machine(gpu: str, records: Records) -> Machine:
    """What is known of `gpu`: published, and measured where a record's machine has that word in its name.

    Raises:
        ValueError: nothing is known of it, or no record has what no publication says.
    """
    if gpu not in MACHINES:
        raise ValueError(f"--gpu {gpu}: nothing is known of it; choose from {', '.join(MACHINES)}")
    known = replace(MACHINES[gpu], host=_host_rates(gpu, records))
    own = records.of_gpu(gpu)
    changes: dict[str, object] = {}
    if "step" in own:
        changes |= _step(own["step"])
    if "loss" in own:
        changes |= _loss(own["loss"])
    if "estep" in own:
        changes |= _estep(own["estep"])
    if "data" in own:
        changes |= _decoded(own["data"])
    return replace(known, **changes)


def _host_rates(gpu: str, records: Records) -> HostRates:
    """By the machine's own record, or any; on the V100's older processor by what is published of it."""
    if gpu == "v100" and "data" not in records.of_gpu(gpu):
        source = f"assumed: {_PAIR_BY_VIEW} of one view's, as on two EPYC cores (median of three runs)"
        pair = Constant("PIL, two views", _PAIR_BY_VIEW * _XEON_VIEW.value, "images/s per core", source)
        return HostRates(pair, _XEON_VIEW)
    rates = []
    for name, kind in (("PIL, two views", "training views"), ("PIL, one view", "clustering views")):
        record, rate = records.find("data", kind, "torchvision", "images_per_s", first=gpu)
        rates.append(record.constant(name, rate / record.cases[kind]["cores"], "images/s per core"))
    return HostRates(*rates)


def _step(record: Record) -> dict[str, object]:
    """From the largest batch of ResNet-50 at 224 px, loader off."""
    cases = [
        (case["batch"], case["providers"]["encoder-only"]["images_per_s"])
        for case in record.cases.values()
        if (case["arch"], case["size"], case["loader"]) == ("resnet50", 224, "off")
        and "encoder-only" in case["providers"]
    ]
    if not cases:
        return {}
    batch, rate = max(cases)
    name = f"query forward and backward and key forward, batch {batch}"
    return {"measured_step": (record.constant(name, rate, "images/s per GPU"), batch)}


def loss_seconds(record: Record) -> tuple[Constant, int] | None:
    """(seconds of ours for 64 rows in the precision in which training computes it; its columns)."""
    wanted = 64, "float32" if record.on_cpu else "float16"
    group = next((name for name, case in record.cases.items() if (case.get("N"), case.get("dtype")) == wanted), "")
    for provider in ("triton", "eager"):
        found = record.figure(group, provider, "median_ms")
        if found is not None:
            return record.constant("loss and gradient, 64 rows", found / 1e3, "s"), record.cases[group]["columns"]
    return None


def _loss(record: Record) -> dict[str, object]:
    return {"measured_loss": loss_seconds(record)}


def _estep(record: Record) -> dict[str, object]:
    changes: dict[str, object] = {}
    rate = record.figure("20 iterations, redo 5", "triton", "tflop_per_s")
    if rate is not None:
        changes["clustering"] = record.constant("k-means, ours", 1e12 * rate, "FLOP/s per GPU")
    official = record.figure("5 iterations, redo 1", "official", "estimated_paper_ms")
    if official is not None:
        changes["measured_official_estep"] = record.constant("the paper's E-step, official", official / 1e3, "s")
    return changes


def _decoded(record: Record) -> dict[str, object]:
    rate = record.figure("training views", "dali", "images_per_s")
    if rate is None:
        return {}
    per_core = rate / record.cases["training views"]["cores"]
    return {"decoded": record.constant("DALI, decoding on the GPU", per_core, "images/s per core")}
