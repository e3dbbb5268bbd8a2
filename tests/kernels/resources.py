"""Compiles the kernels for GPUs that need not be present, and prints two lines per kernel and target: what it takes,
and the instructions of its inner loop by pipe, with the bound that follows from them.

    python tests/kernels/resources.py 80 90 [--record bench/results]

With --record it also writes <folder>/bounds-sm_<target>.json, which docs/benchmarks.md quotes. Neither commit nor date
is in it: the same code and compiler make the same file.

The exit code is 1 if a kernel spills registers inside a loop, needs more shared memory than the GPU has, or fewer of
its programs fit a multiprocessor than its launch counts on; if a product does not run on the matrix units, the compiler
serialises it (C7510 to C7515 of ptxas), or a register that it reads is overwritten before it was waited for. This must
run without TRITON_INTERPRET, which replaces the kernels by Python.

A bound is what the busiest pipe allows at full overlap, at the clock of the data sheet: nobody measured it, and a
kernel stays below it. Both sides of a branch are counted, so of code with branches it is only a rough guide.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import machine_code
import torch
import triton
from pcl_fast.kernels import (
    assign,
    batch_norm,
    batch_norm_kernels,
    combine,
    launch,
    max_pool,
    normalise,
    photometric,
    sampling,
    segment,
    stem,
    stream,
)
from pcl_fast.kernels.contrast import DRAW_BLOCK, TRITON_TYPES, chunk, parts_at_once
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

try:
    from triton.experimental.gluon._runtime import GluonASTSource
except ImportError:  # Triton 3.1
    GluonASTSource = None

# Bytes of shared memory that a program may have.
SHARED = {
    70: 96 << 10, 75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip
# Of all programs on a multiprocessor together; each takes 1 KB more than it asks for.
SHARED_OF_ALL = {
    70: 96 << 10, 75: 64 << 10, 80: 164 << 10, 86: 100 << 10, 89: 100 << 10,
    90: 228 << 10, 100: 228 << 10, 120: 100 << 10,
}  # fmt: skip
REGISTERS = 1 << 16  # of a multiprocessor
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
# Types of the kernels' pointers, by the arguments' names (without the digits at their ends), where these are not
# pointers to float32.
INTEGERS = {
    "index": "*i64", "assignment": "*i32", "list_ids": "*i32", "ends": "*i32", "correct": "*u8", "found": "*i32",
    "order": "*i64", "bounds": "*i64", "images": "*u8", "jittered": "*u8", "source": "*u8",
    "batches": "*i64", "ops": "*i32", "luma": "*i32", "kept": "*i32", "taps": "*u8",
}  # fmt: skip
FLOATS = ("queue_weight", "first_share", "other_share", "mean", "std", "momentum", "eps")
FEATURES = (
    "query", "key", "bank", "out", "points", "values", "x", "y", "residual", "dy", "second", "stored", "g", "dx",
    "folded", "gradient",
)  # fmt: skip
HALF = ("high", "low")
NUMBERS = (
    "n", "size", "columns", "height", "width", "length", "begin", "granularity", "stride", "first_bank", "first_part",
    "part_columns", "seed_low", "seed_high", "banks", "bank_stride", "row_stride", "k", "padded", "tiles",
    "pixels", "rows", "entries", "channels", "part_rows", "groups", "parts", "h", "w", "out_h", "out_w",
    "filter_stride", "colour_stride", "row_stride", "column_stride",
)  # fmt: skip


class Case(NamedTuple):
    """A kernel to compile: its constants, the type of the features that it reads or of the images that it writes, its
    options, whether it should use the matrix units (products), how many programs its launch counts on a multiprocessor,
    whether it should load and store 16 bytes at a time (wide), which of its numbers are multiples of 16 (even), and how
    many bytes its inner loop should move at a turn (moved; None: not looked at), all but so many words 16 at a time.
    """

    name: str
    kernel: triton.JITFunction
    constants: dict
    features: torch.dtype
    options: dict
    products: bool
    programs: int = 1
    wide: bool = False
    even: tuple[str, ...] = ()
    moved: float | None = None
    words: int = 0


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
            yield Case(name, stream.stream, constants, features, options, products=True, programs=tile.programs)
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
    for activations in half:
        yield from cases_of_batch_norm(activations)
        yield from cases_of_pooling(activations)
        yield from cases_of_stem(activations)
    yield from cases_of_merging()


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
            if tile.held and d == assign.assign_held.WIDTH:
                held = {name: size for name, size in constants.items() if name not in ("D", "SPLIT")}
                held |= {"ROWS": tile.rows, "WARPS": tile.warps}
                options = {"num_warps": tile.warps}
                kernel = assign.assign_held.sweep_held
                yield Case(f"sweep_held {name}", kernel, held, points, options, products=True)
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
        yield Case(name, normalise.shift_and_scale, constants, out, {}, products=False, wide=True)


def cases_of_batch_norm(activations: torch.dtype) -> Iterator[Case]:
    """As of ResNets: channels are multiples of 16, and enough for whole blocks."""
    kind, size = POINTER[activations][1:], activations.itemsize
    summed, mapped = (batch_norm.divide(1 << 16, 512, c, size, 80) for c in (batch_norm.SUMMED, batch_norm.MAPPED))
    options = {"num_warps": batch_norm.WARPS}

    def case(kernel, name: str, constants: dict, tile: batch_norm.Launch, values: float) -> Case:
        """values: bytes moved a value."""
        constants = {key: value for key, value in constants.items() if key != "num_warps"}
        moved = values * batch_norm.UNROLL * tile.rows * tile.columns
        # Sums are stored once, a channel at a time.
        wide = kernel not in (batch_norm_kernels.partial_statistics, batch_norm_kernels.partial_sums)
        common = {"products": False, "programs": batch_norm.PROGRAMS, "wide": wide, "even": ("channels",)}
        common |= {"moved": moved, "words": "bits" in name}
        return Case(f"{kernel.__name__} {name}", kernel, constants, activations, options, **common)

    yield case(batch_norm_kernels.partial_statistics, kind, summed.constants(), summed, size)
    for residual, relu, keep in ((0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 1, 1)):
        constants = mapped.constants() | {"RESIDUAL": bool(residual), "RELU": bool(relu), "KEEP": bool(keep)}
        constants |= {} if residual else {"residual": None}
        name = f"{kind}{' + residual' * residual}{' relu' * relu}{' bits' * keep}"
        yield case(batch_norm_kernels.normalise_rows, name, constants, mapped, (2 + residual) * size + keep / 8)
    for second, kept, relu in ((0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)):
        writes = second or kept
        constants = summed.constants() | {"SECOND": bool(second), "KEPT": bool(kept), "RELU": bool(relu)}
        constants |= {"WRITE": bool(writes)} | ({} if second else {"second": None}) | ({} if kept else {"kept": None})
        name = f"{kind}{' relu' * relu}{' bits' * kept}{' fork' * second}"
        moved = (2 + second + writes) * size + kept / 8
        yield case(batch_norm_kernels.partial_sums, name, constants, summed, moved)
    for relu, training in ((0, 1), (1, 1), (1, 0)):
        constants = mapped.constants() | {"RELU": bool(relu), "TRAINING": bool(training)}
        name = f"{kind}{' relu' * relu}{'' if training else ' eval'}"
        moved = (3 if relu or training else 2) * size
        yield case(batch_norm_kernels.differentiate_rows, name, constants, mapped, moved)


def cases_of_pooling(activations: torch.dtype) -> Iterator[Case]:
    """As of a ResNet's stem."""
    kind, tile = POINTER[activations][1:], max_pool.tile(64)
    window = {"KERNEL": 3, "STRIDE": 2, "PADDING": 1}
    options = {"products": False, "wide": True, "even": ("channels",)}
    for keep in (False, True):
        name, constants = f"pool {kind}{' taps' * keep}", window | tile | {"KEEP": keep}
        yield Case(name, max_pool.pool, constants, activations, {}, **options)
    yield Case(f"unpool {kind}", max_pool.unpool, window | tile, activations, {}, **options)


