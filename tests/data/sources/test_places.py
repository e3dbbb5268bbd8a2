"""Places205 by its lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from class_folders import write_images

from pcl_fast.data.sources.places import find_places, holds_places
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.labelled import holds_labelled, open_labelled


@pytest.fixture
def places(tmp_path) -> Path:
    write_images(tmp_path / "vision")
    (tmp_path / "train_places205.csv").write_text(
        "vision/class_0/00.jpg 0\nvision/class_1/00.jpg 204\nvision/class_0/02.jpg 0\n"
    )
    (tmp_path / "val_places205.csv").write_text("vision/class_1/01.jpg,204\n\nvision/class_0/01.jpg,0\n")
    return tmp_path


def test_lists_are_training_and_test_images(places):
    assert holds_places(places)
    assert holds_labelled(places) is None
    train, test = find_places(places)
    assert train.paths == ("vision/class_0/00.jpg", "vision/class_1/00.jpg", "vision/class_0/02.jpg")
    assert train.labels == (0, 204, 0)
    assert test.labels == (204, 0)
    found = open_labelled(places)
    assert found.classes == ("0", "204")
    assert found.train_labels.tolist() == [0, 1, 0]
    assert found.test_labels.tolist() == [1, 0]


def test_as_the_archives_unpack(tmp_path):
    """Lists and images lie in folders of their own; a path may have blanks and commas."""
    images = tmp_path / "data" / "vision" / "torralba" / "deeplearning" / "images256"
    write_images(images)
    (images / "class_0" / "00.jpg").rename(images / "class_0" / "a, b.jpg")
    lists = tmp_path / "trainvalsplit_places205"
    lists.mkdir()
    for name in ("train", "val"):
        (lists / f"{name}_places205.csv").write_text("class_0/a, b.jpg 1\nclass_2/01.jpg 0\n")
    assert holds_places(tmp_path)
    for found in find_places(tmp_path):
        assert found.paths == ("class_0/a, b.jpg", "class_2/01.jpg")
        assert found.labels == (1, 0)
        assert found.read(0).mode == "RGB"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "val_places205.csv: No such file or directory; Places205 and its lists are at"),
        ("\n", "val_places205.csv is empty"),
        ("vision/class_0/01.jpg\n", "line 1: 'vision/class_0/01.jpg' is not a path and the number of a class"),
        ("vision/class_0/01.jpg x\n", "line 1: .* is not a path and the number"),
        ("vision/class_0/01.jpg 0\n\nvision 1\n5\n", "line 4: '5' is not a path and the number"),
        ("vision/class_0/01.jpg 0\nnowhere.jpg 0\n", "1 of 2 images of .* are missing, the first is .*nowhere.jpg"),
        ("no/where.jpg 0\n", "1 of 1 images of .* are missing, the first is .*no/where.jpg; the paths in the lists"),
    ],
)
def test_faults(places, text, message):
    path = places / "val_places205.csv"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ImageError, match=message):
        find_places(places)
