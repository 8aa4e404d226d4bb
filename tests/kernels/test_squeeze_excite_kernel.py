"""Squeeze-and-excitation beyond what `test_specs.py` makes of its declaration: odd shapes, timm's module, autocast,
launches, errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_specs import check, random_gradient
from timm.layers import SEModule
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcifar.kernels import squeeze_excite as module
from fastcifar.kernels.dispatch import KERNELS_EXIST
from fastcifar.kernels.spec import Arguments, Case
from fastcifar.kernels.squeeze_excite import (
    DTYPES,
    SPEC,
    squeeze_excite,
    squeeze_excite_backward,
    squeeze_excite_forward,
    squeeze_excite_reference,
)

CPU = torch.device("cpu")

# At one sample, or one hidden unit, chance rules the more: 8 halves of an eps are 5e-7.
AT_ODD_SHAPES = replace(SPEC, multiple={torch.float32: 8.0})

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


def case_of(
    sizes: tuple[int, int, int, int, int], residual: bool = True, relu: bool = True, skip: bool = False
) -> Case:
    return module._case(sizes, residual, relu, skip)


def odd_cases() -> list[Any]:
    """Small shapes, of one and several samples a program; what follows the scaling takes turns."""
    sizes = itertools.product((1, 3), (1, 17, 130), ((1, 1), (5, 7), (8, 8)), (2, 37))
    ends = itertools.cycle([(False, False, False), (False, True, True), (True, False, True), (True, True, False)])
    cases = [case_of((samples, channels, *side, reduced), *next(ends)) for samples, channels, side, reduced in sizes]
    return [pytest.param(case, id=case.name) for case in cases]


def arguments(
    sizes: tuple[int, int, int, int, int] = (3, 17, 5, 7, 2),
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Arguments:
    torch.manual_seed(0)
    return SPEC.make(case_of(sizes).shape, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_may_have_the_dtype_of_x(dtype: torch.dtype) -> None:
    given = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments().items()}
    weights = [given[name].requires_grad_() for name in SPEC.differentiable[2:]]
    gradients = torch.autograd.grad(squeeze_excite(**given).sum(), weights)
    wide = {name: value.detach().float() if "_" in name else value for name, value in given.items()}
    wide_weights = [wide[name].requires_grad_() for name in SPEC.differentiable[2:]]
    for gradient, expected in zip(
        gradients, torch.autograd.grad(squeeze_excite(**wide).sum(), wide_weights), strict=True
    ):
        assert torch.equal(gradient, expected.to(dtype))


def test_is_that_of_timm() -> None:
    torch.manual_seed(0)
    theirs = SEModule(48, rd_ratio=0.25, rd_divisor=1)
    exact = SEModule(48, rd_ratio=0.25, rd_divisor=1).double()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 48, 7, 5).contiguous(memory_format=torch.channels_last)
    layers = theirs.fc1, theirs.fc2
    weights = [
        tensor.detach().flatten(1) if tensor.dim() == 4 else tensor.detach()
        for fc in layers
        for tensor in (fc.weight, fc.bias)
    ]

    def gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    inputs = [x.clone().requires_grad_(), *(weight.clone().requires_grad_() for weight in weights)]
    ours = gradients(squeeze_excite(*inputs), *inputs)
    found = []
    for oracle, image in ((theirs, x.clone()), (exact, x.double())):
        parameters = oracle.fc1.weight, oracle.fc1.bias, oracle.fc2.weight, oracle.fc2.bias
        found.append(gradients(oracle(image.requires_grad_()), image, *parameters))
    for actual, theirs_, exact_ in zip(ours, *found, strict=True):
        assert_as_accurate_as_torch(actual, theirs_.reshape(actual.shape), exact_.reshape(actual.shape), SPEC.multiple)


@pytest.mark.parametrize("function", [squeeze_excite, squeeze_excite_reference], ids=lambda function: function.__name__)
def test_autocast_changes_nothing(function: Any) -> None:
    given = arguments(dtype=torch.bfloat16)
    weight = given["reduce_weight"].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = function(**given)
        results.append((y, *torch.autograd.grad(y.sum(), weight)))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))


def test_a_nan_passes_the_relu() -> None:
    given = arguments()
    given["residual"][0, 0, 0, 0] = torch.nan
    assert squeeze_excite(**given)[0, 0, 0, 0].isnan()


def test_an_empty_batch_is_passed_on() -> None:
    given = {
        name: value.requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments((0, 17, 5, 7, 2)).items()
    }
    y = squeeze_excite(**given)
    assert y.shape == (0, 17, 5, 7)
    assert not torch.autograd.grad(y.sum(), given["expand_weight"])[0].any()


def test_compiles_to_one_graph_for_all_batch_sizes() -> None:
    torch.compiler.reset()
    compiled = torch.compile(squeeze_excite, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (3, 5):
        case = case_of((samples, 17, 5, 7, 2))
        check(SPEC, case, torch.float32, run=compiled, gradient=random_gradient(SPEC, case, torch.float32, CPU))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch trace kernels for an sm_90 that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget

    pretended = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", pretended)
    monkeypatch.setattr(module, "use_triton", lambda tensor: tensor.device.type == "cuda")


def kernel_writes(function: Callable[..., Any], *given: Any) -> list[list[str]]:
    """What each kernel of the function's graph writes, for tensors like those given on a GPU."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode() as mode, torch.no_grad():
        fakes = [mode.from_tensor(value).to("cuda") if isinstance(value, Tensor) else value for value in given]
        aot_function(function, record)(*fakes)
    (graph,) = graphs
    return [
        node.kwargs["tensors_to_clone"] for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)
    ]


