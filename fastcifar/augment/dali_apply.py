"""The NVIDIA DALI applier: one pipeline, the same for a CPU and a GPU, that runs ahead of the training on its own threads or stream."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Params
from fastcifar.errors import ConfigError

CPU_THREADS = 2


class DaliApplier:
    """Carries out `Params` as one `warp_affine`; arguments as in `TorchApplier`.

    All randomness is in the parameters, so DALI keeps no state. Float32 and float16 are normalised by DALI; it has no bfloat16, so that
    dtype is normalised by torch.

    Raises:
        ConfigError: DALI is not installed.
    """

    def __init__(
        self, shape: tuple[int, int], chunk_size: int, dtype: torch.dtype, normalization: Normalization, device: torch.device
    ) -> None:
        self.width, self.dtype, self.normalization, self.device = shape[1], dtype, normalization, device
        self.in_dali = dtype in (torch.float32, torch.float16)
        self.pipeline = build_pipeline(chunk_size, dtype if self.in_dali else torch.uint8, normalization, device)
        self.held: tuple[Tensor, Tensor] | None = None

    def submit(self, images: Tensor, params: Params) -> None:
        """Start on a chunk: uint8 (N, H, W, 3) and its parameters. On a CPU the chunk is read in place until `collect`."""
        matrix = params.matrix(self.width)
        if self.device.type == "cuda":
            matrix = matrix.pin_memory().to(self.device, non_blocking=True)
        self.held = images, matrix
        for name, tensor in (("images", images), ("matrix", matrix)):
            self.pipeline.feed_input(name, tensor if tensor.is_cuda else tensor.numpy())
        self.pipeline.schedule_run()

    def collect(self) -> Tensor:
        """The chunk submitted last: (N, 3, H, W) in channels_last, in memory of its own (DALI reuses what it hands out)."""
        stream = (torch.cuda.current_stream(self.device),) if self.device.type == "cuda" else ()
        chunk = torch.from_dlpack(self.pipeline.outputs(*stream)[0].as_tensor())
        self.held = None
        return chunk.permute(0, 3, 1, 2).clone() if self.in_dali else self.normalization(chunk.clone(), self.dtype)


def build_pipeline(chunk_size: int, dtype: torch.dtype, normalization: Normalization, device: torch.device):
    """A built `nvidia.dali.Pipeline`: uint8 NHWC images and (N, 2, 3) matrices -> NHWC images of `dtype`.

    Nearest neighbour is exact for the maps that `Params` holds. On a GPU the inputs are copied: with `no_copy=True` DALI would not wait for
    the kernels that are still writing them.
    """
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise ConfigError(
            f"the loader dali needs NVIDIA DALI, which cannot be imported ({error}); install nvidia-dali-cuda130 or choose --loader torch."
        ) from error

    kind = "gpu" if device.type == "cuda" else "cpu"
    if kind == "gpu":
        torch.cuda.set_device(device)
    pipeline = Pipeline(
        batch_size=chunk_size,
        num_threads=CPU_THREADS,
        device_id=(device.index or 0) if kind == "gpu" else None,
        prefetch_queue_depth=1,
    )
    with pipeline:
        copying = {"batch": True, "no_copy": kind == "cpu"}
        images = fn.external_source(name="images", device=kind, dtype=types.UINT8, layout="HWC", **copying)
        matrix = fn.external_source(name="matrix", device=kind, dtype=types.FLOAT, ndim=2, **copying)
        images = fn.warp_affine(images, matrix, interp_type=types.INTERP_NN, fill_value=0)
        if dtype != torch.uint8:
            images = fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT16 if dtype == torch.float16 else types.FLOAT,
                output_layout="HWC",
                mean=[255 * mean for mean in normalization.mean],
                std=[255 * std for std in normalization.std],
            )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline
