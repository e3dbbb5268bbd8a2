"""The size of a JPEG from its first bytes.

Pillow tells it too, but reads all tables of the file's head, in Python: that takes five times as long, and of all
threads only one at a time can do it.
"""

from __future__ import annotations

import struct

_BEGIN, _MARKER = b"\xff\xd8\xff", 0xFF
# Frames that every decoder knows: baseline, extended, progressive.
_FRAMES = (0xC0, 0xC1, 0xC2)
# Any other frame, what has no length, and where the picture or the file begins anew or ends; 0xC4 and 0xCC are tables.
_STRANGE = frozenset({0x00, 0x01, *range(0xC3, 0xDB)} - {0xC4, 0xCC})
# Behind it, in an application's segment of this number, is the place of further pictures.
_SEVERAL, _SEGMENT = b"MPF\0", 0xE2


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG of one picture in colour or grey, 8 bits each. None: it is something else, or
    not as it should be, and another must look at it.
    """
    if not data.startswith(_BEGIN):
        return None
    at = 2
    try:
        while data[at] == _MARKER:
            kind = data[at + 1]
            if kind in _FRAMES:
                depth, height, width, colours = struct.unpack_from(">BHHB", data, at + 4)
                plain = depth == 8 and height and width and colours in (1, 3)
                return (height, width) if plain else None
            if kind in _STRANGE or (kind == _SEGMENT and data.startswith(_SEVERAL, at + 4)):
                return None
            # A marker may be filled up with more of its first byte.
            at += 1 if kind == _MARKER else 2 + struct.unpack_from(">H", data, at + 2)[0]
    except (IndexError, struct.error):  # the head is not whole
        return None
    return None
