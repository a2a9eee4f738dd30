"""A packed model in formats that run without cmt_fast: torch.export, AOTInductor, ONNX (docs/export.md).

Every file takes ``images`` (B, in_chans, H, W) in the dtype of the program, ready for the model (scaled and normalised), and
returns what :attr:`ExportablePacked.output_names` lists, in the dtype of the program. It holds what a deployer needs to
know: see :func:`metadata`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmt_fast._version import __version__
from cmt_fast.inference.packed_io import put_together, take_apart
from cmt_fast.inference.program import PackedModel
from cmt_fast.inference.run import run
from cmt_fast.models.checkpoint_io import write_atomically

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: Of every file's input.
INPUT = "images"
#: The first with the exact GELU as one operator.
ONNX_OPSET = 20
ONNX_DTYPES = (torch.float32, torch.float16)
#: The entry of a torch.export file that holds :func:`metadata`.
METADATA_FILE = "cmt_fast.json"


class ExportablePacked(nn.Module):
    """A packed model as a module that PyTorch's exporters trace: one buffer a tensor, plain torch ops, the batch as a whole.

    Buffers are named by their place in the program (``stages.0.blocks.1.expand.weight``) and share memory with ``packed``.
    ``.double()`` runs the same program, with its weights as they were rounded, in float64.
    """

    def __init__(self, packed: PackedModel) -> None:
        super().__init__()
        tensors: dict[str, Tensor] = {}
        self._tree = take_apart(packed, "", tensors)
        for name, tensor in tensors.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(leaf, tensor)
        self.eval()

    @property
    def packed(self) -> PackedModel:
        """The program over the buffers as they are now."""
        return put_together(self._tree, dict(self.named_buffers(remove_duplicate=False)))

    @property
    def output_names(self) -> list[str]:
        """``logits`` (or ``features``, before the classifier); of a feature model ``stage_0``, ... for its ``out_indices``."""
        packed = self.packed
        if packed.head is None:
            return [f"stage_{i}" for i in packed.out_indices]
        return ["features" if packed.head.class_weight is None else "logits"]

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """(B, in_chans, H, W) -> what :func:`cmt_fast.inference.run` returns."""
        return run(self.packed, images)


def export_torch(
    packed: PackedModel,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    any_size: bool = False,
    **extra: Any,
) -> Path:
    """Save a ``torch.export`` program, which ``torch.export.load(path).module()`` runs wherever PyTorch does.

    Args:
        packed: from :func:`cmt_fast.inference.pack`.
        path: the ``.pt2`` file to write; its folder must exist. A file that was there is replaced at once or not at all.
        batch_size: the only one that the file takes; None for any.
        any_size: take every image whose sides are multiples of :func:`size_step` and at least twice that, with position
            bias tables resized at each call, instead of ``packed.img_size`` alone.
        **extra: further entries of the file's :func:`metadata`.

    Returns:
        The path written.

    Raises:
        ValueError: on a wrong ``batch_size``.
        TypeError: if JSON cannot hold an entry of ``extra``.
        OSError: if the file cannot be written.
    """
    program = trace(packed, batch_size=batch_size, any_size=any_size)
    notes = {METADATA_FILE: json.dumps(metadata(packed, batch_size=batch_size, any_size=any_size, **extra))}
    return write_atomically(path, lambda file: torch.export.save(program, file, extra_files=notes))


def export_aoti(
    packed: PackedModel,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    any_size: bool = False,
    **extra: Any,
) -> Path:
    """Compile with AOTInductor for this machine's kind of processor; C++ without Python runs the file too.

    ``torch._inductor.aoti_load_package(path)`` loads it. Takes minutes; arguments and errors are those of
    :func:`export_torch`, and the file must end in ``.pt2``.

    Raises:
        RuntimeError: without a C++ compiler.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"PyTorch loads AOTInductor packages only from names that end in .pt2, got {path}")
    _require_compiler()
    program = trace(packed, batch_size=batch_size, any_size=any_size)
    notes = as_text(metadata(packed, batch_size=batch_size, any_size=any_size, **extra))
    package = io.BytesIO()
    with without_warnings():
        torch._inductor.aoti_compile_and_package(
            program, package_path=package, inductor_configs={"aot_inductor.metadata": notes}
        )
    return write_atomically(path, lambda file: file.write(package.getbuffer()))


