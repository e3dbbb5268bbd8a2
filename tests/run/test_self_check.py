"""The check of the kernels at a run's start: right ones pass, and whatever is broken is named.

The kernels run in Triton's interpreter, with the tiles of a GPU made smaller, or on a GPU if there is one.
"""

from __future__ import annotations

import pytest
import torch
from pcl_fast.kernels import (
    assign,
    batch_norm,
    contrast,
    launch,
    max_pool,
    normalise,
    photometric,
    photometric_plain,
    segment,
    stem,
    switches,
)
from pcl_fast.kernels.launch import Tile
from pcl_fast.kernels.switches import KERNELS

from pcl_fast.errors import UserError
from pcl_fast.run import self_check

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, one_thread):
    if not GPU:
        monkeypatch.setitem(launch.TABLE, 90, {2: (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))})
        monkeypatch.setitem(launch.NEAREST, 90, {2: {128: Tile(32, 16, 4, 2)}})
        for name, value in {"SUMMED": 8, "MAPPED": 16, "WARPS": 2, "MERGED": {"PARTS": 2, "COLUMNS": 32}}.items():
            monkeypatch.setattr(batch_norm, name, value)


def faults(*kernels: str, granularities: int = 1) -> dict[str, str]:
    return self_check.find_faults(kernels, DEVICE, dim=24, granularities=granularities)


def test_right_kernels_pass():
    assert faults(*KERNELS) == {}


def test_a_product_that_is_zero_in_part_is_found(monkeypatch):
    """A quarter of the rows of one tile, in one part of the last bank: an open report about Volta's fp16 products."""
    stream = contrast._stream

    def broken(launched, query, index, lists, temperature, state):
        stream(launched, query, index, lists, temperature, state)
        state.numerators[-1, 20:24] = 0

    monkeypatch.setattr(contrast, "_stream", broken)
    assert "gradients differ" in faults("contrast", granularities=1)["contrast"]


def test_a_score_that_is_zero_in_part_is_found(monkeypatch):
    """As if a fragment of scores, of 8 columns, were 0: their exponentials are missing from the sum."""
    stream = contrast._stream

    def broken(launched, query, index, lists, temperature, state):
        stream(launched, query, index, lists, temperature, state)
        columns = sum(bank.length for bank in launched.banks) / sum(launched.parts)
        state.sums[0, 17] *= 1 - 8 / columns

    monkeypatch.setattr(contrast, "_stream", broken)
    assert "losses differ" in faults("contrast", granularities=0)["contrast"]


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_point_with_another_centroid_is_found(monkeypatch, place):
    nearest = assign.nearest

    def broken(points, centroids):
        found = nearest(points, centroids)
        found[place] = (found[place] + 1) % len(centroids)
        return found

    monkeypatch.setattr(assign, "nearest", broken)
    assert "distances differ" in faults("assign")["assign"]


def test_of_points_held_in_registers_only_that_is_named(monkeypatch):
    nearest = assign.nearest

    def broken(points, centroids):
        found = nearest(points, centroids)
        return found if switches.is_off("assign_held") else (found + 1) % len(centroids)

    monkeypatch.setattr(assign, "nearest", broken)
    assert list(faults("assign_held", "assign")) == ["assign_held"]
    assert not switches.is_off("assign_held")


def test_a_centroid_that_there_is_not_is_found(monkeypatch):
    nearest = assign.nearest
    monkeypatch.setattr(assign, "nearest", lambda points, centroids: nearest(points, centroids) + 1)
    assert "centroids that there are not" in faults("assign")["assign"]


def test_a_point_that_a_sum_lacks_is_found(monkeypatch):
    sums = segment.segment_sums

    def broken(values, clusters, k):
        total, counts = sums(values, clusters, k)
        total[clusters[500]] -= values[500].float()
        return total, counts

    monkeypatch.setattr(segment, "segment_sums", broken)
    assert "sums differ" in faults("segment")["segment"]


def test_another_count_is_found(monkeypatch):
    sums = segment.segment_sums
    monkeypatch.setattr(segment, "segment_sums", lambda *given: (sums(*given)[0], sums(*given)[1] + 1))
    assert "counts other points" in faults("segment")["segment"]


