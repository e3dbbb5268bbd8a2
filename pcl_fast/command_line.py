"""What the command lines share: a preset comes first, and several numbers are written as people write them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")
AUTO = "auto"
# Flags that tyro answers itself.
_WITHOUT_PRESET = ("-h", "--help", "--tyro-")


def parse_preset(presets: Mapping[str, tuple[str, T]], *, prog: str, description: str | None) -> T:
    """Read a preset and its flags from the command line; ends the program if they make no sense.

    Args:
        presets: (description, what the flags change) of every preset, by its name.
        prog: the command's name.
        description: of the command, for its help.
    """
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first not in presets and not first.startswith(_WITHOUT_PRESET):
        fault = f"there is no preset {first!r}" if first and first[0] != "-" else "a preset must come first"
        sys.exit(f"{prog}: {fault}; choose from {', '.join(presets)}")
    return tyro.extras.overridable_config_cli(dict(presets), prog=prog, description=description)


def _several(number: Callable[[str], Any], metavar: str, *, auto: bool = False) -> PrimitiveConstructorSpec:
    """Any count of numbers, with spaces or commas between them; or the word auto."""

    def one(word: str) -> Any:
        try:
            return number(word)
        except ValueError:
            raise ValueError(f"{word!r} is no {metavar}") from None

    def parse(arguments: Sequence[str]) -> tuple | str:
        if auto and list(arguments) == [AUTO]:
            return AUTO
        return tuple(one(word) for argument in arguments for word in argument.replace(",", " ").split())

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{'auto|' if auto else ''}[{metavar} [{metavar} ...]]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple) or (auto and value == AUTO),
        str_from_instance=lambda value: [AUTO] if value == AUTO else [str(item) for item in value],
    )


Integers = Annotated[tuple[int, ...], _several(int, "INT")]
IntegersOrAuto = Annotated[tuple[int, ...] | Literal["auto"], _several(int, "INT", auto=True)]
Numbers = Annotated[tuple[float, ...], _several(float, "FLOAT")]
