"""What a benchmark of whole models can time: every way to run a loaded CMT, from the original's code to the packed program."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmt_fast.backend import use_backend
from cmt_fast.inference.export import export_onnx
from cmt_fast.inference.pack import pack
from cmt_fast.models.cmt import CMT
from cmt_fast.testing.original_code import original_model
from cmt_fast.testing.original_order import OriginalOrder
from cmt_fast.testing.precision import Precision

#: Images (B, in_chans, H, W) -> logits (B, classes). It sets autocast and backend; the caller decides about gradients.
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to run a model.

    Attributes:
        description: what it is, for users.
        make: (model, images, precision) -> :data:`Forward`, which is ready for such images once it has run on them. The
            model is in the precision's dtype, in evaluation mode for inference, and is not changed.
        inference_only: it has no training step.
        dtypes: names of the precisions that it runs in; empty for all.
        memory_format: of the images.
    """

    description: str
    make: Callable[[CMT, Tensor, Precision], Forward]
    inference_only: bool = False
    dtypes: tuple[str, ...] = ()
    memory_format: torch.memory_format = torch.contiguous_format

    def unsupported(self, p: Precision, mode: str) -> str | None:
        """Why it has no time in a precision and mode, or None."""
        if mode == "training" and self.inference_only:
            return "inference only: it has no training step"
        if self.dtypes and p.name not in self.dtypes:
            return f"{', '.join(self.dtypes)} only: not timed in {p.name}"
        return None


def eager(module: Callable[[Tensor], Tensor], p: Precision, backend: str = "reference") -> Forward:
    """``module`` under the autocast mode of ``p``, with a backend."""

    def forward(images: Tensor) -> Tensor:
        with use_backend(backend), p.context(images.device):
            return module(images)

    return forward


def _compiled(module: nn.Module, p: Precision, backend: str = "reference", mode: str | None = None) -> Forward:
    """torch.compile, specialised in the shape of the images; ``mode`` is torch.compile's."""

    def call(images: Tensor) -> Tensor:
        return module(images)

    # Dynamo keeps what it compiles by code object, and has a limit for each: every provider gets one of its own.
    own = types.FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    return eager(torch.compile(own, dynamic=False, mode=mode), p, backend)


def _frozen(module: nn.Module, images: Tensor, p: Precision, **settings: bool) -> Forward:
    """torch.compile with the weights as constants, and further settings of Inductor.

    The setting counts while Dynamo traces, with gradients off; ``torch.compile(options=...)`` reaches only Inductor, where it
    would freeze nothing.
    """
    import torch._inductor.config as inductor

    forward = _compiled(module, p)
    with inductor.patch({"freezing": True, **settings}), torch.inference_mode():
        forward(images)
    return forward


