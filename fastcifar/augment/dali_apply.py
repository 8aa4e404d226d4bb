"""The NVIDIA DALI applier: fixed graphs for CPU or GPU, the first of which runs ahead of training on its own stream.

DALI carries out the warp by nearest neighbour over a constant grey or clamped border, greyscale, erasing, every
automatic operation but equalize, all equal to PIL to the last bit, and normalisation to float32 and float16. It has no
bfloat16, no reflected or coloured border, and other definitions of bilinear interpolation and equalize: these are left
to `kernels.augment` and `colour`, and so are intensities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcifar.augment.automatic import Operation
from fastcifar.augment.dali_colour import WITH_VALUE, WITHOUT_VALUE, Colours, Node
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Policy
from fastcifar.augment.sampling import Params, Slot, automatic_table
from fastcifar.augment.torch_apply import Colour, Group, TritonApplier, grouped
from fastcifar.checks import given
from fastcifar.errors import ConfigError, reason
from fastcifar.kernels.transfer import upload
from fastcifar.kernels.warp import ONE

if TYPE_CHECKING:
    from fastcifar.data.image_set import ImageSet

CPU_THREADS = 2
COLOURS = WITHOUT_VALUE | WITH_VALUE
"""The automatic operations that move no pixel and that DALI carries out."""
NOTHING = Params()
Source = Callable[..., Node]
"""The type of `Graph.source`."""
NORMALIZED = (torch.float32, torch.float16)
"""The dtypes that DALI normalises to."""


class DaliApplier(TritonApplier):
    """Augments as `TorchApplier` does, with DALI. All randomness is in the parameters, so DALI keeps no state.

    Raises:
        ConfigError: DALI is not installed, or the chunk is too large for it.
    """

    largest_chunk = 65_535
    """DALI counts samples in a dimension of the CUDA grid with this limit."""

    def __init__(
        self, dataset: ImageSet, policy: Policy, normalization: Normalization, dtype: torch.dtype, chunk_size: int
    ) -> None:
        super().__init__(dataset, policy, normalization, dtype, chunk_size)
        if chunk_size > self.largest_chunk:
            raise ConfigError(
                f"the loader dali takes at most {self.largest_chunk} images at once, not {chunk_size} (mixing takes "
                "two for one); lower --batch-size or choose --loader triton."
            )
        self.device, size = self.images.device, dataset.size
        colours = Colours(import_dali(), size, kind_of(self.device))
        how = self.resampling
        grey_border = how.fill == "constant" and len(set(how.colour)) == 1
        self.dali_warps = policy.warps and not how.bilinear and (grey_border or how.fill == "clamp")
        warp = {"warp": self.dali_warps, "border": how.colour[0] if grey_border else None}
        ending = {
            "grey": colours if policy.greyscale else None,
            "erase": self.erase_colour if policy.erase else None,
            "normalization": normalization if dtype in NORMALIZED else None,
        }
        # Intensities come between grey and erasing, and are the kernel's, so all from grey on is.
        self.whole_ending = bool(policy.intensity)
        if self.whole_ending:
            ending = {}
        # An automatic policy comes between the warp and the rest; without one a single graph does both.
        first, last = (warp, ending) if policy.automatic else (warp | ending, {})
        self.first = sample_graph(self.device, chunk_size, dtype, **first)
        self.last = sample_graph(self.device, chunk_size, dtype, **last)
        if policy.automatic:
            border = automatic_table(policy.automatic, size).fill
            self.moves = given(sample_graph(self.device, chunk_size, warp=True, border=border))
            self.colours = colour_graph(self.device, colours)
        self.under_way: tuple[Tensor, Params] | None = None
        """The input of the first graph, or of what replaces it where it has no work, and the parameters."""

    def submit(self, index: Tensor, params: Params) -> None:
        warp = None if self.dali_warps else params.warp
        images = self.one_pass(self.images, index, warp, self.resampling, None)
        if self.first is not None:
            self.first.start({"images": images, **sample_inputs(params)})
        self.under_way = images, params

    def collect(self) -> Tensor:
        (images, params), self.under_way = given(self.under_way), None
        if self.first is not None:
            images = self.first.finish()[0].clone()
        for slot in params.slots:
            self.apply_slot(images, slot)
        if self.last is not None:
            self.last.start({"images": images, **sample_inputs(params)})
            images = self.last.finish()[0].clone()
        if self.whole_ending or images.dtype != self.dtype:
            images = self.one_pass(images, None, None, self.resampling, params if self.whole_ending else NOTHING)
        return images.permute(0, 3, 1, 2)

    def apply_slot(self, images: Tensor, slot: Slot) -> None:
        """Does as `TorchApplier.apply_slot` does; torch changes its groups while DALI works on the others."""
        groups = grouped(slot, self.device)
        moved = groups.pop(Operation.ROTATE, None)
        coloured = {operation: groups.pop(operation, None) for operation in COLOURS}
        self.colours.start(colour_inputs(images, coloured))
        if moved is not None:
            self.moves.start({"images": images.index_select(0, moved.place), "matrix": affine(moved.warp)})
            images.index_copy_(0, moved.place, self.moves.finish()[0])
        for group in groups.values():
            images.index_copy_(0, group.place, self.apply_group(images, group, slot.fill))
        for group, changed in zip(coloured.values(), self.colours.finish(), strict=True):
            if group is not None:
                images.index_copy_(0, group.place, changed[0])


class Graph:
    """A built pipeline with the outputs of `define(dali, source)`; `source` creates an input.

    On a GPU the inputs are copied: with `no_copy=True` DALI would not wait for the kernels that are still writing them.
    """

    def __init__(self, device: torch.device, batch_size: int, define: Callable[[Any, Source], list[Node]]) -> None:
        self.device, self.kind, self.dali = device, kind_of(device), import_dali()
        self.inputs: dict[str, str] = {}
        """The inputs by name, each with where DALI reads it: cpu or gpu."""
        self.held: list[Any] = []
        """Buffers that DALI reads in place until the output is taken."""
        number = device.index if self.kind == "gpu" else None
        self.pipeline = self.dali.Pipeline(batch_size, CPU_THREADS, number, prefetch_queue_depth=1)
        with self.pipeline:
            self.pipeline.set_outputs(*define(self.dali, self.source))
        self.pipeline.build()

    def source(
        self, name: str, dtype: str, dimensions: int, layout: str | None = None, where: str | None = None
    ) -> Node:
        """Declares an input with so many dimensions a sample; `where` is cpu or gpu, by default the graph's device."""
        self.inputs[name] = where = where or self.kind
        options = {"dtype": getattr(self.dali.types, dtype), "ndim": dimensions, "layout": layout}
        return self.dali.fn.external_source(name=name, device=where, batch=True, no_copy=where == "cpu", **options)

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        """Schedules a batch from those of `tensors`, with a row for each sample, that are inputs of the graph."""
        for name, where in self.inputs.items():
            tensor = tensors[name].contiguous()
            self.held.append(upload(tensor, self.device) if where == "gpu" else tensor.numpy())
            self.pipeline.feed_input(name, self.held[-1])
        self.pipeline.schedule_run()

    def finish(self) -> list[Tensor]:
        """The outputs of the last scheduled batch, valid on the current stream until another is started."""
        stream = (torch.cuda.current_stream(self.device),) if self.kind == "gpu" else ()
        outputs = [torch.from_dlpack(output.as_tensor()) for output in self.pipeline.outputs(*stream)]
        self.held.clear()
        return outputs


