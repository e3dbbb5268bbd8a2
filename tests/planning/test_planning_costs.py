"""The formulas, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pcl_fast.config import PRESETS, ModelConfig
from pcl_fast.planning import official, ours, rates
from pcl_fast.planning.encoder import count
from pcl_fast.planning.figures import DEFAULT, Constant, Records
from pcl_fast.planning.job import CLUSTERING, DATA, ENCODER, EXCHANGE, FEATURES, LOSS, Job
from pcl_fast.planning.rates import Machine, Precision, machine

IMAGENET = 1_281_167
RECORDS = Records(DEFAULT)


def job(preset: str = "pcl_v2", *, gpus: int = 4, nodes: int = 1, cores: int = 20, **changes) -> Job:
    return Job(replace(PRESETS[preset][1], **changes), IMAGENET, gpus, nodes, cores)


def named(phases) -> dict[str, float]:
    return {name: phase.seconds for name, phase in phases.items()}


def test_resnet50_is_counted_as_published():
    """torchvision's table: 4.09 GMAC, 25.56 million parameters with the layer for 1000 classes, which is not here."""
    found = count(ModelConfig(), 224)
    assert found.forward.flop == pytest.approx(2 * 4.09e9, rel=0.01)
    assert found.parameters == 25_557_032 - 2048 * 1000 - 1000 + 2048 * 128 + 128
    assert found.step == pytest.approx(4 / 3, rel=0.01)
    # Every activation of a pass is written and read again, more than once: tens of MB per image.
    assert 5e7 < found.forward.elements < found.training.elements / 2 < 2e8


def test_work_grows_with_the_image():
    small, large = count(ModelConfig(arch="resnet18"), 64), count(ModelConfig(arch="resnet18"), 128)
    assert large.forward.flop == pytest.approx(4 * small.forward.flop, rel=0.01)
    assert large.parameters == small.parameters


def test_published_rates_are_below_what_the_hardware_can():
    for gpu in ("v100", "a100", "h100", "h200"):
        known = machine(gpu, RECORDS)
        for precision in (known.half, known.single):
            work = count(ModelConfig(), 224).training
            bound = max(work.flop / precision.peak, work.elements * precision.itemsize / known.bandwidth.value / 2)
            assert precision.training(1).value < 1 / bound


def test_rates_between_measured_ones():
    forward = {10: 1000, 30: 1500}  # 10 and 20 ms
    known = Precision({1: 100, 5: 300}, 32, "published: somewhere", forward, "published: elsewhere", 1e12, 2)
    assert [known.training(gpus).value for gpus in (1, 3, 5, 8)] == [100, 80, 60, 60]
    assert known.training(1).source == "published: somewhere"
    assert known.training(3).source == "published: somewhere, which has 1, 5 GPUs"
    assert known.forward(20).value == pytest.approx(20 / 15e-3)
    assert known.forward(5).value == pytest.approx(500)
    assert known.forward(300).value == pytest.approx(1500)


def test_a_step_has_a_time_of_its_own():
    """PyTorch's 1.5% from 256 to 128 images on a V100 are where it is from; at half of that it is three times that."""
    known = machine("v100", RECORDS).half
    assert known.share(128, 256).value == pytest.approx(0.985)
    overhead = rates.STEP_OVERHEAD.value
    image = 1 / 1200 - overhead / 256
    assert known.share(64, 256).value == pytest.approx(1 / 1200 / (image + overhead / 64))
    assert known.share(64, 256).value == pytest.approx(0.956, abs=0.001)
    assert known.share(256, 256).value == 1
    assert known.share(64, 256).kind == "assumed"
    # A faster GPU loses more, but nowhere half.
    assert 0.75 < machine("h100", RECORDS).half.share(32, 256).value < 0.85


def test_a_ring_within_and_between_machines():
    known = machine("v100", RECORDS)
    links = {"gpu_link": replace(known.gpu_link, value=100e9), "node_link": replace(known.node_link, value=10e9)}
    linked = replace(known, **links)
    assert ours.reduce_seconds(1e9, job(gpus=4), linked) == pytest.approx(2 * 3 / 4 * 0.01)
    assert ours.reduce_seconds(1e9, job(gpus=4, nodes=2), linked) == pytest.approx(2 * 3 / 4 * 0.01 + 0.1)
    assert ours.reduce_seconds(1e9, job(gpus=1), linked) == 0


