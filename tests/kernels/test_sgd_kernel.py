"""The fused SGD op on the CPU, traced for a GPU, in Triton's interpreter, and (marked) on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import assert_as_accurate_as_torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fastcifar.averaging import flatten
from fastcifar.kernels import sgd as module
from fastcifar.kernels.averaging import CPU_PIECE
from fastcifar.kernels.dispatch import KERNELS_EXIST
from fastcifar.kernels.sgd import ODD_SHAPES, SPEC, gradient_table, in_memory_order, sgd_update_, sgd_update_reference
from fastcifar.kernels.spec import Case

BUCKETS = ("parameters", "momenta", "averages", "shadow")

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


def arguments(dtype: torch.dtype = torch.float32, averages: int = 1, scaled: bool = False, device: str = "cpu") -> dict[str, Any]:
    torch.manual_seed(0)
    return SPEC.make({"parameters": ODD_SHAPES, "averages": averages, "scaled": scaled}, dtype, torch.device(device))


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments in tensors of their own on the CPU; the table keeps the addresses of the old gradients."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), given)


def assert_buckets_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in BUCKETS:
        if expected[name] is not None:
            assert torch.equal(actual[name].cpu(), expected[name].cpu()), name


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.ReLU(), nn.Flatten(), nn.Linear(17 * 36, 7)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor], dtype: torch.dtype, steps: int) -> None:
    """Plain PyTorch: `torch.optim.SGD`, and an average of decay 0.9."""
    for step in range(steps):
        gradients_of(model, dtype, step)
        optimizer.step()
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.1)


def gradients_of(model: nn.Module, dtype: torch.dtype, step: int) -> list[Tensor]:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    model.zero_grad(set_to_none=False)
    model(images.to(memory_format=torch.channels_last)).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_trains_a_network_as_torch_does() -> None:
    """Ten steps over the buckets of `flatten`, in channels_last, against `torch.optim.SGD` in float32 and in float64."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        model = network().to(dtype)
        averages = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-3)
        train(model, optimizer, averages, dtype, steps=10)
        results[dtype] = [*(parameter.detach() for parameter in model.parameters()), *averages]

    model = network()
    parameters = list(model.parameters())
    flat = flatten(parameters)
    shadow, momenta, average = flat.bfloat16(), torch.zeros_like(flat), flat.clone()
    offsets = [parameter.storage_offset() for parameter in parameters]
    lr, decay = torch.tensor(0.1), torch.tensor(0.9)
    for step in range(10):
        gradients = gradients_of(model, torch.float32, step)
        views = [parameter.detach() for parameter in parameters]
        sgd_update_(flat, momenta, gradients, gradient_table(views, gradients), offsets, lr, 0.9, 5e-3, average, decay, shadow, None, None)
    averages = [average.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset()) for parameter in parameters]
    ours = [*(parameter.detach() for parameter in parameters), *averages]
    joined = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (ours, results[torch.float32], results[torch.float64])]
    assert_as_accurate_as_torch(*joined)
    assert torch.equal(shadow, flat.bfloat16())


def test_pieces_on_a_cpu_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = arguments(torch.float16, averages=2, scaled=True)
    cut = copied(whole)
    sgd_update_(**whole)
    assert whole["parameters"].numel() < CPU_PIECE
    monkeypatch.setattr("fastcifar.kernels.averaging.CPU_PIECE", 100)
    sgd_update_(**cut)
    assert_buckets_equal(cut, whole)


def test_what_lies_between_parameters_stays() -> None:
    given = arguments(torch.float16, averages=2)
    between = torch.ones(given["parameters"].numel(), dtype=torch.bool)
    for gradient, offset in zip(given["gradients"], given["offsets"], strict=True):
        between[offset : offset + gradient.numel()] = False
    for name in BUCKETS:
        given[name].masked_fill_(between, 77)
    sgd_update_(**given)
    assert between.sum() > 0
    assert all((given[name][..., between] == 77).all() for name in BUCKETS)


