"""Batch norm with the additions and the ReLU around it: on the CPU, traced for a GPU, in Triton's interpreter, and
(marked) on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastcifar.kernels import batch_norm as module
from fastcifar.kernels.batch_norm import (
    DTYPES,
    MOST_CHANNELS,
    MOST_PARTS,
    SPEC,
    TILE,
    BatchNormReLU,
    Skip,
    batch_norm_relu,
    batch_norm_relu_backward,
    batch_norm_relu_forward,
    split,
)
from fastcifar.kernels.dispatch import KERNELS_EXIST
from fastcifar.kernels.spec import Case

NAMES = ("x", "weight", "bias", "residual", "addend")
VARIANTS = [(residual, relu) for residual in (False, True) for relu in (False, True)]
ODD_CASES = [case for case in SPEC.cases if not case.of_a_network]

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


def arguments(
    size: tuple[int, ...],
    residual: bool = True,
    relu: bool = True,
    dtype: torch.dtype = torch.float32,
    addend: bool = False,
    skip: Skip | None = None,
) -> dict[str, Any]:
    torch.manual_seed(sum(size))
    shape = {"size": size, "residual": residual, "relu": relu, "addend": addend, "skip": skip}
    return SPEC.make(shape, dtype, torch.device("cpu"))


def module_and_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    skip: Skip | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """An addition, `nn.BatchNorm2d`, another addition and a ReLU."""
    x = x if addend is None else x + addend
    norm = nn.BatchNorm2d(x.shape[1], eps, momentum, dtype=weight.dtype, device=x.device).train(training)
    state = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    state["num_batches_tracked"] = norm.num_batches_tracked
    y = torch.func.functional_call(norm, state, (x,))
    y = y if residual is None else y + residual
    y = F.relu(y) if relu else y
    return (y, x) if skip == "input" else (y, y) if skip == "output" else y


def differentiable_ops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    addend: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    skip: Skip | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`batch_norm_relu` through the two ops, as on a GPU, whatever the device."""
    assert training
    return BatchNormReLU.apply(x, weight, bias, running_mean, running_var, residual, addend, momentum, eps, relu, skip)


def evaluate(function: Callable[..., Any], given: dict[str, Any], grad_y: Tensor) -> dict[str, Tensor]:
    """The outputs, the running statistics and the gradients, by name, the shortcut's gradient being half of
    `grad_y`; `given` stays.
    """
    leaves = {name: given[name].detach().requires_grad_() for name in NAMES if given[name] is not None}
    running = {name: given[name].clone() for name in SPEC.mutates}
    returned = function(**{**given, **leaves, **running})
    outputs = dict(zip(("y", "skip"), returned if given["skip"] else (returned,), strict=False))
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [grad_y, grad_y / 2][: len(outputs)])
    outputs = {name: output.detach() for name, output in outputs.items()}
    return {**outputs, **running, **dict(zip(leaves, gradients, strict=True))}


def exact_results(given: dict[str, Any], grad_y: Tensor) -> dict[str, Tensor]:
    """`evaluate` of the module in float64."""
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    return evaluate(module_and_relu, wide, grad_y.double())


def assert_as_accurate(function: Callable[..., Tensor], given: dict[str, Any]) -> None:
    """Fails where a result of `function` is further from the module in float64 than a small multiple of the module
    in the dtype itself.
    """
    grad_y = torch.randn_like(given["x"])
    exact, theirs = exact_results(given, grad_y), evaluate(module_and_relu, given, grad_y)
    for name, result in evaluate(function, given, grad_y).items():
        assert result.dtype == theirs[name].dtype
        least = torch.finfo(result.dtype).eps / 2
        assert relative_error(result, exact[name]) <= SPEC.multiple[result.dtype] * max(
            relative_error(theirs[name], exact[name]), least
        ), name


def large_mean(size: tuple[int, ...]) -> dict[str, Any]:
    """Activations of mean 100 and standard deviation 0.01."""
    given = arguments(size, residual=False, relu=False)
    x = torch.randn(size).mul_(0.01).add_(100).to(memory_format=torch.channels_last)
    return {**given, "x": x}


