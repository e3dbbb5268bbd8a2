"""What machine code says of a kernel: loops, instructions by pipe, bounds, and whether wgmma's operands are kept."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of cuobjdump -sass. name: with its suffixes, such as "LDG.E.128"."""

    address: int
    conditional: bool
    name: str
    operands: str

    @property
    def stem(self) -> str:
        return self.name.split(".")[0]


def parse(code: str) -> list[Instruction]:
    """Return the instructions of a disassembled kernel."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
    return [
        Instruction(int(address, 16), bool(condition), name, operands.strip())
        for address, condition, name, operands in line.findall(code)
    ]


# --- loops --------------------------------------------------------------------------------------------------------


def _successors(code: list[Instruction]) -> list[list[int]]:
    """Return the indices of the instructions that may follow each one. A call returns."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following = []
    for i, instruction in enumerate(code):
        jump = instruction.stem in ("BRA", "CALL")
        target = re.search(r"0x[0-9a-f]+$", instruction.operands) if jump else None
        # `BRA !P5, 0x40` and `@P0 BRA 0x40` may fall through.
        always = not instruction.conditional and (
            (instruction.stem == "BRA" and "," not in instruction.operands) or instruction.stem in ("EXIT", "RET")
        )
        next_ones = [] if always or i + 1 == len(code) else [i + 1]
        following.append([*next_ones, *([index[int(target[0], 16)]] if target else [])])
    return following


def loops(code: list[Instruction]) -> list[list[int]]:
    """Return every natural loop as sorted indices of its instructions, smallest first.

    An edge closes a loop if it leads back to an instruction that every way from the start passes. Jumps back from code
    that was only moved out of the way are no loops.
    """
    following = _successors(code)
    before: list[list[int]] = [[] for _ in code]
    for i, ones in enumerate(following):
        for j in ones:
            before[j].append(i)
    found: dict[int, set[int]] = {}
    for end, ones in enumerate(following):
        for start in ones:
            if start < end and not _reaches(following, 0, end, without=start):
                body = _up_to(before, end, start)
                found[start] = found.get(start, set()) | body
    return sorted((sorted(body) for body in found.values()), key=len)


def _reaches(following: list[list[int]], begin: int, end: int, without: int) -> bool:
    seen, waiting = {begin, without}, deque([begin] if begin != without else [])
    while waiting:
        for j in following[waiting.popleft()]:
            if j == end:
                return True
            if j not in seen:
                seen.add(j)
                waiting.append(j)
    return False


def _up_to(before: list[list[int]], end: int, start: int) -> set[int]:
    body, waiting = {start, end}, deque([end])
    while waiting:
        for j in before[waiting.popleft()]:
            if j not in body:
                body.add(j)
                waiting.append(j)
    return body


def inner_loop(code: list[Instruction]) -> list[Instruction]:
    """Return the loop without loops in it that has most products, then most instructions; without loops, all code."""
    every = loops(code)
    innermost = [body for body in every if not any(set(other) < set(body) for other in every)]
    chosen = max(innermost, key=lambda body: (sum(_flop(code[i]) for i in body), len(body)), default=range(len(code)))
    return [code[i] for i in chosen]


def spills_in_loops(code: list[Instruction]) -> int:
    inside = {i for body in loops(code) for i in body}
    return spills(code[i] for i in inside)


def spills(code: Iterable[Instruction]) -> int:
    """Count the moves of a register to or from local memory."""
    return sum(instruction.stem in ("STL", "LDL") for instruction in code)


# --- wgmma --------------------------------------------------------------------------------------------------------


def overwritten_operands(code: list[Instruction]) -> list[str]:
    """Return what overwrites registers that an asynchronous product reads before the product was waited for.

    wgmma reads its first operand, four registers of two fp16 numbers, while the instructions after it already run. Code
    is looked through in the order of its addresses, which is how the compiler lays out a loop; other ways are not.
    """
    wrong: list[str] = []
    open_groups: list[list[int]] = [[]]
    for instruction in code:
        product = re.match(r"R\d+, R(\d+), gdesc", instruction.operands) if instruction.stem == "HGMMA" else None
        if product:
            open_groups[-1].append(int(product[1]))
        if instruction.stem == "HGMMA":
            if "gsb0" in instruction.operands:
                open_groups.append([])
        elif instruction.name.startswith("WARPGROUP.DEPBAR"):
            left = int(instruction.operands.split(",")[-1], 16)
            open_groups = open_groups[-1 - left :]
        else:
            written = _written(instruction)
            wrong += [
                f"{instruction.address:#x} {instruction.name} {instruction.operands}"
                for operand in {operand for group in open_groups for operand in group}
                if written & set(range(operand, operand + 4))
            ]
    return wrong


def _written(instruction: Instruction) -> set[int]:
    """Return the numbers of the registers that an instruction writes, its first operand (after a predicate)."""
    if instruction.stem in ("ST", "STG", "STS", "STSM", "STL", "RED", "REDG", "BAR", "LDGSTS", "BRA", "RET"):
        return set()
    first = re.match(r"(?:U?P\w+, )*R(\d+)\b", instruction.operands)
    if not first:
        return set()
    wide = ".64" in instruction.name or "WIDE" in instruction.name
    count = bytes_of(instruction) // 4 if instruction.stem in LOADS else 2 if wide else 1
    return set(range(int(first[1]), int(first[1]) + max(1, count)))


# --- pipes and bounds ---------------------------------------------------------------------------------------------

