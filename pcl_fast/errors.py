"""Errors that a user can mend. Their messages say what was wrong and what to do; a stack trace would hide that."""

from __future__ import annotations


class UserError(RuntimeError):
    """Something outside the program is not as it must be: images, a checkpoint, an installed package, the recipe."""


class ImageError(UserError):
    """An image, or a folder of images, that cannot be used; names it."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read; names it."""


class DamagedError(CheckpointError):
    """A checkpoint that a fault of the disk has spoiled, as far as one can tell; not one of something else."""


class MissingPackageError(UserError):
    """A package that this choice needs is not installed."""


class NonFiniteError(UserError):
    """The loss or a gradient became NaN or infinite; names the images of the batch."""


# What to do about it.
DIVERGED = (
    "A run that diverges can go on from an earlier checkpoint with a smaller learning rate: --resume-from CHECKPOINT "
    "--output NEW --optim.lr LESS"
)
