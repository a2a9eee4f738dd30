"""Time to the first result and memory, of a provider in a process of its own."""

import subprocess
import sys

import pytest

from cmt_fast.testing.fresh import measure_fresh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")


def test_memory_grows_with_the_batch_and_not_what_is_kept():
    one = measure_fresh("cmt_ti", "original", 1, "float32", 64)
    many = measure_fresh("cmt_ti", "original", 64, "float32", 64)
    assert one.ready_s > 0 and many.ready_s > 0
    # the widest map of the IRFFN, 16 x 16 of 184 channels, is there twice at least
    assert many.peak_mib > 2 * 64 * 16 * 16 * 184 * 4 / 2**20 > one.peak_mib
    assert many.kept_mib < many.peak_mib / 2


def test_the_providers_own_error_comes_back():
    with pytest.raises(RuntimeError, match="ValueError: an image of 8 x 8 pixels"):
        measure_fresh("cmt_ti", "original", 1, "float32", 8)


def test_what_a_provider_cannot_do_starts_no_process():
    with pytest.raises(ValueError, match="float32 only"):
        measure_fresh("cmt_ti", "onnxruntime", 1, "bfloat16", 64)


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        measure_fresh("cmt_ti", "original", 1, "float32", 64, timeout=0.1)
