"""Jitter, grey and blur against torchvision's on PIL images, of which no byte may differ."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from pcl_fast.kernels import photometric, photometric_plain
from pcl_fast.kernels.photometric_plain import MAX_SIGMA, Op
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JITTER = (Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE)
OPERATIONS = {
    Op.NONE: lambda image, factor: image,
    Op.BRIGHTNESS: F.adjust_brightness,
    Op.CONTRAST: F.adjust_contrast,
    Op.SATURATION: F.adjust_saturation,
    Op.HUE: F.adjust_hue,
    Op.GRAYSCALE: lambda image, factor: F.rgb_to_grayscale(image, num_output_channels=3),
}


@pytest.fixture(autouse=True)
def one_thread():
    """The plain version's operations are so short that on a busy machine threads would rather wait than work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kernels(images, ops, factors, sigma):
    arguments = (torch.as_tensor(array, device=DEVICE) for array in (images, ops, factors, sigma))
    return photometric.photometric(*arguments).cpu()


def plain(images, ops, factors, sigma, **options):
    return photometric_plain.photometric(*map(torch.as_tensor, (images, ops, factors, sigma)), **options)


both = pytest.mark.parametrize("run", [kernels, plain])


@cache
def sample() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def photos(h: int, w: int) -> np.ndarray:
    """Two photos; bytes at random, the extreme ones among these, close to grey, grey, and dark: uint8 [7, h, w, 3]."""
    rng = np.random.default_rng(h * w)
    real = [np.array(photo.resize((w, h))) for photo in sample()]
    noise = rng.integers(0, 256, (h, w, 3))
    grey = rng.integers(0, 256, (h, w, 1))
    made = (noise, noise // 128 * 255, (grey + noise // 32 - 4).clip(0, 255), grey.repeat(3, axis=2), noise // 40)
    return np.stack([*real, *made]).astype(np.uint8)


def by_pil(image: np.ndarray, ops, factors, sigma: float) -> np.ndarray:
    picture = Image.fromarray(image)
    for op, factor in zip(ops, factors, strict=True):
        picture = OPERATIONS[op](picture, float(factor))
    return np.array(picture.filter(ImageFilter.GaussianBlur(float(sigma))))


def assert_like_pil(run, images: np.ndarray, ops: np.ndarray, factors: np.ndarray, sigma: np.ndarray) -> None:
    ops, factors, sigma = ops.astype(np.int32), factors.astype(np.float32), sigma.astype(np.float32)
    found = run(images, ops, factors, sigma).numpy()
    expected = np.stack([by_pil(*view) for view in zip(images, ops, factors, sigma, strict=True)])
    difference = np.abs(found.astype(int) - expected)
    assert not difference.any(), f"{(difference > 0).mean():.2e} differ, by up to {difference.max()}"


@both
@pytest.mark.parametrize(
    ("op", "factors"),
    [
        *((op, (0, 0.3, 0.6, 1, 1.4, 3)) for op in (Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION)),
        (Op.HUE, (-0.5, -0.4, -0.1, 0, 1 / 255, 0.25, 0.5)),
        (Op.GRAYSCALE, (0,)),
        (Op.NONE, (0.5,)),
    ],
)
def test_each_operation(run, op, factors):
    images, factors = photos(11, 15), factors if run is plain else factors[:: len(factors) // 2 or 1]
    n, views = len(images), len(images) * len(factors)
    ops, factors = np.full((views, 1), op), np.repeat(factors, n)[:, None]
    assert_like_pil(run, np.tile(images, (views // n, 1, 1, 1)), ops, factors, np.zeros(views))


@pytest.mark.parametrize(("run", "reds"), [(plain, range(256)), (kernels, (0, 3, 128, 254, 255))])
@pytest.mark.parametrize(("op", "factor"), [(Op.HUE, 0), (Op.HUE, 0.3), (Op.GRAYSCALE, 0)])
def test_all_colours(run, reds, op, factor, monkeypatch):
    """By the kernel, of the reds that are always an end of the range of the channels, and of some that are not."""
    if DEVICE == "cpu":
        monkeypatch.setattr(photometric, "BLOCK", 1 << 16)
    green, blue = np.mgrid[:256, :256].astype(np.uint8)
    for red in reds:
        image = np.stack([np.full_like(green, red), green, blue], axis=2)[None]
        assert_like_pil(run, image, np.array([[op]]), np.array([[factor]]), np.zeros(1))


@both
def test_every_order_with_grey_before_or_after(run):
    orders = list(itertools.permutations(JITTER))
    ops = np.array([[*order, Op.GRAYSCALE][:: 1 - 2 * (i % 2)] for i, order in enumerate(orders)])
    ops[::3][ops[::3] == Op.GRAYSCALE] = Op.NONE
    rng = np.random.default_rng(0)
    factors = np.where(ops == Op.HUE, rng.uniform(-0.4, 0.4, ops.shape), rng.uniform(0.6, 1.4, ops.shape))
    images = np.tile(photos(5, 7)[:4], (6, 1, 1, 1))
    assert_like_pil(run, images, ops, factors, np.zeros(24))


@both
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 9), (9, 1), (2, 3), (5, 5), (22, 2)])
def test_blur(run, h, w):
    """From sqrt(2) on the box has a second pixel."""
    sigma = [0.4, 1.3, 2]
    if run is plain:
        sigma += [0.01, 0.1, 1, 1.41, np.sqrt(2), 1.42, 1.7, MAX_SIGMA]
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)
    views = len(sigma)
    nothing = np.zeros((views, 0))
    assert_like_pil(run, np.tile(image, (views, 1, 1, 1)), nothing, nothing, np.array(sigma))


def test_blur_of_larger_images():
    sigma = np.tile(np.linspace(0.1, MAX_SIGMA, 14), 7)
    nothing = np.zeros((len(sigma), 0))
    assert_like_pil(plain, photos(41, 67).repeat(14, axis=0), nothing, nothing, sigma)


@pytest.mark.parametrize(
    ("h", "w"), [(7, 73), (16, 32), (27, 19), (91, 91)], ids=["below", "at", "across", "second round"]
)
def test_contrast_at_the_edges_of_blocks(h, w):
    """BLOCK pixels at a time, PARTS * BLOCK pixels in a round of all parts."""
    assert photometric.BLOCK == 512
    assert 90 * 91 < photometric.BLOCK * photometric.PARTS < 91 * 91
    ops, factors = np.array([[Op.BRIGHTNESS, Op.CONTRAST]]), np.array([[1.3, 0.5]])
    assert_like_pil(kernels, photos(h, w)[:1], ops, factors, np.zeros(1))


@pytest.mark.parametrize(("h", "w"), [(21, 2), (2, 64), (22, 1)], ids=["below", "at", "across"])
def test_blur_at_the_edges_of_blocks(h, w):
    assert photometric.LINES == 64
    nothing = np.zeros((1, 0))
    assert_like_pil(kernels, photos(h, w)[2:3], nothing, nothing, np.array([1.8]))


def slots_and_sigma(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ops, factors, sigma: every third view without a blur, every fourth without a jitter."""
    rng = np.random.default_rng(n)
    ops = np.array([rng.permutation([*JITTER, Op.GRAYSCALE]) for _ in range(n)], np.int32)
    factors = np.where(ops == Op.HUE, rng.uniform(-0.5, 0.5, ops.shape), rng.uniform(0, 2, ops.shape))
    sigma = rng.uniform(0.1, 2, n)
    sigma[::3], ops[::4] = 0, Op.NONE
    return ops, factors.astype(np.float32), sigma.astype(np.float32)


def test_kernels_and_plain_version_agree_in_every_bit():
    images = torch.from_numpy(photos(8, 10)).transpose(1, 2)  # not contiguous
    found = [run(images, *slots_and_sigma(len(images))) for run in (kernels, plain)]
    assert torch.equal(*found)
    assert found[0].dtype == torch.uint8
    assert found[0].is_contiguous()


def test_a_pool_changes_no_bit():
    images = photos(20, 30).repeat(3, axis=0)
    with ThreadPoolExecutor(3) as pool:
        found = [plain(images, *slots_and_sigma(21), pool=p) for p in (None, pool)]
    assert torch.equal(*found)


def test_a_pool_raises_what_a_thread_raises(monkeypatch):
    monkeypatch.setattr(photometric_plain._Canvas, "read", lambda *_: 1 / 0)
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        plain(photos(3, 3), *slots_and_sigma(7), pool=pool)


@both
def test_no_images(run):
    found = run(photos(4, 5)[:0], *(array[:0] for array in slots_and_sigma(1)))
    assert found.shape == (0, 4, 5, 3)


@both
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(2, 4, 4, 3)}, "images must be uint8"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "images must be uint8"),
        ({"ops": torch.zeros(2, 5, dtype=torch.int64)}, "ops must be int32"),
        ({"ops": torch.zeros(3, 5, dtype=torch.int32)}, "ops must be int32"),
        ({"ops": torch.zeros(2, dtype=torch.int32)}, "ops must be int32"),
        ({"factors": torch.zeros(2, 5, dtype=torch.float64)}, "factors must be float32"),
        ({"factors": torch.zeros(2, 4)}, "factors must be float32"),
        ({"sigma": torch.zeros(2, dtype=torch.float64)}, "sigma must be float32"),
        ({"sigma": torch.zeros(3)}, "sigma must be float32"),
    ],
)
def test_wrong_arguments(run, changes, message):
    arguments = {
        "images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        "ops": torch.zeros(2, 5, dtype=torch.int32),
        "factors": torch.zeros(2, 5),
        "sigma": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        run(**(arguments | changes))


@pytest.mark.parametrize("sigma", [-0.1, 2.45, np.nan])
def test_wrong_sigma_on_a_cpu(sigma):
    """Checked by both, but on a GPU it would have to be waited for."""
    images, ops = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 0, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sigma must lie in \[0, 2\.44\]"):
        plain(images, ops, ops.float(), torch.tensor([sigma], dtype=torch.float32))


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has graphs")
def test_a_graph_replays_on_new_images():
    """Which also shows that nothing waits for the GPU."""
    first, second = torch.as_tensor(photos(30, 40), device=DEVICE), torch.as_tensor(photos(40, 30), device=DEVICE)
    second = second.view(first.shape)
    draws = [torch.as_tensor(array, device=DEVICE) for array in slots_and_sigma(len(first))]
    expected = [photometric.photometric(images, *draws) for images in (first, second)]
    images, graph = first.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = photometric.photometric(images, *draws)
    for new, result in zip((first, second), expected, strict=True):
        images.copy_(new)
        graph.replay()
        assert torch.equal(found, result)
