"""The sweep of points held in registers, against float64. Without a GPU it runs on a small model of Gluon."""

from __future__ import annotations

import pytest
import torch
import triton

if not triton.__version__.startswith("3.6."):
    pytest.skip("Gluon is used with Triton 3.6 alone", allow_module_level=True)

import gluon_on_cpu
from pcl_fast.kernels import assign, assign_held, assign_plain, switches
from pcl_fast.kernels.assign import CLASSES
from pcl_fast.kernels.launch import NEAREST, capability
from test_assign import DEVICE, clustered, distances, excess

D, SLOTS = assign_held.WIDTH, assign_held.SLOTS
TILE = NEAREST[90][2][D]
HOPPER = torch.cuda.is_available() and capability(torch.device("cuda")) == 90


def nearest(features: torch.Tensor, centroids: torch.Tensor, monkeypatch) -> torch.Tensor:
    """Return what `assign.nearest` does with points held in registers."""
    if HOPPER:
        assert assign.holds(features)
        return assign.nearest(features, centroids)
    with monkeypatch.context() as patch:
        patch.setattr(assign, "holds", lambda features: True)
        patch.setattr(assign_held, "sweep_held", OnCPU())
        return assign.nearest(features, centroids)


class OnCPU:
    """`sweep_held`, launched on a CPU."""

    fn = assign_held.sweep_held.fn

    def __getitem__(self, grid):
        return lambda *arguments, num_warps, **constants: gluon_on_cpu.run(self, *grid, *arguments, **constants)


@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (255, 63), (256, 64), (257, 65), (30, 4 * 64), (30, 4 * 64 + 1), (40, 9 * 64 - 1)],
)
def test_finds_the_nearest_at_and_across_the_edges_of_tiles(n, k, monkeypatch):
    features, centroids = clustered(n, k, D, torch.float16, seed=n + k)
    exact = distances(features, centroids)
    found = nearest(features, centroids, monkeypatch)
    # Centroids are rounded to fp16, for plain PyTorch too.
    plainly = excess(assign_plain.nearest(features, centroids.half().float()), exact)
    assert (excess(found, exact) <= plainly + 1e-3 * exact.min(1).values + 1e-6).all()


@pytest.mark.parametrize("seed", range(2))
def test_far_from_the_origin_and_of_any_size(seed, monkeypatch):
    features, centroids = clustered(40, 300, D, torch.float32, seed=seed)
    features, centroids = (features + 0.5 * seed).half(), centroids + 0.5 * seed
    exact = distances(features, centroids)
    within = 0.05 * exact.min(1).values
    assert (excess(nearest(features, centroids, monkeypatch), exact) <= within).all()


def test_every_column_can_win(monkeypatch):
    k = 3 * TILE.columns + 3
    features, _ = clustered(k, k, D, torch.float16, seed=2)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = nearest(features, features[order].float(), monkeypatch)
    assert torch.equal(found[order].long(), torch.arange(k, device=DEVICE))


def test_equals_the_other_sweep(monkeypatch):
    features, centroids = clustered(300, 300, D, torch.float16, seed=3)
    with switches.without("assign_held"):
        expected = assign.nearest(features, centroids)
    assert (nearest(features, centroids, monkeypatch) == expected).double().mean() > 0.99


def test_where_points_are_held():
    """Where Triton's interpreter runs, and for other types and widths, they are not."""
    points = torch.zeros(1, D, dtype=torch.float16, device=DEVICE)
    assert assign.holds(points) == HOPPER
    assert not assign.holds(points.float())
    assert not assign.holds(points[:, :100])
    held = [tile for table in NEAREST.values() for tiles in table.values() for tile in tiles.values() if tile.held]
    assert held == [TILE]
    assert TILE.columns % (2 * CLASSES) == 0


@pytest.mark.skipif(HOPPER, reason="of the model on a CPU")
@pytest.mark.parametrize(
    ("line", "instead", "fault"),
    [
        ("async_copy.wait_group(_SLOTS - 3)", "async_copy.wait_group(_SLOTS - 2)", "not waited for"),
        ("    gl.thread_barrier()\n", "", "not waited for|still read"),
        ("    fence_async_shared()\n", "", "may not see"),
        ("tile + _SLOTS, COLUMNS", "tile + _SLOTS + 1, COLUMNS", "farther|out of bounds"),
        ("c3, start3, c0", "c3, start3, c3", "farther|reads|overwritten"),
        ("return warpgroup_mma_wait(0, [begun]), largest", "return begun, largest", "."),
    ],
)
def test_what_is_broken_is_found(line, instead, fault, monkeypatch):
    features, centroids = clustered(20, 500, D, torch.float16, seed=4)
    getsource = gluon_on_cpu.inspect.getsource
    assert any(line in getsource(f.fn) for f in vars(assign_held).values() if hasattr(f, "fn"))
    monkeypatch.setattr(gluon_on_cpu.inspect, "getsource", lambda f: getsource(f).replace(line, instead))
    with pytest.raises((AssertionError, TypeError, IndexError), match=fault):
        check(features, centroids, monkeypatch)


def check(features, centroids, monkeypatch) -> None:
    exact = distances(features, centroids)
    assert (excess(nearest(features, centroids, monkeypatch), exact) <= 0.01).all(), "farther"
