"""Only what is right is timed, and ratios are against the original's order."""

import pytest

from cmt_fast.modules import LMHSA
from cmt_fast.testing.benchmark import MODES, bench, default_providers
from cmt_fast.testing.precision import precision
from cmt_fast.testing.providers import PROVIDERS

# 64 pixels leave 2 x 2 maps: BatchNorm over the two values of a batch of 1 x 1 maps would magnify rounding without limit
TINY = dict(models=["cmt_ti"], img_size=64, seconds=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_rows(mode):
    seen = []
    rows = bench(**TINY, providers=["original", "reference"], batches=[2], mode=mode, on_rows=seen.extend)
    assert rows == seen
    original, reference = rows
    assert (original.provider, original.ratio) == ("original", 1.0)
    assert reference.ratio == original.median_ms / reference.median_ms
    assert reference.p20_ms <= reference.median_ms <= reference.p80_ms
    assert reference.images_per_s == pytest.approx(2000 / reference.median_ms)
    assert (reference.mode, reference.batch, reference.img_size, reference.note) == (mode, 2, 64, "")


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast-bfloat16"])
def test_low_precision_passes_the_gate(dtype):
    rows = bench(**TINY, providers=["reference"], dtypes=[dtype])
    assert rows[0].median_ms is not None, rows[0].note
    assert rows[0].ratio is None, "without a baseline there is no ratio"


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_provider_gets_no_number(mode, monkeypatch):
    forward = LMHSA.forward
    monkeypatch.setattr(LMHSA, "forward", lambda self, x, *args, **kwargs: forward(self, x, *args, **kwargs) + 0.1 * x)
    original, reference = bench(**TINY, providers=["original", "reference"], mode=mode)
    assert original.median_ms is not None
    assert reference.median_ms is None and reference.note.startswith("wrong: ")


def test_a_wrong_gradient_alone_gets_no_number(monkeypatch):
    forward = LMHSA.forward
    monkeypatch.setattr(
        LMHSA,
        "forward",
        lambda self, x, h, w, bias, **kwargs: forward(self, x, h, w, bias.detach() + 0 * bias, **kwargs),
    )
    _, reference = bench(**TINY, providers=["original", "reference"], mode="training", batches=[2])
    assert reference.median_ms is None and "grad relative_pos_a" in reference.note


def test_a_provider_that_raises_gets_no_number(monkeypatch):
    def out_of_memory(self, *args, **kwargs):
        raise RuntimeError("out of memory\nlong explanation")

    monkeypatch.setattr(LMHSA, "forward", out_of_memory)
    original, reference = bench(**TINY, providers=["original", "reference"])
    assert original.median_ms is not None
    assert reference.median_ms is None and reference.note == "RuntimeError: out of memory"


def test_every_provider_that_needs_no_compiler_passes_the_gate():
    names = ["original", "original-channels-last", "auto", "optimize", "optimize-reference"]
    rows = bench(**TINY, providers=names, batches=[6])
    assert [(row.provider, row.note) for row in rows] == [(name, "") for name in names]
    assert all(row.runs >= 5 for row in rows)


@pytest.mark.parametrize("mode", MODES)
def test_by_default_only_what_can_run_is_timed(mode):
    assert not any(PROVIDERS[name].unsupported(precision("float32"), mode) for name in default_providers(mode))
    assert ("optimize" in default_providers(mode)) == (mode == "inference")


def test_an_optimized_model_under_autocast_computes_in_the_dtype_of_autocast():
    original, optimized = bench(**TINY, providers=["original", "optimize-reference"], dtypes=["autocast-bfloat16"])
    assert optimized.ratio == original.median_ms / optimized.median_ms, optimized.note


@pytest.mark.parametrize(
    "provider, dtype, mode, note",
    [
        ("optimize", "float32", "training", "inference only: it has no training step"),
        ("onnxruntime", "bfloat16", "inference", "float32 only: not timed in bfloat16"),
    ],
)
def test_what_a_provider_cannot_do_is_said_without_a_number(provider, dtype, mode, note):
    (row,) = bench(**TINY, providers=[provider], dtypes=[dtype], batches=[2], mode=mode)
    assert (row.median_ms, row.note) == (None, note)