def cases_of_stem(activations: torch.dtype) -> Iterator[Case]:
    kind, rows, block = POINTER[activations][1:], {"ROWS": stem.ROWS}, {"BLOCK": stem.BLOCK}
    yield Case(f"stack_blocks {kind}", stem.stack_blocks, rows, activations, {}, products=False, wide=True)
    for kernel in (stem.fold_filters, stem.unfold_filters):
        yield Case(f"{kernel.__name__} {kind}", kernel, block, activations, {}, products=False)


def cases_of_merging() -> Iterator[Case]:
    merged = dict(batch_norm.MERGED)
    options = {"num_warps": merged.pop("num_warps")}
    for name, constants in (("merge_statistics", merged | {"TRACK": True, "COUNT": True}), ("merge_sums", merged)):
        kernel = getattr(batch_norm_kernels, name)
        yield Case(name, kernel, constants, torch.float32, options, products=False)


def build(case: Case, capability: int):
    """Compile the kernel of a case."""
    signature = {name: _type(name, case) for name in case.kernel.arg_names if name not in case.constants}
    aligned = [
        i
        for i, name in enumerate(case.kernel.arg_names)
        if signature.get(name, "").startswith("*") or (name in case.even and name in signature)
    ]
    if "constexprs" in inspect.signature(ASTSource).parameters:
        whole = {name: signature.get(name, "constexpr") for name in case.kernel.arg_names}
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        language = GluonASTSource if getattr(case.kernel, "is_gluon", bool)() else ASTSource
        source = language(case.kernel, whole, constexprs=case.constants, attrs=attributes)
    else:  # Triton 3.1
        from triton.compiler.compiler import AttrsDescriptor

        attributes = AttrsDescriptor(tuple(aligned), ())
        source = ASTSource(case.kernel, signature, constants=case.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)


