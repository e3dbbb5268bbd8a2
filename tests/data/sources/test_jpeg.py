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


def with_segment(segment: bytes) -> bytes:
    return USUAL["plain"][:2] + segment + USUAL["plain"][2:]


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
    "no picture": USUAL["plain"][: USUAL["plain"].index(b"\xff\xda")],
    "a second frame": USUAL["plain"].replace(b"\xff\xda", b"\xff\xc0\0\x0b\x08\0\x09\0\x09\x01\x01\x11\0\xff\xda", 1),
    "a longer frame": with_segment(b"\xff\xc0\0\x12\x08\0\x29\0\x46\x03" + bytes(10)),
    "a short JFIF": with_segment(b"\xff\xe0\0\x08JFIF\0\x01"),
    "a short Adobe": with_segment(b"\xff\xee\0\x07Adobe"),
    "a short profile": with_segment(b"\xff\xe2\0\x0eICC_PROFILE\0"),
    "a short table": with_segment(b"\xff\xdb\0\x09\0" + bytes(6)),
    "a reserved marker": with_segment(b"\xff\x02\0\x04\0\0"),
    "a hierarchy": with_segment(b"\xff\xde\0\x08" + bytes(6)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_unusual_is_left_to_pillow(kind):
    assert jpeg_size(UNUSUAL[kind]) is None


@pytest.mark.parametrize("kind", ["plain", "progressive", "profile"])
def test_what_it_tells_pillow_tells_too(kind):
    """Whatever the bytes are."""
    data, generator, told = USUAL[kind], random.Random(), 0
    head = data.index(b"\xff\xda") + 4
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(2, head)] = generator.choice((0, 0xFF, 0xC0, 0xDA, generator.randrange(256)))
        found = jpeg_size(bytes(changed))
        # Beyond a size Pillow takes a picture for an attack, which for_dali leaves to it.
        if found is not None and found[0] * found[1] <= Image.MAX_IMAGE_PIXELS:
            told += 1
            with Image.open(io.BytesIO(changed)) as image:
                assert found == (image.height, image.width), bytes(changed[:head]).hex()
    assert told > 50


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
