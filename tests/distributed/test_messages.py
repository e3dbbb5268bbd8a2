"""What ranks tell each other arrives as it was, and cannot be code."""

from __future__ import annotations

import datetime
import math

import numpy as np
import pytest
import torch
from ranks import run_ranks

from pcl_fast.distributed import World, gather_objects
from pcl_fast.distributed.messages import from_bytes, to_bytes

ITEMS = [
    *(None, True, 0, -(2**70), 0.1, math.inf, "ä\n\ud800", b"\x00\xff", b"", "", [], (), {}),
    [1, (2, [3.5, (None,)]), {"a": {1: (2,), (3, "b"): [b"c"]}}],
    {"tensor": 1, "tuple": [2]},
]
TENSORS = [
    torch.randn(3, 4),
    torch.randn(6, 4)[::2, 1:3],
    torch.tensor(2.5, dtype=torch.bfloat16),
    torch.randn(2, 3).half(),
    torch.arange(4),
    torch.tensor([True, False]),
    torch.empty(0, 3),
    torch.randint(0, 255, (7,), dtype=torch.uint8),
]
ARRAYS = [np.arange(6.0).reshape(2, 3).T, np.float64(0.1), np.int64(3), np.array(["one", "three"]), np.zeros((0, 4))]


@pytest.mark.parametrize("item", ITEMS, ids=repr)
def test_values_arrive_as_they_were(item):
    found = from_bytes(to_bytes(item))
    assert (found, type(found)) == (item, type(item))


def test_so_do_tensors_and_arrays_wherever_they_are():
    found = from_bytes(to_bytes({"tensors": TENSORS, "arrays": (b"between", *ARRAYS)}))
    for sent, came in zip(TENSORS, found["tensors"], strict=True):
        assert (came.dtype, came.shape) == (sent.dtype, sent.shape)
        assert torch.equal(came, sent)
        came.zero_()
    for sent, came in zip(ARRAYS, found["arrays"][1:], strict=True):
        assert (came.dtype, came.shape, type(came)) == (sent.dtype, sent.shape, type(sent))
        assert np.array_equal(came, sent)


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (datetime.date(2021, 5, 3), "date"),
        ([{"a": {1, 2}}], "set"),
        (ValueError("x"), "ValueError"),
        (np.array([object()]), "arrays of objects"),
    ],
)
def test_nothing_else_is_sent(item, kind):
    with pytest.raises(TypeError, match=f"ranks cannot exchange .*{kind}"):
        to_bytes(item)


@pytest.mark.parametrize(
    "told",
    ['{"module": ["os"]}', '{"tensor": ["load", [3]]}', '{"array": ["O", [1]]}', "[", '{"bytes": -1}', '{"bytes": 5}',
     '{"tensor": ["float32", [2]]}', '{"a": 1, "b": 2}',
     '{"tensor": ["float32", [9]]}', "[" * 5000 + "]" * 5000],
)  # fmt: skip
def test_what_no_rank_has_written_is_refused_in_a_sentence(told):
    message = len(told).to_bytes(8, "little") + told.encode() + b"1234"
    with pytest.raises(ValueError, match=r"bytes between ranks is none of ours .* somebody else may be sending"):
        from_bytes(message)


def test_nor_is_what_is_no_message():
    for message in (b"", b"GET / HTTP/1.1", bytes(100)):
        with pytest.raises(ValueError, match="is none of ours"):
            from_bytes(message)


def exchange(world: World, items: list) -> list:
    return gather_objects(items[world.rank], world)


def test_ranks_may_say_much_or_nothing():
    items = [None, {"x": torch.arange(1000), "y": ("long" * 1000,)}, [1]]
    for found in run_ranks(3, exchange, items):
        assert torch.equal(found[1].pop("x"), torch.arange(1000))
        assert found == [None, {"y": ("long" * 1000,)}, [1]]
        items[1]["x"] = torch.arange(1000)
