"""The reading of events that are made up by hand."""

from __future__ import annotations

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from fastcifar.diagnostics.profile_report import PARTS, costliest, kernel_seconds, launches_of, share_busy, split_of


def event(name: str, start: int, duration: int, where: str = "host", thread: int = 1) -> FunctionEvent:
    """Makes a stretch in microseconds: on the host, on the card, or marked in the code on either."""
    device = DeviceType.CUDA if "card" in where else DeviceType.CPU
    options = {"device_type": device, "use_device": "cuda", "is_user_annotation": "mark" in where}
    return FunctionEvent(0, name, thread, start, start + duration, **options)


def nested(*events: FunctionEvent) -> EventList:
    """Nests events as the profiler returns them, each with those around it."""
    found = EventList(events)
    found._build_tree()
    return found


def test_events_of_a_gpu():
    """There are two steps, whose kernels overlap once; the stream of the data runs beside them."""
    events = nested(
        event("part: forward", 0, 100, "mark"),
        event("part: forward", 10, 300, "mark on card"),
        event("part: backward", 100, 100, "mark"),
        event("part: data", 220, 30, "mark"),
        event("somebody else's", 0, 500, "mark"),
        event("aten::conv", 1, 50),
        event("conv", 10, 20, "card"),
        event("conv", 20, 30, "card"),
        event("Memset", 90, 20, "card"),
        event("wgrad", 150, 50, "card"),
        event("crop", 160, 10, "card", 9),
        event("crop", 230, 20, "card", 9),
        event("lost", 300, 10, "card"),
        event("cudaLaunchKernel", 2, 1),
        event("cuLaunchKernelEx", 4, 1),
        event("cudaGraphLaunch", 6, 1),
        event("cudaMemsetAsync", 8, 1),
        event("cudaStreamSynchronize", 9, 90),
    )
    assert kernel_seconds(events) == pytest.approx({"forward": 70e-6, "backward": 60e-6, "data": 20e-6})
    assert share_busy(events) == pytest.approx((40 + 20 + 50 + 20 + 10) / 300)
    assert launches_of(events, 2) == {"launches": 3.5, "host_launches": 2.0}
    found = [(one.name, one.calls, round(2e6 * one.seconds)) for one in costliest(events, 2)]
    assert found == [("conv", 1, 50), ("wgrad", 0.5, 50), ("crop", 1, 30), ("Memset", 0.5, 20), ("lost", 0.5, 10)]


def test_events_of_a_cpu():
    """An operation's own time is its time less that of operations within it, on its thread."""
    events = nested(
        event("part: forward", 0, 100, "mark"),
        event("outer", 0, 100),
        event("inner", 10, 30),
        event("innermost", 10, 30),
        event("inner", 40, 20),
        event("other thread", 50, 500, thread=2),
        event("outer", 100, 10),
    )
    assert launches_of(events, 3) == {"launches": 1.0, "host_launches": None}
    found = {one.name: (one.calls, round(1e6 * one.seconds)) for one in costliest(events, 1)}
    assert found == {"other thread": (1, 500), "outer": (2, 60), "inner": (2, 20), "innermost": (1, 30)}
    assert share_busy(events) == 0.0
    assert [one.name for one in costliest([event(f"op{i}", 100 * i, i) for i in range(1, 31)], 1)] == [
        f"op{i}" for i in range(30, 20, -1)
    ]


@pytest.mark.parametrize(
    ("parts", "idle", "expected"),
    [
        ({"forward": 2.0, "backward": 3.0, "data": 1.0}, 4.0, {"data": 1, "forward": 2, "backward": 3, "idle": 4}),
        ({"forward": 8.0, "data": 4.0}, 1.0, {"data": 3, "forward": 6, "idle": 1}),
        ({}, 0.0, {"idle": 10}),
    ],
)
def test_the_split_is_the_whole_step(parts, idle, expected):
    split = split_of(parts, idle, 10.0)
    assert tuple(split) == PARTS
    assert split == pytest.approx(dict.fromkeys(PARTS, 0) | expected)
