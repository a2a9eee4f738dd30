"""Checking an exported file: what it computes beside the packed model that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from cmt_fast.inference import PackedModel, load_packed, run
from cmt_fast.inference.export import INPUT, ExportablePacked, size_step, without_warnings
from cmt_fast.testing.tolerance import Comparison, compare

Runner = Callable[[Tensor], "Tensor | list[Tensor]"]

#: Images compared, at least: the largest of few errors is luck.
IMAGES = 8


def load_torch(path: Path) -> Runner:
    """A file of ``export_torch``."""
    with without_warnings():
        return torch.export.load(path).module()


def load_aoti(path: Path) -> Runner:
    """A file of ``export_aoti``."""
    return torch._inductor.aoti_load_package(str(path))


def load_onnx(path: Path) -> Runner:
    """A file of ``export_onnx``, in onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {INPUT: x.cpu().numpy()})]


def load_saved(path: Path) -> Runner:
    """A file of ``save_packed``."""
    packed = load_packed(path)
    return lambda x: run(packed, x.to(packed.device))


#: By the name of a format on the command line.
LOADERS: dict[str, Callable[[Path], Runner]] = {
    "onnx": load_onnx,
    "torch": load_torch,
    "aoti": load_aoti,
    "packed": load_saved,
}


def cannot_load(format: str) -> str | None:
    """What is missing to run a file of this format, or None."""
    return "onnxruntime is not installed" if format == "onnx" and find_spec("onnxruntime") is None else None


@torch.inference_mode()
def check_exported(
    packed: PackedModel, path: Path, format: str, *, batch_size: int | None = None, any_size: bool = False
) -> list[Comparison]:
    """Judge a file by the tolerance policy, on random images.

    The exact result is the program, with its weights as they are, in float64; plain PyTorch's is the program in its dtype.

    Args:
        packed: what was exported.
        path: the file.
        format: a name of :data:`LOADERS`.
        batch_size, any_size: as exported. Where any batch or size is allowed, several are compared.

    Returns:
        One comparison an output.
    """
    module = ExportablePacked(packed)
    double, loaded = ExportablePacked(packed).double(), LOADERS[format](path)
    batches = [1, IMAGES - 1] if batch_size is None else [batch_size] * -(-IMAGES // batch_size)
    sizes = [packed.img_size] * len(batches)
    if any_size:
        step = size_step(packed)
        sizes = [(2 * step, 2 * step), (2 * step, 4 * step)] * len(batches)
        batches = [batch for batch in batches for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    results: list[tuple[list[Tensor], ...]] = []
    for batch, size in zip(batches, sizes):
        x = torch.randn(batch, packed.in_chans, *size, generator=generator).to(packed.device, packed.dtype)
        results.append(tuple(_outputs(f(y)) for f, y in ((loaded, x), (double, x.double()), (module, x))))
    return [
        compare(name, *(torch.cat([result[k][i].flatten() for result in results]) for k in range(3)))
        for i, name in enumerate(module.output_names)
    ]


def _outputs(result: Tensor | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