def test_a_skipped_step_keeps_parameters_and_momenta_but_averages_them() -> None:
    given = arguments(torch.float16, averages=1, scaled=True)
    given["found_inf"].fill_(1)
    given["gradients"][0].fill_(torch.inf)
    expected = copied(given)
    expected["averages"].lerp_(expected["parameters"], (1 - expected["decays"])[:, None])
    sgd_update_(**given)
    assert torch.equal(given["parameters"], expected["parameters"])
    assert torch.equal(given["momenta"], expected["momenta"])
    assert torch.equal(given["shadow"], expected["parameters"].half())
    torch.testing.assert_close(given["averages"], expected["averages"])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_is_read_in_memory_order(format: torch.memory_format) -> None:
    for shape in ((5, 3, 2, 4), (5, 1, 1, 4), (5, 3, 1, 1), (1, 3, 2, 2)):
        tensor = torch.randn(shape).contiguous(memory_format=format)
        vector = in_memory_order(tensor)
        assert torch.equal(vector, tensor.as_strided((tensor.numel(),), (1,)))
        assert vector.data_ptr() == tensor.data_ptr()


def test_compiles_to_one_graph_that_sees_the_gradients_change() -> None:
    """Gradients that the graph itself computes and scales are read after that."""

    def update(given: dict[str, Any]) -> None:
        gradients = [gradient * 2 for gradient in given["gradients"]]
        given["gradients"][0].mul_(3)
        gradients[0] = given["gradients"][0]
        sgd_update_(**{**given, "gradients": gradients})

    ours = arguments(averages=2, scaled=True)
    theirs = copied(ours)
    compiled = torch.compile(update, fullgraph=True)
    for lr in (0.1, 0.2):
        for given in (ours, theirs):
            given["lr"].fill_(lr)
        compiled(ours)
        update(theirs)
    for name in BUCKETS[:3]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch trace kernels for an sm_90 that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget

    pretended = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", pretended)
    monkeypatch.setattr(module, "use_triton", lambda tensor: tensor.device.type == "cuda")


@needs_kernels
@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_on_a_gpu_the_compiled_step_holds_one_kernel_that_is_given_the_gradients() -> None:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode():
        flat = [torch.empty(4112, device="cuda") for _ in range(3)]
        gradients = [torch.empty(5, 3, 3, 3, device="cuda"), torch.empty(3000, device="cuda")]
        table, scalars = torch.empty(4, 3, dtype=torch.int64, device="cuda"), [torch.empty((), device="cuda") for _ in range(2)]

        def update(parameters, momenta, average, table, lr, decay, *gradients):
            sgd_update_(parameters, momenta, list(gradients), table, [0, 144], lr, 0.9, 0.0, average, decay, None, None, None)

        aot_function(update, record, keep_inference_input_mutations=True)(*flat, table, *scalars, *gradients)
    (graph,) = graphs
    (kernel,) = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert sorted(kernel.kwargs["tensors_to_clone"]) == ["averages_ptr", "momenta_ptr", "parameters_ptr"]
    assert "cat" in str(kernel.kwargs["kwargs"]["gradient_ptr"].target)


