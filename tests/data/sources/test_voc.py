"""VOC's devkit, and what is refused of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from voc_sets import write_voc

from pcl_fast.data.sources.voc import VOC_CLASSES, find_devkit, holds_voc, read_annotation, read_split
from pcl_fast.errors import ImageError

CAT, DOG = VOC_CLASSES.index("cat"), VOC_CLASSES.index("dog")


@pytest.fixture
def devkit(tmp_path) -> Path:
    images = {
        "000001": [("cat", (1, 2, 20, 30), False), ("cat", (10, 10, 48, 40), True)],
        "000002": [("dog", (5, 5, 9, 9), True)],
        "000007": [],
    }
    return write_voc(tmp_path, 2007, {"trainval": images, "test": {"000003": images["000001"]}})


def test_what_is_on_the_images(devkit):
    """A class whose objects are all difficult counts as neither there nor not."""
    found = read_split(devkit, 2007, "trainval")
    assert found.ids == ("000001", "000002", "000007")
    assert found.presence[:, CAT].tolist() == [1, -1, -1]
    assert found.presence[:, DOG].tolist() == [-1, 0, -1]
    assert (found.presence == -1).sum() == 58
    assert found.images.read(1).size == (48, 40)


def test_objects(devkit):
    found = read_split(devkit, 2007, "trainval")
    objects = read_annotation(found.annotation(0))
    assert objects.boxes.tolist() == [[1, 2, 20, 30], [10, 10, 48, 40]]
    assert objects.labels.tolist() == [CAT, CAT]
    assert objects.difficult.tolist() == [False, True]
    nothing = read_annotation(found.annotation(2))
    assert nothing.boxes.shape == (0, 4)


def test_the_devkit_is_found_from_three_places(devkit):
    expected = devkit / "VOC2007"
    for folder in (devkit.parent, devkit, expected):
        assert find_devkit(folder, 2007) == expected
        assert holds_voc(folder, 2007)
    assert not holds_voc(devkit, 2012)
    with pytest.raises(ImageError, match=r"holds no VOC2012 .*host.robots.ox.ac.uk/pascal/VOC"):
        find_devkit(devkit, 2012)


def spoil(path: Path, text: str | None) -> None:
    path.unlink() if text is None else path.write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ImageSets/Main/sofa_trainval.txt", None, "sofa_trainval.txt is missing; the devkit is at"),
        ("ImageSets/Main/sofa_trainval.txt", "", "sofa_trainval.txt is empty"),
        ("ImageSets/Main/sofa_trainval.txt", "000001 -1\n000002 -1\n", "000007 is in one of them alone"),
        ("ImageSets/Main/sofa_trainval.txt", "000001 -1\n000002\n", "line 2: '000002' is not the name of another"),
        ("ImageSets/Main/sofa_trainval.txt", "000001 -1\n000001 1\n", "line 2: '000001 1' is not the name of another"),
        ("JPEGImages/000007.jpg", None, "1 of 3 images are missing, the first is .*000007.jpg"),
    ],
)
def test_faults_of_a_split(devkit, file, text, message):
    spoil(devkit / "VOC2007" / file, text)
    with pytest.raises(ImageError, match=message):
        read_split(devkit, 2007, "trainval")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "000001.xml is missing; the devkit is at"),
        ("<annotation>", "000001.xml cannot be read: no element found"),
        ("<a><object><name>fish</name></object></a>", "000001.xml cannot be read: 'fish' is no class of VOC"),
        ("<a><object><name>cat</name></object></a>", "000001.xml cannot be read: "),
    ],
)
def test_faults_of_an_annotation(devkit, text, message):
    path = devkit / "VOC2007" / "Annotations" / "000001.xml"
    spoil(path, text)
    with pytest.raises(ImageError, match=message):
        read_annotation(path)


def test_a_part_of_the_devkit_is_missing(devkit):
    (devkit / "VOC2007" / "JPEGImages").rename(devkit / "elsewhere")
    with pytest.raises(ImageError, match="JPEGImages is missing; the devkit is at"):
        find_devkit(devkit, 2007)
