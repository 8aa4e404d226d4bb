"""Compiles kernels for cards that need not be present, and reads what they use of them."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dispatch import triton

CARDS = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Compilation:
    """One way in which a kernel is launched.

    `signature` gives each argument, constexprs aside, the type that Triton's ahead-of-time compiler would be given:
    `*bf16`, `i32`, or `*bf16:16` where the pointer (or the integer) is a multiple of 16.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, int]
    num_warps: int = 4

    @property
    def configuration(self) -> str:
        """The argument types, constexprs and warps in one line."""
        constexprs = [f"{name}={value}" for name, value in self.constexprs.items()]
        return " ".join([*self.signature.values(), *constexprs, f"warps={self.num_warps}"])


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: registers a thread, bytes of shared memory a block, bytes of spilled registers a
    thread.
    """

    registers: int
    shared_memory: int
    spills: int


def all_compilations() -> list[Compilation]:
    """The `COMPILATIONS` of every module of this package.

    Raises:
        RuntimeError: there are no kernels in this process, or interpreted ones.
    """
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f".{name}", __package__) for name in names]
    found = [compilation for module in modules for compilation in getattr(module, "COMPILATIONS", ())]
    if triton is None or not all(isinstance(compilation.kernel, triton.JITFunction) for compilation in found):
        raise RuntimeError(
            "compiling kernels needs Triton, with neither FASTCIFAR_KERNELS=reference nor TRITON_INTERPRET=1 set."
        )
    return found


def compile_for(compilation: Compilation, card: int) -> Resources:
    """Compiles one kernel to machine code for compute capability `card` (90 is sm_90); needs Triton, but no GPU.

    What Triton or ptxas raises, when the kernel does not compile, is passed on.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind.removesuffix(":16") for name, kind in compilation.signature.items()}
    source = ASTSource(
        fn=compilation.kernel,
        signature={name: types.get(name, "constexpr") for name in compilation.kernel.arg_names},
        constexprs=dict(compilation.constexprs),
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(compilation.signature.values())
            if kind.endswith(":16")
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": compilation.num_warps})
    used = _resource_usage(compiled.asm["cubin"])
    # Triton declares no local arrays, so that whatever stands on the stack or in local memory was spilled.
    return Resources(
        registers=used["REG"], shared_memory=compiled.metadata.shared, spills=used["STACK"] + used["LOCAL"]
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """The line `REG:16 STACK:0 SHARED:0 LOCAL:0 ...` that cuobjdump prints for the kernel in `cubin`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
