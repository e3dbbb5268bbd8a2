"""Lists of images in files, and class-balanced draws."""

from __future__ import annotations

import pytest
import torch
from coloured import write_coloured
from ranks import run_ranks

from pcl_fast.data import find_images
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.label_lists import draw_balanced, listed_images

NAMES = [f"class {number}" for number in range(4)]


def labels_of(*counts: int) -> torch.Tensor:
    """In a mixed order."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def counts_of(labels: torch.Tensor, chosen: torch.Tensor) -> list[int]:
    return labels[chosen].bincount(minlength=4).tolist()


@pytest.mark.parametrize(
    ("share", "expected"), [(0.1, [10, 10, 10, 10]), (0.29, [29, 29, 29, 29]), (0.001, [1, 1, 1, 1])]
)
def test_a_draw_has_as_many_images_of_every_class(share, expected):
    """Whatever the classes' sizes, and in the second case although 0.29 * 400 is a little less than 116."""
    labels = labels_of(150, 120, 90, 40)
    chosen = draw_balanced(labels, share, NAMES, seed=0)
    assert counts_of(labels, chosen) == expected
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_a_draw_that_does_not_divide_among_the_classes():
    labels = labels_of(100, 100, 100, 100)
    draws = [counts_of(labels, draw_balanced(labels, 0.105, NAMES, seed=seed)) for seed in range(20)]
    assert all(sorted(counts) == [10, 10, 11, 11] for counts in draws)
    assert len({tuple(counts) for counts in draws}) > 2  # it is not always the same classes


def test_a_draw_of_everything():
    labels = labels_of(10, 11, 11, 11)
    assert draw_balanced(labels, 1.0, NAMES, seed=0).tolist() == list(range(43))


def test_a_draw_follows_from_its_seed():
    labels = labels_of(100, 100, 100, 100)
    one, again, other = (draw_balanced(labels, 0.1, NAMES, seed=seed).tolist() for seed in (5, 5, 6))
    assert one == again != other
    assert set(one) < set(draw_balanced(labels, 0.5, NAMES, seed=5).tolist())


def test_every_image_may_be_drawn():
    labels = labels_of(10, 10, 10, 10)
    drawn = torch.cat([draw_balanced(labels, 0.1, NAMES, seed=seed) for seed in range(400)])
    counts = drawn.bincount(minlength=40)
    assert counts.min() > 15  # of 40 expected, with a deviation of 6
    assert counts.max() < 70


def draw(world, labels):
    torch.manual_seed(world.rank)  # ranks need not have the same state
    return draw_balanced(labels, 0.1, NAMES, seed=3).tolist()


def test_ranks_draw_the_same():
    labels = labels_of(100, 100, 100, 100)
    assert run_ranks(2, draw, labels) == [draw_balanced(labels, 0.1, NAMES, seed=3).tolist()] * 2


def test_a_class_with_too_few_images():
    message = r"0\.1 .* are 25 images of every class, but 2 of 4 classes have fewer, the first is class 1 with 24"
    with pytest.raises(ImageError, match=message):
        draw_balanced(labels_of(500, 24, 453, 23), 0.1, NAMES, seed=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = write_coloured(tmp_path_factory.mktemp("coloured"), per_class=3, seed=0)
    (root / "8" / "9_0.png").write_bytes((root / "8" / "8_0.png").read_bytes())  # a name that is there twice
    return find_images(root)


def listing(tmp_path, *lines: str):
    file = tmp_path / "list.txt"
    file.write_text("\n".join(lines))
    return file


def test_a_list_of_names_and_paths(images, tmp_path):
    found = listed_images(listing(tmp_path, "4_1.png\r", "", " 0_2.png", "9/9_0.png", ""), images)
    assert found.tolist() == sorted(found.tolist())
    assert [images.keys()[place] for place in found] == ["0/0_2.png", "4/4_1.png", "9/9_0.png"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["4_1.png", "4_7.png", "5_0.png", "x.png"], r"2 of the 4 images .* the first is 4_7\.png"),
        (["4_1.png", "9_0.png"], r"1 of the 2 names .* several .* 9_0\.png \(.*8/9_0\.png, .*9/9_0\.png\)"),
        (["4_1.png", "5_0.png", "4/4_1.png", "5_0.png"], r"lists 2 images twice, the first is .*4/4_1\.png"),
        (["", " "], r"lists no images; it must hold a file name a line"),
    ],
)
def test_a_list_that_cannot_be_used(images, tmp_path, lines, message):
    with pytest.raises(ImageError, match=message):
        listed_images(listing(tmp_path, *lines), images)


def test_a_list_that_is_no_text(images, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\x89PNG\xff\xfe\n\x80")
    with pytest.raises(ImageError, match="2 of the 2 images"):
        listed_images(tmp_path / "list.txt", images)


def test_a_list_that_is_not_there(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1percent\.txt"):
        listed_images(tmp_path / "1percent.txt", images)