def test_a_pooled_value_of_another_pixel_and_its_gradient_are_found(monkeypatch):
    pool = max_pool.max_pool
    monkeypatch.setattr(max_pool, "max_pool", lambda x, *window: pool(x.roll(1, 3) * (x > 3) + x * (x <= 3), *window))
    assert "values differ" in faults("max_pool")["max_pool"]
    monkeypatch.setattr(
        max_pool, "max_pool", lambda x, *window: pool(x * (x > 0.01) + x.detach() * (x <= 0.01), *window)
    )
    assert "gradients differ" in faults("max_pool")["max_pool"]


def test_a_product_of_the_stem_that_is_left_out_and_its_gradient_are_found(monkeypatch):
    convolve = stem.stem
    corner = torch.zeros(64, 3, 7, 7, device=DEVICE)
    corner[5, 2, 6, 6] = 1
    monkeypatch.setattr(stem, "stem", lambda x, weight: convolve(x, weight * (1 - corner)))
    assert "values differ" in faults("stem")["stem"]
    monkeypatch.setattr(stem, "stem", lambda x, weight: convolve(x, weight * (1 - corner) + weight.detach() * corner))
    assert "gradients differ" in faults("stem")["stem"]


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_an_entry_that_is_not_normalised_is_found(monkeypatch, wrong):
    shift = normalise.normalise

    def broken(images, **options):
        found = shift(images, **options)
        found[2, 1, 18, 22] += wrong
        return found

    monkeypatch.setattr(normalise, "normalise", broken)
    assert "1 of 3933 values differ" in faults("normalise")["normalise"]


def test_a_block_of_pixels_that_is_not_coloured_is_found(monkeypatch):
    def broken(images, *slots):
        found = photometric_plain.photometric(images.cpu(), *(slot.cpu() for slot in slots))
        found[1, 22, 6:] = images[1, 22, 6:].cpu()  # the last block of 17 pixels
        return found

    monkeypatch.setattr(photometric, "photometric", broken)
    assert "bytes differ" in faults("photometric")["photometric"]


def lacks_a_tile(results, *given):
    results[0][1, :8, 4, 2:6] = 0


def lets_all_through(results, *given):
    """Where ReLU is 0: all kept bits are set, in one word of four rows."""
    if results[1].numel():
        results[1].view(-1)[3] = -1


def lacks_rows(results, dy, *given):
    """In the sums, four rows of 351."""
    results[0][0, :8] -= dy[0, :8, 4, 2:6].float().sum(1)


def stores_another_gradient(results, *given):
    if results[3].numel():
        results[3][2, 9:17, 8, 12] = 0


def of_another_row(results, *given):
    results[2, 9:17, 8, 12] = results[2, 9:17, 8, 11]


def biased_variance(results, x, running_mean, running_var, *rest):
    running_var -= 0.1 * results[0, x.shape[1] : 2 * x.shape[1]] / 351


@pytest.mark.parametrize(
    ("operation", "fault", "message"),
    [
        ("apply", lacks_a_tile, "results differ"),
        ("apply", lets_all_through, "gradients differ"),
        ("sums", lacks_rows, "gradients differ"),
        ("sums", stores_another_gradient, "gradients differ"),
        ("differentiate", of_another_row, "gradients differ"),
        ("statistics", biased_variance, "running statistics differ"),
    ],
)
def test_a_batch_norm_that_is_wrong_in_part_is_found(monkeypatch, operation, fault, message):
    right = getattr(batch_norm.OPERATIONS, operation)

    def broken(*given):
        results = right(*given)
        fault(results, *given)
        return results

    monkeypatch.setattr(batch_norm, "OPERATIONS", batch_norm.OPERATIONS._replace(**{operation: broken}))
    assert message in faults("batch_norm")["batch_norm"]


@pytest.mark.parametrize("error", [RuntimeError("\n  no kernel image\nlines"), SystemError(), AssertionError("x")])
def test_whatever_a_launch_raises_is_named(monkeypatch, error):
    def broken(*given):
        raise error

    monkeypatch.setattr(segment, "segment_sums", broken)
    found = faults("segment", "normalise")
    assert list(found) == ["segment"]
    assert found["segment"].startswith(f"cannot be launched ({type(error).__name__}: ")
    assert "\n" not in found["segment"]


def test_a_gpu_that_takes_no_more_work_is_said(monkeypatch):
    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.raises(UserError, match="the kernel normalise failed, and after it a GPU takes no more work"):
        self_check._fault("normalise", lambda: None, torch.device("cuda", 0))