def _type(name: str, case: Case) -> str:
    stem = name.rstrip("0123456789")
    if stem in HALF or (stem == "centroids" and case.kernel is assign.settle and not case.constants["SPLIT"]):
        return "*fp16"
    if stem in FEATURES:
        return POINTER[case.features]
    if stem in FLOATS:
        return "fp32"
    if stem in NUMBERS:
        return "i32"
    return "*i64" if name == "seed_on_device" else INTEGERS.get(stem, "*fp32")


class Resources(NamedTuple):
    """What a compiled kernel takes, and what is wrong with its code."""

    registers: int
    spills: int  # instructions that move a register to or from local memory
    spills_in_loops: int
    shared: int  # bytes
    matrix: str  # matrix instructions: how many of which kind
    serialised: list[str]  # ptxas' warnings that every wgmma is waited for, by number: C7514, ...
    overwritten: list[str]
    wide: bool  # stores 16 bytes at a time
    loop: list[machine_code.Instruction]
    moved: int  # bytes that a thread loads from and stores to global memory in the loop
    narrow: int  # accesses of global memory in the loop that are not of 16 bytes

    def __str__(self) -> str:
        sizes = f"{self.registers:4} registers {self.spills:4} spills {self.shared:7} B shared"
        return f"{sizes}   {self.matrix or 'no products'}"

    def programs(self, warps: int, capability: int) -> int:
        """Return how many programs a multiprocessor holds at a time, by registers and shared memory."""
        registers = 32 * warps * (-(-self.registers // 8) * 8)
        shared = self.shared + (0 if capability < 80 else 1024)
        return min(REGISTERS // registers, SHARED_OF_ALL[capability] // max(1, shared))


def resources(compiled) -> Resources:
    """Read from its machine code what a compiled kernel takes."""
    tool = TOOLS / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    code = machine_code.parse(text)
    counts = Counter(instruction.stem for instruction in code)
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=machine_code.spills(code),
        spills_in_loops=machine_code.spills_in_loops(code),
        shared=compiled.metadata.shared,
        matrix=", ".join(f"{counts[name]} {name}" for name in MATRIX if counts[name]),
        serialised=_serialised(compiled.asm["ptx"]),
        overwritten=machine_code.overwritten_operands(code),
        wide=any(one.name.startswith("STG") and ".128" in one.name for one in code),
        loop=(loop := machine_code.inner_loop(code)),
        moved=sum(machine_code.bytes_of(one) for one in loop if one.stem in ("LDG", "STG")),
        narrow=sum(one.stem in ("LDG", "STG") and ".128" not in one.name for one in loop),
    )


def _serialised(ptx: str) -> list[str]:
    """Return ptxas' warnings that it serialises matrix instructions. Triton keeps them to itself."""
    if "wgmma" not in ptx:
        return []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        command = [TOOLS / "ptxas", "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return re.findall(r"\((C\d+)\)[^\n]* are serialized", said)


def faults(case: Case, found: Resources, capability: int) -> list[str]:
    """Return what is wrong with a kernel, in words."""
    warps = case.options.get("num_warps", 4)
    checks = {
        f"{found.spills_in_loops} spills inside a loop": found.spills_in_loops,
        "too much shared memory": found.shared > SHARED[capability],
        f"fewer than {case.programs} programs fit": found.programs(warps, capability) < case.programs,
        "products off the matrix units": case.products and not found.matrix,
        "no stores of 16 bytes": case.wide and not found.wide,
        f"{found.narrow} loads and stores of less than 16 bytes": case.moved and found.narrow > case.words,
        f"a turn moves {32 * warps * found.moved} bytes, not {case.moved}": case.moved
        and 32 * warps * found.moved != case.moved,
        f"serialised wgmma ({', '.join(found.serialised)})": found.serialised,
        f"operand of wgmma overwritten: {', '.join(found.overwritten[:3])}": found.overwritten,
    }
    return [name for name, wrong in checks.items() if wrong]


def loop_line(case: Case, found: Resources, capability: int) -> str:
    """Return the instructions of the inner loop by pipe, and the bound that follows."""
    warps = case.options.get("num_warps", 4)
    pipes = ", ".join(f"{count} {name}" for name, count in machine_code.by_pipe(found.loop).most_common())
    line = f"{len(found.loop)} instructions: {pipes}"
    if capability in machine_code.GPUS:
        limit = machine_code.bound(found.loop, warps, machine_code.GPUS[capability])
        line += f"; {limit} on {machine_code.GPUS[capability].name} ({limit.limit})"
    return line


def entry(case: Case, found: Resources, capability: int) -> dict:
    """Return what the record says about a kernel."""
    warps = case.options.get("num_warps", 4)
    result = {
        "registers": found.registers,
        "spills": found.spills,
        "spills_in_loops": found.spills_in_loops,
        "shared_bytes": found.shared,
        "programs_on_a_multiprocessor": found.programs(warps, capability),
        "matrix_instructions": found.matrix,
        "instructions_of_the_loop": len(found.loop),
        "by_pipe": dict(machine_code.by_pipe(found.loop).most_common()),
    }
    if capability in machine_code.GPUS:
        limit = machine_code.bound(found.loop, warps, machine_code.GPUS[capability])
        result["bound"] = {
            "tflop_per_s": round(limit.flop / 1e12, 1),
            "tb_per_s": round(limit.bytes / 1e12, 2),
            "limit": limit.limit,
        }
    return result


def write_record(folder: Path, capability: int, kernels: dict[str, dict]) -> Path:
    gpu = machine_code.GPUS.get(capability)
    known = {"gpu": gpu.name, "memory_tb_per_s": gpu.memory / 1e12} if gpu else {}
    record = {"target": f"sm_{capability}", **known, "triton": triton.__version__, "kernels": kernels}
    path = folder / f"bounds-sm_{capability}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def main(targets: list[int], folder: Path | None = None) -> int:
    failed = False
    for capability in targets:
        kernels = {}
        for case in cases(capability):
            found = resources(build(case, capability))
            wrong = faults(case, found, capability)
            failed |= bool(wrong)
            print(f"sm_{capability}  {case.name:20} {found}{'   <- FAILS: ' + '; '.join(wrong) if wrong else ''}")
            print(f"{'':7}{loop_line(case, found, capability)}", flush=True)
            kernels[case.name] = entry(case, found, capability)
        if folder:
            print(f"written: {write_record(folder, capability, kernels)}")
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", type=int, help="compute capabilities, such as 90")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write a record of each target into this folder")
    arguments = parser.parse_args()
    sys.exit(main(arguments.targets, arguments.record))
