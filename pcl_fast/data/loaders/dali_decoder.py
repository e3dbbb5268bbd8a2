"""Reading and decoding batches of images with DALI, several at a time.

A batch passes three stages, each at the same time as other batches pass the others: its files are read by threads here,
decoded and cropped by DALI's threads and streams, and finished by whoever asks for it.

A decoder on a GPU can fail with images that are whole. The batches that it was given then are decoded on the CPU.
"""

from __future__ import annotations

import gc
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.sources.images import ImageSet, open_image, to_rgb
from pcl_fast.data.sources.jpeg import jpeg_size
from pcl_fast.errors import ImageError, UserError

# A job of a thread reads so many images: few enough to spread a batch over the threads, enough that jobs cost nothing.
_CHUNK = 8

# These DALI decodes as PIL does, on a CPU byte for byte (it rounds the 16-bit colours that PIL cuts off). Anything else
# (CMYK, 16-bit grey, GIF, ...) is rare and left to PIL.
_FORMATS, _MODES = ("JPEG", "PNG", "WEBP"), ("RGB", "L", "P", "RGBA")

# What CUDA's errors are called by DALI (the first three, behind the operator that met them) and by PyTorch.
_CUDA_ERRORS = (
    "CUDA runtime API error", "CUDA driver API error", "CUDA allocation failed",
    "CUDA error", "CUDA driver error", "CUDA out of memory", "cudaError",
)  # fmt: skip


# A forked process must not collect its parent's pipelines: it would wait for threads that only the parent has.
os.register_at_fork(after_in_child=gc.freeze)


class Input(NamedTuple):
    """An input of a graph is one array for every image, of this type and number of dimensions."""

    dtype: types.DALIDataType
    ndim: int = 1


_ENCODED = Input(types.UINT8)


class Read(NamedTuple):
    """A batch as it is read: index int64 [n], the images' bytes, and sizes int64 [n, 2] (heights and widths)."""

    index: np.ndarray
    encoded: list[np.ndarray]
    sizes: np.ndarray


