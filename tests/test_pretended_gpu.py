"""The pretended GPU punishes what a real one would; `test_gpu_runs.py` shows that it lets the rest through."""

import pytest
import torch
from gpu_rules import CARD, Broken


@pytest.fixture(autouse=True)
def forgiven(gpu):
    """Lets a test end well although it broke a rule."""
    yield
    gpu.broken.clear()


def test_a_tensor_says_where_it_was_put(gpu):
    there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
    assert (there.device, there.is_cuda, here.device.type, here.is_cuda) == (CARD, True, "cpu", False)
    with pytest.raises(TypeError, match="cuda:0"):
        there.numpy()


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda card, host: card + host, "tensors of the CPU and of the GPU"),
        (lambda card, host: card.sum().item(), "waits for the GPU"),
        (lambda card, host: card.tolist(), "waits for the GPU"),
        (lambda card, host: card.cpu(), "waits for the GPU"),
        (lambda card, host: card[card > 0], "waits for the GPU"),
        (lambda card, host: host.to(card.device, non_blocking=True), "not pinned"),
        (lambda card, host: card.copy_(host), "not pinned"),
        (lambda card, host: card[host.long()], "not pinned"),
        (lambda card, host: torch.tensor([1.0], device=card.device), "not pinned"),
        (lambda card, host: torch.cuda.synchronize(), "waits for the GPU"),
    ],
)
def test_what_a_steady_epoch_must_not_do(gpu, call, rule):
    card, host = torch.ones(3, device=CARD), torch.ones(3)
    with gpu.steady(), pytest.raises(Broken, match=rule):
        call(card, host)


def test_streams_must_wait_for_each_other(gpu):
    side = torch.cuda.Stream(CARD)
    card = torch.ones(3, device=CARD) + 1
    with torch.cuda.stream(side), pytest.raises(Broken, match="stream side uses what default has not finished with"):
        card + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = card + 1
    with pytest.raises(Broken, match="stream default uses what side"):
        there + 1
    torch.cuda.current_stream().wait_stream(side)
    assert (there + 1).tolist() == [4.0, 4.0, 4.0]


def test_memory_given_back_must_not_be_read_any_more(gpu):
    side = torch.cuda.Stream(CARD)
    with torch.cuda.stream(side):
        there = torch.ones(3, device=CARD)
    torch.cuda.current_stream().wait_stream(side)
    there.sum()
    del there
    with pytest.raises(Broken, match="record_stream"):
        gpu.purge()


def test_a_capture_runs_nothing_and_a_replay_runs_no_python(gpu):
    factor = 2.0
    count, seen = torch.zeros(1, device=CARD), torch.zeros(1, device=CARD)
    weight = torch.tensor([3.0], device=CARD, requires_grad=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count.add_(1)
        (weight * count * factor).sum().backward()
        seen.copy_(weight.grad)
        weight.grad = None
    assert (count.item(), seen.item()) == (0.0, 0.0)
    factor = 100.0
    for step in (1, 2, 3):
        graph.replay()
        assert (count.item(), seen.item()) == (step, 2.0 * step)


def test_a_capture_must_not_wait(gpu):
    card = torch.ones(3, device=CARD)
    with pytest.raises(Broken, match="waits in a capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        card.sum().item()
