"""A number of the model, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("measured", "published", "assumed")


@dataclass(frozen=True)
class Constant:
    """`source` begins with what kind it is: "measured: <record>", "published: <where>" or "assumed: <why>"."""

    name: str
    value: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not self.source.partition(": ")[2]:
            raise ValueError(f'the source of "{self.name}" must be one of {", ".join(KINDS)}, a colon and which')

    @property
    def kind(self) -> str:
        return self.source.partition(":")[0]

    def __str__(self) -> str:
        """The value in a unit of readable size: 900 GB/s, 61.3 ms, 336 images/s per core."""
        quantity, _, per = self.unit.partition(" ")
        for factor, prefix in _PREFIXES.get(quantity, ()):
            if self.value >= factor:
                return f"{self.value / factor:,.4g} {prefix}{quantity} {per}".strip()
        return f"{self.value:,.4g} {self.unit}".strip()


_PREFIXES = {
    "B/s": ((1e9, "G"),),
    "FLOP/s": ((1e12, "T"),),
    "s": ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n")),
}