LOADS = ("LDG", "LDS", "LDSM", "LDL", "LD", "LDC")
_FMA = {"FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2"}
_SPECIAL = {"MUFU"}
_CONVERSIONS = {"I2F", "F2I", "F2F", "I2I", "FRND", "I2FP"}
_CONTROL = {"BRA", "BAR", "NOP", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "CALL", "RET",
            "FENCE", "CS2R", "S2R", "BREAK", "SYNCS", "MEMBAR", "VOTE", "VOTEU", "YIELD", "ERRBAR", "CCTL"}  # fmt: skip


class Gpu(NamedTuple):
    """What a GPU does in a clock, from NVIDIA's tables of throughput (CUDA C++ programming guide, arithmetic
    instructions) and data sheets. Lanes are results a clock and multiprocessor.
    """

    name: str
    multiprocessors: int
    clock: float  # Hz
    flop: int  # of the matrix units with fp16 operands and fp32 sums, a clock and multiprocessor
    float_lanes: int  # FADD, FMUL, FFMA
    integer_lanes: int
    conversion_lanes: int
    memory: float  # bytes a second


GPUS = {
    70: Gpu("V100", 80, 1.53e9, 1024, 64, 64, 16, 0.9e12),
    80: Gpu("A100", 108, 1.41e9, 2048, 64, 64, 16, 2.0e12),
    90: Gpu("H200", 132, 1.83e9, 4096, 128, 64, 64, 4.8e12),
}
_SPECIAL_LANES = 16
_SHARED_BYTES = 128  # a clock and multiprocessor


def pipe(instruction: Instruction) -> str:
    """Return the unit that runs an instruction: tensor, fma, alu, special, convert, memory, uniform or control."""
    stem = instruction.stem
    if stem in ("HMMA", "HGMMA"):
        return "tensor"
    for name, members in (("fma", _FMA), ("special", _SPECIAL), ("convert", _CONVERSIONS), ("control", _CONTROL)):
        if stem in members:
            return name
    if stem.startswith(("LD", "ST", "RED", "ATOM", "UTMA", "UBLK")) or stem == "SHFL":
        return "memory"
    return "uniform" if re.match(r"U[A-Z]|R2UR|S2UR", stem) else "alu"


def by_pipe(code: Iterable[Instruction]) -> Counter:
    """Count instructions by pipe."""
    return Counter(pipe(instruction) for instruction in code)


class Bound(NamedTuple):
    """What a loop cannot exceed, were all its pipes to overlap fully: the pipe that is busy longest sets it.

    flop: a second, of the matrix units (fp32 features take three products, each of which counts); bytes: a second, to
    and from global memory; limit: what sets it.
    """

    flop: float
    bytes: float
    limit: str

    def __str__(self) -> str:
        return f"<= {self.flop / 1e12:.0f} TFLOP/s" if self.flop else f"<= {self.bytes / 1e12:.2f} TB/s"


def bound(code: list[Instruction], warps: int, gpu: Gpu) -> Bound:
    """Return the bound of a loop that `warps` warps run, each on one of a multiprocessor's four schedulers."""
    clocks = {name: warps * count for name, count in _clocks(code, gpu).items()}
    limit = max(clocks, key=clocks.get)
    rate = gpu.multiprocessors * gpu.clock / clocks[limit]
    flop = warps * sum(map(_flop, code)) * rate
    moved = warps * sum(32 * bytes_of(one) for one in code if one.stem in ("LDG", "STG", "LDGSTS", "LD", "ST")) * rate
    if not flop and moved > gpu.memory:
        return Bound(0.0, gpu.memory, "global memory")
    return Bound(flop, moved, limit)


def _clocks(code: list[Instruction], gpu: Gpu) -> dict[str, float]:
    """Return how long each pipe of a multiprocessor is busy with one warp's instructions, in clocks."""
    busy = dict.fromkeys(("tensor", "fma", "alu", "special", "convert", "shared memory", "issue"), 0.0)
    for one in code:
        busy["issue"] += 1 / 4
        unit = pipe(one)
        if unit == "tensor":
            busy["tensor"] += _flop(one) / gpu.flop
        elif unit == "memory":
            busy["shared memory"] += 32 * bytes_of(one) / _SHARED_BYTES if one.stem in _TO_SHARED else 0
        elif unit in ("fma", "alu", "special", "convert"):
            integer = unit == "alu" or one.stem == "IMAD"
            lanes = {"special": _SPECIAL_LANES, "convert": gpu.conversion_lanes}.get(unit, gpu.float_lanes)
            busy[unit] += 32 / (gpu.integer_lanes if integer else lanes)
        busy["shared memory"] += _read_by_wgmma(one)
    return busy


_TO_SHARED = ("LDS", "LDSM", "STS", "STSM", "LDGSTS", "SHFL")


def _read_by_wgmma(instruction: Instruction) -> float:
    """Return the clocks in which shared memory gives a wgmma its operands, a quarter of them for each of its warps."""
    shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.name)
    if not shape:
        return 0.0
    m, n, k = map(int, shape.groups())
    from_registers = re.match(r"R\d+, R\d+, gdesc", instruction.operands)
    return 2 * k * (n + (0 if from_registers else m)) / _SHARED_BYTES / 4


def _flop(instruction: Instruction) -> float:
    """Return what a warp's share of a matrix instruction is, in FLOP. An HMMA.884 is one of a product's four steps."""
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.name):
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k / 4
    if shape := re.match(r"HMMA\.(16816|1688|884)", instruction.name):
        return {"16816": 4096, "1688": 2048, "884": 512}[shape[1]]
    return 0.0


def bytes_of(instruction: Instruction) -> int:
    """Return how many bytes a thread moves."""
    if instruction.stem in ("LDSM", "STSM"):
        return 4 * int((re.search(r"\.([124])\b", instruction.name) or [0, 1])[1])
    size = re.search(r"\.(?:U|S)?(8|16|64|128)\b", instruction.name)
    return int(size[1]) // 8 if size else 4
