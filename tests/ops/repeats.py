"""Calls of kernels on a GPU that must give the same bits again: on several streams at once, and in a CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Makes a tensor, or several.
Call = Callable[[], Tensor | Sequence[Tensor]]


def assert_same_on_streams(calls: Sequence[Call], rounds: int = 10) -> None:
    """Calls on streams of their own at once equal the same calls one after the other."""
    expected = [_tensors(call()) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results = []
    for _ in range(rounds):
        for call, stream in zip(calls, streams):
            with torch.cuda.stream(stream):
                results.append(_tensors(call()))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert all(map(torch.equal, result, expected[i % len(calls)])), f"call {i % len(calls)}"


def assert_same_in_a_graph(call: Call, replays: int = 3) -> None:
    """A graph of the call writes what the call returned, each time that it is replayed."""
    expected = _tensors(call())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _tensors(call())
    for _ in range(replays):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected))


def _tensors(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else result