FORWARD = [["y_ptr", "pooled_ptr", "hidden_ptr", "gate_ptr"]]
BACKWARD = [
    ["grad_x_ptr", "grad_residual_ptr", "grad_expanded_ptr", "grad_hidden_ptr"],
    ["grad_reduce_weight_ptr", "grad_reduce_bias_ptr", "grad_expand_weight_ptr", "grad_expand_bias_ptr"],
]


@needs_kernels
@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        ((8, 2048, 1, 1, 128), FORWARD, BACKWARD),
        ((8, 256, 8, 8, 16), FORWARD, BACKWARD),
        ((2, 256, 9, 8, 16), [], []),
        ((2, 512, 1, 1, 513), [], []),
    ],
    ids=["smallest-map", "largest-sample", "larger-sample", "larger-weights"],
)
def test_on_a_gpu_the_compiled_step_launches_one_and_two_kernels_or_is_the_reference(
    sizes: tuple[int, int, int, int, int], forward: list[list[str]], backward: list[list[str]]
) -> None:
    given = arguments(sizes, torch.bfloat16)
    inputs = [value for name, value in given.items() if name != "skip"]
    assert kernel_writes(squeeze_excite_forward, *inputs) == forward
    x, weights = given["x"], (given["reduce_weight"], given["expand_weight"])
    y, *intermediates = squeeze_excite_forward(*inputs)
    assert kernel_writes(squeeze_excite_backward, y, y, x, y, *intermediates, *weights, True) == backward


GOOD = arguments()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", GOOD["x"].double(), TypeError),
        ("x", GOOD["x"][0], ValueError),
        ("x", GOOD["x"].contiguous(), ValueError),
        ("x", GOOD["x"][:, :, :0], ValueError),
        ("reduce_weight", GOOD["reduce_weight"].half(), TypeError),
        ("reduce_weight", GOOD["reduce_weight"][:, :16], ValueError),
        ("reduce_weight", GOOD["reduce_weight"][:0], ValueError),
        ("reduce_weight", GOOD["reduce_weight"][:, :, None, None], ValueError),
        ("reduce_weight", GOOD["expand_weight"].T, ValueError),
        ("reduce_weight", GOOD["reduce_weight"].to("meta"), ValueError),
        ("reduce_bias", GOOD["reduce_bias"].half(), TypeError),
        ("reduce_bias", GOOD["reduce_bias"][:1], ValueError),
        ("reduce_bias", GOOD["reduce_bias"].to("meta"), ValueError),
        ("expand_weight", GOOD["expand_weight"].bfloat16(), TypeError),
        ("expand_weight", GOOD["reduce_weight"].T, ValueError),
        ("expand_weight", GOOD["expand_weight"].T.contiguous(), ValueError),
        ("expand_weight", GOOD["expand_weight"].to("meta"), ValueError),
        ("expand_bias", GOOD["expand_bias"].double(), TypeError),
        ("expand_bias", GOOD["expand_bias"][:, None], ValueError),
        ("expand_bias", GOOD["expand_bias"].to("meta"), ValueError),
        ("residual", GOOD["residual"].half(), TypeError),
        ("residual", GOOD["residual"][:1], ValueError),
        ("residual", GOOD["residual"].contiguous(), ValueError),
        ("residual", GOOD["residual"].to("meta"), ValueError),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_argument_is_named(name: str, value: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must .*\.$"):
        squeeze_excite(**{**GOOD, name: value})


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", odd_cases())
def test_the_kernels_are_as_accurate_as_torch(case: Case, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    check(AT_ODD_SHAPES, case, dtype, device, gradient=random_gradient(SPEC, case, dtype, device))


@pytest.mark.gpu
@needs_kernels
def test_the_kernels_give_the_same_bits_again() -> None:
    given = arguments((8, 130, 4, 5, 37), torch.float16, torch.device("cuda"))
    leaves = [given[name].requires_grad_() for name in SPEC.differentiable]
    runs = []
    for _ in range(10):
        y = squeeze_excite(**given)
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(first, again) for run in runs[1:] for first, again in zip(runs[0], run, strict=True))
