"""The cache of CUDA graphs, without a GPU: everything but the capture itself.

The fake below replays like a GPU would at its worst: only what is ordered by a stream or an event has happened, and a graph writes to the very
memory it was captured with.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cmt_fast
from cmt_fast.inference import cuda_graph
from cmt_fast.inference.cuda_graph import Cuda, GraphCache
from cmt_fast.testing.inputs import randomise
from cmt_fast.testing.shapes import SMALL_MODELS

CPU = torch.device("cpu")


class FakeEvent:
    """Knows the work that it stands for."""

    def __init__(self, log: list) -> None:
        self.log, self.recorded, self.synchronized = log, None, 0

    def synchronize(self) -> None:
        self.log.append(("synchronize", self.recorded))
        self.synchronized += 1


class FakeStream:
    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append((self.name, "wait", event.recorded))

    def record_event(self, event: FakeEvent) -> None:
        event.recorded = self.name
        self.log.append((self.name, "record"))


class FakeGraph:
    """Replay runs the function again and writes into the outputs of the capture."""

    def __init__(self, function, outputs, cuda: FakeCuda) -> None:
        self.function, self.outputs, self.cuda, self.busy = function, outputs, cuda, threading.Lock()

    def replay(self) -> None:
        assert self.busy.acquire(blocking=False), "two threads are in one graph"
        try:
            self.cuda.log.append((self.cuda.current_stream().name, "replay"))
            new = self.function()
            pairs = zip([new], [self.outputs]) if isinstance(new, Tensor) else zip(new, self.outputs)
            for result, static in pairs:
                static.copy_(result)
        finally:
            self.busy.release()


class FakeCuda(Cuda):
    def __deepcopy__(self, memo):
        return self

    def __init__(self) -> None:
        self.log: list = []
        self.local = threading.local()
        self.captures, self.devices, self.events = 0, [], []
        self.graphs: list[weakref.ref] = []
        self.capturing = False
        self.capture_lock = threading.Lock()

    @contextlib.contextmanager
    def on(self, device):
        self.devices.append(device)
        yield

    def current_stream(self):
        return FakeStream(getattr(self.local, "stream", "default"), self.log)

    def event(self):
        self.events.append(FakeEvent(self.log))
        return self.events[-1]

    def is_capturing(self):
        return self.capturing

    def capture(self, function):
        assert self.capture_lock.acquire(blocking=False), "two threads capture"
        try:
            self.captures += 1
            assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
            time.sleep(0.002)  # other threads come
            graph = FakeGraph(function, function(), self)
        finally:
            self.capture_lock.release()
        self.graphs.append(weakref.ref(graph))
        return graph, graph.outputs


@pytest.fixture
def cuda():
    return FakeCuda()


def cache_on(cuda: FakeCuda, limit: int = 8) -> GraphCache:
    return GraphCache(CPU, torch.float32, limit, cuda)


def double(x: Tensor) -> Tensor:
    return 2 * x


def images(*shape: int) -> Tensor:
    return torch.randn(shape)


# ---- which calls are graphs ------------------------------------------------------------------------------------------------


def test_a_shape_is_captured_when_it_comes_again(cuda):
    cache = cache_on(cuda)
    for expected, replays in ((0, 0), (1, 1), (1, 2), (1, 3)):
        x = images(2, 3)
        assert torch.equal(cache.run("double", double, x), 2 * x)
        assert (cuda.captures, len(cache)) == (expected, expected)
        assert cuda.log.count(("default", "replay")) == replays
    cache.run("double", double, images(3, 3))
    assert cuda.captures == 1, "another shape, for the first time"


def test_kinds_and_shapes_have_graphs_of_their_own(cuda):
    cache = cache_on(cuda)
    functions = {"double": double, (0, 2): lambda x: [x + 1, x + 2]}
    for _ in range(3):
        for kind, function in functions.items():
            for shape in ((1, 4), (4, 1)):
                x = images(*shape)
                actual, expected = cache.run(kind, function, x), function(x)
                assert type(actual) is type(expected)
                assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    assert cuda.captures == len(cache) == 4


def test_the_least_recently_used_graph_leaves(cuda):
    cache = cache_on(cuda, limit=2)
    for size in (1, 1, 2, 2, 1, 3, 3):  # 2 leaves
        cache.run("double", double, images(size))
    assert cuda.captures == 3 and len(cache) == 2
    gc.collect()
    assert [ref() is None for ref in cuda.graphs] == [False, True, False], "its memory is free"
    assert [event.synchronized for event in cuda.events] == [0, 1, 0], "after its last replay"
    cache.run("double", double, images(1))
    assert cuda.captures == 3
    cache.run("double", double, images(2))
    cache.run("double", double, images(2))
    assert cuda.captures == 4


def test_many_shapes_in_turn_are_not_captured(cuda):
    cache = cache_on(cuda, limit=3)
    for _ in range(3):
        for size in range(1, 6):
            cache.run("double", double, images(size))
    assert cuda.captures == 0 and len(cache._seen) == 3


def test_a_dropped_cache_frees_its_graphs(cuda):
    cache = cache_on(cuda)
    for size in (1, 1, 2, 2):
        cache.run("double", double, images(size))
    del cache
    assert all(ref() is None for ref in cuda.graphs)
    assert [event.synchronized for event in cuda.events] == [1, 1]


def test_a_failing_capture_leaves_nothing(cuda):
    cache = cache_on(cuda)

    def fails(x: Tensor) -> Tensor:
        if cuda.capture_lock.locked():
            raise RuntimeError("out of memory")
        return x + 1

    x = images(2)
    assert torch.equal(cache.run("f", fails, x), x + 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.run("f", fails, x)
    assert len(cache) == 0 and not cuda_graph._capturing.locked()
    assert torch.equal(cache.run("f", double, x), 2 * x), "the next try may go well"


def test_an_error_of_the_function_is_not_a_shape_seen(cuda):
    cache = cache_on(cuda)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            cache.run("f", lambda x: 1 // 0, images(1))
    assert cuda.captures == 0


def test_inside_another_capture_the_kernels_become_part_of_that(cuda):
    cache, x = cache_on(cuda), images(2)
    for _ in range(2):
        cache.run("double", double, x)
    cuda.capturing, before = True, list(cuda.log)
    assert torch.equal(cache.run("double", double, x), 2 * x)
    assert cuda.log == before


# ---- results -------------------------------------------------------------------------------------------------------------


def test_results_and_inputs_are_the_callers(cuda):
    cache = cache_on(cuda)
    for kind, function in (("one", double), ("several", lambda x: [x + 1, x + 2])):
        held = []
        for _ in range(5):
            x = images(2, 2)
            results, wanted = cache.run(kind, function, x), function(x)
            held.append((results, wanted) if kind == "several" else ([results], [wanted]))
            x.zero_()
        assert all(torch.equal(*pair) for results in held for pair in zip(*results))
        held[-1][0][0].zero_()
        x = images(2, 2)
        assert all(torch.equal(*pair) for pair in zip(cache.run(kind, function, x), function(x)))


def test_any_dtype_strides_and_mode(cuda):
    cache = cache_on(cuda)
    x = images(2, 3, 4, 4)
    for same in (x, x.double(), x.contiguous(memory_format=torch.channels_last), x.flip(3).flip(3), x.clone()):
        result = cache.run("double", lambda t: double(t.float()), same)
        assert torch.equal(result, 2 * x) and result.dtype == torch.float32
    with torch.inference_mode():
        inside = cache.run("double", double, x.clone())
    assert inside.is_inference() and torch.equal(inside, 2 * x)
    assert not cache.run("double", double, x).is_inference() and cuda.captures == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_captured_in_one_mode_and_used_in_another(cuda, mode):
    cache = cache_on(cuda)
    with mode():
        for _ in range(2):
            cache.run("double", double, images(2))
    x = images(2)
    with torch.no_grad():
        assert torch.equal(cache.run("double", double, x), 2 * x)


def test_layout_of_results(cuda):
    cache, x = cache_on(cuda), images(2, 4, 4, 3)
    for _ in range(3):
        (y,) = cache.run("nchw", lambda t: [t.permute(0, 3, 1, 2)], x)
        assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, x.permute(0, 3, 1, 2))


# ---- order ---------------------------------------------------------------------------------------------------------------


def test_streams_are_ordered_by_an_event(cuda):
    cache, x = cache_on(cuda), images(1)
    cache.run("double", double, x)
    for name in ("first", "second"):
        cuda.local.stream = name
        cache.run("double", double, x)
    assert cuda.log == [
        ("first", "wait", None),
        ("first", "replay"),
        ("first", "record"),
        ("second", "wait", "first"),
        ("second", "replay"),
        ("second", "record"),
    ]


def test_the_event_is_recorded_even_if_a_copy_fails(cuda, monkeypatch):
    cache, x = cache_on(cuda), images(1)
    for _ in range(2):
        cache.run("double", double, x)
    before = len(cuda.log)

    def fail(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda_graph._Graph, "_copied", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.run("double", double, x)
    assert cuda.log[before:] == [("default", "wait", "default"), ("default", "replay"), ("default", "record")]


def test_everything_happens_on_the_device(cuda):
    cache = cache_on(cuda)
    for _ in range(3):
        cache.run("double", double, images(1))
    assert cuda.devices == [CPU] * 3


@pytest.mark.parametrize("limit", [1, 2, 8])
def test_threads(cuda, limit):
    """Also while graphs are captured, and evicted under a thread that is about to use them."""
    cache, problems = cache_on(cuda, limit), []
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        cuda.local.stream = f"stream {seed}"
        start.wait()
        held = []
        for _ in range(120):
            x = torch.randn(int(torch.randint(1, 4, (), generator=generator)), generator=generator)
            held.append((x.clone(), cache.run("double", double, x)))
            x.zero_()
        problems.extend(pair for pair in held if not torch.equal(2 * pair[0], pair[1]))

    def guarded(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert len(cache) <= limit
    assert sum(ref() is not None for ref in cuda.graphs) == len(cache)
    if limit == 8:
        assert cuda.captures == 3, "no shape is captured twice"


# ---- copies --------------------------------------------------------------------------------------------------------------


def test_copies_start_empty(cuda):
    cache = GraphCache(CPU, torch.float32, 3)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (other.device, other.dtype, other.limit, len(other)) == (CPU, torch.float32, 3, 0)
        assert other._lock is not cache._lock


# ---- in an optimized model --------------------------------------------------------------------------------------------------


@pytest.fixture
def graphed(cuda):
    """An optimized model whose graphs are fakes, and the same without graphs."""
    config = {**SMALL_MODELS["aligned"], "img_size": 32, "depths": (1, 1, 1, 1)}
    model = randomise(cmt_fast.CMT(**config), torch.Generator().manual_seed(3)).eval()
    fast = cmt_fast.optimize(model, backend="reference")
    plain = copy.deepcopy(fast)
    assert not fast.graph, "there is no graph on a CPU"
    fast._graphs = cache_on(cuda)
    return fast, plain


def test_every_method_and_size_has_its_graph(graphed, cuda):
    fast, plain = graphed
    calls = (
        lambda m: m(inputs),
        lambda m: m.forward_features(inputs),
        lambda m: m.forward_intermediates(inputs, [0, 2], intermediates_only=True),
        lambda m: m.forward_intermediates(inputs, [1], stop_early=True)[1],
    )
    for count, size in enumerate(((1, 3, 32, 32), (1, 3, 48, 64)), 1):
        for _ in range(3):
            inputs = images(*size)
            for call in calls:
                actual, expected = call(fast), call(plain)
                assert all(torch.equal(a, e) for a, e in zip(actual, expected))
                assert [a.stride() for a in actual] == [e.stride() for e in expected]
        assert cuda.captures == count * len(calls)


@pytest.fixture
def matmul():
    before = torch.backends.cuda.matmul.allow_tf32
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_is_a_setting_of_the_call(graphed, cuda, matmul):
    fast, plain = graphed
    for count, allowed in enumerate((False, True), 1):
        matmul.allow_tf32 = allowed
        for _ in range(3):
            x = images(1, 3, 32, 32)
            assert torch.equal(fast(x), plain(x))
        assert cuda.captures == count


def test_feature_maps_of_a_backbone(graphed, cuda):
    fast, plain = graphed
    for model in (fast, plain):
        model.out_indices = (1, 3)
    for _ in range(3):
        x = images(2, 3, 32, 32)
        assert all(torch.equal(a, e) for a, e in zip(fast(x), plain(x)))
    assert cuda.captures == 1


def test_wrong_inputs_never_reach_a_graph(graphed, cuda):
    fast, _ = graphed
    for _ in range(2):
        fast(images(1, 3, 32, 32))
    for x, error in (
        (images(1, 4, 32, 32), ValueError),
        (images(3, 32, 32), ValueError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError),
        (images(1, 3, 32, 8), ValueError),
        ([1.0], ValueError),
    ):
        for _ in range(3):
            with pytest.raises(error):
                fast(x)
    with pytest.raises(RuntimeError, match="no gradients"):
        fast(images(1, 3, 32, 32).requires_grad_())
    assert cuda.captures == 1 and fast(images(0, 3, 32, 32)).shape == (0, 10)


def test_what_watches_a_call_sees_its_operations(graphed, cuda):
    fast, plain = graphed
    x = images(1, 3, 32, 32)
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            fast(x)
        assert counter.get_total_flops() > 0
    assert cuda.captures == 0
    torch.compiler.reset()
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), plain(x))
    assert cuda.captures == 0


def test_copies_of_a_model_share_no_graph(graphed, cuda):
    fast, plain = graphed
    other, x = copy.deepcopy(fast), images(1, 3, 32, 32)
    for _ in range(2):
        assert torch.equal(fast(x), plain(x))
    assert len(other._graphs) == 0 and torch.equal(other(x), plain(x))