def sample_graph(
    device: torch.device,
    chunk_size: int,
    dtype: torch.dtype = torch.uint8,
    *,
    warp: bool = False,
    border: int | None = None,
    grey: Colours | None = None,
    erase: Colour | None = None,
    normalization: Normalization | None = None,
) -> Graph | None:
    """A graph over uint8 NHWC images: warp, greyscale, erasing, normalisation to `dtype`; None where all is off.

    The warp fills with the grey level `border`, or clamps where it is None.
    """

    def define(dali: Any, source: Source) -> list[Node]:
        fn, types = dali.fn, dali.types
        images = source("images", "UINT8", 3, "HWC")
        if warp:
            fill = {} if border is None else {"fill_value": border}
            images = fn.warp_affine(images, source("matrix", "FLOAT", 2), interp_type=types.INTERP_NN, **fill)
        if grey is not None:
            images = grey.greyscale(images, source("grey", "UINT8", 0))
        if erase is not None:
            anchor, shape = (source(name, "FLOAT", 1, where="cpu") for name in ("anchor", "shape"))
            images = fn.erase(images, anchor=anchor, shape=shape, axis_names="HW", fill_value=list(erase))
        if normalization is not None:
            images = fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT16 if dtype == torch.float16 else types.FLOAT,
                output_layout="HWC",
                mean=[255 * mean for mean in normalization.mean],
                std=[255 * std for std in normalization.std],
            )
        return [images]

    useful = warp or any(part is not None for part in (grey, erase, normalization))
    return Graph(device, chunk_size, define) if useful else None