def test_feature_passes_follow_the_trainer():
    """PCL: before epochs 20 to 199 and at the end; evaluation adds 0 and 10. MoCo: evaluation's 21."""

    def passes(*changed, **changes) -> tuple[int, int]:
        found = job(*changed, **changes)
        return len(found.clustered | found.evaluated), len(found.clustered)

    assert passes("pcl_v2") == (183, 181)
    assert passes("moco_v2") == (21, 0)
    never = replace(PRESETS["pcl_v2"][1].evaluation, every=0)
    assert passes("pcl_v2", evaluation=never) == (181, 181)
    assert passes("pcl_v2", evaluation=never, epochs=5) == (0, 0)


def test_ours_by_hand():
    known = machine("v100", RECORDS)
    found = named(ours.plan(job(), known))
    steps = IMAGENET // 256 * 200
    per_gpu = 1200 + (8322 / 8 - 1200) * 3 / 7
    # pcl_v2's MLP head makes the encoder a little larger than the ResNet-50 whose rate was published.
    assert found[ENCODER] == pytest.approx(steps * 4 / 3 * 64 / (per_gpu * 0.956), rel=0.02)
    assert found[FEATURES] == pytest.approx(183 * IMAGENET / (20 * 336))
    flop = 2 * IMAGENET * 128 * 175_000 * 105
    assert found[CLUSTERING] == pytest.approx(181 * flop / (4 * 60e12))
    assert found[DATA] == 0
    columns = 0.1 * 16384 + 0.9 * (4 * 16384)
    assert found[LOSS] == pytest.approx(steps * (2 * 128 * columns / 900e9 + 42e-6))


def test_what_fusion_should_bring_by_hand():
    """On a V100 as MXNet's fused code trains, which is slower than by bytes alone; elsewhere by bytes."""
    steps = IMAGENET // 256 * 200
    known = machine("v100", RECORDS)
    found, eager = named(ours.projected(job(), known)), named(ours.plan(job(), known))
    share = known.fused.share(64, 192).value
    assert found[ENCODER] == pytest.approx(steps * 4 / 3 * 64 / (5357 / 4 * share), rel=0.02)
    assert found[FEATURES] == eager[FEATURES]  # cores decode, and are no faster
    assert found[CLUSTERING] == eager[CLUSTERING]
    hopper = machine("h100", RECORDS)
    saved = 182e6 / (0.89 * 3350e9)
    less = named(ours.plan(job(), hopper))[ENCODER] - named(ours.projected(job(), hopper))[ENCODER]
    assert less == pytest.approx(steps * 64 * saved, rel=0.02)
    many = named(ours.projected(job(cores=500), known))[FEATURES]
    assert many == pytest.approx(183 * IMAGENET / (1.5 * 4 * 3382), rel=0.01)


def test_starts_that_are_left_early_by_hand():
    known, cluster = machine("v100", RECORDS), PRESETS["pcl_v2"][1].cluster
    found = named(ours.plan(job(cluster=replace(cluster, prune_starts=True)), known))
    # Four starts end after 5 iterations, the fifth has 20 and a search for the labels.
    searches = 2 * IMAGENET * 128 * 175_000 * (4 * 5 + 20 + 1)
    assert found[CLUSTERING] == pytest.approx(181 * searches / (4 * 60e12))


def test_the_fast_preset_by_hand():
    known, fast = machine("v100", RECORDS), job("pcl_v2_fast", cores=500)
    found, slow = named(ours.plan(fast, known)), named(ours.plan(job(cores=500), known))
    # Evaluated before every tenth epoch and at the end; the first clustering, before epoch 20, is one of these.
    assert len(fast.passes) == 21
    relative = {
        size: ours.relative(fast.of_size(fast.config.data.at(epoch)), known, known.half, "training")
        for epoch, size in ((0, 160), (120, 192), (160, 224))
    }
    mean = (120 * relative[160] + 40 * relative[192] + 40 * relative[224]) / 200
    assert found[ENCODER] == pytest.approx(slow[ENCODER] * mean / relative[224], rel=1e-4)
    assert mean / relative[224] == pytest.approx((120 * 160**2 + 40 * 192**2 + 40 * 224**2) / 200 / 224**2, rel=0.02)
    flop = 2 * IMAGENET * 128 * 175_000
    assert found[CLUSTERING] == pytest.approx((105 + 180 * 11) * flop / (4 * 60e12))