def export_onnx(
    packed: PackedModel,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    any_size: bool = False,
    **extra: Any,
) -> Path:
    """Save an ONNX model of opset :data:`ONNX_OPSET` with its weights inside.

    Arguments and errors are those of :func:`export_torch`.

    Raises:
        ValueError: unless ``packed`` is in float32 or float16: onnxruntime has no convolution in other dtypes on a CPU.
        ImportError: without onnx and onnxscript.
    """
    if packed.dtype not in ONNX_DTYPES:
        raise ValueError(
            f"ONNX files are written in {' or '.join(map(str, ONNX_DTYPES))}, got {packed.dtype}, in which onnxruntime has no "
            "convolution on a CPU: pack the model with dtype=torch.float32"
        )
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting to ONNX needs onnx and onnxscript: pip install 'cmt-fast[export]'") from error
    program = trace(packed, batch_size=batch_size, any_size=any_size)
    axes = ({} if batch_size else {0: "batch"}) | ({2: "height", 3: "width"} if any_size else {})
    with without_warnings():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=[INPUT],
            output_names=ExportablePacked(packed).output_names,
            dynamic_shapes={INPUT: axes},
            verbose=False,
        )
    assert converted is not None
    notes = metadata(packed, batch_size=batch_size, any_size=any_size, **extra)
    converted.model.metadata_props.update(as_text(notes))
    return write_atomically(path, lambda file: file.write(converted.model_proto.SerializeToString()))


def trace(packed: PackedModel, *, batch_size: int | None = None, any_size: bool = False) -> ExportedProgram:
    """The packed model as a graph of torch ops, in memory; arguments and errors are those of :func:`export_torch`."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, or None for any, got {batch_size!r}")
    axes: dict[int, Any] = {} if batch_size else {0: torch.export.Dim("batch")}
    size = packed.img_size
    if any_size:
        step = size_step(packed)
        axes |= {2: step * torch.export.Dim("rows", min=2), 3: step * torch.export.Dim("columns", min=2)}
        size = (3 * step, 2 * step)
    # An axis of length 1 would be taken for one that always has length 1.
    example = torch.zeros(batch_size or 2, packed.in_chans, *size, dtype=packed.dtype, device=packed.device)
    with torch.no_grad():
        return torch.export.export(ExportablePacked(packed), (example,), dynamic_shapes={INPUT: axes})


def size_step(packed: PackedModel) -> int:
    """Sides that are multiples of it leave no rest in any stage or reduction: 32 for the published variants."""
    return math.lcm(*(2 ** (2 + i) * k for i, k in enumerate(packed.sr_ratios)))


def metadata(packed: PackedModel, *, batch_size: int | None = None, any_size: bool = False, **extra: Any) -> dict:
    """What a file says of itself: ``cmt_fast`` (the version), ``dtype``, ``img_size``, ``in_chans``, ``batch_size`` (null for
    any), ``size_step`` (null unless any size of its multiples runs) and ``extra``."""
    return {
        "cmt_fast": __version__,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "img_size": list(packed.img_size),
        "in_chans": packed.in_chans,
        "batch_size": batch_size,
        "size_step": size_step(packed) if any_size else None,
        **extra,
    }


def as_text(notes: dict) -> dict[str, str]:
    """For formats that hold text only: strings as they are, everything else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in notes.items()}


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out what PyTorch's exporters and their loaders warn of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError("AOTInductor needs a C++ compiler: install g++ or clang, or name it in CXX") from error
