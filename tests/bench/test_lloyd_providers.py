"""Who is compared in k-means: found, called with what their releases take, or left out in words. Their modules are
stand-ins.
"""

from __future__ import annotations

import sys
from types import ModuleType

import kmeans
import left_out
import pytest
import torch
from lloyd_providers import PROVIDERS, STAGES, step

N, K, D = 300, 7, 16
FLASHLIB = "flashlib.primitives.kmeans"


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator()
    generator.seed()
    features = torch.randn(N, D, generator=generator).half()
    return features, features[:K].float()


def assigned(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    assert points.shape == (1, N, D)
    assert centroids.shape == (1, K, D)
    assert points.dtype == centroids.dtype == torch.float16
    return torch.cdist(points.float(), centroids.float()).argmin(2).int()


def with_norms(x, centroids, x_sq, out=None, c_sq=None):
    assert x_sq.dtype == torch.float32
    torch.testing.assert_close(x_sq, x.float().square().sum(2))
    return assigned(x, centroids)


def means(x: torch.Tensor, cluster_ids: torch.Tensor, old_centroids: torch.Tensor) -> torch.Tensor:
    assert cluster_ids.shape == (1, N)
    assert old_centroids.dtype == x.dtype
    hot = torch.nn.functional.one_hot(cluster_ids.long(), K).float()
    counts = hot.sum(1)[..., None]
    return torch.where(counts == 0, old_centroids.float(), hot.mT @ x.float() / counts.clamp(min=1)).half()


def lloyd_step(x, cluster_ids, old_centroids, *, sums_buf, cnts_buf, new_buf, shift_buf):
    assert (sums_buf.shape, sums_buf.dtype) == ((1, K, D), torch.float32)
    assert (cnts_buf.shape, cnts_buf.dtype) == ((1, K), torch.int32)
    assert (shift_buf.shape, shift_buf.dtype) == ((1, K), torch.float32)
    new_buf.copy_(means(x, cluster_ids, old_centroids))
    return new_buf, cluster_ids, shift_buf.max()


# What is called of each package: flash-kmeans 0.3.1 and its repository, flashlib 0.4.0.
MODULES = {
    "flash_kmeans.assign_euclid_triton": {"euclid_assign_triton": with_norms},
    "flash_kmeans.centroid_update_triton": {
        "triton_centroid_update_sorted_euclid": lambda x, cluster_ids, old_centroids: means(
            x, cluster_ids, old_centroids
        )
    },
    "flash_kmeans.cutedsl_impl": {"cutedsl_assign_euclid": with_norms, "euclid_assign_triton": with_norms},
    f"{FLASHLIB}.triton.assign": {"euclid_assign_triton": assigned},
    f"{FLASHLIB}.triton.update": {"triton_lloyd_centroid_step_euclid": lloyd_step},
    f"{FLASHLIB}.cutedsl.assign": {"cutedsl_assign_euclid": assigned, "euclid_assign_triton": assigned},
    "cutlass.cute": {},
}
OTHERS = [name for name in PROVIDERS if name.startswith("flash")]


@pytest.fixture
def installed(monkeypatch) -> dict[str, ModuleType]:
    """Stand-ins for all packages."""
    for name, functions in MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = sys.modules.get(part := ".".join(parts[:end])) or ModuleType(part)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, part, module)
        for function, stand_in in functions.items():
            setattr(sys.modules[name], function, stand_in)
    return {name: sys.modules[name] for name in MODULES}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("provider", OTHERS)
def test_they_are_called_with_what_they_take(provider, stage, problem, installed):
    expected = step(stage, "torch", *problem)()
    found = step(stage, provider, *problem)()
    if stage == "assignment":
        assert (found.view(-1) == expected).double().mean() > 0.98
    else:
        assert found.shape == (1, K, D)
        torch.testing.assert_close(found[0].float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("provider", "package"),
    [
        ("flash-kmeans", "flash-kmeans"),
        ("flash-kmeans-cute", "nvidia-cutlass-dsl"),
        ("flashlib", "flashlib"),
        ("flashlib-cute", "nvidia-cutlass-dsl"),
    ],
)
def test_without_their_packages_they_are_left_out(provider, package, problem, monkeypatch):
    for name in ("flash_kmeans", "flashlib", "cutlass"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    with pytest.raises(pytest.skip.Exception, match=f"needs the package {package}$"):
        step("assignment", provider, *problem)


def test_a_release_without_cute_is_said(problem, installed, monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_kmeans.cutedsl_impl")
    with pytest.raises(pytest.skip.Exception, match="needs the package flash-kmeans from its repository"):
        step("assignment", "flash-kmeans-cute", *problem)


@pytest.mark.parametrize(
    ("provider", "module"),
    [("flash-kmeans-cute", "flash_kmeans.cutedsl_impl"), ("flashlib-cute", f"{FLASHLIB}.cutedsl.assign")],
)
def test_triton_is_not_measured_under_the_name_of_cute(provider, module, problem, installed, monkeypatch):
    """Both take their Triton kernels where the one in CuTe cannot be used, and swallow exceptions on the way."""
    found = installed[module]

    def falls_back(*arguments):
        try:
            return found.euclid_assign_triton(*arguments)
        except Exception:
            return found.euclid_assign_triton(*arguments)

    monkeypatch.setattr(found, "cutedsl_assign_euclid", falls_back)
    search = step("assignment", provider, *problem)
    with pytest.raises(pytest.skip.Exception, match="no kernel in CuTe for this case"):
        search()


def test_their_own_shapes_are_cases(monkeypatch):
    assert kmeans.cases() == [] or kmeans.device.CUDA
    monkeypatch.setattr(kmeans.device, "CUDA", True)
    cases = kmeans.cases()
    for points, clusters in ((1_048_576, 200_000), (5_000_000, 65_536)):
        (case,) = (case for case in cases if (case.points, case.clusters) == (points, clusters))
        assert case.dtype == torch.float16
        assert {*OTHERS, "triton"} == set(kmeans.providers(case, "assignment"))
        assert case.describe()["flop"] == 2 * points * clusters * 128
    assert {name for case in cases for name in kmeans.providers(case, "assignment")} == set(PROVIDERS)


def test_packages_are_named():
    assert left_out.package_of("flash_kmeans.assign_euclid_triton") == "flash-kmeans"
    assert left_out.package_of("cutlass.cute") == "nvidia-cutlass-dsl"
