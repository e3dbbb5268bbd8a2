"""Runs a kernel in Gluon on a CPU, as Triton's interpreter does those in Triton: one program after another, in PyTorch.

Layouts mean nothing here. What is asynchronous happens as late, or as early, as a GPU may do it: a copy arrives when it
is waited for and until then its place holds NaN; a product reads its factor from shared memory both when it is begun
and when it is waited for, and the two must be the same. What other warps do is not seen before a barrier: a copy
counts as arrived only if a barrier follows the wait, and a place may be copied to only if a barrier follows the wait
for the product that reads it, and what was loaded from it. Breaking one of these is an AssertionError.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch


class Pointers:
    """A tensor of places in memory."""

    def __init__(self, memory: torch.Tensor, places: torch.Tensor | int = 0):
        self.memory, self.places = memory, places

    def __add__(self, other) -> Pointers:
        return Pointers(self.memory, self.places + other)


class Shared:
    """A place in shared memory. before: when the last barrier was."""

    def __init__(self, program: Program, shape, dtype):
        self.program, self.values = program, torch.full(tuple(shape), float("nan"), dtype=dtype)
        self.used = -1  # when a warp may last have read it
        self.products: list[Product] = []  # that read it and were not waited for

    def permute(self, order) -> SimpleNamespace:
        return SimpleNamespace(shared=self, order=order)

    def load(self, layout) -> torch.Tensor:
        self.used = self.program.clock
        assert not self.values.isnan().any(), "loads what was not copied, or not waited for by all warps"
        return self.values.clone()


class Product:
    """An asynchronous product of a factor in registers and one in shared memory."""

    def __init__(self, x: torch.Tensor, factor: SimpleNamespace):
        self.x, self.factor, self.at_first = x, factor, factor.shared.values.clone()
        factor.shared.products.append(self)

    def result(self) -> torch.Tensor:
        shared = self.factor.shared
        assert not self.at_first.isnan().any(), "multiplies what was not copied, or not waited for by all warps"
        assert torch.equal(shared.values, self.at_first), "a product's factor was overwritten"
        shared.products.remove(self)
        shared.used = shared.program.clock
        return self.x.float() @ shared.values.permute(self.factor.order).float()


class Program:
    """One program: the time in barriers, and the copies that have not arrived. Fenced: since the last copy arrived."""

    def __init__(self, index: int):
        self.index, self.clock = index, 0
        self.begun: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []
        self.arrived: list[Callable[[], None]] = []
        self.fenced = True


def run(kernel, grid: int, *arguments, **constants) -> None:
    """Run a gluon.jit kernel. Tensors among the arguments are memory."""
    memory = [Pointers(value.view(-1)) if isinstance(value, torch.Tensor) else value for value in arguments]
    for index in range(grid):
        _plain(kernel, Program(index))(*memory, **constants)


def _plain(kernel, program: Program) -> Callable:
    """Return a kernel as a plain function: with this module's operations, and the functions that it calls plain too."""
    seen = {
        "gl": _language(program), "async_copy": _copies(program), "warpgroup_mma": _begin, "fence_async_shared": None,
        "warpgroup_mma_wait": lambda left, products: products[0].result(),
    }  # fmt: skip
    seen["fence_async_shared"] = lambda: setattr(program, "fenced", True)
    module: ModuleType = inspect.getmodule(kernel.fn)
    for name, value in vars(module).items():
        if hasattr(value, "fn"):
            source = textwrap.dedent(inspect.getsource(value.fn))
            exec(source[source.index("def ") :], seen)  # without its decorator
        elif name.startswith("_") and hasattr(value, "value"):
            seen[name] = value.value
    # Annotations are looked at too, but mean nothing.
    return seen[kernel.fn.__name__]


def _begin(x, factor, zero, *, use_acc: bool, is_async: bool) -> Product:
    assert is_async
    assert not use_acc
    return Product(x, factor)


def _copies(program: Program) -> SimpleNamespace:
    def copy(shared: Shared, source: Pointers) -> None:
        assert not shared.products, "copies to where a product reads"
        assert shared.used < program.clock, "copies to where another warp may still read"
        shared.values.fill_(float("nan"))
        values = source.memory[source.places]
        program.begun.append(lambda: shared.values.copy_(values))

    def commit() -> None:
        program.groups.append(program.begun)
        program.begun = []

    def wait(left: int) -> None:
        while len(program.groups) > left:
            program.arrived += program.groups.pop(0)
            program.fenced = False

    return SimpleNamespace(async_copy_global_to_shared=copy, commit_group=commit, wait_group=wait)


def _language(program: Program) -> SimpleNamespace:
    def barrier() -> None:
        assert program.fenced, "products may not see what was copied"
        program.clock += 1
        for arrive in program.arrived:
            arrive()
        program.arrived = []

    def load(source: Pointers, mask, other):
        mask = mask.expand(source.places.shape)
        return torch.where(mask, source.memory[torch.where(mask, source.places, 0)], other)

    def store(to: Pointers, values, mask) -> None:
        to.memory[to.places[mask]] = values[mask]

    def nothing(*_, **__) -> None:
        return None

    layouts = (
        "NVMMADistributedLayout", "BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMASharedLayout",
        "SwizzledSharedLayout",
    )  # fmt: skip
    return SimpleNamespace(
        **dict.fromkeys(layouts, nothing),
        constexpr=None, int32=torch.int32, int64=torch.int64, float16=torch.float16, float32=torch.float32,
        program_id=lambda axis: torch.tensor(program.index),
        arange=lambda begin, end, layout=None: torch.arange(begin, end, dtype=torch.int32),
        expand_dims=torch.unsqueeze, maximum=torch.maximum, zeros_like=torch.zeros_like,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        where=torch.where, load=load, store=store, thread_barrier=barrier,
        convert_layout=lambda values, layout: values,
        reduce=lambda values, axis, combine: values.amax(axis),
        max=lambda values, axis: values.amax(axis), min=lambda values, axis: values.amin(axis),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(program, shape, dtype),
    )  # fmt: skip
