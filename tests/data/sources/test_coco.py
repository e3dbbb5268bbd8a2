"""Reading COCO's annotations."""

from __future__ import annotations

import numpy as np
import pytest
from coco_sets import SIZE, change_coco, rectangles, write_coco

from pcl_fast.data.sources.coco import holds_coco, read_coco
from pcl_fast.errors import ImageError


def test_images_boxes_and_labels(tmp_path):
    split = read_coco(write_coco(tmp_path), "train2017")
    assert split.ids.tolist() == [10, 11, 12, 13, 14]
    assert split.images.keys()[0] == "000000000000.jpg"
    assert split.categories == ((3, "red"), (7, "green"))
    for number in range(4):
        assert split.boxes[number].tolist() == [list(box) for box, _ in rectangles(number)]
        assert split.labels[number].tolist() == [0, 1]
    assert split.boxes[4].shape == (0, 4)
    assert (split.crowds, split.degenerate) == (1, 2)


def test_masks_of_polygons_and_of_run_length_codes(tmp_path):
    split = read_coco(write_coco(tmp_path), "val2017")
    for number in range(4):
        masks = np.zeros((2, *SIZE), np.uint8)
        for mask, ((x1, y1, x2, y2), _) in zip(masks, rectangles(number), strict=True):
            mask[y1:y2, x1:x2] = 1
        np.testing.assert_array_equal(split.masks(number), masks)
    assert split.masks(4).shape == (0, *SIZE)


def test_a_compressed_code(tmp_path):
    """As the library writes them."""
    from faster_coco_eval.core import mask as rle

    write_coco(tmp_path)
    shape = np.zeros(SIZE, np.uint8)
    shape[3:9, 20:50:2] = 1
    code = rle.encode(np.asfortranarray(shape))

    def change(content):
        content["annotations"][0]["segmentation"] = {**code, "counts": code["counts"].decode()}

    change_coco(tmp_path, "train2017", change)
    np.testing.assert_array_equal(read_coco(tmp_path, "train2017").masks(0)[0], shape)


def test_boxes_end_at_the_images_edges(tmp_path):
    write_coco(tmp_path)
    change_coco(tmp_path, "train2017", lambda content: content["annotations"][0].update(bbox=[-3, 30, 999, 20.5]))
    assert read_coco(tmp_path, "train2017").boxes[0][0].tolist() == [0, 30, SIZE[1], SIZE[0]]


@pytest.mark.parametrize("part", ["val2017", "annotations/instances_train2017.json"])
def test_a_part_is_missing(tmp_path, part):
    root = write_coco(tmp_path)
    assert holds_coco(root) is None
    (root / part).rename(tmp_path / "elsewhere")
    assert holds_coco(root) == f"{root} has no {part}"
    with pytest.raises(ImageError, match=rf"{part} is missing; .*https://cocodataset.org"):
        read_coco(root, "val2017" if "val" in part else "train2017")


def test_an_image_is_missing(tmp_path):
    root = write_coco(tmp_path)
    (root / "train2017" / "000000000002.jpg").unlink()
    with pytest.raises(ImageError, match=r"1 of the 5 images of .* the first is 000000000002.jpg"):
        read_coco(root, "train2017")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content["annotations"][1].update(category_id=99), "annotation 101 is of category 99, which"),
        (lambda content: content["annotations"][1].update(image_id=99), "annotation 101 is of image 99, which"),
        (lambda content: content["annotations"][1].pop("bbox"), 'entry 1 of "annotations" has no "bbox"'),
        (lambda content: content["annotations"][1].update(bbox=[1, 2, 3]), "annotation 101 has the box"),
        (lambda content: content["annotations"][1].pop("segmentation"), 'annotation 101 has no "segmentation"'),
        (lambda content: content["annotations"][1].update(segmentation={"size": [3, 4]}), "must be polygons, or"),
        (lambda content: content.pop("categories"), 'has no "categories"'),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, change, sentence):
    root = write_coco(tmp_path)
    change_coco(root, "train2017", change)
    with pytest.raises(ImageError, match=sentence):
        read_coco(root, "train2017")


def test_half_a_file(tmp_path):
    path = write_coco(tmp_path) / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ImageError, match=r"is not JSON .* was it copied whole"):
        read_coco(tmp_path, "val2017")
