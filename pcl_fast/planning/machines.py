"""What is published of GPUs and of the machines around them, and which benchmarks measure the same: data alone.

Rates are those of ResNet-50 at 224 px. NVIDIA's are of the DeepLearningExamples' READMEs (PyTorch: resnet50v1.5, MXNet:
RN50v1.5), Lambda's of lambdal/deeplearning-benchmark, which runs a fork of the same PyTorch code. Lambda's A100 makes
1582 images/s where NVIDIA's makes 2470: so H100 and H200, of which NVIDIA has published none, are rather too slow here.
"""

from __future__ import annotations

_PYTORCH = "published: NVIDIA DeepLearningExamples, PyTorch resnet50v1.5"
_MXNET = "published: NVIDIA DeepLearningExamples, MXNet RN50v1.5"
_LAMBDA = "published: lambdal/deeplearning-benchmark, PyTorch"
_BY_RATIO = "assumed: an A100's (published: NVIDIA DeepLearningExamples, MXNet RN50v1.5) by the ratio of training rates"
_SHEET = "published: NVIDIA's data sheet"
_DGX_1 = "published: data sheet of DGX-1: four links of 100 Gbit/s, 40 cores, 8 GPUs"
_DGX_A100 = "published: data sheet of DGX A100: eight links of 200 Gbit/s, 128 cores, 8 GPUs"
_DGX_HOPPER = "published: data sheets of DGX H100 and DGX H200: eight links of 400 Gbit/s, 112 cores, 8 GPUs"
_DALI = f"{_MXNET}, evaluation, 10 threads; one view, at least"
_H200_RUN = "bench/results/nvidia-h200/training-run.jsonl, 16 cores of a host that takes 30 us a launch"
_FAISS = "published: faiss wiki, Comparing GPU vs CPU"

# One core of a Xeon Gold 5118: one view (random crop, flip, normalised) by PIL and torchvision.
_XEON_VIEW = 1070.37 / 8
# One A100 80 GB: mixed precision, loading included, and TF32 by its published ratio. Smaller batches were faster.
_A100_HALF = {32: 2964, 64: 4547, 128: 5530, 256: 6120}
_A100_SINGLE = {32: 2964 / 1.51, 64: 4547 / 1.80, 128: 5530 / 1.94, 256: 6120 / 2.19}


def _faster(a100: dict[int, float], gain: float) -> tuple[dict[int, float], str]:
    return {batch: rate * gain for batch, rate in a100.items()}, _BY_RATIO


_HOPPER = {
    "half_peak": 989e12,
    "single_peak": 495e12,
    "vector_peak": (67e12, _SHEET),
    "host_link": (54.8e9, "published: aigatech/vpbenchmarking, H100"),
    "gpu_link": (370e9, "published: NVIDIA/nccl-tests issue 212, NVLink 4 after the protocol's overhead"),
    "node_link": (400e9, _DGX_HOPPER),
    "cores": (14, _DGX_HOPPER),
}

