"""Every kernel of a packed model's forward pass in its order, counted on tensors without memory: no GPU, no kernel runs.

The launches are the very objects that a GPU call would run (:mod:`cmt_fast.ops._triton.launch`); what lies between them is PyTorch's own
kernels, as a dispatch mode sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cmt_fast.inference import program
from cmt_fast.inference.pack import pack
from cmt_fast.inference.packed_io import put_together, take_apart
from cmt_fast.inference.program import PackedModel
from cmt_fast.inference.run import run
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.models.cmt import CMT
from cmt_fast.models.features import CMTFeatures
from cmt_fast.ops._triton.launch import Launch, record_launches
from cmt_fast.ops._triton.register import IMPLEMENTATIONS

_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_GRADIENTS = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        step: of :class:`cmt_fast.inference.program`, such as ``lpu``, empty between steps; of a training step the operator of ours that
            launches it, such as ``irffn_expand``, or ``forward`` or ``backward`` for PyTorch's own.
        stage: ``a`` to ``d``.
        name: of the Triton kernel, or of PyTorch's operator.
        triton: whether it is one of ours.
        shapes: of its tensors, by parameter (of an operator: in order).
        tile: constants of a launch that make its tile; empty for an operator.
        reads, writes: bytes that must move at least once.
        flops: of matrix products and convolutions, 2 a multiply-add.
    """

    step: str
    stage: str
    name: str
    triton: bool
    shapes: str
    tile: str
    reads: int
    writes: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.reads + self.writes


def trace(
    model: CMT | CMTFeatures, batch: int, dtype: torch.dtype, img_size: int | Sequence[int] | None = None
) -> list[Kernel]:
    """The kernels of ``cmt_fast.optimize(model, device="cuda", dtype=dtype)`` on a batch, with tiles for an H100.

    A CUDA graph replays the same, between a copy of the input, which also converts it, and one of the outputs.

    Args:
        model: with weights, on a CPU.
        img_size: of model and images, which have its dtype; by default the model's own.
    """
    from cmt_fast.inference.triton_steps import prepare

    packed, functions = prepare(_without_memory(pack(model, dtype=dtype, img_size=img_size, base2=True)))
    images = torch.empty(batch, packed.in_chans, *packed.img_size, dtype=dtype, device="meta")
    with torch.no_grad(), record_launches() as launches, Tracer(launches) as tracer:
        run(packed, images, tracer.labelled(functions))
    return tracer.kernels


def _without_memory(packed: PackedModel) -> PackedModel:
    tensors: dict[str, Tensor] = {}
    tree = take_apart(packed, "", tensors)
    return put_together(tree, {name: tensor.to("meta") for name, tensor in tensors.items()})


class Tracer(TorchDispatchMode):
    """Sees every operator, and runs the launcher of ours on tensors without memory."""

    def __init__(self, launches: list[Launch]) -> None:
        """``launches``: where they are recorded, to be taken from."""
        super().__init__()
        self.launches = launches
        self.kernels: list[Kernel] = []
        self.step, self.stages = "", 0

    def labelled(self, functions: StepFunctions) -> StepFunctions:
        """``functions``, telling which step runs."""

        def call(name: str, *arguments: Any) -> Any:
            self.stages += any(isinstance(argument, program.PatchEmbed) for argument in arguments)
            self.step = name
            result = getattr(functions, name)(*arguments)
            self._take()
            self.step = ""
            return result

        steps = [field.name for field in fields(StepFunctions) if getattr(functions, field.name) is not None]
        return StepFunctions(**{step: partial(call, step) for step in steps})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._take()
        kwargs = kwargs or {}
        namespace, _, name = func.name().partition("::")
        if namespace == "cmt_fast_triton":
            with self:  # its launcher may copy, or call operators
                return IMPLEMENTATIONS[name.partition(".")[0]](*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)  # an operator made of others, such as a linear one
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func is _CONVOLUTION and _by_cudnn_in_nhwc(*args):
            result = torch.empty_like(result, memory_format=torch.channels_last)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        changed = _changed(func, args, kwargs)
        written = changed + [t for t in outputs if not _is_view(t, inputs)]
        if written and "empty" not in name:
            overwrites = name.startswith(("copy_", "fill_", "zero_")) or name.endswith(("out", "_out"))
            inputs = _convolution_operands(args) if func is _CONVOLUTION_GRADIENTS else inputs
            read = [t for t in inputs if not (overwrites and any(t is other for other in changed))]
            count = flop_registry.get(func.overloadpacket)
            self._add(
                name,
                False,
                " ".join(map(_shape, [*read, *written])),
                "",
                sum(map(_bytes, read)),
                sum(map(_bytes, written)),
                count(*args, **kwargs, out_val=result) if count else 0,
            )
        return result

    def _take(self) -> None:
        """The launches since the last operator."""
        for launch in self.launches:
            tensors = {name: t for name, t in launch.arguments.items() if isinstance(t, Tensor)}
            self._add(
                launch.kernel.__name__,
                True,
                " ".join(f"{name}{_shape(t)}" for name, t in tensors.items()),
                " ".join(f"{name.lower()}={value}" for name, value in launch.tile.items()),
                launch.reads,
                launch.writes,
                launch.flops,
            )
        self.launches.clear()

    def _add(self, name: str, triton: bool, shapes: str, tile: str, reads: int, writes: int, flops: int) -> None:
        stage = "abcd"[max(self.stages, 1) - 1]
        self.kernels.append(Kernel(self.step, stage, name, triton, shapes, tile, reads, writes, flops))


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = x.values()
    return [t for part in x for t in _tensors(part)] if isinstance(x, (tuple, list, type({}.values()))) else []


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to."""
    parameters = func._schema.arguments
    values = {parameter.name: value for parameter, value in zip(parameters, args)} | kwargs
    writes = [p.name for p in parameters if p.alias_info is not None and p.alias_info.is_write]
    return [values[name] for name in writes if isinstance(values.get(name), Tensor)]


def _by_cudnn_in_nhwc(x: Tensor, weight: Tensor, *rest: Any) -> bool:
    """Whether a convolution's result is NHWC in memory on a GPU, which a tensor without memory does not tell; a depthwise one's is not."""
    groups = rest[-1]
    return groups == 1 and suggest_memory_format(x) is torch.channels_last


def _convolution_operands(args: Sequence[Any]) -> list[Tensor]:
    """What ``convolution_backward`` reads: the weight for the map's gradient, and the map for the weight's."""
    grad, x, weight, *_, (needs_x, needs_weight, _) = args
    return [grad, *([weight] if needs_x else []), *([x] if needs_weight else [])]


def _is_view(x: Tensor, others: Sequence[Tensor]) -> bool:
    return any(x.untyped_storage()._cdata == other.untyped_storage()._cdata for other in others)


def _bytes(x: Tensor) -> int:
    """What is in memory of it: an expanded tensor counts once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"
