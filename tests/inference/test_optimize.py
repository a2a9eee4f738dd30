"""cmt_fast.optimize: the same results as the model, on what backend, and what it refuses."""

from __future__ import annotations

import copy
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import cmt_fast
from cmt_fast import _native
from cmt_fast.inference import load_packed, pack, save_packed
from cmt_fast.inference.native import layout
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.inputs import in_double, randomise
from cmt_fast.testing.tolerance import assert_within

optimize_module = sys.modules["cmt_fast.inference.optimize"]  # cmt_fast.inference.optimize may be the function
needs_library = pytest.mark.skipif(_native.load() is not None, reason=f"native: {_native.load()}")

GOLDEN = Path(__file__).parents[1] / "golden"
LOW = (torch.float32, torch.bfloat16)
each_low = pytest.mark.parametrize("dtype", LOW, ids=str)
# PyTorch's matrix products, where they are used, may round otherwise with another number of rows or threads.
each_of_our_products = pytest.mark.parametrize("dtype", LOW[: 1 if layout.multiplies_bfloat16() else 2], ids=str)
TINY = dict(
    img_size=64,
    num_classes=5,
    embed_dims=(6, 12, 12, 28),
    stem_channel=5,
    fc_dim=18,
    num_heads=(1, 2, 2, 4),
    depths=(1, 1, 1, 1),
    mlp_ratios=(3.6,) * 4,
)


def random_model(model=None, **config):
    """In eval mode, with no norm, bias or statistic at its trivial start."""
    model = cmt_fast.CMT(**{**TINY, **config}) if model is None else model
    return randomise(model, torch.Generator().manual_seed(3)).eval()


def images(batch: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    size = size or (64, 64)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5)).to(dtype)


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float64 and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


# ---- results -------------------------------------------------------------------------------------------------------------


@needs_library
@each_low
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, dtype):
    model = random_model(getattr(cmt_fast, name)(img_size=(32, 64), num_classes=10)).to(dtype)
    x = images(8, 32, 64, dtype=dtype)
    fast = cmt_fast.optimize(model)
    assert (fast.backend, fast.dtype, fast.img_size, fast.in_chans) == ("native", dtype, (32, 64), 3)
    with torch.no_grad():
        exact, plain = in_double(model), model
        assert_within("logits", fast(x), exact(x.double()), plain(x))
        last = exact.forward_features(x.double())
        assert_within("features", fast.forward_features(x), last, plain.forward_features(x))


