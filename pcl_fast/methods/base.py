"""What a method is to the rest of the project.

A method is one module: the networks, queues, banks and prototypes that are learned, and what a step does with them. The
learner takes one optimiser step of whatever method it is given, the trainer decides when there is a step, an E-step or
an evaluation; neither knows what any method is made of. docs/adding-a-method.md goes through an example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from pcl_fast.augmentations import View
from pcl_fast.config import Config, view_of
from pcl_fast.data import Batch, normalise
from pcl_fast.distributed import World
from pcl_fast.nn.batch_norm import batch_norm_buffers, fold_batch_norm
from pcl_fast.nn.encoder import Pooled
from pcl_fast.nn.feature_pass import fused_encoder
from pcl_fast.nn.precision import autocast, encoder_dtype
from pcl_fast.nn.queue import KeyQueue
from pcl_fast.optim import Group, one_group


class Inputs(NamedTuple):
    """All that differs from step to step, on the device: what a captured step must be given anew.

    views: uint8 [N, size, size, 3], one tensor for every View of the method.
    index: int64 [N], positions of the images in the data set.
    drawn: what `Method.draw` returned, for the whole step. On a CPU its plain numbers stay so, elsewhere they are 0-d
        int64 tensors.
    part: which part of the step's images these are; None where they are all.
    """

    views: tuple[torch.Tensor, ...]
    index: torch.Tensor
    drawn: dict[str, torch.Tensor | int]
    part: Part | None = None

    @property
    def first(self) -> bool:
        """Whether the step begins with these: for what a step does once."""
        return self.part is None or self.part.number == 0

    def divided(self, parts: int) -> list[Inputs]:
        """Those of so many equal parts of the images, in their order, without a copy."""
        index, *views = (tensor.chunk(parts) for tensor in (self.index, *self.views))
        return [
            Inputs(tuple(views), index, self.drawn, Part(number, self))
            for number, (index, *views) in enumerate(zip(index, *views, strict=True))
        ]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """All but the views on another device, by moving a single int64 tensor."""
        values = [self.index, *map(torch.as_tensor, self.drawn.values())]
        packed = move(torch.cat([value.view(-1) for value in values]))
        parts = packed.split([value.numel() for value in values])
        index, *drawn = (part.view(value.shape) for part, value in zip(parts, values, strict=True))
        return Inputs(self.views, index, dict(zip(self.drawn, drawn, strict=True)))

    def copy_(self, new: Inputs) -> None:
        """Take over the inputs of another step, in place: what a captured step computes with."""
        for ours, theirs in zip((*self.views, self.index), (*new.views, new.index), strict=True):
            ours.copy_(theirs)
        for name, ours in self.drawn.items():
            ours.copy_(new.drawn[name])


class Part(NamedTuple):
    """Which part of a step's images some inputs are, see `Method.accumulation`.

    number: from 0 on.
    whole: the inputs of all parts.
    others: what `Method.represent` has made of the parts before, without a gradient; for the last part of methods that
        compare the images of a step.
    """

    number: int
    whole: Inputs
    others: tuple[tuple[torch.Tensor, ...], ...] = ()


class Step(NamedTuple):
    """What a method's forward pass returns.

    loss: 0-d, with a gradient.
    metrics: 0-d tensors on the device, of this rank's batch, named as in `Method.metrics`; "loss" is among them. Some
        may be missing, but the same ones at all steps of an epoch, and on all ranks. Where a step has parts, they are
        means over these.
    carry: what `after_update` wants of this pass. Where a step has parts, theirs are joined by `Method.join`.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    carry: Any = None


class Metric(NamedTuple):
    """How a metric is shown: its label, and the title of the report's panel in which it is drawn. Of a panel whose
    title ends with % the axis goes from 0 to 100.
    """

    label: str
    panel: str


class FeatureSpec(NamedTuple):
    """The features that represent the images outside of training: for the E-step, and for evaluation.

    encoder: a key of `Method.encoders`.
    width: their length.
    from_bank: whether the next E-step reads them from a bank that the method has filled while it trained. Else they
        come from a pass of that encoder over the clustering view of all images.
    pooled: whether they are the backbone's pooled features, made unit features, instead of what the head makes of them.
    """

    encoder: str
    width: int
    from_bank: bool = False
    pooled: bool = False


