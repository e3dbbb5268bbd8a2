"""The recipe of a run: frozen dataclasses, and presets that derive from one another.

The presets' figures are those of the paper (Li et al., ICLR 2021, section 4 and appendix) and of its official
code; MoCo's are those of He et al. 2020 and Chen et al. 2020.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pcl_fast.augmentations import AUGMENTATIONS, View
from pcl_fast.command_line import AUTO, Integers, IntegersOrAuto
from pcl_fast.crop_sizes import Stage, Stages, check_stages, size_at
from pcl_fast.seeds import check_seed

# Iterations of k-means after which `prune_starts` lets only the best start go on.
PRUNED_AFTER = 5
# A string, of which the command line takes and lists these.
_Augmentation = tyro.extras.literal_type_from_choices(AUGMENTATIONS)


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are cropped and augmented."""

    root: Annotated[Path | None, tyro.conf.arg(name="data", prefix_name=False, metavar="DIR")] = None
    """Folder of class folders, a flat folder of images, or a folder of tar shards. The demo makes its own when this is
    missing."""
    format: Literal["folder", "webdataset"] = "folder"
    """webdataset: tar files of name.jpg (png, webp, ...) and, if there are labels, name.cls."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes and crops; auto is DALI wherever it can be imported."""
    decode_on: Literal["gpu", "cpu"] = "gpu"
    """DALI, where a GPU trains: what decodes the images, the GPU with the cores or the cores alone; the GPU makes the
    views either way. Which is faster depends on how many cores there are to a GPU: bench/decoding.py tells."""
    views: _Augmentation = "v1"
    """Augmentation: the paper's v1 or v2 (adds blur), v2 without blur for small images, SimCLR's, BYOL's, crop and flip
    alone, or one for handwritten digits."""
    size: int = 224
    """Side of the crops, in pixels."""
    sizes: Stages = ()
    """Smaller crops at first, which take less time: 160:120 192:160 is 160 px up to epoch 120 and 192 px up to epoch
    160, then the size. The clustering view has the size of the epoch that comes next."""
    resize: int | None = None
    """Clustering view: the shorter side is resized to this before the centre crop. None: 256/224 of the size."""
    min_crop_area: float = 0.2
    """Random resized crops cover at least this share of the image (v1 and v2)."""
    workers: int | None = None
    """Threads (DALI) or processes (torchvision; 0: none) per rank that read and decode; None divides this machine's
    cores among its ranks, but takes at most 16."""
    prefetch: int | None = None
    """DALI: batches that are read ahead, and as many that are decoded ahead. torchvision: of each process. None: 2, or
    3 on a GPU of 32 GB or more."""
    decoder_mib: int | None = None
    """GPU memory in MiB that each of DALI's threads sets aside to decode; None: 16, less on small GPUs."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep the clustering view in this folder once it has been decoded, and read it from there before every later
    epoch, in later runs too: images x size^2 x 3 bytes, 193 GB for ImageNet. Wants a fast local disk. Another data set,
    size, loader or number of ranks makes other files, and none is ever deleted. Delete them when you exchange images
    under the same names, which is not always noticed. None: decode it every time."""
    skip_broken: bool = False
    """Decode everything once before the run begins and leave out what cannot be decoded, instead of ending with an
    error when it is met."""

    @property
    def shorter_side(self) -> int:
        """`resize`, or what is derived from the size where it is not given."""
        return round(self.size * 256 / 224) if self.resize is None else self.resize

    def at(self, epoch: int) -> DataConfig:
        """The same with the size that crops have in an epoch (from 0), `resize` in proportion and no `sizes`."""
        if not self.sizes:
            return self
        size = size_at(self.sizes, self.size, epoch)
        return replace(self, size=size, sizes=(), resize=round(self.shorter_side * size / self.size))


