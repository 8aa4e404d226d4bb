"""The NVIDIA DALI applier: a fixed graph, the same for a CPU and a GPU, that runs ahead of the training on its own threads or stream.

What DALI does, and how near it comes to PIL: warps by nearest neighbour with a constant or clamped border, and erasing, to the last bit;
greyscale within one grey level; of the automatic operations brightness within one, colour within two.
What is handed to torch, through DLPack, since DALI's definition differs or it has none: warps with reflected or coloured borders or
bilinear interpolation, the geometric automatic operations, equalize (DALI has OpenCV's formula), sharpness (it differs at the
border), contrast (DALI wants the mean grey level on the CPU, which would wait for a GPU), autocontrast, invert, posterize, solarize; and
normalisation to bfloat16, which DALI does not know.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcifar.augment.automatic import Operation
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Policy
from fastcifar.augment.sampling import Params, Slot
from fastcifar.augment.torch_apply import Colour, TorchApplier
from fastcifar.errors import ConfigError
from fastcifar.kernels.augment import ONE, normalize_reference

if TYPE_CHECKING:
    from fastcifar.data.image_set import ImageSet

CPU_THREADS = 2
NORMALIZED = (torch.float32, torch.float16)
"""Dtypes that DALI normalises to."""
DENSE_CALLS = {Operation.BRIGHTNESS: "brightness", Operation.COLOR: "saturation"}
"""Automatic operations that DALI carries out over a group at once, and its names for them."""


class DaliApplier(TorchApplier):
    """As `TorchApplier`. All randomness is in the parameters, so DALI keeps no state.

    Raises:
        ConfigError: DALI is not installed.
    """

    def __init__(self, dataset: ImageSet, policy: Policy, normalization: Normalization, dtype: torch.dtype, chunk_size: int) -> None:
        super().__init__(dataset, policy, normalization, dtype, chunk_size)
        self.device = self.images.device
        how = self.resampling
        grey_border = how.fill == "constant" and len(set(how.colour)) == 1
        self.dali_warps = policy.warps and not how.bilinear and (grey_border or how.fill == "clamp")
        border = how.colour[0] if grey_border else None
        ending = {"grey": policy.greyscale > 0, "erase": self.erase_colour if policy.erase else None}
        ending["normalization"] = normalization if dtype in NORMALIZED else None
        first = {"warp": self.dali_warps, "border": border, **({} if policy.automatic else ending)}
        self.first = Graph.build(self.device, chunk_size, dtype, **first)
        self.last = Graph.build(self.device, chunk_size, dtype, **ending) if policy.automatic else None
        self.under_way: Params | None = None

    def submit(self, index: Tensor, params: Params) -> None:
        warp = None if self.dali_warps else params.warp
        self.first.start(self.one_pass(self.images, index, warp, self.resampling, None), params)
        self.under_way = params

    def collect(self) -> Tensor:
        params, self.under_way = self.under_way, None
        assert params is not None, "collect() without submit()"
        images = self.first.finish()
        for slot in params.slots:
            images = self.apply_slot(images, slot)
        if self.last is not None:
            self.last.start(images, params)
            images = self.last.finish()
        if images.dtype != self.dtype:
            images = normalize_reference(images, self.scale, self.offset, self.dtype)
        return images.permute(0, 3, 1, 2)

    def apply_group(self, images: Tensor, members: Tensor, operation: Operation, slot: Slot) -> Tensor:
        if operation not in DENSE_CALLS:
            return super().apply_group(images, members, operation, slot)
        group = images.index_select(0, members.to(self.device, non_blocking=True))
        return dense_call(DENSE_CALLS[operation], group, slot.value[members].float())


@dataclass(frozen=True)
class Graph:
    """A built pipeline and the inputs that it has."""

    pipeline: Any
    inputs: tuple[str, ...]
    device: torch.device
    held: list[Any]
    """What DALI reads in place until the output is taken."""

    @staticmethod
    def build(
        device: torch.device,
        chunk_size: int,
        dtype: torch.dtype,
        *,
        warp: bool = False,
        border: int | None = None,
        grey: bool = False,
        erase: Colour | None = None,
        normalization: Normalization | None = None,
    ) -> Graph:
        """uint8 NHWC images -> warped (over the grey level `border`, or clamped where it is None), greyed, erased, normalised to `dtype`.

        On a GPU the inputs are copied: with `no_copy=True` DALI would not wait for the kernels that are still writing them.
        """
        Pipeline, fn, types = import_dali()
        kind = "gpu" if device.type == "cuda" else "cpu"
        pipeline = Pipeline(chunk_size, CPU_THREADS, device.index if kind == "gpu" else None, prefetch_queue_depth=1)
        inputs = []

        def source(name: str, dimensions: int, where: str) -> Any:
            inputs.append(name)
            return fn.external_source(name=name, device=where, dtype=types.FLOAT, ndim=dimensions, batch=True, no_copy=where == "cpu")

        with pipeline:
            inputs.append("images")
            images = fn.external_source(name="images", device=kind, dtype=types.UINT8, layout="HWC", batch=True, no_copy=kind == "cpu")
            if warp:
                fill = {} if border is None else {"fill_value": border}
                images = fn.warp_affine(images, source("matrix", 2, kind), interp_type=types.INTERP_NN, **fill)
            if grey:
                images = fn.saturation(images, saturation=source("saturation", 0, "cpu"))
            if erase is not None:
                images = fn.erase(
                    images, anchor=source("anchor", 1, "cpu"), shape=source("shape", 1, "cpu"), axis_names="HW", fill_value=list(erase)
                )
            if normalization is not None:
                images = fn.crop_mirror_normalize(
                    images,
                    dtype=types.FLOAT16 if dtype == torch.float16 else types.FLOAT,
                    output_layout="HWC",
                    mean=[255 * mean for mean in normalization.mean],
                    std=[255 * std for std in normalization.std],
                )
            pipeline.set_outputs(images)
        pipeline.build()
        return Graph(pipeline, tuple(inputs), device, [])

    def start(self, images: Tensor, params: Params) -> None:
        """Schedules a chunk: uint8 (N, H, W, 3) on the device."""
        for name in self.inputs:
            tensor = images if name == "images" else INPUTS[name](params).contiguous()
            if name == "matrix" and self.device.type == "cuda":
                tensor = tensor.pin_memory().to(self.device, non_blocking=True)
            self.held.append(tensor if tensor.is_cuda else tensor.numpy())
            self.pipeline.feed_input(name, self.held[-1])
        self.pipeline.schedule_run()

    def finish(self) -> Tensor:
        """The chunk scheduled last, (N, H, W, 3), in memory of its own, since DALI reuses what it hands out."""
        stream = (torch.cuda.current_stream(self.device),) if self.device.type == "cuda" else ()
        chunk = torch.from_dlpack(self.pipeline.outputs(*stream)[0].as_tensor()).clone()
        self.held.clear()
        return chunk


INPUTS = {
    "matrix": lambda params: affine(params.warp),
    "saturation": lambda params: (~params.grey).float(),
    "anchor": lambda params: params.boxes[:, :, :2].flatten(1).float(),
    "shape": lambda params: (params.boxes[:, :, 2:] - params.boxes[:, :, :2]).flatten(1).float(),
}
"""What a graph is fed besides the images, float32 with a row a sample."""


def affine(warp: Tensor) -> Tensor:
    """Fixed-point maps as DALI has them, with corner-based coordinates: int32 (N, 6) -> float32 (N, 2, 3).

    Half of the last bit is added: it keeps every position away from the borders between pixels, where DALI's float32 could fall to the
    other side.
    """
    matrix = warp.double().view(-1, 2, 3)
    matrix[:, :, 2] += 0.5 - 0.5 * (matrix[:, :, 0] + matrix[:, :, 1])
    return (matrix / ONE).float()


def dense_call(name: str, images: Tensor, values: Tensor) -> Tensor:
    """One operator of DALI's dynamic mode over uint8 (N, H, W, 3), with its argument of the same name, float32 (N,) on the CPU."""
    import nvidia.dali.experimental.dynamic as dynamic

    context: AbstractContextManager = nullcontext()
    if images.is_cuda:
        context = dynamic.EvalContext(device_id=images.device.index, cuda_stream=torch.cuda.current_stream(images.device))
    with context:
        batch = dynamic.as_batch(images if images.is_cuda else images.numpy(), layout="HWC")
        changed = getattr(dynamic, name)(batch, **{name: dynamic.as_batch(values.numpy())})
        return torch.from_dlpack(dynamic.as_tensor(changed)).clone()


def why_unusable(device: torch.device) -> str | None:
    """Why DALI cannot work on `device`, in a few words, or None where it can: one image is put through it."""
    try:
        graph = Graph.build(device, 1, torch.uint8)
        graph.start(torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device=device), Params(None, (), None, None, None))
        graph.finish()
    except Exception as error:
        return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return None


def import_dali() -> tuple[Any, Any, Any]:
    """`Pipeline`, `fn` and `types`. Raises ConfigError where DALI cannot be imported."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise ConfigError(
            f"the loader dali needs NVIDIA DALI, which cannot be imported ({error}); install nvidia-dali-cuda130 or choose --loader torch."
        ) from error
    return Pipeline, fn, types
