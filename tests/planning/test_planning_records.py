"""Reading records, and what the formulas say of the steps in them."""

from __future__ import annotations

import json

import pytest
from measured_steps import measured_steps

from pcl_fast.planning.figures import Constant, Records
from pcl_fast.planning.rates import machine

HELPED = "disk 2 times as fast as the cores"
LOSS = {"N": 64, "r": 16384, "columns": 1000}


def write(root, slug: str, machine_name: str, benchmark: str, cases: dict, **more) -> None:
    folder = root / slug
    folder.mkdir(exist_ok=True)
    (folder / f"{benchmark}.json").write_text(json.dumps({"machine": machine_name, "cases": cases, **more}))


def rates(**images_per_s: float) -> dict:
    return {"providers": {name.replace("_", " "): {"images_per_s": rate} for name, rate in images_per_s.items()}}


def step_case(loader: str, encoder: float, ours: float, **more) -> dict:
    case = {"arch": "resnet18", "size": 64, "batch": 32, "loader": loader, "queue": 400, "ks": [50, 300]}
    providers = {"encoder-only": {"images_per_s": encoder}, "ours": {"images_per_s": ours}}
    return {**case, "negatives": 100, "parameters": 1_000_000, "providers": providers, **more}


def test_a_figure_is_found_on_the_machine_asked_for_first(tmp_path):
    for slug, rate in (("a-cpu", 1.0), ("nvidia-h200", 2.0)):
        write(tmp_path, slug, slug, "data", {"training views": rates(dali=rate)})
    records = Records(tmp_path)
    question = ("training views", "dali", "images_per_s")
    assert records.find("data", *question).figure(*question) == 1.0
    assert records.find("data", *question, first="h200").figure(*question) == 2.0
    assert records.find("data", *question, first="h100").figure(*question) == 1.0
    assert records.of_gpu("h20") == {}
    with pytest.raises(ValueError, match=r'"training views", torchvision: images_per_s; run the benchmarks'):
        records.find("data", "training views", "torchvision", "images_per_s")


@pytest.mark.parametrize("text", ["{", "[]", '{"cases": {}}', '{"machine": "x", "cases": 3}'])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "loss.json").write_text(text)
    with pytest.raises(ValueError, match=r"machine/loss\.json is no benchmark's record"):
        Records(tmp_path)


def test_a_constant_says_where_it_comes_from():
    with pytest.raises(ValueError, match="must be one of measured, published, assumed"):
        Constant("rate", 1.0, "1/s", "guessed: it feels right")
    assert str(Constant("rate", 9e11, "B/s per GPU", "assumed: so")) == "900 GB/s per GPU"
    assert str(Constant("time", 0.0613, "s", "assumed: so")) == "61.3 ms"
    assert str(Constant("share", 0.5, "", "assumed: so")) == "0.5"


def test_loaders_share_a_cpu_but_not_a_gpu(tmp_path):
    cases = {
        "training views": {**rates(dali=300.0, torchvision=150.0), "cores": 2},
        "step of resnet18": rates(batch_at_hand=200.0, dali=110.0, torchvision=90.0),
    }
    write(tmp_path, "cpu", "AMD EPYC CPU, 2 threads", "data", cases)
    write(tmp_path, "gpu", "NVIDIA H200", "data", cases)
    found = {step.name: step for step in measured_steps(Records(tmp_path))}
    assert set(found) == {f"{where}, step of resnet18, dali" for where in ("cpu", "gpu")} | {
        "gpu, step of resnet18, torchvision"
    }
    assert found["cpu, step of resnet18, dali"].predicted == pytest.approx(1 / 200 + 1 / 300)
    assert found["gpu, step of resnet18, dali"].predicted == pytest.approx(1 / 200)
    assert found["gpu, step of resnet18, torchvision"].predicted == pytest.approx(1 / 150)
    assert found["gpu, step of resnet18, torchvision"].measured == pytest.approx(1 / 90)
    assert found["cpu, step of resnet18, dali"].error == pytest.approx((1 / 200 + 1 / 300) * 110 - 1)


def test_a_step_with_smaller_views_waits_for_those(tmp_path):
    cases = {
        "training views": rates(dali=300.0),
        "training views, 64 px": rates(dali=500.0),
        "step of resnet18": rates(batch_at_hand=200.0, dali=140.0),
    }
    write(tmp_path, "cpu", "AMD EPYC CPU, 2 threads", "data", cases)
    (step,) = measured_steps(Records(tmp_path))
    assert step.predicted == pytest.approx(1 / 200 + 1 / 500)