def test_small_crops_may_wait_for_data_while_large_ones_do_not():
    """Two cores a GPU decode 672 images/s: enough for 224 px, not for 160."""
    known, config = machine("v100", RECORDS), PRESETS["pcl_v2_fast"][1]
    few = job("pcl_v2_fast", cores=11)
    large = named(ours.plan(replace(few, config=replace(config, data=replace(config.data, sizes=()))), known))
    assert large[DATA] == 0
    assert named(ours.plan(few, known))[DATA] > 0


def test_a_cache_is_read_by_all_passes_but_the_first():
    """5 GB/s are more images than what four GPUs encode. 20 cores decode 6720 images/s."""
    config = PRESETS["pcl_v2"][1]
    known = with_cache(5e9)
    first = IMAGENET / (20 * 336)
    assert named(ours.plan(job(), known))[FEATURES] == pytest.approx(first + 182 * IMAGENET / (4 * 3382), rel=0.01)
    never = job("moco_v2", evaluation=replace(config.evaluation, every=0))
    assert named(ours.plan(never, known))[FEATURES] == 0


@pytest.mark.parametrize(
    ("rate", "cores", "read"),
    [
        # 3322 images/s are read and 6720 decoded; the share of their sum is less than what four GPUs encode.
        (0.5e9, 20, 0.9 * (0.5e9 / 150_528 + 20 * 336)),
        # 13,287 images/s are a little less than what four GPUs encode, with the cores' help more.
        (2e9, 20, 4 * 3382),
        # Five cores decode 1680 images/s, less than a quarter of 6722, so that they do not help.
        (1.0118e9, 5, 1.0118e9 / 150_528),
        (1.0112e9, 5, 0.9 * (1.0112e9 / 150_528 + 5 * 336)),
    ],
)
def test_cores_help_a_slow_cache(rate, cores, read):
    known = with_cache(rate, share=0.9)
    expected = IMAGENET / (cores * 336) + 182 * IMAGENET / read
    assert named(ours.plan(job(cores=cores), known))[FEATURES] == pytest.approx(expected, rel=0.001)
    # Each of two machines has half of the images, as it has half of the cores.
    halves = job(gpus=4, nodes=2, cores=cores)
    assert named(ours.plan(halves, known))[FEATURES] == pytest.approx(expected / 2, rel=0.001)


def test_what_sets_the_rate_of_a_cache_is_said():
    slow, fast = (ours.plan(job(), with_cache(rate))[FEATURES].formula for rate in (0.5e9, 5e9))
    assert "here cache and cores;" in slow
    assert "here GPUs;" in fast


def with_cache(rate: float, share: float = 1.0) -> Machine:
    known = machine("v100", RECORDS)
    cache = Constant("cache", rate, "B/s", "assumed: --cache")
    return replace(known, cache=cache, helped=replace(known.helped, value=share))


def test_official_by_hand():
    known = machine("v100", RECORDS)
    found = named(official.plan(job(cores=32), known))
    steps = IMAGENET // 256
    question = ("sampling alone", "official", "median_ms")
    milliseconds = RECORDS.find("loss", *question).figure(*question)
    assert found[LOSS] == pytest.approx(180 * steps * milliseconds / 1e3, rel=0.01)
    flop = 2 * IMAGENET * 128 * 175_000 * 105
    faiss = 256e12 / 55 * 15.7 / 10.6
    assert found[CLUSTERING] == pytest.approx(180 * flop / faiss, rel=0.05)
    assert found[FEATURES] == pytest.approx(180 * IMAGENET / (32 * 1070.37 / 8), rel=0.01)
    few = named(official.plan(job(cores=8), known))
    assert few[FEATURES] == pytest.approx(4 * found[FEATURES], rel=0.01)
    many = named(official.plan(job(cores=128), known))
    assert many[FEATURES] == pytest.approx(found[FEATURES])  # there are 32 workers at most


