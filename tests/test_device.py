"""What the system reports of memory."""

import sys

import pytest
import torch

from fastcifar import device as machine

CPU = torch.device("cpu")


def test_free_memory_is_that_of_the_control_group_where_it_is_less(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert machine.free_memory(CPU, tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 1000 kB\nMemAvailable:    5000 kB\n")
    assert machine.free_memory(CPU, tmp_path) == 5000 * 1024
    write("proc/self/cgroup", "0::/user.slice/shell.scope\n")
    write("sys/fs/cgroup/user.slice/memory.max", "4000000\n")
    write("sys/fs/cgroup/user.slice/memory.current", "1500000\n")
    write("sys/fs/cgroup/user.slice/memory.stat", "active_file 7\ninactive_file 500000\n")
    write("sys/fs/cgroup/user.slice/shell.scope/memory.max", "max\n")
    write("sys/fs/cgroup/user.slice/shell.scope/memory.current", "9\n")
    assert machine.free_memory(CPU, tmp_path) == 3_000_000
    write("proc/self/cgroup", "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n")
    assert machine.free_memory(CPU, tmp_path) == 5000 * 1024
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n")  # the container's own, whose name it does not see
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1999999\n")
    write("sys/fs/cgroup/memory/memory.stat", "inactive_file 3\ntotal_inactive_file 10\n")
    assert machine.free_memory(CPU, tmp_path) == 11
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "2999999\n")
    assert machine.free_memory(CPU, tmp_path) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own figures")
def test_own_memory_and_its_peak_are_what_linux_says_of_this_process_alone(tmp_path):
    assert (machine.own_memory(tmp_path), machine.peak_memory_bytes(CPU, tmp_path)) == (0, None)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(
        "VmHWM:\t 1100 kB\nVmRSS:\t 900 kB\nRssAnon:\t     700 kB\nRssFile:\t 200 kB\n"
    )
    assert (machine.own_memory(tmp_path), machine.peak_memory_bytes(CPU, tmp_path)) == (700 * 1024, 1100 * 1024)
