"""One CUDA graph for each shape of input: captured once, replayed at every further call.

At a small batch a forward pass is bound by launching its kernels, one by one from Python. A graph launches them all at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Outputs = TypeVar("Outputs", Tensor, list[Tensor], Tensor | list[Tensor])
Function = Callable[[Tensor], Outputs]

#: Graphs that a cache keeps, and shapes that it remembers to have seen once.
LIMIT = 8

#: CUDA allows captures in several threads at once, PyTorch's allocator does not.
_capturing = threading.Lock()


class Cuda:
    """What a :class:`GraphCache` asks of ``torch.cuda``. A test without a GPU puts its own in place of it."""

    def on(self, device: torch.device) -> contextlib.AbstractContextManager:
        """``device`` is the current one inside."""
        return torch.cuda.device(device)

    def current_stream(self) -> Any:
        """Of the current device and this thread."""
        return torch.cuda.current_stream()

    def event(self) -> Any:
        """A new event, not yet recorded: to wait for it takes no time."""
        return torch.cuda.Event()

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into somebody's graph."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, function: Callable[[], Outputs]) -> tuple[Any, Outputs]:
        """The graph of a call of ``function``, with a memory pool of its own, and the call's outputs, which each replay overwrites."""
        stream, current, graph = torch.cuda.Stream(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()  # compiles kernels, loads them and makes the handles of libraries, which a capture must not
            # cuBLAS has a workspace for each thread and stream. The graph gets one of its own, from its own pool: graphs that shared one
            # could not run at the same time, and the memory of one that somebody clears would be given away.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                torch._C._cuda_clearCublasWorkspaces()
                outputs = function()
            torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(stream)
        return graph, outputs


class GraphCache:
    """Runs functions of one tensor as CUDA graphs.

    A shape runs as it is when it comes for the first time, is captured when it comes again, and replayed from then on. So the odd
    last batch of an epoch costs nothing, and many sizes in turn, more than are kept, run without graphs instead of being captured again and again.

    What is guaranteed:

    * *Results are the caller's.* A call copies its input into the graph's and the graph's outputs into new tensors, all on the current stream
      of the caller: no later call changes a result, and the input may be changed or freed as after any other operation on that stream.
    * *Threads and streams.* Any number may call at once. Calls of one shape run one after the other on the GPU, in the order in which they
      came; an event orders those of different streams. Calls of different shapes may overlap.
    * *Devices.* Everything runs on ``device``, whichever is the current one.
    * *Memory.* Each graph keeps its own pool, of the size of one forward pass, until it is the least recently used one of more than
      ``limit``, or the cache is dropped; it is freed when its last replay has ended.
    * *Inside another capture* nothing is replayed: the kernels become part of that graph.

    Copies of a cache, pickled ones too, start empty.

    Args:
        device: of inputs and outputs.
        dtype: that inputs are converted to.
        limit: graphs to keep.
        cuda: what to capture with.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, limit: int = LIMIT, cuda: Cuda | None = None) -> None:
        self.device, self.dtype, self.limit = device, dtype, limit
        self._cuda = cuda or Cuda()
        self._lock = threading.Lock()  # of the two below, never held while the GPU is asked for something
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def run(self, kind: Hashable, function: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
        """``function(x)``, as a graph if ``kind`` and the shape of ``x`` have come before.

        Args:
            kind: tells functions apart: those of one kind do the same.
            function: makes one tensor or a list of tensors, without a gradient, of a tensor of :attr:`dtype` on :attr:`device`.
            x: floating point, on :attr:`device`; any strides.
        """
        with self._cuda.on(self.device):
            if self._cuda.is_capturing():
                return function(x)
            key = (kind, tuple(x.shape))
            graph = self._find(key)
            if graph is None and not self._has_come(key):
                outputs = function(x)
                self._remember(key)
                return outputs
            if graph is None:
                with _capturing:
                    graph = self._find(key)  # another thread may have been first
                    if graph is None:
                        graph = _Graph(self._cuda, function, x, self.dtype)
                        self._keep(key, graph)
            return graph(x)

    def __len__(self) -> int:
        """How many graphs are kept."""
        return len(self._graphs)

    def __reduce__(self) -> tuple[type[GraphCache], tuple[Any, ...]]:
        return GraphCache, (self.device, self.dtype, self.limit, self._cuda)

    def _has_come(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._seen or key in self._graphs

    def _remember(self, key: Hashable) -> None:
        with self._lock:
            self._seen[key] = None
            if len(self._seen) > self.limit:
                self._seen.popitem(last=False)

    def _find(self, key: Hashable) -> _Graph | None:
        with self._lock:
            if key in self._graphs:
                self._graphs.move_to_end(key)
            return self._graphs.get(key)

    def _keep(self, key: Hashable, graph: _Graph) -> None:
        with self._lock:
            self._graphs[key] = graph
            self._seen.pop(key, None)
            oldest = self._graphs.popitem(last=False)[1] if len(self._graphs) > self.limit else None
        del oldest  # waits for the GPU, unless another thread is in it, which then does


class _Graph:
    """A graph with its input and outputs."""

    def __init__(self, cuda: Cuda, function: Callable[[Tensor], Any], x: Tensor, dtype: torch.dtype) -> None:
        self._cuda, self._lock, self._done = cuda, threading.Lock(), cuda.event()
        with torch.inference_mode(False), torch.no_grad():  # its tensors are changed outside of inference mode, too
            self._input = static = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
            self._graph, self._outputs = cuda.capture(lambda: function(static))

    def __call__(self, x: Tensor) -> Any:
        stream = self._cuda.current_stream()
        with self._lock:
            stream.wait_event(self._done)
            try:
                self._input.copy_(x)
                self._graph.replay()
                return self._copied()
            finally:
                stream.record_event(self._done)

    def _copied(self) -> Any:
        if isinstance(self._outputs, Tensor):
            return self._outputs.clone()
        return [output.clone() for output in self._outputs]

    def __del__(self) -> None:
        """Memory must not be freed under a graph that runs."""
        self._done.synchronize()