@dataclass(frozen=True)
class ModelConfig:
    """The encoder, and what PCL keeps beside it: the momentum encoder and the queue of keys."""

    arch: str = "resnet50"
    """Any torchvision ResNet (resnet18, resnet50, wide_resnet50_2, ...), a CIFAR ResNet (cifar_resnet8, ...) or one of
    timm's networks (timm/convnext_tiny, ...)."""
    small_stem: bool = False
    """3x3 stem without pooling, for images of 64 px and less (torchvision ResNets only)."""
    head: Literal["linear", "mlp", "mlp_bn", "mlp_inner_bn", "mlp_unbiased_bn"] = "linear"
    """Projection to the features: one linear layer; two with a ReLU between; or these with batch norm after each; or
    after the first alone; or so and without biases."""
    hidden: int | None = None
    """Width between the two layers of such a head. None: that of the backbone's features."""
    dim: int = 128
    """Length of the unit features."""
    momentum: float = 0.999
    """Share of itself that the momentum encoder keeps at each step. BYOL's grows from this to 1 in the course of the
    run."""
    queue_size: int = 16384
    """Number of momentum keys kept as negatives for InfoNCE."""
    bank_momentum: float = 0.5
    """Share of itself that the feature of an image in InstDisc's bank keeps each time the image is seen."""
    shuffle_bn: bool = True
    """Compute keys on batches shuffled across ranks, so that batch statistics cannot leak the positive. One rank alone
    has nobody to shuffle with, unless bn_splits makes several of it."""
    bn_splits: int = 1
    """Batch norm treats a rank's batch as so many equal parts, each with its own statistics, and shuffles among them:
    one large GPU then trains like so many small ones."""
    fusion: Literal["auto", "eager", "triton", "compile"] = "auto"
    """How the encoders' passes are computed: module by module, with batch norm, ReLU and residual as one operation, or
    by torch.compile. auto: what is fastest on the run's GPUs, timed at its start; on a CPU and with deterministic
    eager. Given by name, eager also fuses nothing in the pass over the images but batch norm with its
    convolutions."""
    sync_bn: bool = False
    """Batch norm takes its statistics from all ranks' batches together, for methods that shuffle no keys."""


@dataclass(frozen=True)
class LossConfig:
    """What the loss contrasts with what."""

    temperature: float = 0.1
    """tau: InfoNCE's temperature and the mean concentration of the prototypes."""
    num_negatives: int | None = 16384
    """r: negative prototypes drawn per batch and granularity, for InstDisc images of the bank; None takes all."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the loss; auto takes the fastest that runs on the device."""


@dataclass(frozen=True)
class ClusterConfig:
    """The E-step."""

    ks: IntegersOrAuto = (25000, 50000, 100000)
    """Numbers of clusters, one per granularity. Empty: no prototypes, which is MoCo. auto: the paper's, for as many
    images as there are: n/51, n/26 and n/13; queue and negatives are then at most n."""
    warmup_epochs: int = 20
    """Epochs of InfoNCE alone before the first E-step."""
    features: Literal["pass", "keys"] = "pass"
    """What is clustered. pass: features from a pass of the momentum encoder over all images. keys: the keys that the
    epoch before has made of one augmented view each, up to an epoch old, as DeepCluster-v2 does; an image that an epoch
    drops keeps its last key. The first E-step has a pass all the same."""
    iterations: int = 20
    """Lloyd iterations per k-means."""
    redo: int = 5
    """k-means restarts; the one with the least objective is kept."""
    prune_starts: bool = False
    """After 5 iterations let only the start with the least objective go on."""
    alpha: float = 10.0
    """Smoothing of the concentration of small clusters."""
    fixed_concentration: bool = False
    """Every prototype has the concentration tau, instead of an estimate of how tight its cluster is: the paper's
    ablation (Figure 3a)."""
    init: Literal["random", "previous"] = "random"
    """Where k-means starts: random points, or the last E-step's prototypes, of unit length as they are. The first one
    is random all the same."""
    warm_iterations: int = 5
    """Lloyd iterations of a start from the last E-step's prototypes, of which there is one (no redo)."""
    backend: Literal["auto", "triton", "faiss", "torch"] = "auto"
    """Implementation of the nearest-centroid search; auto is triton on GPUs that it supports, else torch."""
    split_by: Literal["spread", "size"] = "spread"
    """Which cluster gives half of itself to one that has become empty. spread: that with the largest sum of squared
    distances to its centroid; size: one drawn by its number of images, as faiss does."""


@dataclass(frozen=True)
class SiameseConfig:
    """Siamese PCL: what its E-step clusters."""

    components: int = 256
    """Principal components of the backbone's features that are whitened and clustered; at most as many as there are
    features, and images."""