def test_steps_on_a_cpu(tmp_path):
    """Loss: 10 ms for 64 rows and 1000 columns, so 2.75 ms for 32 rows and 400 + 50 + 100 columns. Update: 32 MB at 20
    GB/s, 1.6 ms. The loader costs ours what it costs the encoder alone.
    """
    cases = {"off": step_case("off", 320.0, 300.0), "on": step_case("on", 200.0, 190.0)}
    write(tmp_path, "cpu", "AMD EPYC CPU, 2 threads", "step", cases)
    write(tmp_path, "cpu", "AMD EPYC CPU, 2 threads", "loss", loss_record("eager", 10.0))
    off, on = measured_steps(Records(tmp_path))
    assert off.predicted == pytest.approx(1 / 320 + (2.75e-3 + 1.6e-3) / 32)
    assert on.predicted == pytest.approx(1 / 200 + (2.75e-3 + 1.6e-3) / 32)
    assert (off.measured, on.measured) == pytest.approx((1 / 300, 1 / 190))


def test_a_ratio_of_rounds_that_took_turns_counts_more_than_two_rates(tmp_path):
    case = step_case("off", 320.0, 200.0)
    case["providers"]["ours"]["share_of_encoder_only"] = 0.8
    write(tmp_path, "cpu", "AMD EPYC CPU, 2 threads", "step", {"off": case})
    (step,) = measured_steps(Records(tmp_path))
    assert step.measured == pytest.approx(1 / 320 / 0.8)


def test_steps_on_a_gpu(tmp_path):
    """Loss by columns alone, 0.055 ms; update at 4000 GB/s, 8 us. Both are free while the encoder alone waits."""
    cases = {"off": step_case("off", 3200.0, 3000.0), "on": step_case("on", 3190.0, 3000.0)}
    write(tmp_path, "gpu", "NVIDIA H200", "step", cases, copy_gb_per_s=4000.0)
    write(tmp_path, "gpu", "NVIDIA H200", "loss", loss_record("triton+graph", 0.1))
    added = (0.055e-3 + 8e-6) / 32
    off, on = measured_steps(Records(tmp_path))
    assert off.predicted == pytest.approx(1 / 3200 + added)
    assert on.predicted == pytest.approx(max(1 / 3190, 1 / 3200 + added))


def loss_record(provider: str, milliseconds: float) -> dict:
    """In the precision of training: half on a GPU, of which the provider is triton. The other one takes ten times as
    long.
    """
    used, other = ("float16", "float32") if provider == "triton+graph" else ("float32", "float16")
    times = {other: 10 * milliseconds, used: milliseconds}
    return {
        f"N=64, r=16384, {dtype}": {**LOSS, "dtype": dtype, "providers": {provider: {"median_ms": time}}}
        for dtype, time in times.items()
    }


def test_measured_rates_of_a_gpu_replace_published_ones(tmp_path):
    views = {
        kind: {**rates(torchvision=80.0, dali=3200.0), "cores": 16} for kind in ("training views", "clustering views")
    }
    write(tmp_path, "nvidia-a100-sxm4-80gb", "NVIDIA A100-SXM4-80GB", "data", views)
    write(tmp_path, "nvidia-a100-sxm4-80gb", "NVIDIA A100-SXM4-80GB", "loss", loss_record("triton+graph", 0.1))
    shared = {HELPED: {"providers": {"disk and cores": {"share_of_sum": 0.8}}}}
    write(tmp_path, "nvidia-a100-sxm4-80gb", "NVIDIA A100-SXM4-80GB", "slow_disk", shared)
    # What the official code does on the host is anybody's.
    median = {"providers": {"official": {"median_ms": 30.0}}}
    write(tmp_path, "cpu", "AMD EPYC CPU, 2 threads", "loss", {"sampling alone": median})
    write(tmp_path, "cpu", "AMD EPYC CPU, 2 threads", "kmeans", {"concentration, N=1281167, K=25000": median})
    estep = {
        "5 iterations, redo 1": {"providers": {"official": {"estimated_paper_ms": 5e5}}},
    }
    write(tmp_path, "nvidia-a100-sxm4-80gb", "NVIDIA A100-SXM4-80GB", "estep", estep)
    iteration = {"N=1281167, K=100000, float16, iteration": {"providers": {"triton": {"tflop_per_s": 200.0}}}}
    write(tmp_path, "nvidia-a100-sxm4-80gb", "NVIDIA A100-SXM4-80GB", "kmeans", iteration)
    records = Records(tmp_path)
    known = machine("a100", records)
    assert (known.clustering.value, known.decoded.value, known.pair.value) == (2e14, 200.0, 5.0)
    assert known.loss.value == pytest.approx(1e-4 / 1000)
    assert known.official_estep.value == 500.0
    assert (known.sampling.value, known.loops.value, known.helped.value) == (0.03, 0.03, 0.8)
    assert {known.clustering.kind, known.decoded.kind, known.view.kind, known.loops.kind} == {"measured"}
    other = machine("h100", records)
    assert (other.clustering.kind, other.helped.kind) == ("assumed", "assumed")
    assert other.pair.value == 5.0  # the host's part is anybody's
    with pytest.raises(ValueError, match="choose from v100, a100, h100, h200"):
        machine("tpu", records)