# Arguments of rates.Precision: *_training, images/s of all GPUs of a machine by their number, and images per GPU and
# step (fused: by code that fuses batch norm, shortcut and ReLU); *_forward, images/s of one GPU by batch; *_peak,
# products in FLOP/s by NVIDIA's data sheet. Then constants of rates.Machine: value and source.
MACHINES = {
    "v100": {
        "name": "V100 (SXM2 16 GB)",
        "half_training": ({1: 1200, 8: 8322}, 256, _PYTORCH),
        "fused_training": ({4: 5357}, 192, _MXNET),
        "half_forward": ({8: 595, 16: 1178, 32: 2146, 64: 2984, 128: 3249, 256: 3382}, _PYTORCH),
        "half_peak": 125e12,
        "single_training": ({1: 367, 8: 2855}, 128, _PYTORCH),
        "single_forward": ({8: 709, 16: 1023, 32: 1127, 64: 1200, 128: 1229, 256: 1261}, _PYTORCH),
        "single_peak": 15.7e12,
        "vector_peak": (15.7e12, _SHEET),
        "bandwidth": (900e9, _SHEET),
        "host_link": (12e9, f"{_FAISS}, PCIe 3"),
        "gpu_link": (120e9, "assumed: 0.8 of NVLink's 150 GB/s a direction, as nccl-tests issue 212 says of NVLink 4"),
        "node_link": (50e9, _DGX_1),
        "cores": (5, _DGX_1),
        "decoded": (336, _DALI),  # 3362 with 10 threads
        # Two training views by the clustering view: 0.27, 0.29 and 0.30. What MoCo takes is as sensitive to it as that.
        "pair": (0.29 * _XEON_VIEW, "assumed: 0.29 of one view's, as on two EPYC cores (median of three runs)"),
        "view": (_XEON_VIEW, "published: Oneflow-Inc/DLPerf, PyTorch resnet50v1.5, 8 V100, 8 worker processes"),
    },
    "a100": {
        "name": "A100 (SXM4 80 GB)",
        "half_training": ({1: 2470, 8: 16621}, 256, _PYTORCH),
        "half_forward": (_A100_HALF, _MXNET),
        "half_peak": 312e12,
        "single_training": ({1: 938, 8: 7248}, 256, _PYTORCH),
        "single_forward": (_A100_SINGLE, _MXNET),
        "single_peak": 156e12,
        "vector_peak": (19.5e12, _SHEET),
        "bandwidth": (2039e9, _SHEET),
        "host_link": (24e9, f"assumed: twice PCIe 3 ({_FAISS})"),
        "gpu_link": (200e9, "published: NVIDIA/nccl-tests issue 149"),
        "node_link": (200e9, _DGX_A100),
        "cores": (16, _DGX_A100),
        "decoded": (620, _DALI),  # 6198 with 10 threads
    },
    # By which Lambda's training is faster than on its A100 SXM: 1582 images/s mixed, 1066 TF32.
    "h100": {
        "name": "H100 (SXM5 80 GB)",
        "half_training": ({1: 2791, 2: 5526, 4: 11057, 8: 22059}, 256, _LAMBDA),
        "half_forward": _faster(_A100_HALF, 2791 / 1582),
        "single_training": ({1: 1895, 2: 3745, 4: 7493, 8: 14969}, 256, _LAMBDA),
        "single_forward": _faster(_A100_SINGLE, 1895 / 1066),
        "bandwidth": (3350e9, _SHEET),
        "decoded": (230, f"assumed: as on an H200 ({_H200_RUN})"),
        **_HOPPER,
    },
    "h200": {
        "name": "H200 (SXM 141 GB)",
        "half_training": ({1: 3079, 8: 24479}, 256, _LAMBDA),
        "half_forward": _faster(_A100_HALF, 3079 / 1582),
        "single_training": ({1: 2259, 8: 17947}, 256, _LAMBDA),
        "single_forward": _faster(_A100_SINGLE, 2259 / 1066),
        "bandwidth": (4800e9, _SHEET),
        "decoded": (230, f"measured: {_H200_RUN}"),  # 3643 and 3677 images/s, two views and one
        **_HOPPER,
    },
}
# Of the data sheet's half-precision products, what ours reaches: 60 of a V100's 125 TFLOP/s, the lower of two guesses.
CLUSTERING = (60 / 125, "assumed: 0.48 of the data sheet's products, as bench/results/NOTES.md expects of a V100")

# Of cache and cores together, what is left of the sum of their rates: the least of nine cases.
HELPED = (0.9, "assumed: as on two cores that decode without a GPU and encode nothing, at least (bench/slow_disk.py)")

# Where the benchmarks' records have a constant of rates.Machine: benchmark, case, provider, figure; a number of the
# case by which it is divided.
MEASURED = {
    "sampling": ("loss", "sampling alone", "official", "median_ms", None),
    "loops": ("kmeans", "concentration, N=1281167, K=25000", "official", "median_ms", None),
    "pair": ("data", "training views", "torchvision", "images_per_s", "cores"),
    "view": ("data", "clustering views", "torchvision", "images_per_s", "cores"),
    "decoded": ("data", "training views", "dali", "images_per_s", "cores"),
    "helped": ("slow_disk", "disk 2 times as fast as the cores", "disk and cores", "share_of_sum", None),
    # What the GPU takes: the host's launches are beside the encoder's work.
    "loss": ("loss", "N=64, r=16384, float16", "triton+graph", "median_ms", "columns"),
    # Not the whole E-step: on synthetic features it ends before its last iteration.
    "clustering": ("kmeans", "N=1281167, K=100000, float16, iteration", "triton", "tflop_per_s", None),
    "forward": ("features", "resnet50, 224 px, 256 images", "fused", "images_per_s", None),
    "official_estep": ("estep", "5 iterations, redo 1", "official", "estimated_paper_ms", None),
}
# Of these, what a host does alone: where nothing is published of it, the record of any machine will do.
ON_HOST = ("sampling", "loops", "pair", "view")