def join_rows(parts: Sequence[Any]) -> Any:
    """One after another, the rows of tensors; those of tuples of tensors, each for itself; None of None."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    fields = [join_rows(rows) for rows in zip(*parts, strict=True)]
    return type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)


class Method(nn.Module):
    """Base of all methods.

    A subclass gives its name, `class PCL(Method, name="pcl")`, and overrides what it needs. Parameters, momentum
    copies, queues and prototypes are submodules and buffers: its state_dict is the checkpoint's. What one rank alone
    has (a bank of its own images) is a buffer with persistent=False that `own_state` returns.

    metrics: what the steps report, by name.
    unfused_layers: in `feature_encoder` all layers but these are fused with what follows them, see fused_encoder; None:
        none is.
    settings: the recipe's fields that this method reads and not every method does ("loss.temperature"; "cluster." for
        a whole group). Changing one that belongs to other methods alone is an error.
    accumulation: how a step can be computed in parts (--optim.accumulate), one part's encoding in memory at a time.
        "mean": the loss is a mean over images, none of which depends on what the step computes for others. `forward` is
            called for each part, and the step's loss is the mean of theirs.
        "compare": the loss compares the images of the step with each other, by what an encoder makes of each: instead
            of `forward` there are `represent` and `compare`.
        None: not at all, which is refused in words.
    divisible: whether a step of several ranks can be captured, as CUDA graphs between which they exchange what they do.
        They do so by `all_gather_rows`, `all_reduce_sum` or BatchShuffle, in the forward pass or in `after_update`; not
        in the backward pass, as for batch norm or a loss of all ranks' images, and not beside a `branch`.
    knows_its_end: whether its steps depend on how many the run will have, by a schedule other than the learning rate's.
        A run that has begun is then not made longer but by --resume-from.
    """

    metrics: ClassVar[dict[str, Metric]]
    settings: ClassVar[tuple[str, ...]] = ()
    accumulation: ClassVar[Literal["mean", "compare"] | None] = None
    divisible: ClassVar[bool] = False
    knows_its_end: ClassVar[bool] = False
    named: ClassVar[dict[str, type[Method]]] = {}
    unfused_layers: Collection[str] | None = None

    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()
        cls.name = name
        Method.named[name] = cls

    def __init__(self, config: Config, world: World, images: int):
        """Build everything on the CPU, where every rank draws the same initial weights, and without collectives; see
        `methods.build`.

        Args:
            images: in the data set.
        """
        super().__init__()
        self.config, self.world, self.images = config, world, images

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        """Refuse what this method cannot do with so many images or ranks.

        Raises:
            ValueError: names the flag, its value and what to use instead.
        """

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        """The settings that make this method small enough for the demo's 5,000 images and minutes on a CPU, beside
        those that go for all methods; see demo.miniature.
        """
        return {}

    # --- what it wants --------------------------------------------------------------------------------------------

    @property
    def views(self) -> tuple[View, ...]:
        """The views of every image. By default two, drawn alike."""
        return (view_of(self.config.data),) * 2

    def groups(self) -> list[Group]:
        """Which parameters the optimiser updates, and how. By default all that have a gradient, alike."""
        return one_group(self)

    def order(self, epoch: int) -> np.ndarray | None:
        """The whole epoch's images, int64, for a method that pairs them; the same on all ranks. Those of a step lie
        together, and are dealt out to the G ranks like cards: two that one rank is to see in a row have G - 1 between
        them. None: the usual order, shuffled.
        """
        return None

    def notes(self) -> list[str]:
        """Lines for the log at the start of a run."""
        return []

    def warning(self, means: dict[str, float], step: int) -> str | None:
        """What to tell the user if training goes wrong without failing. It is asked after every epoch, on all ranks,
        until there is something to say.

        Args:
            means: the epoch's mean metrics, over all ranks.
            step: how many steps the run has done.
        """
        return None

    # --- a step ---------------------------------------------------------------------------------------------------

    def draw(self, batch: Batch, number: int) -> dict[str, torch.Tensor | int]:
        """What step `number` of the run draws on the host: int64 tensors, and integers of 64 bits. They travel to the
        device in one copy. The batch is that of the whole step, and all its parts are given what is drawn.
        """
        return {}

    def forward(self, inputs: Inputs) -> Step:
        """Loss and metrics. On the device from end to end, so that a CUDA graph can hold it; collectives are called in
        the same order on all ranks. Every parameter that a gradient may reach takes part, as DistributedDataParallel
        wants it.

        A method gives this, or `represent` and `compare`.
        """
        made = self.represent(inputs)
        if inputs.part is None:
            return self.compare(made, inputs)
        return self.compare(join_rows([*inputs.part.others, made]), inputs.part.whole)

    def represent(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """What the encoder makes of some images: tensors with a row for each. Asked again it makes the same, and but
        for batch norm's running statistics it changes nothing.
        """
        raise TypeError(f"{type(self).__name__} has no forward pass")

    def compare(self, made: tuple[torch.Tensor, ...], inputs: Inputs) -> Step:
        """Loss and metrics by what `represent` has made of all images of the step.

        Args:
            inputs: of the whole step.
        """
        raise TypeError(f"{type(self).__name__} has no forward pass")

    def join(self, carries: Sequence[Any]) -> Any:
        """The Step.carry of a whole step, of those of its parts: by default as tensors, or tuples of tensors, with a
        row for each image.
        """
        return join_rows(carries)

    def before_update(self, number: int) -> None:
        """Called between the backward pass and the optimiser of step `number`, for heads that are frozen at first
        (their gradients become None) and the like. A captured step has what it did when it was captured, see `phase`.
        """

    def phase(self, number: int) -> Hashable:
        """What step `number` depends on besides inputs and tensors that stay in their places: whether there are
        prototypes yet, whether a head is frozen. A step that was captured in another phase is captured anew. By default
        all steps are alike.
        """
        return None

    def after_update(self, carry: Any, applied: torch.Tensor) -> None:
        """Called after the optimiser with Step.carry, for queues, banks and momentum copies.

        Args:
            applied: 0-d bool on the device: False where the update was skipped because its gradient was not finite.
        """

    # --- features and the E-step ----------------------------------------------------------------------------------

    def encoders(self) -> dict[str, nn.Module]:
        """The encoders that a run is for: "query", and "momentum" if there is a momentum encoder. The checkpoint holds
        each under its name, for evaluation and export.
        """
        raise TypeError(f"{type(self).__name__} names no encoders")

    def features(self) -> FeatureSpec:
        """Which features the next E-step and online evaluation take. It is asked before each of them."""
        return FeatureSpec("query", self.config.model.dim)

    def feature_encoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The encoder of `features` as it is now, in eval mode: uint8 [N, H, W, 3] -> unit features [N, width].

        Its batch norm is folded into the convolutions, and it computes in the device's precision; see `unfused_layers`.
        """
        dtype, spec, plain = encoder_dtype(self.world.device), self.features(), self.unfused_layers
        encoder = self.encoders()[spec.encoder]
        if spec.pooled:
            encoder = Pooled(encoder.backbone)
        folded = (fold_batch_norm(encoder) if plain is None else fused_encoder(encoder, plain)).to(dtype)
        return lambda images: folded(normalise(images, dtype))

    def expects(self, epoch: int) -> bool:
        """Whether there is an E-step before this epoch (from 0; also asked for the end of training)."""
        return False

    def expect(self, features: torch.Tensor | None, epoch: int) -> list[dict[str, Any]]:
        """The E-step: replace prototypes or pseudo-labels in place, so that their addresses stay.

        Args:
            features: [n_local, width], this rank's shard of the data set, in its order; None if they are in a bank.

        Returns:
            Rows for the record, one per clustering, as clustering.cluster_row makes them.
        """
        return []

    def renewed(self) -> Sequence[nn.Parameter]:
        """The parameters that every E-step draws anew, in place. Their momentum begins anew with them."""
        return ()

    def clusterings(self) -> dict[str, torch.Tensor]:
        """The assignments of the last E-step, int [n] of the whole data set, by a name for each; for evaluation."""
        return {}

    def key_queue(self) -> KeyQueue | None:
        """The queue of momentum keys, which a run takes over from the checkpoint whose weights it begins with (--init);
        None for methods that have none.
        """
        return None

    # --- what is one rank's own -----------------------------------------------------------------------------------

    def own_state(self) -> dict[str, torch.Tensor]:
        """What this rank has and others do not, on the CPU: by default the batch-norm statistics, which are each
        rank's own within an epoch.

        All ranks' are gathered for the checkpoint, in every process and on a GPU through its memory: a bank of many
        gigabytes is better kept where all ranks have it.
        """
        return {name: buffer.cpu() for name, buffer in batch_norm_buffers(self)}

    def load_own(self, states: Sequence[dict[str, torch.Tensor]]) -> None:
        """Take up what `own_state` returned on each rank of the run that was saved, which may have been another
        number. By default a rank takes that of the rank with its number, or of another if there was none. It must not
        use collectives.

        Raises:
            ValueError: this number of ranks cannot go on with what those had; says so in words.
        """
        own = states[self.world.rank % len(states)]
        for name, buffer in batch_norm_buffers(self):
            buffer.copy_(own[name])

    # --- for methods ----------------------------------------------------------------------------------------------

    def encode(self, encoder: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Any:
        """The encoder's output (or that of one of its functions) for uint8 [N, H, W, 3], computed in the device's
        precision.
        """
        with autocast(images.device):
            return encoder(normalise(images, encoder_dtype(images.device)))

    def encode_by_size(
        self, encoder: Callable[[torch.Tensor], torch.Tensor], views: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """What `encode` makes of several views of one batch: [N, dim] for each of them, in their order.

        Views of one size are one batch, in their order, the sizes in that of their first views: so many passes as
        there are sizes, each with its own statistics of batch norm. Two views of one size are encoded as their
        concatenation is.

        Args:
            views: uint8 [N, size, size, 3] each, with N images and sizes of their own.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for place, view in enumerate(views):
            places.setdefault(tuple(view.shape[1:]), []).append(place)
        encoded: dict[int, torch.Tensor] = {}
        for alike in places.values():
            images = views[alike[0]] if len(alike) == 1 else torch.cat([views[place] for place in alike])
            encoded.update(zip(alike, self.encode(encoder, images).chunk(len(alike)), strict=True))
        return tuple(encoded[place] for place in range(len(views)))
