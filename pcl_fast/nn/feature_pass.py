"""An encoder for the pass over the images: batch norm folded, and what follows a convolution done by the convolution.

`fused_encoder` makes it, `unfit_layers` names the layers for which it goes wrong, or on a GPU does not pay, and
`find_difference` compares whole encoders. Which layers are left out is a list of names, so that ranks can agree on it,
and a record can keep it:

    images = normalise(batch, dtype)               # of a shape that the pass will have
    plain = list(unfit_layers(encoder, images))    # on any rank, at any shape
    if find_difference(encoder, images, plain) is None:
        encode = fused_encoder(encoder, plain).to(dtype)
"""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import fx, nn

from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.fused_batch_norm import unfuse_batch_norm
from pcl_fast.nn.fused_convolution import FusedConvolution, is_taken, suits
from pcl_fast.nn.max_pool import FusedMaxPool2d
from pcl_fast.nn.stem import StemConvolution
from pcl_fast.nn.stem import suits as suits_stem

# Rows that are also computed in the next finer type, to compare with.
_COMPARED = 8
# By so much a layer must be faster on a GPU, or its times may be chance; and how often it is timed.
_FASTER, _REPETITIONS = 1.02, 5


class BiasReLU(nn.Module):
    """relu(x + bias) of x [N, C, H, W], in place."""

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.bias.view(-1, 1, 1)).relu_()


def fused_encoder(encoder: nn.Module, plain: Collection[str] = ()) -> nn.Module:
    """Return a copy of an encoder in eval mode that passes over its activations less often. It has no gradient.

    Batch norm is folded as `fold_batch_norm` does it. A convolution that ReLU follows, or the sum with a shortcut and
    then ReLU, becomes a FusedConvolution wherever `suits` says so. Of others that ReLU and max pooling follow (the stem
    on a GPU) bias and ReLU come after the pooling: both are monotone, so this is exact, and there are a quarter as
    many elements. On a GPU a bias whose result is only added to that of a fused convolution joins that one's.

    The features are those of `fold_batch_norm` up to rounding.

    Args:
        encoder: on the device where it will compute; `.to(dtype)` of the result gives it the type of its images.
        plain: names of convolutions ("backbone.conv1") that are left as they are.

    Returns:
        The encoder, in which `fused_layers` finds what was fused; without changes but the folding where the patterns
        are not found, or the encoder's code cannot be traced.
    """
    folded = fold_batch_norm(encoder).requires_grad_(False)
    unfuse_batch_norm(folded)  # there is none left, and what it does cannot be traced
    try:
        graph = _Tracer().trace(folded)
    except Exception:  # tracing runs the encoder's code with symbols, on which it may do anything
        return folded
    traced = fx.GraphModule(folded, graph)
    _drop_identities(traced)
    _fuse(traced, plain)
    _pool_first(traced)
    _stem_and_pooling_by_kernels(traced, plain)
    _overwrite(traced)
    if any(tensor.is_cuda for tensor in traced.parameters()):
        join_biases(traced)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


def fused_layers(module: nn.Module) -> list[str]:
    """Return the names of an encoder's fused convolutions."""
    return [name for name, part in module.named_modules() if isinstance(part, FusedConvolution)]


# --- rewriting ----------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Looks into what has convolutions; heads and pooling stay modules, so that their code may be any."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or not any(isinstance(part, nn.Conv2d) for part in m.modules())


