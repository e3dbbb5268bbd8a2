"""What DALI makes, against PIL and torchvision on the same images and with the same draws."""

from __future__ import annotations

import gc
import io
import itertools
import multiprocessing
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import piece, write_pieces
from PIL import Image
from torchvision.transforms.v2 import functional as F

pytest.importorskip("nvidia.dali", exc_type=ImportError)
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from pcl_fast.augmentations import AUGMENTATIONS, View, multi_crop
from pcl_fast.config import DataConfig, view_of
from pcl_fast.data import Batch, ImageSet, TrainingLoader, clustering_loader, find_images, training_loader
from pcl_fast.data.loaders import dali_decoder, dali_loader
from pcl_fast.data.loaders.dali_decoder import Decoder, is_cuda_error
from pcl_fast.data.loaders.dali_loader import centre_crops
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.sources.images import to_rgb
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError, UserError

WORLD = World(0, 1, torch.device("cpu"), None)
# Where DALI runs: with a GPU there too, held to the same reference.
BY_CPU = "cuda, decoding by the CPU"
DEVICES = ["cpu", *(["cuda", BY_CPU] if torch.cuda.is_available() else [])]


def config(kind: str, **changes) -> DataConfig:
    workers = 2 if kind == "dali" else 0
    return replace(DataConfig(size=96, resize=112, workers=workers), loader=kind, **changes)


def config_on(kind: str, device: str) -> DataConfig:
    return config(kind, decode_on="cpu" if device == BY_CPU else "gpu")


def world_of(device: str) -> World:
    return WORLD if device == "cpu" else World(0, 1, torch.device("cuda", 0), None)


def pairs(images: ImageSet, config: DataConfig, batch_size: int = 8, world: World = WORLD) -> TrainingLoader:
    views = (view_of(config),) * 2
    return training_loader(images, config, views=views, batch_size=batch_size, seed=1, world=world)


def signed(views: torch.Tensor) -> np.ndarray:
    """Bytes whose differences can be taken."""
    return views.cpu().numpy().astype(int)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    write_pieces(folder, 24)
    return find_images(folder)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("views", "limit", "most"), [("v1", 0.6, 4), ("v2", 0.6, 4), ("digits", 0.8, 8)])
def test_training_views_are_the_torchvision_loader_s(pieces, views, limit, most, device):
    """Same images and draws. What is left is the resize (DALI's edges, PIL's rounding between its two passes), which
    contrast and saturation make up to 1.4 times larger each; and where a distorted image ends, of which DALI makes a
    soft edge. A GPU decodes JPEGs not quite as libjpeg does: twice the limits.
    """
    compare(pieces, device, [view_of(config("dali", views=views))] * 2, [limit] * 2, [most] * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_several_different_views_are_the_torchvision_loader_s(pieces, device):
    """Two large views of different blurs, one of them solarised at times, a distorted one and six small ones."""
    large = replace(AUGMENTATIONS["v2"], size=96)
    always = replace(large, blur_share=1.0)
    seldom = replace(large, blur_share=0.1, solarise_share=0.2, size=80)
    distorted, small = replace(AUGMENTATIONS["digits"], size=64), replace(large, size=40, min_area=0.05)
    views = [always, distorted, seldom, *[small] * 6]
    compare(pieces, device, views, [0.6, 0.8, 0.6, *[0.6] * 6], [4, 8, 4, *[4] * 6])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("large", "small"), [(32, 14), (96, 41)])
@pytest.mark.parametrize("views", ["v2", "simclr"])
def test_small_crops_are_the_torchvision_loader_s(pieces, views, large, small, device):
    """SwAV's, of a twentieth to a seventh of the image, within the limits of two large views. But where an image is
    made smaller, DALI counts its edge several times for the outermost pixels, which are a quarter of 14 px, and PIL
    does not: they have a limit of their own, and the others a lower one.
    """
    view = replace(AUGMENTATIONS[views], size=large, min_area=0.14)
    crops = multi_crop(view, 3, size=small, areas=(0.05, 0.14))
    compare(pieces, device, [view, view, *crops], [0.6] * 5, [3] * 5, edges=14)


