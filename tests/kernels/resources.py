"""Compiles the kernels for GPUs that need not be present, and prints what they take, one line per kernel and target.

    python tests/kernels/resources.py 80 90

The exit code is 1 if a kernel spills registers to memory, needs more shared memory than the GPU has, or if a product
does not run on the matrix units. This must run without TRITON_INTERPRET, which replaces the kernels by Python.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from pcl_fast.kernels import assign, combine, launch, normalise, photometric, sampling, segment, stream
from pcl_fast.kernels.contrast import DRAW_BLOCK, TRITON_TYPES, chunk, parts_at_once
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a program may have.
SHARED = {
    70: 96 << 10, 75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
# Types of the kernels' pointers, by the arguments' names (without the digits at their ends), where these are not
# pointers to float32.
INTEGERS = {
    "index": "*i64", "assignment": "*i32", "list_ids": "*i32", "ends": "*i32", "correct": "*u8", "found": "*i32",
    "order": "*i64", "bounds": "*i64", "images": "*u8", "jittered": "*u8", "source": "*u8",
    "ops": "*i32", "luma": "*i32",
}  # fmt: skip
FLOATS = ("queue_weight", "first_share", "other_share", "mean", "std")
FEATURES = ("query", "key", "bank", "out", "points", "values")
HALF = ("high", "low")
NUMBERS = (
    "n", "size", "columns", "height", "width", "length", "begin", "granularity", "stride", "first_bank", "first_part",
    "part_columns", "seed_low", "seed_high", "banks", "bank_stride", "row_stride", "k", "padded", "tiles",
    "pixels", "rows", "entries",
)  # fmt: skip


class Case(NamedTuple):
    """A kernel to compile: its constants, the type of the features that it reads or of the images that it writes, its
    options, and whether it should use the matrix units (products).
    """

    name: str
    kernel: triton.JITFunction
    constants: dict
    features: torch.dtype
    options: dict
    products: bool


def cases(capability: int) -> Iterator[Case]:
    """Yield every kernel as the package launches it on this architecture, by type of operand and width."""
    half = [torch.float16] if capability < 80 else [torch.float16, torch.bfloat16]
    widths = (128,) if capability < 80 else (128, 512)
    for features in (*half, torch.float32):
        for d in widths:
            tile = launch.tile_for(capability, features.itemsize, d)
            operand = TRITON_TYPES[features]
            constants = {"D": d, "BLOCK_D": min(d, launch.BLOCK_D), "ROWS": tile.rows, "COLUMNS": tile.columns}
            constants |= {"USED": sampling.SLOTS, "QUEUE": True, "OPERAND": operand, "DOT": operand}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            name = f"stream {POINTER[features][1:]} d={d}"
            yield Case(name, stream.stream, constants, features, options, products=True)
    for rows in (64, 1024):
        constants = {"USED": sampling.SLOTS, "SEEDED": True, "BLOCK": DRAW_BLOCK}
        constants |= {"EXCLUDED": 2 * rows, "CHUNK": chunk(rows, 2 * rows)}
        yield Case(f"draw N={rows}", sampling.draw, constants, torch.float32, {}, products=False)
    for d in widths:
        constants = {"D": d, "BLOCK_D": d, "PARTS": parts_at_once(d)}
        yield Case(f"combine d={d}", combine.combine, constants, torch.float32, {}, products=False)
        constants = {"D": d, "BLOCK_D": d, "MEAN": True, "BY_ROW": True}
        yield Case(f"weigh d={d}", combine.weigh, constants, torch.float16, {}, products=False)
    yield from cases_of_kmeans(capability)
    yield from cases_of_views()


def cases_of_kmeans(capability: int) -> Iterator[Case]:
    for points in (torch.float16, torch.float32):
        tiles = launch.nearest_tile(capability, points.itemsize)
        for d, tile in {100: tiles[128], **tiles}.items():
            name = f"{POINTER[points][1:]} d={d}"
            constants = {"D": d, "WIDTH": launch.BLOCK_D if d < launch.BLOCK_D else d, "SPLIT": points == torch.float32}
            prepare = constants | {"ROWS": assign.BLOCK}
            yield Case(f"prepare {name}", assign.prepare, prepare, points, {}, products=False)
            constants |= {"COLUMNS": tile.columns, "CLASSES": assign.CLASSES}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            yield Case(f"sweep {name}", assign.sweep, constants | {"ROWS": tile.rows}, points, options, products=True)
            settle = constants | {"ROWS": assign.BLOCK}
            yield Case(f"settle {name}", assign.settle, settle, points, {}, products=False)
    for d, rows in ((128, 16), (128, 64), (1, 64)):
        constants = {"D": d, "BLOCK_D": d, "ROWS": rows}
        yield Case(f"add_segments {rows}x{d}", segment.add_segments, constants, torch.float16, {}, products=False)


def cases_of_views() -> Iterator[Case]:
    slots, exact = photometric.slots(5), photometric.EXACT
    yield Case("add_luma", photometric.add_luma, slots, torch.float16, exact, products=False)
    yield Case("jitter", photometric.jitter, slots, torch.uint8, exact, products=False)
    options = exact | {"num_warps": photometric.LINES // 32}
    yield Case("blur", photometric.blur, {"LINES": photometric.LINES}, torch.uint8, options, products=False)
    for out in (torch.float16, torch.float32):
        name, constants = f"shift_and_scale {POINTER[out][1:]}", {"BLOCK": normalise.BLOCK}
        yield Case(name, normalise.shift_and_scale, constants, out, {}, products=False)


def build(case: Case, capability: int):
    """Compile the kernel of a case."""
    signature = {name: _type(name, case) for name in case.kernel.arg_names if name not in case.constants}
    aligned = [i for i, name in enumerate(case.kernel.arg_names) if signature.get(name, "").startswith("*")]
    if "constexprs" in inspect.signature(ASTSource).parameters:
        whole = {name: signature.get(name, "constexpr") for name in case.kernel.arg_names}
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(case.kernel, whole, constexprs=case.constants, attrs=attributes)
    else:  # Triton 3.1
        from triton.compiler.compiler import AttrsDescriptor

        attributes = AttrsDescriptor(tuple(aligned), ())
        source = ASTSource(case.kernel, signature, constants=case.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)


def _type(name: str, case: Case) -> str:
    stem = name.rstrip("0123456789")
    if stem in HALF or (stem == "centroids" and not case.constants["SPLIT"] and case.kernel is assign.settle):
        return "*fp16"
    if stem in FEATURES:
        return POINTER[case.features]
    if stem in FLOATS:
        return "fp32"
    if stem in NUMBERS:
        return "i32"
    return "*i64" if name == "seed_on_device" else INTEGERS.get(stem, "*fp32")


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spills: int  # instructions that move a register to or from local memory
    shared: int  # bytes
    matrix: str  # matrix instructions: how many of which kind

    def __str__(self) -> str:
        sizes = f"{self.registers:4} registers {self.spills:4} spills {self.shared:7} B shared"
        return f"{sizes}   {self.matrix or 'no products'}"


def resources(compiled) -> Resources:
    """Read from its machine code what a compiled kernel takes."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in (*MATRIX, "STL", "LDL")}
    matrix = ", ".join(f"{counts[name]} {name}" for name in MATRIX if counts[name])
    spills = counts["STL"] + counts["LDL"]
    return Resources(int(re.search(r"REG:(\d+)", usage)[1]), spills, compiled.metadata.shared, matrix)


def main(targets: list[int]) -> int:
    failed = False
    for capability in targets:
        for case in cases(capability):
            found = resources(build(case, capability))
            wrong = bool(found.spills) or found.shared > SHARED[capability] or (case.products and not found.matrix)
            failed |= wrong
            print(f"sm_{capability}  {case.name:20} {found}{'   <- FAILS' if wrong else ''}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
