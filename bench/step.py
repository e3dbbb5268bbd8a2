"""A training step from batch to updated weights, as the official code takes it and as ours does. Run by `make bench`.

It is a step of PCL v2: on a GPU with ResNet-50 at 224 px and the paper's queue and prototypes, on a CPU with ResNet-18
at 64 px and what would suit 100,000 images. The providers are:

- official: the official code, rebuilt from a description of it, see official_step.py.
- encoder-only: what no way to train can do without, in the precision and memory format of ours. That is query forward,
  backward from a constant gradient of the features, and key forward: no loss, no optimiser, no momentum update.
- ours: Learner.step.
- encoder-only and ours, triton and compile: with the encoders' passes by fused kernels or by torch.compile, see
  pcl_fast.nn.fusion; loader off and on a GPU only.
- any of these +graph: as a CUDA graph (of ours Learner.compute, into which the inputs are copied); likewise.

With the loader off, every provider gets one batch over and over, in the form in which its loader would deliver it:
normalised floats in the host's memory (official), or bytes on the device (ours). Encoder-only gets normalised images on
the device. With the loader on, photographs come from the official code's transforms in worker processes (official), or
from our loader (ours and encoder-only).

The other methods, each by its preset, have a case with the loader off, and the providers encoder-only and ours.
Encoder-only is there a pass of all views of a batch, one for each of their sizes, and its backward pass; and where
there is a momentum encoder (in BYOL), a pass of that over all views too. Steps are those of the midst of a run: SwAV's
prototypes are no longer frozen, and its queue is in use. SwAV has a case without its small crops, too, and SimCLR one
with a batch that is larger than the device, computed in parts (--optim.accumulate): encoder-only takes their passes one
after another, ours encodes all of them twice, as the loss needs what all are before any has a gradient.

Every round of a provider follows one of encoder-only, so that both see the machine in the same state. A provider's
share of encoder-only's speed is the median of the rounds' ratios, and times_official is the ratio of two shares.
(Encoder-only's share of its own speed says how exact this is.) While one provider works, the other's loader makes
batches in advance; these are taken first, and not timed.

Before anything is timed, the official step and ours must learn the same from the same.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import device
import official_step
import optional
import photos
import pytest
import recipe
import torch
import torch.distributed as dist
from agreement import check_agreement
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.augmentations import View
from pcl_fast.config import Config, view_of, with_settings
from pcl_fast.data import Batch, normalise, training_loader
from pcl_fast.data.loaders.loader import pick_loader
from pcl_fast.data.loaders.resources import pick_resources
from pcl_fast.methods import Method, build
from pcl_fast.nn import fusion
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.precision import autocast, encoder_dtype

DEVICE = recipe.WORLD.device
BATCHES = (64, 256) if device.CUDA else (64, 32)
REFERENCE, GRAPH = "encoder-only", "+graph"
EPOCH = 1 << 20  # images: the photographs many times over, so that no epoch ends while a step is measured
SIZES = {"images": recipe.IMAGES, "width": photos.WIDTH, "height": photos.HEIGHT}
# The rates of dense half-precision products in TFLOP/s, from the data sheets.
PEAKS = {"V100-PCIE": 112, "V100": 125, "A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989}

Step = Callable[[], object]

pytestmark = pytest.mark.benchmark(timer=device.clock)


class Case(NamedTuple):
    batch: int
    loader: str  # "off" or "on"
    method: str = "pcl"
    small_crops: int | None = None  # None: as many as the preset has
    parts: int = 1  # --optim.accumulate

    def __str__(self) -> str:
        config, name = self.config, "" if self.is_pcl else f"{self.method}, "
        name += "" if self.small_crops is None else f"small crops {self.small_crops}, "
        batch = f"batch {self.batch}" + (f" in {self.parts} parts" if self.parts > 1 else "")
        return f"{name}{config.model.arch}, {config.data.size} px, {batch}, loader {self.loader}"

    @property
    def config(self) -> Config:
        if self.is_pcl:
            return recipe.step_recipe(self.batch)
        settings = {"optim.accumulate": self.parts}
        if self.small_crops is not None:
            settings["swav.small_crops"] = self.small_crops
        return with_settings(recipe.method_recipe(self.method, self.batch), settings)

    @property
    def is_pcl(self) -> bool:
        """Return whether each network encodes a view of its own, the query or the key; in all other methods each
        encodes all views.
        """
        return self.method == "pcl"

    @property
    def steps(self) -> int:
        """Return the steps of a round; with a loader so many that batches made in advance count for little."""
        if self.loader == "on":
            return 32 if device.CUDA else 512 // self.batch
        if self.parts > 1:
            return 1
        return 8 if device.CUDA else 256 // self.batch

    @property
    def rounds(self) -> int:
        return 9 if self.loader == "off" and not device.CUDA else 5

    def describe(self) -> dict:
        """Return what the record says about the case."""
        config = self.config
        flop, parameters = count_work(self)
        return {
            "method": self.method,
            "arch": config.model.arch,
            "size": config.data.size,
            **({"views": [view.size for view in views_of(self)]} if len(by_size(views_of(self))) > 1 else {}),
            "batch": self.batch,
            **({"parts": self.parts} if self.parts > 1 else {}),
            "loader": self.loader,
            "ranks": 1,
            **({"queue": config.model.queue_size} if self.is_pcl else {}),
            "ks": list(config.cluster.ks),
            "negatives": config.loss.num_negatives,
            "parameters": parameters,
            "steps_per_round": self.steps,
            "flop_per_step": flop,
            "flop": flop * self.steps,
            **({"our_loader": pick_loader(config.data.loader)} if self.loader == "on" else {}),
        }


@functools.cache
def views_of(case: Case) -> tuple[View, ...]:
    """Return the views of an image that a step has."""
    return (view_of(case.config.data),) * 2 if case.is_pcl else method_of(case).views


def has_twin(case: Case) -> bool:
    """Return whether there is a momentum encoder."""
    return case.is_pcl or "momentum" in method_of(case).encoders()


@functools.cache
def method_of(case: Case) -> Method:
    return build(case.config, recipe.WORLD, recipe.CLUSTERED)


def by_size(views: tuple[View, ...]) -> dict[int, list[int]]:
    """Return the places of the views of every size: a pass of an encoder that sees all views."""
    places: dict[int, list[int]] = {}
    for place, view in enumerate(views):
        places.setdefault(view.size, []).append(place)
    return places


@functools.cache
def count_work(case: Case) -> tuple[int, int]:
    """Return (floating point operations of encoder-only's step, parameters of one encoder)."""
    views = views_of(case)[:1] if case.is_pcl else views_of(case)
    with torch.device("meta"):
        encoder = Encoder(case.config.model)
        passes = [torch.empty(case.batch * len(places), 3, size, size) for size, places in by_size(views).items()]
    with FlopCounterMode(display=False) as counter:
        for images in passes:
            encoder(images).sum().backward()
            if has_twin(case):
                with torch.no_grad():
                    encoder(images)
    return counter.get_total_flops(), sum(parameter.numel() for parameter in encoder.parameters())


class Runner(NamedTuple):
    """A provider that is ready to take steps."""

    step: Step
    ahead: int  # batches that its loader may have made in advance


@functools.cache
def batch_at_hand(case: Case) -> Batch:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(case.batch, view.size, view.size, 3) for view in views_of(case)]
    views = tuple(torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=DEVICE) for shape in shapes)
    return Batch(views, torch.arange(case.batch))