def test_all_views_of_an_image_come_from_one_decoding(pieces, monkeypatch):
    """However many there are, the graph has one decoder."""
    decoders, decode = [], dali_decoder._decode
    monkeypatch.setattr(dali_decoder, "_decode", lambda *given: decoders.append(given) or decode(*given))
    view = view_of(config("dali"))
    views = [view, view, *multi_crop(view, 6, areas=(0.05, 0.14))]
    loader = training_loader(pieces, config("dali"), views=views, batch_size=8, seed=1, world=WORLD)
    assert len(next(loader.epoch(0)).views) == 8
    assert len(decoders) == 1


def compare(
    images: ImageSet, device: str, views: list[View], limits: list[float], most: list[float], edges: float | None = None
) -> None:
    """An epoch of both loaders: mean differences below the limits, and only a hundredth of the bytes beyond `most`; or
    of those of the outermost pixels beyond `edges`, if that is given.
    """
    slack = 1 if device == "cpu" else 2
    loaders = [
        training_loader(images, config_on(kind, device), views=views, batch_size=8, seed=1, world=world)
        for kind, world in (("dali", world_of(device)), ("torchvision", WORLD))
    ]
    compared = 0
    for ours, theirs in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert len(ours.views) == len(theirs.views) == len(views)
        for number, (a, b) in enumerate(zip(ours.views, theirs.views, strict=True)):
            difference = np.abs(signed(a) - signed(b))
            assert difference.mean() < limits[number] * slack, number
            inner = np.full(difference.shape, edges is None)
            inner[:, 1:-1, 1:-1] = True
            assert np.quantile(difference[inner], 0.99) <= most[number] * slack + 0.01, number
            if edges is not None:
                assert np.quantile(difference[~inner], 0.99) <= edges * slack + 0.01, number
            compared += len(a)
    assert compared == 24 * len(views)


@pytest.mark.parametrize("device", DEVICES)
def test_clustering_view_is_the_torchvision_loader_s(pieces, device):
    slack = 1 if device == "cpu" else 2
    ours, theirs = (
        signed(torch.cat(list(clustering_loader(pieces, config_on(kind, device), batch_size=10, world=world))))
        for kind, world in (("dali", world_of(device)), ("torchvision", WORLD))
    )
    assert len(ours) == len(theirs) == 24
    difference = np.abs(ours - theirs)
    assert difference.mean() < 0.3 * slack
    assert np.quantile(difference[:, 2:-2, 2:-2], 1 if slack == 1 else 0.999) < 2.01 * slack


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (100, 333), (77, 41), (256, 256), (2000, 31)], ids=str)
def test_centre_crops_are_placed_as_torchvision_s(size):
    """A picture of its own coordinates tells where the crop came from."""
    begin, end = centre_crops(np.array([size]), 40, 32)
    image = F.resize(Image.new("RGB", size[::-1]), [40])
    coordinates = torch.from_numpy(np.indices((image.height, image.width)))
    crop = F.center_crop(coordinates, [32])
    scale = np.array(size) / (image.height, image.width)
    np.testing.assert_allclose(begin[0], crop[:, 0, 0].numpy() * scale, rtol=1e-6)
    np.testing.assert_allclose(end[0], (crop[:, -1, -1].numpy() + 1) * scale, rtol=1e-6)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bits(grey: np.ndarray) -> bytes:
    return saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


SQUARE = piece(0, 48, 48)
FILES = {
    "jpg": saved(SQUARE, "JPEG", quality=90),
    "progressive.jpg": saved(SQUARE, "JPEG", progressive=True),
    "full_colour.jpg": saved(SQUARE, "JPEG", subsampling=0),
    "turned.jpg": saved(SQUARE, "JPEG", exif=turned()),
    "grey.jpg": saved(SQUARE.convert("L"), "JPEG"),
    "cmyk.jpg": saved(SQUARE.convert("CMYK"), "JPEG"),
    "png": saved(SQUARE, "PNG"),
    "named.jpg": saved(SQUARE, "PNG"),
    "grey.png": saved(SQUARE.convert("L"), "PNG"),
    "bits.png": saved(SQUARE.convert("1"), "PNG"),
    "palette.png": saved(SQUARE.convert("P"), "PNG"),
    "transparent_palette.png": saved(SQUARE.convert("P"), "PNG", transparency=3),
    "alpha.png": saved(Image.merge("RGBA", [*SQUARE.split(), SQUARE.convert("L")]), "PNG"),
    "grey_alpha.png": saved(SQUARE.convert("LA"), "PNG"),
    "16bit.png": sixteen_bits(np.array(SQUARE.convert("L"))),
    "webp": saved(SQUARE, "WEBP"),
    "alpha.webp": saved(Image.merge("RGBA", [*SQUARE.split(), SQUARE.convert("L")]), "WEBP", lossless=True),
    "gif": saved(SQUARE.convert("P"), "GIF"),
    "tif": saved(SQUARE, "TIFF"),
    "bmp": saved(SQUARE, "BMP"),
}


