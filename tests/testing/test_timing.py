"""Times are per call, fair, and never of nothing."""

import gc
import platform
import subprocess
import sys
import time

import pytest
import torch

from cmt_fast.testing import timing
from cmt_fast.testing.timing import measure, measure_interleaved, peak_memory


def test_a_sleep_takes_its_time():
    timing = measure(lambda: time.sleep(0.004), seconds=0.05)
    assert 0.004 <= timing.p20 <= timing.median <= timing.p80 < 0.04
    assert timing.runs >= 5


def test_a_fast_call_is_repeated_within_a_sample():
    calls = []
    timing = measure(lambda: calls.append(1), seconds=0.02)
    assert timing.median < 1e-4
    assert timing.runs > 1000
    assert timing.runs <= len(calls)


def test_calls_take_turns():
    order: list[str] = []

    def call(name: str):
        return lambda: (order.append(name), time.sleep(0.002))

    timings = measure_interleaved({"a": call("a"), "b": call("b")}, seconds=1e-6, min_runs=6)
    assert timings["a"].runs == timings["b"].runs == 6
    measured = order[-12:]
    rounds = [set(measured[i : i + 2]) for i in range(0, 12, 2)]
    assert rounds == [{"a", "b"}] * 6
    assert measured[:4] == ["a", "b", "b", "a"], "the order must turn, so that none always follows the other"


def test_garbage_collection_is_off_while_measuring_and_back_after():
    seen = []
    measure(lambda: seen.append(gc.isenabled()), seconds=0.01)
    assert not seen[-1] and gc.isenabled()
    with pytest.raises(RuntimeError):
        measure(lambda: exec("raise RuntimeError"), seconds=0.01)
    assert gc.isenabled()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator, and this is another C library")
def test_freed_memory_stays_with_the_process():
    """Else the system clears the pages of every large tensor again, and the time depends on what the process did before."""
    code = (
        "import resource, torch; from cmt_fast.testing.timing import measure; measure(lambda: torch.ones(1 << 24), seconds=0.01);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; torch.ones(1 << 24);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1000, "a page each of 16384"


def test_nothing_to_measure():
    assert measure_interleaved({}) == {}


@pytest.mark.parametrize("wrong", [dict(seconds=0), dict(min_runs=0), dict(seconds=-1.0)])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        measure(lambda: None, **wrong)


def test_peak_memory_of_a_cpu_is_unknown():
    assert peak_memory(lambda: None, "cpu") is None


@pytest.mark.gpu
def test_gpu_time_and_memory():
    x = torch.randn(4096, 4096, device="cuda")
    both = measure_interleaved(
        {"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}, seconds=0.2, device="cuda"
    )
    assert 2.5 < both["four"].median / both["one"].median < 5.5
    cold = measure_interleaved({"copy": lambda: x.clone()}, seconds=0.2, device="cuda", cold_cache=True)["copy"]
    assert 2 * x.nbytes / cold.median < 10e12, "no memory is that fast"
    assert peak_memory(lambda: x @ x, "cuda") == x.nbytes


def test_a_slow_call_runs_three_times_and_others_more_often(monkeypatch):
    monkeypatch.setattr(timing, "_SLOW_SECONDS", 0.05)
    timings = measure_interleaved({"slow": lambda: time.sleep(0.06), "fast": lambda: time.sleep(0.002)}, seconds=1e-6)
    assert timings["slow"].runs == 3
    assert 3 * 2 <= timings["fast"].runs <= 3 * 10