@needs_kernels
def test_compile_caches_see_the_kernel() -> None:
    assert torch._library.triton.get_triton_kernels_for_op("fastcifar::sgd_update_") == [module.sgd_kernel]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("parameters", torch.zeros(64, dtype=torch.float64), TypeError),
        ("parameters", torch.zeros(4, 16), ValueError),
        ("parameters", torch.zeros(64, requires_grad=True), ValueError),
        ("momenta", torch.zeros(64).half(), TypeError),
        ("momenta", torch.zeros(63), ValueError),
        ("momenta", torch.zeros(64, device="meta"), ValueError),
        ("gradients", [], ValueError),
        ("gradients", [torch.zeros(17), torch.zeros(3).half()], TypeError),
        ("gradients", [torch.zeros(17), torch.zeros(6)[::2]], ValueError),
        ("gradients", [torch.zeros(17), torch.zeros(3, device="meta")], ValueError),
        ("table", torch.zeros(2, 3), TypeError),
        ("table", torch.zeros(3, 3, dtype=torch.int64), ValueError),
        ("offsets", [0], ValueError),
        ("offsets", [0, 20], ValueError),
        ("offsets", [0, 16], ValueError),
        ("parameters", torch.zeros(32), ValueError),
        ("lr", torch.zeros((), dtype=torch.float64), TypeError),
        ("lr", torch.zeros(1), ValueError),
        ("averages", torch.zeros(5, 64), ValueError),
        ("averages", torch.zeros(1, 48), ValueError),
        ("averages", None, ValueError),
        ("decays", None, ValueError),
        ("decays", torch.zeros(2), ValueError),
        ("shadow", torch.zeros(64), TypeError),
        ("shadow", torch.zeros(63).half(), ValueError),
        ("inverse_scale", torch.zeros((), dtype=torch.float64), TypeError),
        ("found_inf", torch.zeros(1), ValueError),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_a_bad_argument_is_named(name: str, value: Any, error: type[Exception]) -> None:
    flat = torch.zeros(64)
    good = {
        **{"parameters": flat, "momenta": flat.clone(), "gradients": [torch.zeros(17), torch.zeros(3)], "offsets": [0, 32]},
        **{"table": torch.zeros(2, 3, dtype=torch.int64), "lr": torch.tensor(0.1), "momentum": 0.9, "weight_decay": 0.0},
        **{"averages": torch.zeros(1, 64), "decays": torch.zeros(1), "shadow": flat.half()},
        **{"inverse_scale": torch.tensor(1.0), "found_inf": torch.tensor(0.0)},
    }
    sgd_update_(**good)
    blamed = {"averages": "(averages|decays)", "parameters": "(parameters|momenta)"}.get(name, name)
    with pytest.raises(error, match=rf"^{blamed} must .*\.$"):
        sgd_update_(**{**good, name: value})


@pytest.mark.parametrize(
    ("parameter", "gradient", "blamed"),
    [
        (torch.zeros(64)[16:20], torch.zeros(5), "gradients"),
        (torch.zeros(64)[16:20].view(2, 2), torch.zeros(2, 2).T, "gradients"),
        (torch.zeros(64)[16:20], torch.zeros(64)[1:5], "gradients"),
        (torch.zeros(64)[15:19], torch.zeros(4), "parameters"),
    ],
    ids=["shape", "strides", "unaligned gradient", "unaligned parameter"],
)
def test_a_table_of_what_the_kernel_could_not_read_is_refused(parameter: Tensor, gradient: Tensor, blamed: str) -> None:
    with pytest.raises(ValueError, match=rf"^{blamed}\[1\] must .*\.$"):
        gradient_table([torch.zeros(3), parameter], [torch.zeros(3), gradient])


@needs_kernels
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("interpreted_sgd.py"))]
    finished = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("compiled", [False, True], ids=["addresses", "compiled"])
@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
@pytest.mark.parametrize("case", [*SPEC.small_cases(), SPEC.network_cases()[-1]], ids=lambda case: case.name)
def test_the_kernel_equals_the_reference(case: Case, dtype: torch.dtype, compiled: bool) -> None:
    torch.compiler.reset()
    on_gpu = SPEC.make(case.shape, dtype, torch.device("cuda"))
    expected = copied(on_gpu)
    update = torch.compile(sgd_update_, fullgraph=True) if compiled else sgd_update_
    for _ in range(3):
        update(**on_gpu)
        sgd_update_reference(**expected)
    assert_buckets_equal(on_gpu, expected)


@pytest.mark.gpu
@needs_kernels
def test_a_captured_graph_reads_new_gradients_and_rates() -> None:
    on_gpu = arguments(torch.float16, averages=2, scaled=True, device="cuda")
    sgd_update_(**{**on_gpu, **{name: on_gpu[name].clone() for name in BUCKETS}})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sgd_update_(**on_gpu)
    for step in range(4):
        on_gpu["lr"].fill_(0.1 / (1 + step))
        on_gpu["found_inf"].fill_(step == 2)
        for gradient in on_gpu["gradients"]:
            gradient.normal_()
        expected = copied(on_gpu)
        graph.replay()
        sgd_update_reference(**expected)
        assert_buckets_equal(on_gpu, expected)