def _module(
    graph: fx.GraphModule, node: object, kind: type[nn.Module] | tuple[type[nn.Module], ...]
) -> nn.Module | None:
    """Return the module of this kind that the node calls, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = graph.get_submodule(node.target)
    return module if isinstance(module, kind) else None


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    return _module(graph, node, nn.ReLU) is not None or _calls(node, F.relu, torch.relu)


def _calls(node: fx.Node, *functions: Callable) -> bool:
    return node.op == "call_function" and node.target in functions


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _drop_identities(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if _module(graph, node, nn.Identity) is not None:
            _replace(node, node.args[0])


def _fuse(graph: fx.GraphModule, plain: Collection[str]) -> None:
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]

    def is_fusible(node: object) -> bool:
        conv = _module(graph, node, nn.Conv2d)
        once = conv is not None and len(node.users) == 1 and called.count(node.target) == 1
        return once and type(conv) is nn.Conv2d and node.target not in plain and suits(conv)

    for relu in list(graph.graph.nodes):
        if not _is_relu(graph, relu):
            continue
        before, residual = relu.args[0], ()
        if _calls(before, operator.add, operator.iadd, torch.add) and len(before.users) == 1 and not before.kwargs:
            # The block's own path is the first term in a ResNet. The other may be a convolution too, but does not take
            # its place: it would be one that `unfit_layers` has not tried.
            terms = sorted(before.args, key=lambda term: _module(graph, term, nn.Conv2d) is None)
            before, residual = terms[0], (terms[1],)
            if not isinstance(terms[1], fx.Node):
                continue
        if not is_fusible(before):
            continue
        graph.get_submodule(before.target).__class__ = FusedConvolution
        with graph.graph.inserting_before(relu):  # where the shortcut has been computed
            fused = graph.graph.call_module(before.target, (before.args[0], *residual))
        add = relu.args[0]
        _replace(relu, fused)
        for done in (add, before):
            if not done.users and done in graph.graph.nodes:
                graph.graph.erase_node(done)


def _pool_first(graph: fx.GraphModule) -> None:
    """Put the bias and ReLU of a convolution behind the max pooling that follows them."""
    for pool in list(graph.graph.nodes):
        if _module(graph, pool, nn.MaxPool2d) is None or not _is_relu(graph, pool.args[0]):
            continue
        relu = pool.args[0]
        before = relu.args[0]
        conv = _module(graph, before, nn.Conv2d)
        if conv is None or conv.bias is None or len(relu.users) > 1 or len(before.users) > 1:
            continue
        name = f"{before.target}_bias_relu"
        graph.add_submodule(name, BiasReLU(conv.bias))
        conv.bias = None
        _replace(relu, before)
        with graph.graph.inserting_after(pool):
            after = graph.graph.call_module(name)
        pool.replace_all_uses_with(after)
        after.args = (pool,)


def _stem_and_pooling_by_kernels(graph: fx.GraphModule, plain: Collection[str]) -> None:
    for node in graph.graph.nodes:
        module = _module(graph, node, (nn.Conv2d, nn.MaxPool2d))
        if type(module) is nn.MaxPool2d:
            module.__class__ = FusedMaxPool2d
        elif type(module) is nn.Conv2d and node.target not in plain and suits_stem(module):
            module.__class__ = StemConvolution


def _overwrite(graph: fx.GraphModule) -> None:
    """Let a fused convolution write over its shortcut where nothing reads that later, and it is a tensor of its own."""
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        fused = _module(graph, node, FusedConvolution)
        if fused is None or len(node.args) < 2 or node.args[0] is node.args[1]:
            continue
        fresh = _module(graph, node.args[1], (nn.Conv2d, nn.MaxPool2d, BiasReLU)) is not None
        fused.overwrites = fresh and max(node.args[1].users, key=order.__getitem__) is node


def join_biases(graph: fx.GraphModule) -> None:
    """Let a fused convolution add the bias of the convolution whose result is its shortcut. cuDNN's plain convolution
    has no bias: PyTorch adds it in a pass of its own. (oneDNN's has.)
    """
    for node in graph.graph.nodes:
        fused = _module(graph, node, FusedConvolution)
        if fused is None or len(node.args) < 2 or fused.bias is None:
            continue
        conv = _module(graph, node.args[1], nn.Conv2d)
        if conv is not None and type(conv) is nn.Conv2d and conv.bias is not None and len(node.args[1].users) == 1:
            fused.bias = nn.Parameter(fused.bias + conv.bias, requires_grad=False)
            conv.bias = None


# --- whether it is right, and pays -------------------------------------------------------------------------------


@torch.inference_mode()
def unfit_layers(encoder: nn.Module, images: torch.Tensor) -> dict[str, str]:
    """Return the convolutions that `fused_encoder` should leave as they are, by name, each with the reason.

    Every shape of a layer is tried once, with the activations that these images give: the operator must not raise,
    must be as near to the result in a finer type as the separate steps are, and on a GPU it must be faster.

    Args:
        encoder: on the device of the images.
        images: normalised, [N, 3, H, W], channels_last, of a shape and the type that the pass will have.
    """
    fused = fused_encoder(encoder).to(images.dtype)
    found: dict[tuple, str | None] = {}
    unfit: dict[str, str] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(layer: FusedConvolution, inputs: tuple[torch.Tensor, ...]) -> None:
            shape = *(tuple(each.shape) for each in (*inputs, layer.weight)), layer.geometry[0]
            key = repr(shape)
            if key not in found:
                found[key] = _unfit(layer, *inputs)
            if found[key] is not None:
                unfit[name] = found[key]

        return hook

    for name in fused_layers(fused):
        fused.get_submodule(name).register_forward_pre_hook(look(name))
    fused(images)
    return unfit


def _unfit(layer: FusedConvolution, x: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    plain = layer.plain(x, residual)
    if not is_taken(x, residual, plain.numel()):
        return "does not take such tensors"
    try:
        fast = layer.fast(x, residual if residual is None else residual.clone())
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"cannot be run ({str(error).partition(chr(10))[0]})"
    if fast.shape != plain.shape:
        return f"is wrong: its result is {tuple(fast.shape)}, not {tuple(plain.shape)}"
    if fault := _difference(layer, x[:_COMPARED], residual, fast[:_COMPARED], plain[:_COMPARED]):
        return fault
    if not x.is_cuda:
        return None
    slow, quick = (milliseconds(lambda way=way: way(x, residual), x.device) for way in (layer.plain, layer.fast))
    return None if slow >= _FASTER * quick else f"is not faster: {quick:.3f} ms, {slow:.3f} ms in steps"


def finer(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which results of this type are checked."""
    return torch.float64 if dtype is torch.float32 else torch.float32


def _difference(layer: FusedConvolution, x, residual, fast: torch.Tensor, plain: torch.Tensor) -> str | None:
    """What is wrong with the first rows of a layer's result, channel by channel: its largest error against that of the
    separate steps, and a little. That is four roundings of the largest value before ReLU, and of sums of K products
    what chance makes of K roundings, sqrt(K) 2^-24 of the sum of their sizes.
    """
    wide, kept = finer(x.dtype), residual if residual is None else residual[: len(x)]
    x, weight, bias, kept = (t if t is None else t.to(wide) for t in (x, layer.weight, layer.bias, kept))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = F.conv2d(x, weight, bias, *layer.geometry)
        sizes = F.conv2d(x.abs(), weight.abs(), None, *layer.geometry).amax((0, 2, 3))
    if kept is not None:
        exact = exact + kept
    largest = exact.abs().amax((0, 2, 3))
    exact = exact.relu()
    error, allowed = ((result.to(wide) - exact).abs().amax((0, 2, 3)) for result in (fast, plain))
    tf32 = fast.dtype is torch.float32 and x.is_cuda and torch.backends.cudnn.allow_tf32
    eps = 2.0**-10 if tf32 else torch.finfo(fast.dtype).eps
    limit = 2 * allowed + 4 * eps * largest + weight[0].numel() ** 0.5 * 2.0**-24 * sizes
    wrong = ~(error <= limit)
    if not wrong.any():
        return None
    return f"is wrong: {int(wrong.sum())} of {len(wrong)} channels differ by up to {float(error.max()):.2g}"


@torch.inference_mode()
def find_difference(encoder: nn.Module, images: torch.Tensor, plain: Collection[str] = ()) -> str | None:
    """Compare the features of `fused_encoder` with those of `fold_batch_norm`, and both with those in a finer type.

    Args:
        encoder: on the device of the images, maps them to unit features.
        images: normalised, [N, 3, H, W], channels_last, of a shape and the type that the pass will have. All of them
            are encoded in their type, so that the operators are those of the pass; some in the finer one.
        plain: as for `fused_encoder`.

    Returns:
        None if the fused features of every image are at most twice as far from the exact ones as the farthest of the
        folded are, and a little; else what is wrong, to be read behind the encoder's name.
    """
    folded, dtype = fold_batch_norm(encoder), images.dtype
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = fold_batch_norm(encoder).to(finer(dtype))(images[:_COMPARED].to(finer(dtype))).to(finer(dtype))
    usual = folded.to(dtype)(images)[:_COMPARED].to(exact)
    found = fused_encoder(encoder, plain).to(dtype)(images)[:_COMPARED].to(exact)
    if found.shape != exact.shape:
        return f"is wrong: its features are {tuple(found.shape)}, not {tuple(exact.shape)}"
    errors, allowed = ((result - exact).norm(dim=1) for result in (found, usual))
    limit = 2 * float(allowed.max()) + 4 * torch.finfo(dtype).eps / math.sqrt(exact.shape[1])
    wrong = int((~(errors <= limit)).sum())
    if not wrong:
        return None
    return f"is wrong: {wrong} of {len(errors)} features differ by up to {float(errors.max()):.2g}, not {limit:.2g}"


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of some work, after two times that are not counted."""
    times = []
    for number in range(2 + _REPETITIONS):
        begin = _now(device)
        work()
        seconds = _now(device) - begin
        if number >= 2:
            times.append(seconds)
    return 1e3 * statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
