"""Optimized models on a GPU: numbers, graphs, memory, threads, streams, several devices, torch.compile."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import cmt_fast
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.inputs import in_double, randomise
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_model(name: str = "cmt_ti", dtype: torch.dtype = torch.bfloat16, **config) -> cmt_fast.CMT:
    model = getattr(cmt_fast, name)(num_classes=10, **config)
    return randomise(model, torch.Generator().manual_seed(3)).eval().to("cuda", dtype)


def images(batch: int, *size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 5) -> Tensor:
    size = size or (160, 160)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.fixture(scope="module")
def fast() -> cmt_fast.OptimizedModel:
    return cmt_fast.optimize(random_model())


@pytest.fixture(scope="module")
def plain() -> cmt_fast.OptimizedModel:
    return cmt_fast.optimize(random_model(), graph=False)


# ---- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, dtype):
    model = random_model(name, dtype)
    fast = cmt_fast.optimize(model)
    assert (fast.backend, fast.graph) == ("triton", True)
    size = model.img_size
    with torch.no_grad(), cmt_fast.use_backend("reference"):
        for batch in (1, 9):
            x = images(batch, *size, dtype=dtype)
            exact, own = in_double(model)(x.double()), model(x)
            for run in ("as it is", "captured", "replayed"):
                assert_within(f"batch {batch} {run}", fast(x), exact, own)


def test_the_graph_changes_no_bit(fast, plain):
    for seed in range(6):
        x = images(4, seed=seed)
        assert torch.equal(fast(x), plain(x))
        assert all(
            torch.equal(a, e) for a, e in zip(fast.forward_intermediates(x)[1], plain.forward_intermediates(x)[1])
        )


def test_feature_maps_of_detection():
    model = cmt_fast.cmt_ti(features_only=True)
    randomise(model, torch.Generator().manual_seed(3)).eval().to("cuda", torch.bfloat16)
    fast, plain = cmt_fast.optimize(model), cmt_fast.optimize(model, graph=False)
    for size in ((160, 160), (256, 352), (352, 256)):
        x = images(2, *size)
        for _ in range(3):
            assert all(torch.equal(a, e) for a, e in zip(fast(x), plain(x)))
    assert len(fast._graphs) == 3


# ---- results, streams, threads --------------------------------------------------------------------------------------------


def test_results_are_not_overwritten(fast, plain):
    inputs = [images(2, seed=seed) for seed in range(20)]
    results = [fast(x) for x in inputs]
    assert all(torch.equal(result, plain(x)) for result, x in zip(results, inputs))


def test_streams(fast, plain):
    inputs = [images(3, seed=seed) for seed in range(32)]
    expected = [plain(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 4]):
            results.append(fast(x))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(results, expected))


def test_threads_that_capture_replay_and_allocate():
    fast, plain = cmt_fast.optimize(random_model()), cmt_fast.optimize(random_model(), graph=False)
    inputs = [images(1 + i % 10, seed=i) for i in range(30)]
    expected, problems = [plain(x) for x in inputs], []
    torch.cuda.synchronize()

    def work(first: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(first, first + 90):
                    x = inputs[i % 30].clone()
                    torch.empty(1 << (10 + i % 16), device="cuda")
                    result = fast(x)
                    x.zero_()
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(result, expected[i % 30]):
                        problems.append(i)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 12, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_loader_with_pinned_memory(fast, plain):
    data = torch.randn(70, 3, 160, 160)
    results = []
    with torch.inference_mode():
        for (batch,) in DataLoader(TensorDataset(data), batch_size=8, num_workers=2, pin_memory=True):
            results.append(fast(batch.to("cuda", non_blocking=True)))
        expected = [plain(batch.cuda()) for batch in data.split(8)]
    assert all(torch.equal(*pair) for pair in zip(results, expected))


def test_two_graphs_at_once_share_no_workspace(fast, plain):
    """Replays of two shapes overlap on two streams; K/V products of cuBLAS have a workspace in each graph."""
    small, large = images(1), images(16)
    expected = plain(small), plain(large)
    for x in (small, small, large, large):
        fast(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for stream, x in zip(streams, (small, large)):
            with torch.cuda.stream(stream):
                results.append(fast(x))
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(results, expected))


# ---- memory --------------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_given_back():
    fast = cmt_fast.optimize(random_model())
    fast._graphs.limit = 2
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_allocated(), []
    for batch in range(32, 40):
        x = images(batch)
        for _ in range(3):
            fast(x)
        del x
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert max(held[3:]) < 1.5 * held[1], "graphs that left keep no pool"
    del fast
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before


def test_a_model_that_goes_while_it_runs(plain):
    x = images(64)
    expected = plain(x)
    fast = cmt_fast.optimize(random_model())
    results = [fast(x) for _ in range(20)]
    del fast
    gc.collect()
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 26,), float("nan"), device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results), len(junk)


# ---- beside others ---------------------------------------------------------------------------------------------------------


def test_inside_the_callers_graph(fast, plain):
    x = images(2)
    for _ in range(3):
        fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
    x.copy_(images(2, seed=9))
    graph.replay()
    assert torch.equal(y, plain(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(fast, mode):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: fast(x).softmax(-1), mode=mode, fullgraph=True)
    with torch.inference_mode():
        for seed in range(4):
            x = images(2, seed=seed)
            torch.testing.assert_close(compiled(x), fast(x).softmax(-1))


def test_on_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = random_model()
    models = [cmt_fast.optimize(model, device=f"cuda:{i}") for i in range(2)]
    x = images(2)
    expected = models[0](x)
    for _ in range(3):
        for i, fast in enumerate(models):
            result = fast(x.to(f"cuda:{i}"))
            assert result.device.index == i
            torch.testing.assert_close(result.cpu(), expected.cpu())
    with pytest.raises(ValueError, match="the input is on cuda:0 but the packed model is on cuda:1"):
        models[1](x)


def test_a_tensor_on_the_cpu_is_refused(fast):
    with pytest.raises(ValueError, match="the input is on cpu but the packed model is on cuda:0"):
        fast(images(1).cpu())


def test_plain_pytorch_in_a_graph():
    """The program in float64, which no kernel takes, is captured all the same."""
    model = random_model(dtype=torch.float64)
    fast = cmt_fast.optimize(model)
    assert (fast.backend, fast.graph) == ("reference", True)
    x = images(2, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            exact = model(x)
            assert (fast(x) - exact).abs().max() <= 1e-12 * exact.abs().max()
