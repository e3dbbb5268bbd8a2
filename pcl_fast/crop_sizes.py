"""Crops that grow over the epochs: which size an epoch has. On the command line `160:120 192:160` is 160 px in the
first 120 epochs and 192 px up to epoch 160.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec


class Stage(NamedTuple):
    """Crops of `size` px in all epochs before epoch `until` (from 0), which is the number of epochs up to its end."""

    size: int
    until: int

    def __str__(self) -> str:
        return f"{self.size}:{self.until}"


def _parse(words: Sequence[str]) -> tuple[Stage, ...]:
    return tuple(_stage(part) for word in words for part in word.replace(",", " ").split())


def _stage(word: str) -> Stage:
    try:
        size, until = map(int, word.split(":"))
    except ValueError:
        raise ValueError(f"{word!r} is no size and number of epochs, as in 160:120") from None
    return Stage(size, until)


Stages = Annotated[
    tuple[Stage, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[SIZE:EPOCHS [SIZE:EPOCHS ...]]",
        instance_from_str=_parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: list(map(str, value)),
    ),
]


def size_at(stages: Sequence[Stage], last: int, epoch: int) -> int:
    """The size of an epoch's crops (from 0); `last` after all stages."""
    return next((stage.size for stage in stages if epoch < stage.until), last)


def in_proportion(side: int, size: int, last: int) -> int:
    """The side of a view that is `side` px beside crops of `last` px, where those have `size` px; at least one pixel.

    Small crops of multi-crop grow with the large ones so.
    """
    return max(1, round(side * size / last))


def epoch_sides(stages: Sequence[Stage], last: int, sides: Iterable[int]) -> list[int]:
    """All sides that views of these sides, at the size `last`, have in one epoch or another, the smallest first."""
    sizes = {last, *(stage.size for stage in stages)}
    return sorted({in_proportion(side, size, last) for side in sides for size in sizes})


def check_stages(stages: Sequence[Stage], last: int) -> None:
    """Refuse stages that are not in the order of their epochs, or in which crops do not grow up to `last`, --data.size.

    Raises:
        ValueError: names the stages.
    """
    sizes, ends = [*(stage.size for stage in stages), last], [0, *(stage.until for stage in stages)]
    for stage, size, after, begin in zip(stages, sizes, sizes[1:], ends, strict=False):
        if size < 1:
            raise ValueError(f"--data.sizes {stage}: a size must be positive")
        if stage.until <= begin:
            raise ValueError(
                f"--data.sizes {stage} ends with epoch {stage.until}, and it begins after epoch {begin}; each needs a "
                "larger number of epochs than the one before"
            )
        if after <= size:
            raise ValueError(
                f"--data.sizes {' '.join(map(str, stages))} with --data.size {last}: crops must grow, and {size} px "
                f"are followed by {after}"
            )


def describe_stages(stages: Sequence[Stage], last: int) -> str:
    """Say in words what an epoch's size is."""
    parts = [f"{stage.size} px up to epoch {stage.until}" for stage in stages]
    return f"crops of {', '.join(parts)}, then {last} px"