@dataclass(frozen=True)
class SwavConfig:
    """SwAV: prototypes, the codes that images get by them, and its small crops."""

    prototypes: int = 3000
    """Number of prototypes; at most as many as there are images."""
    epsilon: float = 0.05
    """Of Sinkhorn's algorithm: the smaller, the nearer an image's code is to a single prototype."""
    iterations: int = 3
    """Of Sinkhorn's algorithm: the more, the more exactly all prototypes have the same share of the images."""
    frozen_steps: int = 5005
    """Steps at the start of the run in which prototypes stay as they are."""
    queue_size: int = 3840
    """Embeddings of each large crop that are kept over all ranks, so that codes are made of more images than a batch
    has: a multiple of the number of ranks, and not less than the batch. 0: none."""
    queue_epoch: int = 15
    """Epochs before the queue begins to fill. It is used once it is full."""
    small_crops: int = 6
    """Small crops of every image beside the two large ones."""
    small_size: int | None = None
    """Side of the small crops, in pixels. None: 96/224 of the size."""
    small_areas: tuple[float, float] = (0.05, 0.14)
    """Small crops cover at least and at most these shares of the image. (Large ones: min_crop_area to 1.)"""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    optimizer: Literal["sgd", "lars", "larc"] = "sgd"
    """lars: SGD that adapts the learning rate of every layer to the size of its weights (You et al. 2017), for large
    batches; larc: the same with the learning rate outside of the momentum, as apex has it."""
    batch_size: int = 256
    """Images per step over all ranks together."""
    accumulate: int = 1
    """Compute a step in so many equal parts, for batches that do not fit: of each rank's images one part at a time is
    encoded. batch_size stays the images of a step, and learning rates and losses are those of the whole batch; batch
    norm's statistics alone are of a part (of that part on all ranks with sync_bn)."""
    lr: float = 0.03
    """Learning rate of the first epoch, for whatever batch size there is unless scale_lr is set."""
    scale_lr: bool = False
    """Take lr for a batch of 256 and scale it with the batch size: lr * batch_size / 256 (Goyal et al. 2017)."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    trust: float = 0.001
    """Trust coefficient of LARS and LARC: an update's size, over that of the weights and per unit of learning rate."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate grows linearly, at every step, up to what the schedule says."""
    schedule: Literal["step", "cosine"] = "step"
    """step: times 0.1 at each milestone; cosine: half a cosine down to zero (see final_share). Both change once per
    epoch (after warm-up)."""
    final_share: float = 0.0
    """Share of the learning rate to which schedule=cosine goes down."""
    milestones: Integers = (120, 160)
    """Epochs at which schedule=step drops the learning rate."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Online evaluation of the features, wherever the data set has labels. It never touches training."""

    every: int = 10
    """Evaluate before every n-th epoch and after the last one; 0 never."""
    neighbours: int = 200
    """Neighbours of the weighted kNN classifier."""
    queries: int = 10000
    """Images that are classified, each by all the others; drawn once."""
    ks: Integers = ()
    """Numbers of clusters into which the features are clustered to measure AMI, beside the clusterings that training
    makes itself."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    keep_every: int = 20
    """The checkpoint of every n-th epoch is kept beside the last one; 0 keeps the last alone."""
    every_minutes: float = 30.0
    """Save within an epoch too, when the last checkpoint is so old; 0 saves at its end alone."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    preset: tyro.conf.Suppress[str] = "pcl_v1"
    method: str = "pcl"
    """What is learned: a file of pcl_fast/methods/. A preset says which."""
    output: Path = Path("runs/pcl")
    """Folder for config.json, checkpoint.pt, metrics.jsonl, TensorBoard events and report.png."""
    resume_from: Annotated[Path | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Begin where another run's checkpoint is, a file or a folder, with another learning rate or number of epochs, say.
    --output must be a new folder. None: at the beginning."""
    init: Annotated[Path | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Begin with the weights of a run, of an official PCL or MoCo file with its queue, or of a torchvision or timm
    ResNet: a file or a folder. Everything else begins anew. None: random weights."""
    epochs: int = 200
    seed: int = 0
    log_every: int = 10
    """Steps between two looks at the device's metrics (the only time training waits for the device)."""
    strict_kernels: bool = False
    """End the run where a GPU kernel fails the check at its start, instead of going on with plain PyTorch for it."""
    deterministic: bool = False
    """On a GPU compute the same bits from run to run, where cuDNN would otherwise choose by time: slower."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    siamese: SiameseConfig = field(default_factory=SiameseConfig)
    swav: SwavConfig = field(default_factory=SwavConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def _derive(base: Config, preset: str, **changes: Any) -> Config:
    """`base` under a new name with some fields changed: group={"field": value} or top_level_field=value."""
    groups = {
        name: replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(base, preset=preset, output=Path("runs") / preset, **groups)


_PCL_V1 = _derive(Config(), "pcl_v1")
_PCL_V2 = _derive(
    _PCL_V1,
    "pcl_v2",
    data={"views": "v2"},
    model={"head": "mlp"},
    loss={"temperature": 0.2},
    optim={"schedule": "cosine"},
)
# What it leaves of the paper for the sake of time; see docs/methods.md.
_PCL_V2_FAST = _derive(
    _PCL_V2,
    "pcl_v2_fast",
    data={"sizes": (Stage(160, 120), Stage(192, 160))},
    cluster={"features": "keys", "init": "previous", "warm_iterations": 10},
)
# Of the MoCo authors' demo on CIFAR-10, with PCL's prototypes.
_CIFAR = _derive(
    _PCL_V1,
    "cifar",
    data={"views": "no_blur", "size": 32, "resize": 32, "min_crop_area": 0.08},
    model={"arch": "resnet18", "small_stem": True, "momentum": 0.99, "queue_size": 4096, "bn_splits": 8},
    cluster={"ks": AUTO},
    optim={"batch_size": 512, "lr": 0.06, "weight_decay": 5e-4, "schedule": "cosine"},
)
_IMAGENET100 = _derive(_PCL_V2, "imagenet100", model={"arch": "resnet18"}, cluster={"ks": AUTO})
_MOCO_V1 = _derive(_PCL_V1, "moco_v1", cluster={"ks": ()}, model={"queue_size": 65536}, loss={"temperature": 0.07})
_MOCO_V2 = _derive(_PCL_V2, "moco_v2", cluster={"ks": ()}, model={"queue_size": 65536})
_INSTDISC = _derive(
    _PCL_V1,
    "instdisc",
    method="instdisc",
    cluster={"ks": ()},
    loss={"temperature": 0.07, "num_negatives": 4096},
)


_SIMCLR = _derive(
    Config(),
    "simclr",
    method="simclr",
    data={"views": "simclr", "min_crop_area": 0.08},
    model={"head": "mlp_bn", "sync_bn": True},
    loss={"temperature": 0.1},
    cluster={"ks": ()},
    optim={"optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "warmup_epochs": 10, "schedule": "cosine"},
    evaluation={"ks": (25000,)},
)
# The release's recipe is for CIFAR: a batch of 512 pairs, which are 1024 images, and a learning rate of 1.0. For 256
# images that is 1.0 * 256 / 1024. See docs/methods.md.
_SIAMESE_PCL = _derive(
    _SIMCLR,
    "siamese_pcl",
    method="siamese_pcl",
    loss={"temperature": 0.5},
    cluster={"ks": (512,), "redo": 1},
    optim={"lr": 0.25},
    evaluation={"ks": ()},
)
# Published for a batch of 4096 with the learning rate 4.8; here lr x batch / 4096.
_DEEPCLUSTER_V2 = _derive(
    _SIMCLR,
    "deepcluster_v2",
    method="deepcluster_v2",
    epochs=400,
    model={"head": "mlp_inner_bn"},
    cluster={"ks": (3000, 3000, 3000), "iterations": 10, "redo": 1, "warmup_epochs": 0},
    optim={"lr": 4.8 * 256 / 4096},
)
# Of the authors' script for a batch of 256 and 200 epochs.
_SWAV = _derive(
    _SIMCLR,
    "swav",
    method="swav",
    data={"min_crop_area": 0.14},
    model={"head": "mlp_inner_bn"},
    optim={"optimizer": "larc", "lr": 0.6, "final_share": 0.001, "warmup_epochs": 0},
)
# The recipe of 1000 epochs with 200: its learning rate is 0.2 for a batch of 256, and is not scaled.
_BYOL = _derive(
    _SIMCLR,
    "byol",
    method="byol",
    data={"views": "byol"},
    model={"head": "mlp_unbiased_bn", "hidden": 4096, "dim": 256, "momentum": 0.996},
    optim={"lr": 0.2, "weight_decay": 1.5e-6},
)
_DEMO = _derive(
    _PCL_V1,
    "demo",
    epochs=24,
    data={"views": "digits", "size": 20, "resize": 20, "workers": 0},
    model={"arch": "cifar_resnet8", "head": "mlp", "momentum": 0.99, "queue_size": 1024},
    loss={"num_negatives": None},
    cluster={"ks": (15, 30, 60), "warmup_epochs": 4, "redo": 1},
    optim={"batch_size": 64, "lr": 0.06, "weight_decay": 5e-4, "schedule": "cosine"},
    evaluation={"every": 4, "neighbours": 20},
)

PRESETS: dict[str, tuple[str, Config]] = {
    "demo": ("The whole method in five minutes on two CPU cores, on handwritten digits.", _DEMO),
    "pcl_v1": ("PCL v1: ResNet-50, linear head, tau 0.1, step schedule.", _PCL_V1),
    "pcl_v2": ("PCL v2: adds an MLP head, blur, tau 0.2 and a cosine schedule.", _PCL_V2),
    "moco_v1": ("MoCo v1: PCL v1's encoder without prototypes.", _MOCO_V1),
    "moco_v2": ("MoCo v2: PCL v2's encoder without prototypes.", _MOCO_V2),
    "instdisc": ("InstDisc: one view against a memory bank of all images, NCE, no momentum encoder.", _INSTDISC),
    "simclr": ("SimCLR with a batch of 256: two views against all others, LARS, no momentum encoder.", _SIMCLR),
    "siamese_pcl": ("Siamese PCL: SimCLR, and pairs of images within and across clusters.", _SIAMESE_PCL),
    "deepcluster_v2": ("DeepCluster-v2: pseudo-labels by spherical k-means of the last epoch.", _DEEPCLUSTER_V2),
    "swav": ("SwAV with a batch of 256: a crop predicts the codes of others, multi-crop, LARC.", _SWAV),
    "byol": ("BYOL with a batch of 256: a view predicts the other's target, and nothing is contrasted.", _BYOL),
    "pcl_v2_fast": ("PCL v2 in less time, not quite the paper: small crops at first, clusters of keys.", _PCL_V2_FAST),
    "imagenet100": ("PCL v2 with a ResNet-18, for some 100,000 photographs.", _IMAGENET100),
    "cifar": ("PCL on 32 px: MoCo's recipe for CIFAR-10, ResNet-18 with a small stem.", _CIFAR),
}


def view_of(data: DataConfig) -> View:
    """Return the augmentation that `data.views` names, with the run's size and least crop."""
    return replace(AUGMENTATIONS[data.views], size=data.size, min_area=data.min_crop_area)


# What may differ between a run and its continuation: where things lie, what computes them and what is printed, not
# what is learned. (Which images there are is compared apart.) A step's parts are as many ranks would be, to batch norm.
_NOT_RECIPE = (
    "preset", "output", "resume_from", "init", "log_every", "data.root", "data.format", "data.loader", "data.decode_on",
    "data.workers", "data.prefetch", "data.decoder_mib", "data.cache", "data.skip_broken", "loss.backend",
    "cluster.backend", "evaluation.", "checkpoint.", "strict_kernels", "deterministic", "model.fusion",
    "optim.accumulate",
)  # fmt: skip


# More than any machine has cores; as processes they would take all of its memory before the first image.
_MOST_WORKERS = 1024


# Of anything: beyond it numbers do not fit where PyTorch counts, and loops over them do not end.
_TOO_MANY = 2**31


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of what JSON can hold (tuples become lists, paths strings), with values that
    are derived from others in their places.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(replace(config, data=replace(config.data, resize=config.data.shorter_side))))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_settings(before: Config, now: Config) -> list[str]:
    """Names of the fields ("cluster.ks") that differ, in order."""
    old, new = _flatten(to_dict(before)), _flatten(to_dict(now))
    return [name for name in sorted(new) if old[name] != new[name]]