def test_what_was_measured_on_the_gpu_replaces_what_is_expected():
    """Loss: 1 ns a column for 64 rows, and for 128 rows twice as much. The paper's E-step, official: 500 s."""
    known = machine("v100", RECORDS)
    loss = Constant("loss", 1e-9, "s", "measured: here")
    estep = Constant("E-step", 500.0, "s", "measured: here")
    own = replace(known, loss=loss, official_estep=estep)
    steps, columns = IMAGENET // 256 * 200, 0.1 * 16384 + 0.9 * (4 * 16384)
    assert named(ours.plan(job(), own))[LOSS] == pytest.approx(steps * columns * 1e-9)
    assert named(ours.plan(job(gpus=2), own))[LOSS] == pytest.approx(2 * steps * columns * 1e-9)
    assert named(official.plan(job(), own))[CLUSTERING] == pytest.approx(180 * 500)
    config = PRESETS["pcl_v2"][1]
    half = job(cluster=replace(config.cluster, ks=(25_000, 62_500)))
    assert named(official.plan(half, own))[CLUSTERING] == pytest.approx(90 * 500)


def test_the_step_waits_for_a_slow_loader():
    known = machine("v100", RECORDS)
    slow = named(ours.plan(job(cores=2), known))
    steps = IMAGENET // 256 * 200
    step = (slow[ENCODER] + slow[LOSS] + slow[EXCHANGE]) / steps
    assert slow[DATA] == pytest.approx(steps * (256 / (2 * 336) - step), rel=0.02)


def test_what_the_exchange_hides():
    """Two GPUs: of 112 MB of gradients only the last 25 MiB show; all of them if the link is slow."""
    known = machine("v100", RECORDS)
    steps = IMAGENET // 256 * 200
    hidden = named(ours.plan(job(gpus=2), known))[EXCHANGE] / steps
    assert hidden == pytest.approx(25 * 2**20 / known.gpu_link.value)
    slow = replace(known, gpu_link=replace(known.gpu_link, value=1e9))
    shown = named(ours.plan(job(gpus=2), slow))
    step = shown[ENCODER] / steps
    gradients = 4 * count(PRESETS["pcl_v2"][1].model, 224).parameters / 1e9
    shuffle = 0.5 * 128 * 3 * 224**2 / 1e9  # less than a forward pass
    assert shuffle < step / 4
    assert shown[EXCHANGE] / steps == pytest.approx(max(gradients - step / 2, 25 * 2**20 / 1e9), rel=0.02)
    assert named(ours.plan(job(gpus=1), known))[EXCHANGE] == 0


def test_a_smaller_encoder_takes_less():
    known = machine("v100", RECORDS)
    config = PRESETS["pcl_v2"][1]
    small, large = job(cores=500, model=replace(config.model, arch="resnet18")), job(cores=500)
    for way in (ours, official):
        less, more = named(way.plan(small, known)), named(way.plan(large, known))
        assert less[ENCODER] < 0.5 * more[ENCODER]
    assert named(ours.plan(small, known))[FEATURES] < 0.5 * named(ours.plan(large, known))[FEATURES]


def test_a_step_in_parts_by_hand():
    """Banks are read once a part, small parts encode more slowly, and gradients hide behind the last part alone."""
    known, config = machine("v100", RECORDS), PRESETS["pcl_v2"][1]

    def of(parts: int) -> dict[str, float]:
        optim = replace(config.optim, batch_size=4096, accumulate=parts)
        return named(ours.plan(job(optim=optim), known))

    whole, parts = of(1), of(16)
    assert parts[ENCODER] > whole[ENCODER]
    assert parts[ENCODER] == pytest.approx(
        whole[ENCODER] * known.half.share(1024, 256).value / known.half.share(64, 256).value
    )
    # Every 64 of 1024 rows have a pass, in parts of 64 as in the whole; without a figure of that, one for each part.
    assert parts[LOSS] == pytest.approx(whole[LOSS] * (1 if known.loss is not None else 16))
    assert parts[EXCHANGE] >= whole[EXCHANGE]