def test_every_kind_of_file_is_decoded_as_pil_does(tmp_path):
    for name, data in FILES.items():
        (tmp_path / (name if "." in name else f"x.{name}")).write_bytes(data)
    images = find_images(tmp_path)
    loader = clustering_loader(images, config("dali", size=48, resize=48), batch_size=7, world=WORLD)
    decoded = torch.cat(list(loader)).numpy()
    assert len(decoded) == len(FILES)
    for index, ours in enumerate(decoded):
        expected = np.array(images.read(index))
        assert np.array_equal(ours, expected), images.name(index)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.arange(256).reshape(16, 16)
    with Image.open(io.BytesIO(sixteen_bits(grey))) as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.array(to_rgb(image))[:, :, 0], grey)
    fine = Image.fromarray(np.array([[0, 128, 129, 385, 386, 65535]], dtype=np.uint16))
    assert np.array(to_rgb(fine))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU, which can be late when a batch is overwritten")
def test_a_gpu_s_batches_live_as_long_as_they_are_used(pieces):
    """Kept while later ones are made, and while the GPU is late; an epoch that was left early before."""
    training = pairs(pieces, config("dali"), batch_size=4, world=world_of("cuda"))
    expected = [batch.views[0].cpu() for batch in training.epoch(0)]
    early = training.epoch(1)
    next(early)
    early.close()
    kept = []
    for batch in training.epoch(0):
        torch.cuda._sleep(10**8)
        kept.append(batch.views[0].clone())
        kept.append(batch.views[0])
    for number, view in enumerate(kept):
        assert torch.equal(view.cpu(), expected[number // 2])


def test_a_loader_makes_one_epoch_at_a_time(pieces):
    training = pairs(pieces, config("dali"))
    first = training.epoch(0)
    next(first)
    with pytest.raises(RuntimeError, match="one epoch at a time"):
        next(training.epoch(1))
    assert len(list(first)) == 2
    assert len(list(training.epoch(1))) == 3


@pytest.mark.parametrize("decode_on", ["gpu", "cpu"])
def test_with_a_gpu_the_views_are_made_on_it(decode_on):
    """The graph alone; to run it takes a GPU."""
    resources = Resources(4, 2, torch.device("cuda", 0), 16, decode_on)
    with Pipeline(batch_size=8, num_threads=4, device_id=0):
        encoded, corner, extent, begin, end, matrix = fn.external_source(
            source=lambda: None,
            num_outputs=6,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.FLOAT],
            ndim=[1, 1, 1, 1, 1, 2],
        )
        decoded = dali_decoder._decode(encoded, resources)
        views = [
            dali_loader._view(decoded, corner, extent, begin, end, matrix, size=64),
            *dali_loader._centre_crop(decoded, begin, end, size=64),
        ]
    assert encoded.device == corner.device == "cpu"
    assert {node.device for node in (decoded, *views)} == {"gpu"}


def test_dali_that_does_not_run_says_what_to_do(pieces, monkeypatch):
    def refuse(self):
        raise RuntimeError("this driver is too old")

    monkeypatch.setattr(Pipeline, "build", refuse)
    with pytest.raises(UserError, match=r"use --data.loader torchvision. It says: this driver is too old"):
        pairs(pieces, config("dali"))


def test_a_forked_process_collects_no_pipeline(pieces):
    """It would wait for the pipeline's threads, for ever."""
    list(pairs(pieces, config("dali")).epoch(0))
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start()
    child.join(20)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert child.exitcode == 0


def test_a_wrong_pipeline_is_told_from_a_broken_image(pieces, monkeypatch):
    """What PIL can read and DALI cannot is said to be so."""
    monkeypatch.setattr(dali_decoder, "for_dali", lambda images, index: (np.zeros(9, np.uint8), 90, 90))
    training = pairs(pieces, config("dali"))
    with pytest.raises(ImageError, match=r"which PIL can read; --data.loader torchvision"):
        next(training.epoch(0))


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 3}])
def test_batches_that_a_gpu_fails_to_decode_are_decoded_on_the_cpu(pieces, monkeypatch, failing):
    """The same batches come in the same order; only without a GPU they are the same bytes too."""
    expected = list(pairs(pieces, config("dali")).epoch(0))
    training, asked = pairs(pieces, config("dali")), itertools.count()
    share = Pipeline.share_outputs

    def fail(self, **options):
        if self is training._decoder._pipeline and next(asked) in failing:
            raise RuntimeError("nvJPEG error (3): Bad jpeg")
        return share(self, **options)

    monkeypatch.setattr(dali_decoder, "decodes_on_gpu", lambda resources: True)
    monkeypatch.setattr(Pipeline, "share_outputs", fail)
    with pytest.warns(UserWarning, match=r"failed to decode on the GPU \(nvJPEG error .*; \d batches .* so far"):
        batches = [Batch(tuple(view.clone() for view in batch.views), batch.index) for batch in training.epoch(0)]
    assert 1 <= training._decoder.on_cpu <= 3
    assert [batch.index.tolist() for batch in batches] == [batch.index.tolist() for batch in expected]
    for batch, known in zip(batches, expected, strict=True):
        assert all(torch.equal(*views) for views in zip(batch.views, known.views, strict=True))
    with warnings.catch_warnings():  # the next epoch is the GPU's again
        warnings.simplefilter("error")
        monkeypatch.setattr(Pipeline, "share_outputs", share)
        assert len(list(training.epoch(1))) == len(expected)


