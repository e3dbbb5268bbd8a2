"""Whether a run can have the small crops that are asked of it: said before it begins, by the flag that asks."""

from __future__ import annotations

from pcl_fast.config import Config
from pcl_fast.crop_sizes import epoch_sides
from pcl_fast.nn.timm_network import check_image_sizes


def check_crop_size(flag: str, size: int, config: Config) -> None:
    """Refuse crops beside those of --data.size that are larger than these or have no pixel, or that the encoder does
    not take, at any of the sizes that they have over the epochs (--data.sizes). A method calls it in its `check`.

    Args:
        flag: what gives the size on the command line.
        size: the crops' side in pixels, where the others have --data.size; what multi_crop takes by itself too.

    Raises:
        ValueError: names the flag, the size and what stands against it.
        MissingPackageError: the architecture is timm's, which is not installed.
    """
    data = config.data
    if not 1 <= size <= data.size:
        raise ValueError(
            f"{flag} {size}: small crops have between 1 px and those of the large ones, --data.size {data.size}"
        )
    try:
        check_image_sizes(config.model.arch, epoch_sides(data.sizes, data.size, [size]), flag)
    except ValueError as error:
        raise ValueError(f"{flag} {size}: {error}") from error