def setting(config: Config, name: str) -> Any:
    """The value of a field by its name in `changed_settings`."""
    return functools.reduce(getattr, name.split("."), config)


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The configuration with some fields changed, by their names in `changed_settings`."""
    for name, value in settings.items():
        group, _, field_name = name.rpartition(".")
        if group:
            value = replace(getattr(config, group), **{field_name: value})
        config = replace(config, **{group or field_name: value})
    return config


def model_config(saved: dict[str, Any]) -> ModelConfig:
    """The encoder's part of a recipe from `to_dict`; a field that did not exist when it was saved has its default."""
    known = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in saved["model"].items() if name in known})


def optim_config(saved: dict[str, Any]) -> OptimConfig:
    """The optimiser's part of a recipe from `to_dict`; a field that did not exist when it was saved has its default."""
    known = {field.name for field in fields(OptimConfig)}
    return OptimConfig(**{name: value for name, value in saved["optim"].items() if name in known})


def data_config(saved: dict[str, Any]) -> DataConfig:
    """How a recipe from `to_dict` reads and crops images; where they lie is left out."""
    known = ("views", "size", "resize", "min_crop_area")
    return DataConfig(**{name: saved["data"][name] for name in known if name in saved["data"]})


def recipe_differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes `now` another recipe than `saved` (both from `to_dict`): lines "field: saved -> now"."""
    # A field that did not exist yet when the run began counts as its default.
    before, after = _flatten(to_dict(Config())) | _flatten(saved), _flatten(now)
    names = [name for name in sorted(before.keys() | after.keys()) if not name.startswith(_NOT_RECIPE)]
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)]


def validate(config: Config) -> None:
    """Refuse values that cannot work, before anything is built.

    Raises:
        ValueError: names the flag, its value and what to use instead.
    """
    for name, value in _flatten(to_dict(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
    positive = {
        "--epochs": config.epochs,
        "--log-every": config.log_every,
        "--data.size": config.data.size,
        "--model.dim": config.model.dim,
        "--model.queue-size": config.model.queue_size,
        "--model.bn-splits": config.model.bn_splits,
        "--loss.temperature": config.loss.temperature,
        "--optim.batch-size": config.optim.batch_size,
        "--optim.accumulate": config.optim.accumulate,
        "--optim.lr": config.optim.lr,
        "--optim.trust": config.optim.trust,
        "--cluster.iterations": config.cluster.iterations,
        "--cluster.redo": config.cluster.redo,
        "--cluster.warm-iterations": config.cluster.warm_iterations,
        "--cluster.alpha": config.cluster.alpha,
        "--siamese.components": config.siamese.components,
        "--swav.prototypes": config.swav.prototypes,
        "--swav.epsilon": config.swav.epsilon,
        "--swav.iterations": config.swav.iterations,
        "--evaluation.neighbours": config.evaluation.neighbours,
        "--evaluation.queries": config.evaluation.queries,
    }
    for flag, value in positive.items():
        if not value > 0:
            raise ValueError(f"{flag} must be positive, got {value}")
        if isinstance(value, int) and value >= _TOO_MANY:
            raise ValueError(f"{flag} must be below {_TOO_MANY}, got {value}")
    optional = {
        "--data.prefetch": config.data.prefetch,
        "--data.decoder-mib": config.data.decoder_mib,
        "--swav.small-size": config.swav.small_size,
        "--model.hidden": config.model.hidden,
    }
    for flag, value in optional.items():
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be positive, got {value}")
    not_negative = {
        "--data.workers": config.data.workers or 0,
        "--checkpoint.every-minutes": config.checkpoint.every_minutes,
        "--cluster.warmup-epochs": config.cluster.warmup_epochs,
        "--optim.warmup-epochs": config.optim.warmup_epochs,
        "--optim.weight-decay": config.optim.weight_decay,
        "--swav.frozen-steps": config.swav.frozen_steps,
        "--swav.queue-size": config.swav.queue_size,
        "--swav.queue-epoch": config.swav.queue_epoch,
        "--swav.small-crops": config.swav.small_crops,
        "--evaluation.every": config.evaluation.every,
        "--checkpoint.keep-every": config.checkpoint.keep_every,
    }
    for flag, value in not_negative.items():
        if value < 0:
            raise ValueError(f"{flag} must not be negative, got {value}")
    if (config.data.workers or 0) > _MOST_WORKERS:
        raise ValueError(
            f"--data.workers {config.data.workers}: each is a process or a thread of a rank; use at most "
            f"{_MOST_WORKERS}, and about as many as there are cores for each rank"
        )
    check_seed(config.seed)
    if config.init is not None and config.resume_from is not None:
        raise ValueError(
            f"--init {config.init} begins a new run with a checkpoint's weights, --resume-from {config.resume_from} "
            "goes on with a run; give one of them"
        )
    if config.loss.num_negatives is not None and config.loss.num_negatives < 1:
        raise ValueError(f"--loss.num-negatives must be positive or None for all, got {config.loss.num_negatives}")
    if not 0 <= config.model.momentum <= 1:
        raise ValueError(f"--model.momentum is a share between 0 and 1, got {config.model.momentum}")
    if not 0 <= config.optim.final_share <= 1:
        raise ValueError(
            f"--optim.final-share is a share of the learning rate from 0 to 1, got {config.optim.final_share}"
        )
    if config.model.hidden is not None and config.model.head == "linear":
        raise ValueError(
            f"--model.hidden {config.model.hidden} is the width between two layers, and --model.head linear has one; "
            "choose another head, or leave --model.hidden out"
        )
    if not 0 <= config.optim.momentum < 1:
        raise ValueError(f"--optim.momentum is a share in [0, 1), got {config.optim.momentum}")
    if config.data.views not in AUGMENTATIONS:
        raise ValueError(f"--data.views must be one of {', '.join(AUGMENTATIONS)}, got {config.data.views}")
    if not 0 < config.data.min_crop_area <= 1:
        raise ValueError(f"--data.min-crop-area is a share of the image in (0, 1], got {config.data.min_crop_area}")
    if config.data.shorter_side < config.data.size:
        raise ValueError(f"--data.resize {config.data.resize} is smaller than the crop, --data.size {config.data.size}")
    check_stages(config.data.sizes, config.data.size)
    if config.cluster.prune_starts and (config.cluster.redo < 2 or config.cluster.iterations <= PRUNED_AFTER):
        raise ValueError(
            f"--cluster.prune-starts ends all starts of k-means but the best after {PRUNED_AFTER} iterations: it needs "
            f"--cluster.redo of 2 or more and more --cluster.iterations, got {config.cluster.redo} and "
            f"{config.cluster.iterations}"
        )
    for flag, ks in {"--cluster.ks": config.cluster.ks, "--evaluation.ks": config.evaluation.ks}.items():
        if ks != AUTO and any(k < 1 for k in ks):
            raise ValueError(f"{flag} must be positive numbers of clusters, got {ks}")


def doubts(config: Config) -> list[str]:
    """Sentences about values that work, but that are hardly meant."""
    return [*_doubts_about_the_clustering_view(config.data), *_doubts_about_sizes(config)]


def _doubts_about_the_clustering_view(data: DataConfig) -> list[str]:
    seen = (data.size / data.shorter_side) ** 2
    if seen >= 0.5:
        return []
    derived = replace(data, resize=None).shorter_side
    return [
        f"--data.resize {data.resize} beside --data.size {data.size} shows k-means and kNN the central {seen:.0%} of "
        f"every image; without that flag it is {derived}"
    ]


def _doubts_about_sizes(config: Config) -> list[str]:
    found, data, model = [], config.data, config.model
    if data.sizes and data.sizes[-1].until >= config.epochs:
        found.append(
            f"--data.sizes {data.sizes[-1]} lasts to the end of --epochs {config.epochs}: no epoch has the crops of "
            f"--data.size {data.size}"
        )
    if model.small_stem or model.arch.startswith(("cifar", "timm/")):
        return found
    for stage in data.sizes:
        # A ResNet halves its maps five times, and rounds up.
        if rest := -stage.size % 32:
            found.append(
                f"--data.sizes {stage}: {stage.size} px is no multiple of 32, and {model.arch} rounds its smaller maps "
                f"up to those of {stage.size + rest} px: hardly less time than with these"
            )
    return found
