"""Finding and reading images."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from pcl_fast.data import check_headers, find_images
from pcl_fast.errors import ImageError


def image(path, colour=(200, 30, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour).save(path)


def test_class_folders_give_labels_in_sorted_order(tmp_path):
    for name in ("b/2.jpg", "b/1.PNG", "a/x.webp", "a/deeper/y.jpeg"):
        image(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._1.jpg").write_text("left by a Mac")
    folder = find_images(tmp_path)
    assert folder.paths == ("a/deeper/y.jpeg", "a/x.webp", "b/1.PNG", "b/2.jpg")
    assert folder.labels == (0, 0, 1, 1)
    assert folder.classes == ("a", "b")


def test_flat_folder_has_no_labels(tmp_path):
    image(tmp_path / "2.jpg")
    image(tmp_path / "1.jpg")
    folder = find_images(tmp_path)
    assert folder.paths == ("1.jpg", "2.jpg")
    assert folder.labels is None


def test_fingerprint_tells_names_and_order_apart(tmp_path):
    image(tmp_path / "a" / "1.jpg")
    one = find_images(tmp_path).fingerprint()
    assert find_images(tmp_path).fingerprint() == one
    shutil.move(tmp_path / "a" / "1.jpg", tmp_path / "a" / "2.jpg")
    assert find_images(tmp_path).fingerprint() != one


def test_a_name_of_any_bytes_has_a_fingerprint(tmp_path):
    image(tmp_path / "\udcff.png")
    assert find_images(tmp_path).fingerprint().startswith("1 images")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (8, 8), (200, 30, 90)).convert(mode).save(tmp_path / f"x.{suffix}")
    assert find_images(tmp_path).read(0).mode == "RGB"


def test_unusable_folders_are_named(tmp_path):
    with pytest.raises(ImageError, match="nowhere is not a folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=f"{tmp_path} has no images"):
        find_images(tmp_path)
    image(tmp_path / "flat.jpg")
    image(tmp_path / "class" / "nested.jpg")
    with pytest.raises(ImageError, match=r"flat\.jpg.*class"):
        find_images(tmp_path)


def test_broken_images_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    Image.effect_noise((90, 90), 80).save(tmp_path / "a" / "good.jpg")
    (tmp_path / "a" / "text.jpg").write_text("this is no JPEG")
    whole = (tmp_path / "a" / "good.jpg").read_bytes()
    (tmp_path / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # its header is whole
    folder = find_images(tmp_path)
    with pytest.raises(ImageError, match=r"1 of 3 files .*text\.jpg"):
        check_headers(folder)
    with pytest.raises(ImageError, match=r"cannot read image .*cut\.jpg: image file is truncated"):
        folder.read(folder.paths.index("a/cut.jpg"))
    (tmp_path / "a" / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match=r"cannot read image .*link\.jpg"):
        find_images(tmp_path)
    (tmp_path / "a" / "link.jpg").unlink()
    (tmp_path / "a" / "none.jpg").touch()
    with pytest.raises(ImageError, match=r"1 empty image files.*none\.jpg"):
        find_images(tmp_path)
    assert find_images(tmp_path, strict=False).paths == ("a/cut.jpg", "a/good.jpg", "a/none.jpg", "a/text.jpg")


def test_ranks_share_the_header_check(tmp_path):
    for number in range(5):
        image(tmp_path / f"{number}.jpg")
    (tmp_path / "3.jpg").write_text("no JPEG")
    folder = find_images(tmp_path)
    check_headers(folder, rank=0, size=2)
    with pytest.raises(ImageError, match=r"3\.jpg"):
        check_headers(folder, rank=1, size=2)
