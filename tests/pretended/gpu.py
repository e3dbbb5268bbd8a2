"""What a program sees of a pretended GPU: its kernels' results, the host's waits, launches and collectives.

Every operation on the GPU's tensors is done twice. PyTorch does it as on a GPU, with all its checks of devices, types
and strides, its copies, streams and waits, but kernels do nothing (runtime.c). Then it is done on the CPU, on the same
memory, so that values are there too. Only what cuBLAS, cuSOLVER and cuDNN do is left out of the first part, for these
libraries do not start: PyTorch's own description of the results takes their place. Triton's kernels leave their results
as they were allocated, zeros; of them the arguments are looked at.
"""

from __future__ import annotations

import ctypes
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.jit import JITFunction

from pcl_fast.nn import fused_convolution, sync_batch_norm_plain

aten = torch.ops.aten
_PYTORCH = str(Path(torch.__file__).parent)
DEVICE = torch.device("cuda", 0)
# cuBLAS's, cuSOLVER's and cuDNN's.
_FOREIGN = {
    aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.dot,
    aten._linalg_eigh, aten.cudnn_batch_norm, aten.cudnn_batch_norm_backward, fused_convolution.OPERATOR,
}  # fmt: skip
# Where a tensor lies, but not what is in it.
_PLACES = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.set_, aten.resize_,
    aten.record_stream,
}  # fmt: skip
_INDEXED = {aten.index, aten.index_put, aten.index_put_}
# What ProcessGroupNCCL sends.
NCCL_TYPES = {
    torch.uint8, torch.int8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
}  # fmt: skip


class Collective(NamedTuple):
    """Its name, and the shape, type and device of each of its tensors."""

    name: str
    tensors: tuple[tuple[tuple[int, ...], str, str], ...]


class Recorder(TorchDispatchMode):
    """Records the collectives that are called while it is active, those of DistributedDataParallel too."""

    def __init__(self):
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
            described = tuple((tuple(t.shape), str(t.dtype), str(t.device)) for t in tensors)
            self.collectives.append(Collective(func.__name__, described))
        return func(*args, **kwargs or {})

    def misfits(self) -> list[Collective]:
        """The collectives that NCCL would refuse."""
        allowed = {(str(dtype), str(DEVICE)) for dtype in NCCL_TYPES}
        return [call for call in self.collectives if not {tensor[1:] for tensor in call.tensors} <= allowed]