def _channels_last(model: CMT) -> OriginalOrder:
    """The original's order on a copy of ``model`` with channels_last weights."""
    return OriginalOrder(copy.deepcopy(model).to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def _optimized(model: CMT, p: Precision, backend: str) -> Forward:
    """The packed program; under autocast in autocast's dtype."""
    from cmt_fast.inference.optimize import optimize

    fast: Any = optimize(model, dtype=p.low, backend=backend)
    return fast


def _onnxruntime(model: CMT, images: Tensor, p: Precision) -> Forward:
    """The model as it stands, exported."""
    with use_backend("reference"), contextlib.redirect_stdout(io.StringIO()):
        exported: Any = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    return _session(exported.model_proto.SerializeToString())


def _onnxruntime_packed(model: CMT, images: Tensor, p: Precision) -> Forward:
    """The packed model, exported as ``cmt-fast export`` does."""
    with tempfile.TemporaryDirectory(prefix="cmt-fast-onnx-") as folder:
        return _session(export_onnx(pack(model), Path(folder, "model.onnx"), batch_size=len(images)).read_bytes())


def _session(content: bytes) -> Forward:
    """An ONNX model on onnxruntime, with as many threads as PyTorch has."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("timing onnxruntime needs it: pip install 'cmt-fast[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def forward(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: images.numpy()})
        return torch.from_numpy(logits)

    return forward


def _original_compiled(mode: str, channels_last: bool) -> Provider:
    return Provider(
        f"torch.compile(mode={mode!r}) of the original's operation order"
        + (", with channels_last weights and images" if channels_last else ""),
        lambda model, images, p: _compiled(
            _channels_last(model) if channels_last else OriginalOrder(model), p, mode=mode
        ),
        inference_only=True,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


BASELINE = "original"

#: torch.compile's other modes and the other layout: what a GPU is best compared with. On a CPU the modes change nothing but the minutes.
COMPILED_ON_GPU = {
    "original-compile-channels-last": _original_compiled("default", True),
    "original-compile-reduce-overhead": _original_compiled("reduce-overhead", False),
    "original-compile-reduce-overhead-channels-last": _original_compiled("reduce-overhead", True),
    "original-compile-max-autotune": _original_compiled("max-autotune", False),
    "original-compile-max-autotune-channels-last": _original_compiled("max-autotune", True),
}

#: By name, the baseline first.
PROVIDERS: dict[str, Provider] = {
    BASELINE: Provider(
        "the original's operation order in plain PyTorch, eager: the baseline",
        lambda model, images, p: eager(OriginalOrder(model), p),
    ),
    "original-code": Provider(
        "the original's own code, from a checkout that CMT_FAST_ORIGINAL names",
        lambda model, images, p: eager(original_model(model), p),
    ),
    "original-channels-last": Provider(
        "the same with channels_last weights and images",
        lambda model, images, p: eager(_channels_last(model), p),
        inference_only=True,
        memory_format=torch.channels_last,
    ),
    "reference": Provider(
        "cmt_fast on its reference backend, eager",
        lambda model, images, p: eager(model, p),
    ),
    "auto": Provider(
        "cmt_fast on the best backend that can run, eager",
        lambda model, images, p: eager(model, p, "auto"),
    ),
    "optimize": Provider(
        "cmt_fast.optimize on the best backend that can run",
        lambda model, images, p: _optimized(model, p, "auto"),
        inference_only=True,
    ),
    "optimize-triton": Provider(
        "cmt_fast.optimize on Triton kernels",
        lambda model, images, p: _optimized(model, p, "triton"),
        inference_only=True,
    ),
    "optimize-reference": Provider(
        "cmt_fast.optimize in plain PyTorch",
        lambda model, images, p: _optimized(model, p, "reference"),
        inference_only=True,
    ),
    "onnxruntime": Provider(
        "the model exported with torch.onnx, on onnxruntime's CPU provider",
        _onnxruntime,
        inference_only=True,
        dtypes=("float32",),
    ),
    "onnxruntime-packed": Provider(
        "the packed model exported by cmt-fast export, on the same",
        _onnxruntime_packed,
        inference_only=True,
        dtypes=("float32",),
    ),
    "compile": Provider(
        "torch.compile of cmt_fast",
        lambda model, images, p: _compiled(model, p, "auto"),
    ),
    "original-compile": Provider(
        "torch.compile of the original's operation order",
        lambda model, images, p: _compiled(OriginalOrder(model), p),
    ),
    **COMPILED_ON_GPU,
    "original-freezing": Provider(
        "the same with Inductor's freezing: weights are constants, folded and laid out for oneDNN",
        lambda model, images, p: _frozen(OriginalOrder(model), images, p),
        inference_only=True,
    ),
    "original-freezing-channels-last": Provider(
        "the same with channels_last weights and images",
        lambda model, images, p: _frozen(_channels_last(model), images, p),
        inference_only=True,
        memory_format=torch.channels_last,
    ),
    "original-freezing-cpp-wrapper": Provider(
        "the same called from C++ instead of Python",
        lambda model, images, p: _frozen(_channels_last(model), images, p, cpp_wrapper=True),
        inference_only=True,
        memory_format=torch.channels_last,
    ),
    "original-freezing-max-autotune": Provider(
        "the same with every matrix product tuned: many minutes, on an idle machine only",
        lambda model, images, p: _frozen(_channels_last(model), images, p, cpp_wrapper=True, max_autotune=True),
        inference_only=True,
        memory_format=torch.channels_last,
    ),
}