def our_batches(case: Case) -> tuple[Iterator[Batch], int]:
    """Return (batches, how many of them the loader may have made in advance)."""
    if case.loader == "off":
        return itertools.repeat(batch_at_hand(case)), 0
    config, images = case.config.data, recipe.folder()[0]
    long = images.subset(list(range(len(images))) * (EPOCH // len(images)))
    loader = training_loader(
        long, config, views=(view_of(config),) * 2, batch_size=case.batch, seed=0, world=recipe.WORLD
    )
    resources = pick_resources(config, DEVICE)
    # DALI prefetches in two stages, torchvision in every worker.
    ready = resources.prefetch * (2 if pick_loader(config.loader) == "dali" else resources.workers)
    # There are prototypes for the photographs, not for their repetitions.
    return (batch._replace(index=batch.index % len(images)) for batch in loader.epoch(0)), ready


def official_views(case: Case) -> tuple[Iterator[official_step.Views], int]:
    """Return what `our_batches` returns, for the official code."""
    if case.loader == "on":
        images, size = recipe.folder()[0], case.config.data.size
        return official_step.loader(images, size, case.batch, pin=device.CUDA), official_step.AHEAD
    batch = batch_at_hand(case)
    views = [normalise(view, torch.float32).contiguous().cpu() for view in batch.views]
    return itertools.repeat((*(view.pin_memory() if device.CUDA else view for view in views), batch.index)), 0


def official(case: Case) -> Runner:
    views, ahead = official_views(case)
    learner, granularities = official_step.OfficialStep(case.config, DEVICE), recipe.random_prototypes(case.config)
    return Runner(lambda: learner.step(next(views), granularities), ahead)


def use(way: str, *encoders: nn.Module) -> None:
    """Let encoders compute in one of fusion's ways, or skip the provider."""
    for encoder in encoders:
        try:
            fusion.use(way, encoder)
        except ValueError as error:
            pytest.skip(f"{way}: {error}")


def encoder_only(case: Case, way: str = fusion.WAYS[0], *, graph: bool = False) -> Runner:
    config, dtype = case.config, encoder_dtype(DEVICE)
    encoder = Encoder(config.model).to(DEVICE, memory_format=torch.channels_last)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    use(way, encoder, key_encoder)
    batches, ahead = our_batches(case)

    # Of PCL the first view is the query's and the second the key's; else all views of one size are a pass.
    passes = [[0]] if case.is_pcl else list(by_size(views_of(case)).values())
    keys = [[1]] if case.is_pcl else passes if has_twin(case) else []

    def images(views: tuple[torch.Tensor, ...], places: list[int]) -> torch.Tensor:
        return normalise(views[places[0]] if len(places) == 1 else torch.cat([views[place] for place in places]), dtype)

    def prepared(batch: Batch) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Return what the encoder and the momentum encoder encode of every part of a batch."""
        parts = zip(*(view.chunk(case.parts) for view in batch.views), strict=True)
        return [tuple([images(views, places) for places in whose] for whose in (passes, keys)) for views in parts]

    batches = itertools.repeat(prepared(next(batches))) if case.loader == "off" else map(prepared, batches)
    rows = case.batch // case.parts * sum(map(len, passes))
    upstream = torch.randn(rows, config.model.dim, device=DEVICE)

    def step() -> None:
        for queries, others in next(batches):
            with torch.no_grad(), autocast(DEVICE):
                for images in others:
                    key_encoder(images)
            with autocast(DEVICE):
                features = torch.cat([encoder(images) for images in queries])
            features.backward(upstream)
        encoder.zero_grad(set_to_none=True)

    return Runner(captured(step) if graph else step, ahead)


def ours(case: Case, way: str = fusion.WAYS[0], *, graph: bool = False) -> Runner:
    batches, ahead = our_batches(case)
    learner = recipe.ready_learner(case.config) if case.is_pcl else recipe.ready_method(case.config)
    use(way, *learner.method.encoders().values())
    numbers = itertools.count(midst(case))
    if not graph:
        return Runner(lambda: learner.step(next(batches), next(numbers)), ahead)
    batch = batch_at_hand(case)
    inputs = learner.inputs(batch, next(numbers))
    inputs = inputs._replace(views=tuple(view.clone() for view in inputs.views))
    replay = captured(lambda: learner.compute(inputs, midst(case)))

    def step() -> None:
        inputs.copy_(learner.inputs(batch, next(numbers)))
        replay()

    return Runner(step, 0)


def midst(case: Case) -> int:
    """Return the number of the step in the midst of the run."""
    return case.config.epochs // 2 * (recipe.CLUSTERED // case.batch)


def captured(step: Step) -> Step:
    """Return a function that takes the step as a CUDA graph, or skip the provider."""
    try:
        return device.capture(step)[0]
    except RuntimeError as error:
        pytest.skip(f"the step cannot be captured: {error}")


def by(way: str, graph: bool) -> str:
    """Return what stands behind a provider's name for a way of fusion's, and for a graph of it."""
    return (f", {way}" if way != fusion.WAYS[0] else "") + (GRAPH if graph else "")


# The graphs last, because a failed capture may leave the GPU unusable.
PROVIDERS: dict[str, Callable[[Case], Runner]] = {
    "official": official,
    **{
        f"{name}{by(way, graph)}": functools.partial(provider, way=way, graph=graph)
        for graph in (False, True)
        for way in fusion.WAYS
        for name, provider in ((REFERENCE, encoder_only), ("ours", ours))
    },
}
PLAIN = ("official", REFERENCE, "ours")
CASES = [Case(batch, loader) for batch in BATCHES for loader in ("off", "on")]
OFF = [case for case in CASES if case.loader == "off"]
RUNS = [(case, provider) for case in CASES for provider in PLAIN]
OTHERS = [Case(BATCHES[0], "off", name) for name in sorted(Method.named) if name != "pcl"]
OTHERS.append(Case(BATCHES[0], "off", "swav", small_crops=0))
# What a step of SimCLR's published batch takes where only a part of it fits: here on one device, or in small on a CPU.
LARGE = Case(4096, "off", "simclr", parts=32) if device.CUDA else Case(256, "off", "simclr", parts=4)
OTHERS.append(LARGE)
RUNS += [(case, provider) for case in OTHERS for provider in (REFERENCE, "ours")]
if device.CUDA:
    RUNS += [(case, provider) for provider in PROVIDERS if provider not in PLAIN for case in OFF]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """Make a process group of this process alone for the official step; ours does not use it."""
    options = {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.CUDA else "gloo", **options)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def fastest_convolutions() -> Iterator[None]:
    """Let cuDNN search for the fastest convolutions, for all providers."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.fixture(scope="module")
def agreement() -> None:
    check_agreement()


def warm(provider: str, case: Case) -> tuple[Runner, int | None]:
    """Return (the provider after some steps; the most GPU memory that it takes, its weights included)."""
    before = torch.cuda.memory_allocated() if device.CUDA else 0
    runner = PROVIDERS[provider](case)
    run(runner, device.WARM_UP)
    held = torch.cuda.memory_allocated() - before if device.CUDA else 0
    _, more = device.peak_bytes(runner.step)
    return runner, None if more is None else held + more


def run(runner: Runner, steps: int) -> None:
    for _ in range(steps):
        runner.step()


shares: dict[tuple[Case, str], float] = {}  # (case, provider) -> share of encoder-only's speed


@pytest.mark.parametrize(("case", "provider"), RUNS, ids=str)
@pytest.mark.usefixtures("agreement")
def test_step(benchmark, case, provider):
    batch_at_hand(case)  # now, so that it does not count as the provider's memory
    runner, memory = warm(provider, case)
    reference = runner if provider == REFERENCE else warm(REFERENCE, case)[0]
    reference_seconds: list[float] = []

    def take_turns() -> None:
        run(reference, reference.ahead)
        reference_seconds.append(device.seconds(lambda: run(reference, case.steps)))
        run(runner, runner.ahead)

    benchmark.group = str(case)
    benchmark.extra_info.update(provider=provider, sizes=SIZES, versions=optional.versions(), case=case.describe())
    # A replay allocates nothing.
    benchmark.extra_info["peak_extra_bytes"] = None if provider.endswith(GRAPH) else memory
    benchmark.pedantic(run, args=(runner, case.steps), setup=take_turns, rounds=case.rounds)
    if benchmark.enabled:
        seconds = benchmark.stats.stats.data
        ratios = (theirs / own for theirs, own in zip(reference_seconds, seconds, strict=True))
        shares[case, provider] = statistics.median(ratios)
        benchmark.extra_info["figures"] = figures(case, provider, statistics.median(seconds) / case.steps)


def figures(case: Case, provider: str, seconds: float) -> dict[str, float]:
    """Return the figures of a provider whose step takes so many seconds."""
    share = shares[case, provider]
    result = {"images_per_s": round(case.batch / seconds, 1), "share_of_encoder_only": round(share, 4)}
    if (case, "official") in shares:
        result["times_official"] = round(share / shares[case, "official"], 3)
    if peak := next((peak for name, peak in PEAKS.items() if name in name_of_gpu()), None):
        result["mfu"] = round(count_work(case)[0] / seconds / peak / 1e12, 4)
    return result


def name_of_gpu() -> str:
    return torch.cuda.get_device_name() if device.CUDA else ""