def sample_inputs(params: Params) -> dict[str, Tensor]:
    """The inputs of a `sample_graph` besides the images: float32 with a row for each sample."""
    inputs = {}
    if params.warp is not None:
        inputs["matrix"] = affine(params.warp)
    if params.grey is not None:
        inputs["grey"] = params.grey.byte() * 255
    if params.boxes is not None:
        inputs["anchor"] = params.boxes[:, :, :2].flatten(1).float()
        inputs["shape"] = (params.boxes[:, :, 2:] - params.boxes[:, :, :2]).flatten(1).float()
    return inputs


def colour_graph(device: torch.device, colours: Colours) -> Graph:
    """A graph that applies each of `COLOURS` to a sample, which is a batch: uint8 (1, G, H, W, 3).

    Values are float64 (1, G, 1, 1, 1).
    """

    def define(dali: Any, source: Source) -> list[Node]:
        outputs = []
        for operation, function in COLOURS.items():
            arguments = [source(operation.name, "UINT8", 4)]
            if operation not in WITHOUT_VALUE:
                arguments.append(source(f"{operation.name} value", "FLOAT64", 4))
            outputs.append(function(colours, *arguments))
        return outputs

    return Graph(device, 1, define)


def colour_inputs(images: Tensor, groups: Mapping[Operation, Group | None]) -> dict[str, Tensor]:
    """The inputs of a `colour_graph`; an operation without samples gets one image, to avoid empty tensors."""
    inputs = {}
    for operation, group in groups.items():
        chosen = images[:1] if group is None else images.index_select(0, group.place)
        values = images.new_ones(1, dtype=torch.float64) if group is None else group.value
        inputs |= {operation.name: chosen[None], f"{operation.name} value": values.view(1, -1, 1, 1, 1)}
    return inputs


def affine(warp: Tensor) -> Tensor:
    """Converts fixed-point maps to DALI's corner-based coordinates: int32 (N, 6) -> float32 (N, 2, 3).

    Half of the last bit is added to keep positions off the borders between pixels, where float32 could round to the
    other side.
    """
    matrix = warp.double().view(-1, 2, 3)
    matrix[:, :, 2] += 0.5 - 0.5 * (matrix[:, :, 0] + matrix[:, :, 1])
    return (matrix / ONE).float()


def kind_of(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else "cpu"


def why_unusable(device: torch.device) -> str | None:
    """Why DALI cannot work on `device`, in a few words, after a trial with one image; None where it can."""
    try:
        image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device=device)
        graph = given(sample_graph(image.device, 1, warp=True, border=0))
        graph.start({"images": image, "matrix": torch.eye(2, 3)[None]})
        graph.finish()
    except Exception as error:
        return reason(error)
    return None


def import_dali() -> Any:
    """Imports `nvidia.dali`. Raises ConfigError where that fails."""
    try:
        import nvidia.dali as dali
        from nvidia.dali import fn, math, types  # noqa: F401
    except ImportError as error:
        missing = f"the loader dali needs NVIDIA DALI, which cannot be imported ({error})"
        raise ConfigError(f"{missing}; install nvidia-dali-cuda130 or choose --loader torch.") from error
    return dali