class Decoder:
    """A decoder reads batches of images and sends them through a DALI graph, several at a time.

    on_cpu: how many batches the GPU's decoder has failed to decode so far, which the CPU then has decoded.
    """

    def __init__(
        self,
        images: ImageSet,
        inputs: Sequence[Input],
        graph: Callable[..., list[types.DataNode]],
        batch_size: int,
        resources: Resources,
    ):
        """Build the graph and start the threads.

        Args:
            images: the data set.
            inputs: what the graph takes besides the images.
            graph: is called once, with a node for the decoded images and one for each of `inputs`, and returns the
                nodes of what `run` is to yield.
            batch_size: most images in a batch.
            resources: threads, GPU and batches ahead.

        Raises:
            UserError: DALI does not run on this machine.
        """
        self.images, self.resources = images, resources
        self._readers = ThreadPoolExecutor(resources.threads, thread_name_prefix="read")
        self._running = self._failed = False
        self._waiting: Iterator[np.ndarray] = iter(())
        self._describe: Callable[[Read], tuple[np.ndarray, ...]] = lambda read: ()
        self._reading: deque[tuple[np.ndarray, list[Future]]] = deque()
        # DALI reads its inputs where these lie; and should it fail, they tell which images were under way.
        self._decoding: deque[tuple[Read, tuple[np.ndarray, ...]]] = deque()
        self._inputs, self._graph, self._batch_size = [_ENCODED, *inputs], graph, batch_size
        self._pipeline = self._build(resources, self._next)
        self.on_cpu = 0

    def run(
        self, batches: Iterable[np.ndarray], describe: Callable[[Read], tuple[np.ndarray, ...]]
    ) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """Yield (indices, the graph's outputs, each uint8 [n, h, w, 3]) for every batch of indices, in order.

        Args:
            batches: positions in the data set, int64 [n] each.
            describe: returns the graph's inputs besides the images; it is called once per batch, in order.

        Raises:
            ImageError: images cannot be read or decoded; names them.
            RuntimeError: an epoch is under way already, or CUDA failed, here or in work that was launched before.
        """
        if self._running:
            raise RuntimeError("a loader makes one epoch at a time; close the iterator that is under way")
        if self._failed:
            self._pipeline, self._failed = self._build(self.resources, self._next), False
        self._waiting, self._describe, self._running = iter(batches), describe, True
        try:
            self._pipeline.schedule_run()  # as many as `prefetch` for a start
            while True:
                try:
                    outputs = _outputs(self._pipeline, self.resources.gpu)
                except RuntimeError as error:
                    yield from self._decoded_on_cpu(error)
                    self._pipeline.schedule_run()
                    continue
                if outputs is None:
                    return
                index = self._decoding.popleft()[0].index
                self._pipeline.schedule_run()
                yield index, outputs
        finally:
            self._empty()

    def _next(self) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        """Hand the next batch to DALI, which calls this when it is ready for one."""
        self._read_ahead()
        if not self._reading:
            raise StopIteration
        read = _collect(*self._reading.popleft())
        self._decoding.append((read, self._describe(read)))
        self._read_ahead()
        return read.encoded, *self._decoding[-1][1]

    def _read_ahead(self) -> None:
        while len(self._reading) < self.resources.prefetch and (index := next(self._waiting, None)) is not None:
            chunks = (index[begin : begin + _CHUNK].tolist() for begin in range(0, len(index), _CHUNK))
            self._reading.append((index, [self._readers.submit(self._read, chunk) for chunk in chunks]))

    def _read(self, indices: list[int]) -> list[tuple[np.ndarray, int, int]]:
        return [for_dali(self.images, index) for index in indices]

    def _decoded_on_cpu(self, error: RuntimeError) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """Yield what `run` does for all batches that were under way when the GPU's decoder raised `error`, and begin
        anew with the GPU: DALI does not go on after an error, nor does it tell at which batch it was.

        Raises:
            ImageError: an image is broken, or the CPU's decoder fails too.
            RuntimeError: `error`, if CUDA raised it.
        """
        if is_cuda_error(error):
            raise error
        held = list(self._decoding)
        if not held:
            raise error
        indices = np.concatenate([read.index for read, _ in held]).tolist()
        if not decodes_on_gpu(self.resources) or self._broken(indices):
            raise ImageError(self._explain(indices, str(error))) from error
        self.on_cpu += len(held)
        message = " ".join(str(error).split())[:300]
        warnings.warn(
            f"DALI failed to decode on the GPU ({message}); {len(held)} batches under way are decoded on the CPU "
            f"instead, {self.on_cpu} so far",
            stacklevel=2,
        )
        given = iter([(read.encoded, *arrays) for read, arrays in held])
        pipeline = self._build(replace(self.resources, gpu=None), lambda: next(given))
        self._pipeline = self._build(self.resources, self._next)
        self._decoding.clear()
        pipeline.schedule_run()
        for read, _ in held:
            try:
                outputs = _outputs(pipeline, None)
            except RuntimeError as fault:
                raise ImageError(self._explain(indices, str(fault))) from fault
            # Their memory is used again for the next batch.
            moved = [
                tensor.clone() if self.resources.gpu is None else tensor.to(self.resources.gpu) for tensor in outputs
            ]
            pipeline.schedule_run()
            yield read.index, moved

    def _empty(self) -> None:
        """Drop what is under way, after an epoch that is finished or not, to be ready for the next."""
        self._waiting = iter(())
        for _, jobs in self._reading:
            for job in jobs:
                job.cancel()
        self._reading.clear()
        try:
            self._pipeline.schedule_run()  # finds no more batches
            while _outputs(self._pipeline, self.resources.gpu) is not None:
                pass
            self._pipeline.reset()
        except RuntimeError:  # by a pipeline that has failed for good
            self._failed = True
        self._decoding.clear()
        self._running = False

    def _build(self, resources: Resources, source: Callable[[], tuple]) -> Pipeline:
        """Build DALI's pipeline: inputs, which `source` hands over, decoder and graph.

        Raises:
            UserError: DALI cannot use the GPU, because the driver or the GPU is too old for it, say.
        """
        gpu, inputs = resources.gpu, self._inputs
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=resources.threads,
            device_id=None if gpu is None else gpu.index,
            prefetch_queue_depth=resources.prefetch,
        )
        with pipeline:
            encoded, *others = fn.external_source(
                source=source,
                num_outputs=len(inputs),
                dtype=[kind.dtype for kind in inputs],
                ndim=[kind.ndim for kind in inputs],
                batch=True,
                no_copy=True,
            )
            pipeline.set_outputs(*self._graph(_decode(encoded, resources), *others))
        try:
            pipeline.build()
        except RuntimeError as error:
            raise UserError(f"DALI does not run here; use --data.loader torchvision. It says: {error}") from error
        return pipeline

    def _broken(self, indices: list[int]) -> list[str]:
        """Return what is wrong with those of these images that cannot be decoded."""
        faults = []
        for index in indices:
            try:
                self.images.read(index)
            except ImageError as error:
                faults.append(str(error))
        return faults

    def _explain(self, indices: list[int], message: str) -> str:
        """Say why DALI failed with these images under way. It does not tell at which it failed."""
        if faults := self._broken(indices):
            return f"{len(faults)} of the next {len(indices)} images cannot be decoded, the first: {faults[0]}"
        names = ", ".join(self.images.name(index) for index in indices[:3])
        return (
            f"DALI failed with the images {names}, ... ({len(indices)} in all), which PIL can read; "
            f"--data.loader torchvision does not need it. DALI said: {message}"
        )


