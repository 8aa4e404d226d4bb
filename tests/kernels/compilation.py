"""Records how ops launch their kernels and compiles these launches for cards that need not be present."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from op_specs import SPECS, Case, OpSpec
from torch import Tensor

from fastcifar.kernels import augment, averaging, batch_norm, bookkeeping, squeeze_excite
from fastcifar.kernels.dispatch import KERNELS_EXIST, triton

MODULES = (augment, averaging, batch_norm, bookkeeping, squeeze_excite)
CARDS = (75, 80, 86, 89, 90, 100, 120)


@contextmanager
def kernels_chosen(wrap: Callable[[Any], Any], chosen: bool = True) -> Iterator[None]:
    """Has ops run their kernels on any device, launching what `wrap` makes of a kernel; or else their references."""
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "use_triton", return_value=chosen))
            stack.enter_context(mock.patch.object(module, "wrap_triton", wrap))
        yield


@dataclass(frozen=True)
class Compilation:
    """One way in which a kernel is launched.

    `signature` gives each argument, constexprs aside, the type that Triton's ahead-of-time compiler is given: `*bf16`,
    `i32`, or `i32:16` where the integer is a multiple of 16, as are all pointers.
    """

    kernel: Any
    signature: Mapping[str, str]
    options: Mapping[str, int] = field(default_factory=dict)
    """The constexprs and `num_warps`."""

    @property
    def configuration(self) -> str:
        return " ".join([*self.signature.values(), *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel.

    Registers a thread, bytes of shared memory a block, bytes of spilled registers a thread.
    """

    registers: int
    shared_memory: int
    spills: int


TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if isinstance(value, float):
        return "fp32"
    return ("i32" if value < 2**31 else "i64") + ":16" * (value % 16 == 0)


def compilations(spec: OpSpec, case: Case, dtype: torch.dtype) -> list[Compilation]:
    found: list[Compilation] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return self.record

        def record(self, *arguments: Any, **options: Any) -> None:
            signature = dict(zip(self.kernel.arg_names, map(type_of, arguments), strict=False))
            found.append(Compilation(self.kernel, signature, options))

    arguments = spec.make(case.shape, dtype, torch.device("meta"))
    leaves = [arguments[name].requires_grad_() for name in spec.differentiable if arguments[name] is not None]
    with kernels_chosen(Recorder):
        results = spec.results(arguments, spec.op(**arguments))
        returned = [result for result in results if result.requires_grad]
        if leaves:
            torch.autograd.grad(returned, leaves, [torch.empty_like(result) for result in returned])
    return found


def all_compilations() -> list[Compilation]:
    """Returns each launch of every op at its networks' cases once, the dtypes taking turns.

    Raises RuntimeError where there are no kernels in this process, or interpreted ones.
    """
    if not KERNELS_EXIST or not isinstance(averaging.ema_kernel, triton.JITFunction):
        raise RuntimeError(
            "compiling kernels needs Triton, with neither FASTCIFAR_KERNELS=reference nor TRITON_INTERPRET=1 set."
        )
    found = {}
    for spec in SPECS:
        for place, case in enumerate(spec.network_cases()):
            for compilation in compilations(spec, case, spec.dtypes[-1 - place % len(spec.dtypes)]):
                found[compilation.kernel.__name__, compilation.configuration] = compilation
    return list(found.values())


def compile_for(compilation: Compilation, card: int) -> Resources:
    """Compiles one kernel to machine code for compute capability `card` (90 is sm_90); needs Triton, but no GPU.

    Errors of Triton or ptxas, when the kernel does not compile, are passed on.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind.removesuffix(":16") for name, kind in compilation.signature.items()}
    constexprs = dict(compilation.options)
    warps = constexprs.pop("num_warps", 4)
    divisible = [place for place, kind in enumerate(compilation.signature.values()) if kind.endswith(":16")]
    source = ASTSource(
        fn=compilation.kernel,
        signature={name: types.get(name, "constexpr") for name in compilation.kernel.arg_names},
        constexprs=constexprs,
        attrs={(place,): [["tt.divisibility", 16]] for place in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
    used = resource_usage(compiled.asm["cubin"])
    # Triton declares no local arrays, so that whatever stands on the stack or in local memory was spilled.
    return Resources(used["REG"], compiled.metadata.shared, used["STACK"] + used["LOCAL"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Reads the line `REG:16 STACK:0 SHARED:0 LOCAL:0 ...` that cuobjdump prints for the kernel in `cubin`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