def test_a_broken_image_is_not_decoded_twice(pieces, monkeypatch):
    monkeypatch.setattr(dali_decoder, "decodes_on_gpu", lambda resources: True)
    monkeypatch.setattr(Decoder, "_broken", lambda self, indices: ["that image"])
    raised = raised_while_awaiting(pieces, RuntimeError("nvJPEG error"), monkeypatch)
    assert "cannot be decoded, the first: that image" in str(raised)


ILLEGAL_ADDRESS = """Critical error in pipeline:
Error in MIXED operator `nvidia.dali.fn.decoders.image`,
encountered:

CUDA runtime API error cudaErrorIllegalAddress (700):
an illegal memory access was encountered"""
CUDA_ERRORS = [
    RuntimeError(ILLEGAL_ADDRESS),
    RuntimeError("[/opt/dali/dali/core/mm/cuda_vm_resource.cc:45] CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):"),
    RuntimeError("CUDA allocation failed"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    *([torch.AcceleratorError("unspecified launch failure")] if hasattr(torch, "AcceleratorError") else []),
]
OTHER_ERRORS = [
    RuntimeError("Critical error in pipeline:\nnvJPEG error (3): Bad jpeg"),
    RuntimeError("Failed to decode a JPEG on a CUDA device"),
]


def raised_while_awaiting(images: ImageSet, error: RuntimeError, monkeypatch) -> RuntimeError:
    """What a loader raises when DALI raises `error` instead of the second batch."""
    batches = pairs(images, config("dali")).epoch(0)
    next(batches)

    def fail(self, **options):
        raise error

    monkeypatch.setattr(Pipeline, "share_outputs", fail)
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    return caught.value


@pytest.mark.parametrize("error", CUDA_ERRORS, ids=lambda error: str(error)[-20:])
def test_what_cuda_raises_is_not_the_images_fault(pieces, monkeypatch, error):
    assert is_cuda_error(error)
    assert raised_while_awaiting(pieces, error, monkeypatch) is error


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=lambda error: str(error)[-20:])
def test_what_else_dali_raises_is_the_images_fault(pieces, monkeypatch, error):
    assert not is_cuda_error(error)
    raised = raised_while_awaiting(pieces, error, monkeypatch)
    assert isinstance(raised, ImageError)
    assert raised.__cause__ is error