def golden(name: str):
    """Model, input and logits of the original code, in float64."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model = cmt_fast.CMT(**config).double().eval()
    model.load_state_dict({key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")})
    return model, tensors["input"], tensors["eval.logits"]


@pytest.mark.parametrize("name", ["aligned", "odd"])
def test_golden_in_float64(name):
    model, x, logits = golden(name)
    fast = cmt_fast.optimize(model)
    assert fast.backend == "reference"
    assert_exact(fast(x), logits)


@needs_library
@each_low
@pytest.mark.parametrize("name", ["aligned", "odd"])
def test_golden_in_low_precision(name, dtype):
    model, x, _ = golden(name)
    model = model.to(dtype)
    x = torch.cat([x + 0.1 * i for i in range(8)])[:8].to(dtype)
    with torch.no_grad():
        assert_within("logits", cmt_fast.optimize(model)(x), in_double(model)(x.double()), model(x))


@needs_library
@each_low
@pytest.mark.parametrize("size", [(64, 64), (64, 72), (63, 95), (96, 33)], ids=str)
def test_intermediates_and_sizes(size, dtype):
    model = random_model().to(dtype)
    fast, exact = cmt_fast.optimize(model), in_double(model)
    assert fast.backend == "native"
    x = images(8, *size, dtype=dtype)
    with torch.no_grad():
        final, maps = fast.forward_intermediates(x)
        expected_final, expected = exact.forward_intermediates(x.double())
        plain_final, plain = model.forward_intermediates(x)
        assert_within("final", final, expected_final, plain_final)
        assert len(maps) == len(expected) == 4
        for i, (actual, wanted, own) in enumerate(zip(maps, expected, plain)):
            assert_within(f"map {i}", actual, wanted, own)
        assert_within("logits", fast(x), exact(x.double()), model(x))


@needs_library
def test_between_the_products_of_pytorch(monkeypatch):
    """What a CPU with bfloat16 arithmetic runs."""
    monkeypatch.setattr(layout, "multiplies_bfloat16", lambda: True)
    model, x = random_model().bfloat16(), images(8, dtype=torch.bfloat16)
    fast = cmt_fast.optimize(model)
    assert fast.backend == "native"
    with torch.no_grad():
        assert_within("logits", fast(x), in_double(model)(x.double()), model(x))


@needs_library
def test_arguments_of_forward_intermediates():
    model = random_model()
    fast, x = cmt_fast.optimize(model), images(1)
    _, maps = fast.forward_intermediates(x)
    only = fast.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(a, maps[i]) for a, i in zip(only, (1, 3)))
    final, chosen = fast.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(final, maps[0]) and torch.equal(chosen[0], maps[0])
    for arguments in (dict(indices=2), dict(indices=[-1, 0]), dict(norm=True)):
        _, ours = fast.forward_intermediates(x, **arguments)
        _, theirs = model.forward_intermediates(x, **arguments)
        assert [t.shape for t in ours] == [t.shape for t in theirs]
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        fast.forward_intermediates(x, output_fmt="NLC")


@needs_library
@each_low
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (2, 0)])
def test_features(out_indices, dtype):
    model = cmt_fast.CMTFeatures(random_model().to(dtype), out_indices)
    fast, x = cmt_fast.optimize(model), images(8, dtype=dtype)
    assert fast.backend == "native" and fast.out_indices == out_indices
    with torch.no_grad():
        results = fast(x), in_double(model)(x.double()), model(x)
    for i, (actual, expected, own) in enumerate(zip(*results)):
        assert_within(f"map {i}", actual, expected, own)
        assert actual.is_contiguous(memory_format=torch.channels_last)


@needs_library
@each_of_our_products
def test_chunks_do_not_change_a_bit(dtype, monkeypatch):
    """Nor does the batch: an image has the result that it has alone."""
    model = random_model().to(dtype)
    x = images(5, dtype=dtype)
    whole = cmt_fast.optimize(model)
    for size in (1, 1 << 14, 1 << 16):  # one image a chunk, a few, other numbers in each stage
        monkeypatch.setattr(optimize_module, "CHUNK_BYTES", size)
        fast = cmt_fast.optimize(model)
        for batch in (0, 1, 2, 5):
            expected = whole.forward_intermediates(x[:batch], intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(fast.forward_intermediates(x[:batch])[1], expected))
            assert torch.equal(fast(x[:batch]), whole(x[:batch]))
            assert fast(x[:batch]).shape == (batch, 5)
    alone = torch.cat([whole.forward_features(image[None]) for image in x])
    assert torch.equal(alone, whole.forward_features(x))


@needs_library
@each_of_our_products
def test_threads_do_not_change_a_bit(dtype):
    model = random_model(cmt_fast.cmt_ti(img_size=64, num_classes=10)).to(dtype)
    fast = cmt_fast.optimize(model)
    for batch in (1, 3):
        x = images(batch, dtype=dtype)
        expected = fast(x), fast.forward_features(x)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            try:
                actual = fast(x), fast.forward_features(x)
            finally:
                torch.set_num_threads(1)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected)), (batch, threads)


@needs_library
def test_any_input():
    """Strides, floating dtypes and the arithmetic of the caller do not matter."""
    fast, x = cmt_fast.optimize(random_model()), images(2)
    expected = fast(x)
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.double(),
        x.flip(3).flip(3),
        x.repeat(1, 1, 1, 2)[..., :64],
    ):
        assert torch.equal(fast(same), expected)
    assert fast(x.half()).dtype == torch.float32
    assert torch.equal(fast(x[:1].expand(4, -1, -1, -1))[3], expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), expected)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            y = fast(x)
        assert torch.equal(y, expected) and not y.requires_grad
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fast(x), expected)
        with torch.device("meta"):
            assert torch.equal(fast(x), expected)
    finally:
        torch.set_default_dtype(before)


@needs_library
def test_made_under_inference_mode():
    model, x = random_model(), images(2)
    expected = cmt_fast.optimize(model)(x)
    with torch.inference_mode():
        fast = cmt_fast.optimize(model)
    assert torch.equal(fast(x), expected)


@needs_library
@each_low
def test_not_a_number_stays_in_its_image(dtype):
    fast = cmt_fast.optimize(random_model().to(dtype))
    x = images(3, dtype=dtype)
    expected = fast(x)
    x[1, 0, 20, 20] = float("nan")
    y = fast(x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], expected[::2])
    assert torch.equal(fast(images(3, dtype=dtype)), expected)  # nothing is left of it in a thread's own memory


@needs_library
@each_low
def test_from_several_python_threads(dtype):
    fast = cmt_fast.optimize(random_model().to(dtype))
    inputs = [images(1 + i % 3, 64, 64 + 8 * (i % 4), dtype=dtype) * (1 + i) for i in range(8)]
    expected = [fast(x) for x in inputs]
    wrong: list[object] = []
    start = threading.Barrier(4)

    def work(first: int) -> None:
        try:
            start.wait()
            for i in range(first, first + 40):
                if not torch.equal(fast(inputs[i % 8]), expected[i % 8]):
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---- the model it was made of --------------------------------------------------------------------------------------------


@needs_library
@each_low
def test_model_is_left_alone(dtype):
    model, x = random_model().to(dtype), images(2, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    fast = cmt_fast.optimize(model)
    expected = fast(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    del model
    assert torch.equal(fast(x), expected)
    assert not list(fast.parameters()) and not fast.state_dict()
    assert torch.equal(fast.train()(x), expected)
    assert torch.equal(copy.deepcopy(fast)(x), expected)


@needs_library
@each_low
def test_from_a_file(dtype, tmp_path):
    model, x = random_model().to(dtype), images(2, dtype=dtype)
    fast = cmt_fast.optimize(model)
    maps = fast.forward_intermediates(x, [1, 3], intermediates_only=True)
    logits = fast(x)
    features = cmt_fast.CMTFeatures(copy.deepcopy(model), (1, 3))  # takes the head away
    for name, source, expected in (("logits", model, logits), ("maps", features, maps)):
        save_packed(pack(source, dtype=dtype), tmp_path / f"{name}.safetensors")
        loaded = cmt_fast.optimize(load_packed(tmp_path / f"{name}.safetensors"))
        assert loaded.backend == "native"
        assert all(torch.equal(a, e) for a, e in zip(loaded(x), expected))


def test_dtype_and_size_options():
    model = random_model()
    fast = cmt_fast.optimize(model, dtype=torch.float64, img_size=(96, 64))
    assert (fast.dtype, fast.img_size, fast.backend) == (torch.float64, (96, 64), "reference")
    wide = in_double(model)
    wide.set_input_size((96, 64))
    x = images(1, 96, 64).double()
    with torch.no_grad():
        assert_exact(fast(x), wide(x))
    half = cmt_fast.optimize(model, dtype=torch.float16)
    assert half.backend == "reference" and half(images(1)).dtype == torch.float16


# ---- the choice ----------------------------------------------------------------------------------------------------------


@needs_library
def test_explain():
    model, x = random_model(), images(1)
    fast = cmt_fast.optimize(model)
    name = "packed CMT, float32 on cpu"
    assert (
        str(fast.explain()) == f"{name}: native (1 call)\n    not triton: Triton kernels run on CUDA tensors, got cpu"
    )
    assert cmt_fast.explain(fast, x).calls == {(name, "native"): 1}
    assert f"{name}, img_size=(64, 64), backend=native" in repr(fast)
    plain = cmt_fast.optimize(model, backend="reference")
    assert plain.backend == "reference"
    assert cmt_fast.explain(plain, x).calls == {(name, "reference"): 1}
    with torch.no_grad():
        assert_within("reference", plain(images(8)), in_double(model)(images(8).double()), model(images(8)))
    half = cmt_fast.optimize(model, dtype=torch.float16)
    assert "not native: dtype must be float32 or bfloat16, got torch.float16" in str(half.explain())


@needs_library
def test_the_backend_is_chosen_once():
    model, x = random_model(), images(1)
    with cmt_fast.use_backend("reference"):
        plain = cmt_fast.optimize(model)
    fast = cmt_fast.optimize(model)
    assert (plain.backend, fast.backend) == ("reference", "native")
    with cmt_fast.use_backend("reference"):
        assert ("packed CMT, float32 on cpu", "native") in cmt_fast.explain(fast, x).calls


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda: "the compiled library is not built")
    model, x = random_model(), images(8)
    fast = cmt_fast.optimize(model)
    assert fast.backend == "reference"
    assert "not native: the compiled library is not built" in str(fast.explain())
    with torch.no_grad():
        assert_within("logits", fast(x), in_double(model)(x.double()), model(x))
    with pytest.raises(cmt_fast.BackendError, match="'native' cannot run optimize: the compiled library is not built"):
        cmt_fast.optimize(model, backend="native")


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(backend="triton"), cmt_fast.BackendError, "backend 'triton' cannot run optimize"),
        (
            dict(backend="native", dtype=torch.float16),
            cmt_fast.BackendError,
            "must be float32 or bfloat16, got torch.float16",
        ),
        (dict(backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
        (dict(dtype=torch.int8), ValueError, "dtype must be one of .*, got torch.int8"),
        (dict(img_size=16), ValueError, "leaves a stage without keys"),
    ],
)
def test_option_errors(options, error, message):
    with pytest.raises(error, match=message):
        cmt_fast.optimize(random_model(), **options)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"expected a cmt_fast.CMT or CMTFeatures, got Sequential"):
        cmt_fast.optimize(torch.nn.Sequential(random_model()))
    with pytest.raises(TypeError, match=r"expected a cmt_fast.CMT or CMTFeatures, got str"):
        cmt_fast.optimize("cmt_s.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(dtype=torch.bfloat16),
            "was made for dtype torch.float32, got dtype torch.bfloat16: pack the model again",
        ),
        (dict(device="meta"), r"was made for device cpu, got device meta: .*load_packed\(path, device=...\)"),
        (dict(img_size=96), r"was made for img_size \(64, 64\), got img_size \(96, 96\)"),
        (dict(img_size=[64, 96]), r"was made for img_size \(64, 64\), got img_size \(64, 96\)"),
    ],
)
def test_options_of_a_packed_model(options, message):
    packed = pack(random_model())
    with pytest.raises(ValueError, match=message):
        cmt_fast.optimize(packed, **options)
    cmt_fast.optimize(packed, dtype=torch.float32, device="cpu", img_size=64)


# ---- what it refuses ----------------------------------------------------------------------------------------------------


def test_no_gradients():
    fast, x = cmt_fast.optimize(random_model()), images(1).requires_grad_()
    for method in (fast, fast.forward_features, fast.forward_intermediates):
        with pytest.raises(RuntimeError, match="an optimized model has no gradients, but the input requires one"):
            method(x)
    with torch.no_grad():
        fast(x)


def test_cannot_be_moved():
    fast, x = cmt_fast.optimize(random_model()), images(1)
    expected = fast(x)
    for move in (torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")):
        with pytest.raises(
            RuntimeError, match=r"laid out for torch.float32 on cpu and cannot become .*: call cmt_fast.optimize"
        ):
            move(fast)
    for stay in (torch.nn.Module.float, torch.nn.Module.cpu, lambda m: m.to("cpu", torch.float32)):
        assert stay(fast) is fast
    assert torch.equal(fast(x), expected)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, 64, 64), ValueError, r"shape \(B, 3, H, W\), got \(3, 64, 64\); add the batch dimension"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "floating point, got torch.uint8"),
        (torch.zeros(1, 3, 64, 64, device="meta"), ValueError, "on meta but the packed model is on cpu"),
        (torch.zeros(1, 3, 20, 64), ValueError, "leaves a stage without keys"),
        ([1.0], ValueError, "got list"),
    ],
)
def test_input_errors(x, error, message):
    fast = cmt_fast.optimize(random_model())
    for method in (fast, fast.forward_features, fast.forward_intermediates):
        with pytest.raises(error, match=message):
            method(x)


# ---- torch.compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_library), "reference"])
def test_compile(backend, fullgraph):
    fast = cmt_fast.optimize(random_model(), backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=fullgraph)
    x = images(2)
    torch.testing.assert_close(compiled(x), fast(x))
