"""``cmt_fast.optimize``: a trained model as a module that runs its packed program on the best backend of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmt_fast.backend import BACKENDS, Explanation, record, select
from cmt_fast.inference import native
from cmt_fast.inference.cuda_graph import GraphCache
from cmt_fast.inference.native import native_reasons
from cmt_fast.inference.pack import pack
from cmt_fast.inference.program import PackedModel
from cmt_fast.inference.run import check_input, run, run_features
from cmt_fast.inference.torch_steps import TORCH, StepFunctions
from cmt_fast.models.cmt import CMT, feature_indices
from cmt_fast.models.features import CMTFeatures
from cmt_fast.ops._triton.reasons import device_reasons
from cmt_fast.ops.tracing import tracing_reasons

#: On a CPU a batch goes through a stage in chunks whose hidden map has about this size: it stays in the last cache.
CHUNK_BYTES = 4 << 20


def optimize(
    model: CMT | CMTFeatures | PackedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    img_size: int | Sequence[int] | None = None,
    backend: str | None = None,
    graph: bool = True,
) -> OptimizedModel:
    """A module for inference that computes what ``model.eval()`` computes, faster.

    The model is packed (:func:`cmt_fast.inference.pack`: norms folded, widths padded, projections absorbed) and laid out for
    the backend; ``model`` is not changed, and what happens to it later does not matter. docs/cpu.md and docs/gpu.md say what then runs.

    >>> fast = cmt_fast.optimize(model)                       # doctest: +SKIP
    >>> fast = cmt_fast.optimize(model, device="cuda", dtype=torch.bfloat16)    # doctest: +SKIP
    >>> logits = fast(images)                                 # doctest: +SKIP
    >>> print(fast.explain())                                 # doctest: +SKIP

    Args:
        model: a CMT or CMTFeatures itself, not wrapped; or what :func:`cmt_fast.inference.load_packed` read.
        dtype: of weights and maps: float32, bfloat16, float16 or float64; by default the model's.
        device: where to run; by default where the model is.
        img_size: the input size that is served fastest, by default the model's own. Others run too, with their position bias
            tables resized at each call.
        backend: see :func:`cmt_fast.use_backend`; None takes the process-wide setting. It is chosen here, not at each call. On "triton" the
            steps that a kernel cannot take run in plain PyTorch.
        graph: on a CUDA device, capture a shape of input that comes again as a CUDA graph, which keeps the memory of a forward pass
            (:class:`cmt_fast.inference.cuda_graph.GraphCache`). Elsewhere it does nothing.

    Raises:
        TypeError, ValueError: if ``model`` cannot be packed, or an argument does not fit; the message says which.
        BackendError: if ``backend`` names one that cannot run the program.
    """
    if isinstance(model, PackedModel):
        _check_packed_options(model, dtype, device, img_size)
        return OptimizedModel(model, *_choose(model.device, model.dtype, backend), graph=graph)
    own = next((p for p in model.parameters() if p.is_floating_point()), None) if isinstance(model, nn.Module) else None
    dtype = dtype or (torch.float32 if own is None else own.dtype)
    device = torch.device(device or ("cpu" if own is None else own.device))
    chosen, against = _choose(device, dtype, backend)
    packed = pack(model, dtype=dtype, device=device, img_size=img_size, base2=chosen == "triton")
    return OptimizedModel(packed, chosen, against, graph=graph)


class OptimizedModel(nn.Module):
    """What :func:`optimize` returns: the forward methods of the model that was packed, for inference only.

    Threads may call it at the same time. It has no parameters: train the model that it was made of, and optimize that again.

    Attributes:
        img_size, in_chans, dtype, device: of the input.
        out_indices: the stages whose maps ``forward`` returns; empty with a head.
        backend: what runs it.
        graph: whether shapes that come again are captured as CUDA graphs.
    """

    def __init__(self, packed: PackedModel, backend: str, against: dict[str, list[str]], *, graph: bool = True) -> None:
        """``backend`` and, for others, reasons ``against`` them: as :func:`optimize` chose."""
        super().__init__()
        self.img_size, self.in_chans, self.out_indices = packed.img_size, packed.in_chans, packed.out_indices
        self.dtype, self.device = packed.dtype, packed.device
        self.backend, self._against = backend, against
        self.graph = graph and packed.device.type == "cuda"
        self._program, self._functions = _prepare(packed, backend)
        self._graphs = GraphCache(self.device, self.dtype) if self.graph else None
        self._chunk_bytes = CHUNK_BYTES if packed.device.type == "cpu" else None

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores (B, num_classes), or of a packed CMTFeatures its list of maps (B, C, H / stride, W / stride).

        Args:
            x: (B, in_chans, H, W), floating point, any size and strides; it is converted to :attr:`dtype`.
        """
        if self.out_indices:
            return self._features(x, self.out_indices)

        def logits(x: Tensor) -> Tensor | list[Tensor]:
            return run(self._program, x, self._functions, chunk_bytes=self._chunk_bytes)

        return self._call("logits", logits, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map (B, C, H / stride, W / stride), as of :meth:`cmt_fast.CMT.forward_features`."""
        return self._features(x, [len(self._program.stages) - 1])[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages; see :meth:`cmt_fast.CMT.forward_intermediates`."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        count = len(self._program.stages)
        take = feature_indices(indices, count)
        if intermediates_only:
            return self._features(x, take)
        last = max(take) if stop_early else count - 1
        *chosen, final = self._features(x, [*take, last])
        return final, chosen

    def explain(self) -> Explanation:
        """Which backend was chosen, and why no faster one was."""
        explanation = Explanation()
        explanation.add(self._describe(), self.backend, self._against)
        return explanation

    def extra_repr(self) -> str:
        return f"{self._describe()}, img_size={self.img_size}, backend={self.backend}"

    def _describe(self) -> str:
        return f"packed CMT, {str(self.dtype).removeprefix('torch.')} on {self.device}"

    def _features(self, x: Tensor, stages: Sequence[int]) -> list[Tensor]:
        def maps(x: Tensor) -> list[Tensor]:
            return run_features(self._program, x, stages, self._functions, chunk_bytes=self._chunk_bytes)

        return self._call(tuple(stages), maps, x)

    def _call(self, kind: str | tuple[int, ...], function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """``function(x)``, as a graph where one is of use: torch.compile makes its own of the kernels that it sees."""
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "an optimized model has no gradients, but the input requires one: call it under torch.inference_mode(), "
                "or use the model that it was made of"
            )
        record(self._describe(), self.backend, self._against)
        with torch.no_grad():
            if self._graphs is None or torch.compiler.is_compiling() or tracing_reasons():
                return function(x)
            check_input(self._program, x)
            if not len(x):
                return function(x)
            return self._graphs.run((kind, torch.backends.cuda.matmul.allow_tf32), function, x)

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModel:
        """Called by ``.to()``, ``.half()``, ``.cuda()`` and their like."""
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        there = fn(here)
        if (there.dtype, there.device) != (here.dtype, here.device):
            raise RuntimeError(
                f"an optimized model is laid out for {self.dtype} on {self.device} and cannot become {there.dtype} on "
                f"{there.device}: call cmt_fast.optimize(model, dtype=..., device=...) again"
            )
        return self


def _choose(device: torch.device, dtype: torch.dtype, backend: str | None) -> tuple[str, dict[str, list[str]]]:
    """The backend for a program, and the reasons against the others."""
    against = {"triton": device_reasons(device, dtype), "native": native_reasons(device, dtype)}
    candidates = {name: lambda name=name: against[name] for name in against}
    chosen = select("optimize", candidates, backend, device=device)
    return chosen, {name: why for name, why in against.items() if BACKENDS.index(name) < BACKENDS.index(chosen)}


def _prepare(packed: PackedModel, backend: str) -> tuple[PackedModel, StepFunctions]:
    """The program as the backend reads it, and the functions that run it."""
    if backend == "native":
        return native.prepare(packed)
    if backend == "triton":
        from cmt_fast.inference.triton_steps import prepare

        return prepare(packed)
    return packed, TORCH


def _check_packed_options(
    packed: PackedModel,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    img_size: int | Sequence[int] | None,
) -> None:
    """A program was made for one dtype, device and size."""
    size = (img_size, img_size) if isinstance(img_size, int) else img_size and tuple(img_size)
    where = torch.device(device) if device is not None else None
    for name, got, own in (
        ("dtype", dtype, packed.dtype),
        ("device", where, packed.device),
        ("img_size", size, packed.img_size),
    ):
        if got is not None and got != own:
            raise ValueError(
                f"the packed model was made for {name} {own}, got {name} {got}: pack the model again, or "
                "load_packed(path, device=...) where only the device differs"
            )