@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_cpu_equals_the_module(residual: bool, relu: bool, training: bool, dtype: torch.dtype) -> None:
    given = {**arguments((3, 17, 5, 7), residual, relu, dtype), "training": training}
    grad_y = torch.randn_like(given["x"])
    expected = evaluate(module_and_relu, given, grad_y)
    for name, result in evaluate(batch_norm_relu, given, grad_y).items():
        assert torch.equal(result, expected[name]), name
        assert result.stride() == expected[name].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=lambda case: case.name)
def test_the_ops_are_as_accurate_as_torch(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate(differentiable_ops, arguments(**case.shape, dtype=dtype))


def test_the_ops_are_accurate_for_a_large_mean() -> None:
    assert_as_accurate(differentiable_ops, large_mean((4, 5, 9, 9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert batch_norm_relu(**arguments((3, 5, 4, 4), dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
@pytest.mark.parametrize("addend", [False, True])
def test_opcheck(residual: bool, relu: bool, addend: bool) -> None:
    given = arguments((3, 5, 4, 3), residual, relu, torch.bfloat16, addend)
    vectors = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    forward = given["x"], *vectors, given["residual"], given["addend"], 0.1, 1e-5, relu
    torch.library.opcheck(batch_norm_relu_forward, forward)
    y, statistics, _ = batch_norm_relu_forward(*forward)
    skip, saved = (
        "input" if addend else "output",
        (given["x"], y if residual and relu else None, *vectors[:2], statistics),
    )
    torch.library.opcheck(batch_norm_relu_backward, (torch.randn_like(y), torch.randn_like(y), *saved, relu, skip))
    torch.library.opcheck(batch_norm_relu_backward, (torch.randn_like(y), None, *saved, relu, None))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("skip", [None, "input", "output"])
def test_the_ops_compile_to_one_graph(residual: bool, addend: bool, skip: Skip | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(differentiable_ops, fullgraph=True, backend="aot_eager")
    assert_as_accurate(compiled, arguments((5, 16, 3, 3), residual, addend=addend, skip=skip))


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
        aot_function(function, record, keep_inference_input_mutations=True)(*fakes)
    (graph,) = graphs
    return [
        node.kwargs["tensors_to_clone"] for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)
    ]


@needs_kernels
@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
@pytest.mark.parametrize(("of_sum", "skip"), [(False, None), (False, "output"), (True, "input")])
@pytest.mark.parametrize("size", [(2, 16, 16, 16), (2, 16, 16, 17)], ids=["one-launch", "two-launches"])
def test_on_a_gpu_the_compiled_step_holds_one_kernel_or_two_each_way(
    size: tuple[int, ...], residual: bool, relu: bool, of_sum: bool, skip: Skip | None
) -> None:
    given = arguments(size, residual, relu, torch.bfloat16, of_sum, skip)
    first = 1 if size[-1] == 16 else 0
    x, weight, bias, *added = (given[name] for name in NAMES)
    vectors = weight, bias, given["running_mean"], given["running_var"]
    forward = kernel_writes(lambda *tensors: batch_norm_relu(*tensors, relu=relu, skip=skip), x, *vectors, *added)
    total, of_x = ["sum_ptr"] * of_sum, ["y_ptr", "statistics_ptr", "running_mean_ptr", "running_var_ptr"]
    assert forward == ([[*of_x, *total]] if first else [["partials_ptr", *total], of_x])

    y, grad_skip = torch.randn_like(x) if residual and relu else None, torch.randn_like(x) if skip else None
    backward = kernel_writes(
        batch_norm_relu_backward, torch.randn_like(x), grad_skip, x, y, weight, bias, torch.ones(2, 16), relu, skip
    )
    masked = [] if y is None else ["grad_residual_ptr"]
    of_x = ["grad_x_ptr", "grad_weight_ptr", "grad_bias_ptr"]
    assert backward == ([[*of_x, *masked]] if first else [["partials_ptr", *masked], of_x])


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 63, 64, 1000, 4097, 131_072, 1_048_576, 10_000_001])
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 32, 64, 130, 2048])
def test_the_split_covers_the_rows_and_stays_small(rows: int, channels: int) -> None:
    span, (parts, blocks), parts_held, block_c, tile_rows = split(rows, channels)
    assert (parts - 1) * span < rows <= parts * span
    assert (blocks - 1) * block_c < channels <= blocks * block_c
    assert parts <= parts_held <= MOST_PARTS
    assert block_c <= MOST_CHANNELS
    assert tile_rows * block_c <= TILE
    assert all(size & (size - 1) == 0 for size in (parts_held, block_c, tile_rows))


GOOD = arguments((3, 5, 4, 2), addend=True)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", GOOD["x"].double(), TypeError),
        ("x", GOOD["x"][0], ValueError),
        ("x", GOOD["x"].contiguous(), ValueError),
        ("x", GOOD["x"][:1, :, :1, :1], ValueError),
        *((name, GOOD[name].half(), TypeError) for name in ("weight", "bias", "running_mean", "running_var")),
        *((name, GOOD[name][1:], ValueError) for name in ("weight", "bias", "running_mean", "running_var")),
        *((name, GOOD[name].to("meta"), ValueError) for name in ("weight", "bias", "running_mean", "running_var")),
        ("weight", torch.ones(10)[::2], ValueError),
        *((name, GOOD[name].half(), TypeError) for name in ("residual", "addend")),
        *((name, GOOD[name][1:], ValueError) for name in ("residual", "addend")),
        *((name, GOOD[name].contiguous(), ValueError) for name in ("residual", "addend")),
        *((name, GOOD[name].to("meta"), ValueError) for name in ("residual", "addend")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_argument_is_named(name: str, value: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must .*\.$"):
        batch_norm_relu(**{**GOOD, name: value})


def test_one_row_has_no_variance_but_can_be_evaluated() -> None:
    given = arguments((2, 5, 1, 1))
    given |= {"x": given["x"][:1], "residual": given["residual"][:1]}
    with pytest.raises(ValueError, match="more than one value per channel"):
        batch_norm_relu(**given)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module_and_relu(**given)
    assert torch.equal(batch_norm_relu(**{**given, "training": False}), module_and_relu(**{**given, "training": False}))


def on_gpu(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in given.items()}


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_the_kernels_are_as_accurate_as_torch(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate(batch_norm_relu, on_gpu(arguments(**case.shape, dtype=dtype)))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("size", [(4, 5, 9, 9), (128, 16, 32, 32)], ids=str)
def test_the_kernels_are_accurate_for_a_large_mean(size: tuple[int, ...]) -> None:
    assert_as_accurate(batch_norm_relu, on_gpu(large_mean(size)))


@pytest.mark.gpu
@needs_kernels
def test_the_kernels_repeat_every_bit() -> None:
    given = on_gpu(arguments((128, 64, 8, 8), dtype=torch.bfloat16))
    grad_y = torch.randn_like(given["x"])
    first, second = (evaluate(batch_norm_relu, given, grad_y) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
def test_the_compiled_kernels_are_as_accurate_as_torch(residual: bool, relu: bool) -> None:
    torch.compiler.reset()
    given = on_gpu(arguments((128, 64, 8, 8), residual, relu, torch.bfloat16))
    assert_as_accurate(torch.compile(batch_norm_relu, fullgraph=True), given)


@pytest.mark.gpu
@needs_kernels
def test_the_kernels_run_in_a_captured_graph() -> None:
    given = on_gpu(arguments((128, 64, 8, 8), dtype=torch.bfloat16))
    running = {name: given[name].clone() for name in SPEC.mutates}
    expected = batch_norm_relu(**{**given, **running})
    captured = {name: given[name].clone() for name in SPEC.mutates}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = batch_norm_relu(**{**given, **captured})
    graph.replay()
    assert torch.equal(y, expected)
    assert all(torch.equal(captured[name], running[name]) for name in running)
