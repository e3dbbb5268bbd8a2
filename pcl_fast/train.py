"""Pre-train an encoder by PCL, MoCo, SimCLR, ...

    torchrun --standalone --nproc-per-node=G -m pcl_fast.train PRESET --data DIR --output DIR [--flags]

Preset first, then flags that change any of its values. Running the same command again resumes.
"""

from __future__ import annotations

import json
from contextlib import ExitStack

import torch

from pcl_fast.command import command
from pcl_fast.command_line import parse_preset
from pcl_fast.config import PRESETS, Config, doubts, to_dict, validate
from pcl_fast.data import ImageSet, check_headers, open_set, usable
from pcl_fast.data.loaders.resources import pick_resources
from pcl_fast.data.sources.digits import digits_folder
from pcl_fast.distributed import World, all_or_none, check_same, connect, disconnect, main_first
from pcl_fast.files import write_whole
from pcl_fast.fitting import fit
from pcl_fast.methods import check_method
from pcl_fast.nn.precision import make_deterministic
from pcl_fast.run.launcher import end_with_launcher
from pcl_fast.run.ownership import owned
from pcl_fast.run.report import write_report
from pcl_fast.trainer import Trainer


def main() -> None:
    with command("pcl_fast.train"):
        config = parse_preset(PRESETS, prog="pcl_fast.train", description=__doc__)
        validate(config)
        check_method(config)
        end_with_launcher()
        world = connect()
        run(config, world)
        disconnect(world)


def run(config: Config, world: World) -> bool:
    """Train as `config` says, or go on with the run in config.output; False when a signal stopped it early.

    Raises:
        ValueError: something in `config` cannot work, or config.output holds another run.
        UserError: the images or the checkpoint cannot be used, a package is missing, training diverged, or another
            process uses config.output.
        OSError: config.output cannot be written.
    """
    for line in doubts(config) if world.is_main else ():
        print(f"warning: {line}", flush=True)
    images = open_images(config, world)
    config, chosen = fit(config, len(images))
    for line in chosen if world.is_main else ():
        print(line, flush=True)
    with ExitStack() as stack:
        all_or_none(lambda: stack.enter_context(owned(config.output)) if world.is_main else None, world)
        return _train(config, images, world)


def _train(config: Config, images: ImageSet, world: World) -> bool:
    # By time it may choose otherwise from run to run.
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        make_deterministic()
    trainer = Trainer(config, images, world)
    all_or_none(lambda: _write_config(config) if world.is_main else None, world)
    finished = trainer.fit()
    if finished and world.is_main:
        print(f"report: {write_report(config.output, trainer.method.metrics)}")
    return finished


def _write_config(config: Config) -> None:
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_whole(config.output / "config.json", lambda file: file.write(text.encode()))


def open_images(config: Config, world: World) -> ImageSet:
    """The images of config.data.root, looked at as far as that is cheap, or left out if they are broken and may be; the
    demo's own where none are given.
    """
    data = config.data
    if data.root is None and config.preset != "demo":
        raise ValueError("--data is missing: the folder of class folders, of images, or of tar shards to train on")

    def find() -> ImageSet:
        root, apart_from = (data.root, config.output) if data.root else (digits_folder(), None)
        return open_set(root, data.format, strict=not data.skip_broken, apart_from=apart_from)

    images = main_first(find, world)
    if world.is_main:
        print(f"training on {images.describe()}", flush=True)
    advice = "--data must hold the same images on every machine"
    check_same("the data set that they find", images.fingerprint(), world, advice=advice)
    if not data.skip_broken:
        lines = all_or_none(lambda: check_headers(images, world.rank, world.size), world)
        for line in lines if world.is_main else ():
            print(line, flush=True)
        return images
    if world.is_main:
        print(f"looking for broken images among {len(images)}", flush=True)
    record = config.output / "broken.json"
    images, broken = usable(images, record, world, threads=pick_resources(data, world.device).threads)
    if world.is_main and broken:
        print(f"{broken} images cannot be decoded and are left out; {record} names them", flush=True)
    return images


if __name__ == "__main__":
    main()