class PretendedGPU(Recorder):
    """Computes what kernels would while it is active, and records what they are launched with. One in a process.

    waits: for every wait of the host, what it waits for, and the lines that led there.
    launches: the names of the Triton kernels that were launched.
    products: the types in which convolutions and matrices were multiplied.
    updates: what the fused optimiser was given: how many parameters, and what is wrong with them.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.products: set[torch.dtype] = set()
        self.updates: list[tuple[int, list[str]]] = []
        # PyTorch calls it on its own threads too, and ctypes wants it kept.
        self._report = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._waited)
        self._shapes = FakeTensorMode()

        ctypes.CDLL(None).pretended_report_waits(self._report)
        JITFunction.run = self._launcher()

    def forget(self) -> None:
        """Begin anew to record."""
        for seen in (self.collectives, self.waits, self.launches, self.products, self.updates):
            seen.clear()

    def seen(self) -> dict[str, Any]:
        """What was recorded, as JSON can hold it."""
        return {
            "waits": list(self.waits),
            "launches": sorted(set(self.launches)),
            "products": sorted(map(str, self.products)),
            "updates": list(self.updates),
            "collectives": [call.name for call in self.collectives],
            "misfits": self.misfits(),
        }

    def _waited(self, why: bytes) -> None:
        frames = [frame for frame in traceback.extract_stack() if _PYTORCH not in frame.filename]
        lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if frame.filename != __file__]
        self.waits.append(f"{why.decode()} at {' '.join(lines[-4:])}")

    def _launcher(self) -> Callable[..., None]:
        def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
            own = {name: value for name, value in named.items() if name not in ("num_warps", "num_stages")}
            values = inspect.signature(kernel.fn).bind(*arguments, **own).arguments
            elsewhere = [n for n, v in values.items() if isinstance(v, torch.Tensor) and v.device != DEVICE]
            assert not elsewhere, f"{kernel.fn.__name__} is given {elsewhere}, which are not on the GPU"
            self.launches.append(kernel.fn.__name__)

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        func, args = _traceable(func, args)
        if func.namespace == "c10d" or (func.namespace == "pcl_fast" and func.overloadpacket not in _FOREIGN):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func.overloadpacket in _INDEXED:
            args = (args[0], self._numbered(args[1]), *args[2:])
        if func.overloadpacket is aten._fused_sgd_:
            self.updates.append((len(args[0]), _faults(*args[:3], kwargs)))
        if func.overloadpacket is aten.addmm_:
            self.products |= {value.dtype for value in args[1:] if _on_gpu(value)}
            results = args[0]
        elif func.overloadpacket in _FOREIGN:
            self.products |= {value.dtype for value in args if _on_gpu(value) and value.ndim > 1}
            results = self._shaped(func, args, kwargs)
        else:
            results = func(*args, **kwargs)
        given, flat = (tree_flatten(each)[0] for each in ((args, kwargs), results))
        if func.overloadpacket in _PLACES or not any(_on_gpu(value) for value in (*given, *flat)):
            return results
        on_host = _on_host_in_single if func.overloadpacket in _FOREIGN and _is_half(args) else _on_host
        expected = _host_twin(func)(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        return _filled(results, expected, {_storage(value) for value in given if isinstance(value, torch.Tensor)})

    def _numbered(self, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Indices without masks, whose number of entries PyTorch would find by a kernel, and wait for."""
        numbered = []
        for index in indices:
            if _on_gpu(index) and index.dtype is torch.bool:
                numbered += self.__torch_dispatch__(aten.nonzero.default, (), (index,)).unbind(1)
            else:
                numbered.append(index)
        return numbered

    def _shaped(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """New tensors as the operation would return on a GPU."""
        faked = tree_map(lambda v: self._shapes.from_tensor(v) if isinstance(v, torch.Tensor) else v, (args, kwargs))
        with self._shapes:
            results = func(*faked[0], **faked[1])
        return tree_map(
            lambda v: (
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
                if isinstance(v, torch.Tensor)
                else v
            ),
            results,
        )


def _traceable(func: Any, args: tuple) -> tuple[Any, tuple]:
    """Our operator in place of cuDNN's fused convolutions, of which PyTorch has no description."""
    if func.overloadpacket is aten.cudnn_convolution_relu:
        return fused_convolution.OPERATOR.default, (*args[:3], None, *args[3:])
    if func.overloadpacket is aten.cudnn_convolution_add_relu:
        x, weight, residual, _, *others = args
        return fused_convolution.OPERATOR.default, (x, weight, others[0], residual, *others[1:])
    return func, args


def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others, which in inference mode nobody has taken apart yet."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _faults(parameters: list, gradients: list, momenta: list, settings: dict[str, Any]) -> list[str]:
    """What the fused SGD would refuse, or do slowly: of tensors, and of the numbers that it reads on the device."""
    faults = [
        f"{name} {number}: {t.dtype} {t.device} {t.stride()} for {p.dtype} {p.device} {p.stride()} {tuple(p.shape)}"
        for name, tensors in (("gradient", gradients), ("momentum", momenta))
        for number, (p, t) in enumerate(zip(parameters, tensors, strict=True))
        if (t.dtype, t.device, _strides(t)) != (p.dtype, p.device, _strides(p)) or p.device != DEVICE
    ]
    numbers = {name: settings.get(name) for name in ("lr", "grad_scale", "found_inf")}
    numbers = {name: value for name, value in numbers.items() if isinstance(value, torch.Tensor)}
    return faults + [f"{n}: {v.dtype} {v.device}" for n, v in numbers.items() if v.device != DEVICE]


def _strides(tensor: torch.Tensor) -> list[int]:
    """Of the dimensions that are longer than 1: the others' mean nothing."""
    return [stride for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]


def _on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _on_host(value: Any) -> Any:
    """The same memory as a tensor of the CPU; "cuda" as "cpu"."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not _on_gpu(value):
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def _is_half(args: tuple) -> bool:
    """Whether all numbers are in one type of 2 bytes, which many CPUs multiply one by one."""
    types = {value.dtype for value in args if _on_gpu(value) and value.is_floating_point()}
    return types in ({torch.float16}, {torch.bfloat16})


def _on_host_in_single(value: Any) -> Any:
    """The same values in float32."""
    return _on_host(value).float() if _on_gpu(value) else _on_host(value)


def _filled(results: Any, expected: Any, given: set[int]) -> Any:
    """The results with the expected values. Those that are arguments, or views of arguments, have them already."""

    def fill(result: Any, value: Any) -> Any:
        if not isinstance(result, torch.Tensor):
            return value
        if _storage(result) in given:
            return result
        if result.shape != value.shape:  # which depends on values: of nonzero, for example
            result = torch.empty(value.shape, dtype=value.dtype, device=result.device)
        _on_host(result).copy_(value)
        return result

    if isinstance(results, (tuple, list)):
        return type(results)(fill(*pair) for pair in zip(results, expected, strict=True))
    return fill(results, expected)


# --- operations that only GPUs have -------------------------------------------------------------------------------


def _cudnn_batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    results = aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    return *results, torch.empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(x, dy, weight, mean, variance, saved_mean, saved_invstd, eps, reserve):
    saved = mean, variance, saved_mean, saved_invstd
    return aten.native_batch_norm_backward(dy, x, weight, *saved, True, eps, [True, True, True])


_TWINS = {
    aten.cudnn_batch_norm: _cudnn_batch_norm,
    aten.cudnn_batch_norm_backward: _cudnn_batch_norm_backward,
    aten.batch_norm_elemt: sync_batch_norm_plain.batch_norm_elemt,
    aten.batch_norm_backward_reduce: sync_batch_norm_plain.batch_norm_backward_reduce,
    aten.batch_norm_backward_elemt: sync_batch_norm_plain.batch_norm_backward_elemt,
}


def _host_twin(func: Any) -> Callable[..., Any]:
    return _TWINS.get(func.overloadpacket, func)