def _outputs(pipeline: Pipeline, gpu: torch.device | None) -> list[torch.Tensor] | None:
    """Return the oldest batch's outputs, in the memory that DALI wrote them to, or None after the last batch.

    They are ordered on the current stream, and so is the return of their memory.
    """
    stream = None if gpu is None else torch.cuda.current_stream(gpu)
    try:
        outputs = pipeline.share_outputs(cuda_stream=stream)
    except StopIteration:
        return None
    tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    pipeline.release_outputs()
    return tensors


def decodes_on_gpu(resources: Resources) -> bool:
    """Return whether there is a GPU's decoder in use, which the CPU's can stand in for."""
    return resources.decodes_on_gpu


def is_cuda_error(error: RuntimeError) -> bool:
    """Tell whether CUDA raised this, through DALI or through PyTorch, so that no image is to blame.

    A kernel's failure is reported by whatever call comes next, and the loader's are among these.
    """
    accelerator_error = getattr(torch, "AcceleratorError", ())  # which PyTorch 2.5 does not have yet
    return isinstance(error, accelerator_error) or any(mark in str(error) for mark in _CUDA_ERRORS)


def for_dali(images: ImageSet, index: int) -> tuple[np.ndarray, int, int]:
    """Return (bytes that DALI decodes as PIL does, height, width) of an image.

    Raises:
        ImageError: the image cannot be read or is none; names it.
    """
    data = images.encoded(index)
    size, most = jpeg_size(data), Image.MAX_IMAGE_PIXELS
    if size is not None and (most is None or size[0] * size[1] <= most):  # of larger ones PIL warns
        return np.frombuffer(data, np.uint8), *size
    try:
        with open_image(io.BytesIO(data)) as image:
            if image.format not in _FORMATS or image.mode not in _MODES:
                buffer = io.BytesIO()
                to_rgb(image).save(buffer, "PPM")
                data = buffer.getvalue()
            width, height = image.size
    except Exception as error:  # PIL's plugins raise whatever their parsers run into
        raise images.fault(index, error) from error
    return np.frombuffer(data, np.uint8), height, width


def _collect(index: np.ndarray, jobs: list[Future]) -> Read:
    found = [image for job in jobs for image in job.result()]
    return Read(index, [data for data, _, _ in found], np.array([size for _, *size in found], dtype=np.int64))


def _decode(encoded: types.DataNode, resources: Resources) -> types.DataNode:
    """Decode to RGB as PIL's convert("RGB") does, and leave EXIF's orientation alone."""
    options = {"output_type": types.RGB, "adjust_orientation": False}
    if not resources.decodes_on_gpu:
        decoded = fn.decoders.image(encoded, device="cpu", **options)
        return decoded if resources.gpu is None else decoded.gpu()
    return fn.decoders.image(
        encoded,
        device="mixed",
        jpeg_fancy_upsampling=True,  # as libjpeg does
        device_memory_padding=resources.decoder_mib * 2**20,
        host_memory_padding=resources.decoder_mib * 2**19,
        **options,
    )
