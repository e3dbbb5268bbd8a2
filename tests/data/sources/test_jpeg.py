"""The size of a JPEG by its first bytes is Pillow's; what is unusual is left to Pillow."""

from __future__ import annotations

import io
import os
import random
import struct
from types import SimpleNamespace

import pytest
from photos import piece
from PIL import Image

from pcl_fast.data.sources.images import read_whole
from pcl_fast.data.sources.jpeg import jpeg_size


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


PHOTO = piece(0, 70, 41)
EXIF = Image.Exif()
EXIF[0x112] = 6
USUAL = {
    "plain": jpeg(PHOTO),
    "progressive": jpeg(PHOTO, progressive=True),
    "grey": jpeg(PHOTO.convert("L")),
    "full colour": jpeg(PHOTO, subsampling=0),
    "turned": jpeg(PHOTO, exif=EXIF),
    "profile": jpeg(PHOTO, icc_profile=b"x" * 70_000),
    "comment": jpeg(PHOTO, comment=b"\xff\xc0" * 9),
    "restart": jpeg(PHOTO, restart_marker_blocks=2),
}


@pytest.mark.parametrize("kind", USUAL)
def test_is_pillow_s(kind):
    with Image.open(io.BytesIO(USUAL[kind])) as image:
        assert jpeg_size(USUAL[kind]) == (image.height, image.width) == (41, 70)


def test_markers_may_be_filled_up():
    data = USUAL["plain"]
    assert jpeg_size(data[:2] + b"\xff\xff\xff" + data[2:]) == (41, 70)


def several() -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, "MPO", save_all=True, append_images=[PHOTO])
    return buffer.getvalue()


def with_frame(change) -> bytes:
    """The plain JPEG with another frame head: its marker, depth, height, width and number of colours."""
    data = bytearray(USUAL["plain"])
    at = data.index(b"\xff\xc0")
    head = change([data[at + 1], *struct.unpack_from(">BHHB", data, at + 4)])
    data[at + 1] = head[0]
    struct.pack_into(">BHHB", data, at + 4, *head[1:])
    return bytes(data)


UNUSUAL = {
    "nothing": b"",
    "a png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "four colours": jpeg(PHOTO.convert("CMYK")),
    "several pictures": several(),
    "lossless": with_frame(lambda head: [0xC3, *head[1:]]),
    "12 bits": with_frame(lambda head: [head[0], 12, *head[2:]]),
    "no height": with_frame(lambda head: [*head[:2], 0, *head[3:]]),
    "two colours": with_frame(lambda head: [*head[:4], 2]),
    "no frame": USUAL["plain"][: USUAL["plain"].index(b"\xff\xc0")],
    "half a frame": USUAL["plain"][: USUAL["plain"].index(b"\xff\xc0") + 7],
    "no marker": USUAL["plain"][:3] + bytes(60),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_unusual_is_left_to_pillow(kind):
    assert jpeg_size(UNUSUAL[kind]) is None


def test_whatever_the_bytes_it_says_something():
    """And never another size than Pillow, if both know one."""
    generator = random.Random(0)
    for _ in range(3000):
        data = bytearray(USUAL["plain"][:700])
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(2, len(data))] = generator.choice((0, 0xFF, 0xC0, 0xDA, generator.randrange(256)))
        found = jpeg_size(bytes(data))
        try:
            with Image.open(io.BytesIO(data)) as image:
                assert found in (None, (image.height, image.width))
        except (OSError, SyntaxError, ValueError):
            pass


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_file_is_read_whole(tmp_path, monkeypatch, size):
    (tmp_path / "file").write_bytes(data := os.urandom(size))
    descriptor, read = os.open(tmp_path / "file", os.O_RDONLY), os.read
    try:
        assert read_whole(descriptor) == data
        os.lseek(descriptor, 0, os.SEEK_SET)
        monkeypatch.setattr(os, "read", lambda file, most: read(file, min(most, 777)))
        assert read_whole(descriptor) == data
        os.lseek(descriptor, 0, os.SEEK_SET)
        monkeypatch.setattr(os, "fstat", lambda file: SimpleNamespace(st_size=0))
        assert read_whole(descriptor) == data
    finally:
        os.close(descriptor)
