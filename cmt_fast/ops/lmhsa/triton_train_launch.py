"""Launching the core of the attention sub-layer in a training step: one kernel each way where it fits, else products and the primitive's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.linear_gradient import Normal, linear_gradient_launches
from cmt_fast.ops._triton.parts import sum_parts_launch, whole_vectors
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.table import aligned, table_layout
from cmt_fast.ops._triton.tiling import block
from cmt_fast.ops.attention.configs import holds_all_keys
from cmt_fast.ops.attention.schema import reduced_kv_attention_bwd, reduced_kv_attention_fwd
from cmt_fast.ops.lmhsa.configs import core_backward_config, core_forward_config
from cmt_fast.ops.lmhsa.triton_reduce_launch import norm_reduce_launch
from cmt_fast.ops.lmhsa.triton_train_kernels import core_backward_kernel, core_forward_kernel

#: Channels that the backward kernel multiplies at once.
CHUNK = 64


@dataclass(frozen=True)
class Core:
    """What both passes take, contiguous; shapes and dtypes: ``schema.py``."""

    x: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float | None
    query_weight: Tensor
    query_bias: Tensor | None
    keys_values: Tensor
    table: Tensor
    out_weight: Tensor
    row_scale: Tensor | None
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.query_weight.dtype

    @property
    def head_dims(self) -> tuple[int, int]:
        """Of q and k, and of v."""
        heads = len(self.table)
        return len(self.query_weight) // heads, self.out_weight.shape[1] // heads

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int, int, bool]:
        """What tiles depend on: images, heads, tokens, keys, channels, dims of a head, bytes of an element, and whether products are exact."""
        heads, tokens, keys = self.table.shape
        images, _, channels = self.x.shape
        size = self.query_weight.element_size()
        return images, heads, tokens, keys, channels, *self.head_dims, size, is_exact(self.dtype)


def lmhsa_core_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    query_weight: Tensor,
    query_bias: Tensor | None,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    shortcut: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes: ``schema.py``."""
    core = _core(
        x, norm_weight, norm_bias, eps, query_weight, query_bias, keys_values, table, out_weight, row_scale, scale
    )
    z = torch.empty_like(core.x, dtype=x.dtype if shortcut else core.dtype)
    lse = torch.empty(x.shape[0], *table.shape[:2], dtype=torch.float32, device=x.device)
    if not z.numel():
        return z, lse
    fused = core_forward_launch(core, out_bias, z, lse, shortcut, device_limits(x.device))
    if fused is not None:
        fused.run()
        return z, lse
    q, k, v = _queries_keys_values(core, _normal(core))
    out, lse = reduced_kv_attention_fwd(q, k, v, core.table, scale)
    branch = _linear(_tokens(out), core.out_weight, out_bias)
    if core.row_scale is not None:
        branch = branch * core.row_scale.float()[:, None, None]
    return z.copy_(x + branch if shortcut else branch), lse


def lmhsa_core_bwd(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    query_weight: Tensor,
    query_bias: Tensor | None,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    row_scale: Tensor | None,
    lse: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Shapes and dtypes: ``schema.py``."""
    core = _core(
        x, norm_weight, norm_bias, eps, query_weight, query_bias, keys_values, table, out_weight, row_scale, scale
    )
    grad = grad.contiguous()
    shapes = x, keys_values, table, query_weight, query_weight[:, 0], out_weight, out_weight[:, 0]
    dtypes = core.dtype, core.dtype, torch.float32, core.dtype, torch.float32, core.dtype, torch.float32
    found = tuple(
        torch.empty(like.shape[0] if needed else 0, *like.shape[1:], dtype=dtype, device=x.device)
        for needed, like, dtype in zip(needs, shapes, dtypes)
    )
    if not x.numel():  # sums of nothing
        for t in found:
            t.zero_()
        return found
    wanted = Gradients(*(t if needed else None for needed, t in zip(needs, found)))
    fused = core_backward_launches(core, grad, lse, wanted, device_limits(x.device))
    if fused is None:
        _composed_backward(core, grad, lse, wanted)
        return found
    launches, dq = fused
    for launch in launches:
        launch.run()
    if wanted.dy is not None and dq is not None:
        torch.mm(_rows(dq), core.query_weight, out=_rows(wanted.dy))
    return found


@dataclass(frozen=True)
class Gradients:
    """Tensors to write the gradients into, None where one is not wanted; shapes and dtypes: ``schema.py``."""

    dy: Tensor | None
    dkv: Tensor | None
    dtable: Tensor | None
    dwq: Tensor | None
    dbq: Tensor | None
    dwo: Tensor | None
    dbo: Tensor | None


def _composed_backward(core: Core, grad: Tensor, lse: Tensor, wanted: Gradients) -> None:
    """By products, and the kernels of the primitive."""
    heads, dtype = len(core.table), core.dtype
    if core.row_scale is not None:
        grad = grad * core.row_scale.to(torch.float32)[:, None, None]
    if wanted.dbo is not None:
        wanted.dbo.copy_(grad.sum((0, 1), dtype=torch.float32))
    grad = grad.to(dtype)
    normal = _normal(core)
    q, k, v = _queries_keys_values(core, normal)
    dvalues = _heads(grad @ core.out_weight, heads)
    out = None
    if wanted.dwo is not None or not holds_all_keys(k.shape[2], max(core.head_dims), q.element_size()):
        out, _ = reduced_kv_attention_fwd(q, k, v, core.table, core.scale)
    need_q = any(t is not None for t in (wanted.dy, wanted.dwq, wanted.dbq))
    needs = [need_q, wanted.dkv is not None, wanted.dkv is not None, wanted.dtable is not None]
    dq, dk, dv, dtable = reduced_kv_attention_bwd(dvalues, q, k, v, core.table, lse, out, core.scale, needs)
    dq = _tokens(dq)
    if wanted.dy is not None:
        torch.mm(_rows(dq), core.query_weight, out=_rows(wanted.dy))
    if wanted.dkv is not None:
        torch.cat([_tokens(dk), _tokens(dv)], dim=-1, out=wanted.dkv)
    if wanted.dtable is not None:
        wanted.dtable.copy_(dtable)
    if wanted.dwq is not None:
        torch.mm(_rows(dq).t(), _rows(normal), out=wanted.dwq)
    if wanted.dbq is not None:
        wanted.dbq.copy_(dq.sum((0, 1), dtype=torch.float32))
    if wanted.dwo is not None and out is not None:
        torch.mm(_rows(grad).t(), _rows(_tokens(out)), out=wanted.dwo)


def core_forward_launch(
    core: Core, out_bias: Tensor | None, z: Tensor, lse: Tensor, shortcut: bool, limits: DeviceLimits
) -> Launch | None:
    """Into z (B, N, C) and lse (B, h, N), contiguous; None where one kernel does not fit."""
    config = core_forward_config(*core.sizes, limits)
    if config is None:
        return None
    images, heads, tokens, keys, channels, d, dv, *_ = core.sizes
    tensors = dict(**_arguments(core), out_bias=out_bias, out=z, lse=lse)
    return Launch(
        kernel=core_forward_kernel,
        grid=(images * -(-tokens // config.block_n),),
        arguments=dict(**tensors, images=images, tokens=tokens, keys=keys, **_numbers(core, tensors["table"])),
        constants=dict(SHORTCUT=shortcut, BLOCK_N=config.block_n, BLOCK_C=block(channels), **_constants(core)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=_bytes(tensors) - z.nbytes - lse.nbytes,
        writes=z.nbytes + lse.nbytes,
        flops=2 * images * heads * tokens * (channels + keys) * (d + dv),
        elements=z.numel(),
        loops=(heads,) if heads > 1 else (),
    )


def core_backward_launches(
    core: Core, grad: Tensor, lse: Tensor, wanted: Gradients, limits: DeviceLimits
) -> tuple[list[Launch], Tensor | None] | None:
    """The launches of the backward pass, in order; None where one kernel does not fit.

    Also dq (B, N, h d_qk), where dy = dq Wq is not among what they write: a product of its own, or it would be a sum over programs.
    """
    config = core_backward_config(*core.sizes, limits)
    if config is None:
        return None
    images, heads, tokens, keys, channels, d, dv, itemsize, _ = core.sizes

    def empty(needed: bool, *size: int, dtype: torch.dtype = core.dtype) -> Tensor | None:
        return torch.empty(size, dtype=dtype, device=grad.device) if needed else None

    dy = wanted.dy if heads == 1 else None
    product = wanted.dy is not None and heads > 1
    query = wanted.dwq is not None or wanted.dbq is not None
    output = wanted.dwo is not None or wanted.dbo is not None
    dq = empty(product or query, images, tokens, heads * d)
    attended = empty(output, images, tokens, heads * dv)
    moments = empty(query and core.eps is not None, images * tokens, 2, dtype=torch.float32)
    dlogits = empty(wanted.dtable is not None, images, heads, tokens, whole_vectors(keys, itemsize))
    dkv = wanted.dkv
    if dkv is not None:
        dkv = dkv[None] if config.parts == 1 else empty(True, config.parts, *dkv.shape, dtype=torch.float32)
    written = dict(dy=dy, dq=dq, attended=attended, moments=moments, dkeys_values=dkv, dlogits=dlogits)
    read = dict(**_arguments(core), lse=lse, grad=grad)
    chunks = -(-channels // min(CHUNK, block(channels)))
    dots = 2 * (d + dv) * keys + 2 * (d + dv) * keys + channels * (d + dv + (d if dy is not None else 0))
    passes = 2 + (core.eps is not None) + (dy is not None)
    launches = [
        Launch(
            kernel=core_backward_kernel,
            grid=(images * heads, config.parts),
            arguments=dict(
                **read,
                **written,
                images=images,
                tokens=tokens,
                keys=keys,
                part_tokens=config.part_queries,
                **_numbers(core, read["table"]),
            ),
            constants=dict(
                LOGITS_ROW=0 if dlogits is None else dlogits.shape[3],
                BLOCK_N=config.block_n,
                BLOCK_C=min(CHUNK, block(channels)),
                **_constants(core),
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            reads=_bytes(read),
            writes=_bytes(written),
            flops=2 * images * heads * tokens * dots,
            elements=grad.numel(),
            loops=tuple(steps for steps in (config.part_queries / config.block_n, *passes * [chunks]) if steps > 1),
        )
    ]
    if dlogits is not None and wanted.dtable is not None:
        launches.append(sum_parts_launch(dlogits, wanted.dtable))
    if dkv is not None and wanted.dkv is not None and config.parts > 1:
        launches.append(sum_parts_launch(dkv, wanted.dkv))
    if query and dq is not None:
        norm = None if moments is None else Normal(moments, core.norm_weight, core.norm_bias)
        launches += linear_gradient_launches(dq, core.x, wanted.dwq, wanted.dbq, norm=norm)
    if output and attended is not None:
        launches += linear_gradient_launches(grad, attended, wanted.dwo, wanted.dbo, row_scale=core.row_scale)
    return launches, dq if product else None


def layer_norm_launch(core: Core, out: Tensor) -> Launch:
    """out (B, N, C) = LN(x), in the dtype of out: the reduction's kernel, of windows of one token."""
    return norm_reduce_launch(
        core.x.unsqueeze(1), core.norm_weight, core.norm_bias, core.eps, None, None, 1, out, None, None
    )


def _core(*parts: Tensor | float | None) -> Core:
    """The arguments of an operator, made contiguous, but for the table."""
    core = Core(*parts)  # type: ignore[arg-type]
    tensors = {name: t.contiguous() for name, t in vars(core).items() if isinstance(t, Tensor) and name != "table"}
    return replace(core, **tensors)  # type: ignore[arg-type]


def _arguments(core: Core) -> dict[str, Tensor | None]:
    """The tensors that both kernels take, by parameter name."""
    arguments = {name: value for name, value in vars(core).items() if name not in ("eps", "scale")}
    return arguments | dict(table=aligned(core.table))


def _numbers(core: Core, table: Tensor | None) -> dict[str, int | float]:
    assert table is not None
    layout = table_layout(table)
    strides = dict(table_head=layout.head, table_row=layout.row, table_columns=layout.columns)
    return dict(scale=float(core.scale), eps=float(core.eps or 0.0), **strides)


def _constants(core: Core) -> dict[str, int | bool | str]:
    _, heads, _, keys, channels, d, dv, *_ = core.sizes
    return dict(
        HEADS=heads,
        C=channels,
        KEY_DIM=d,
        VALUE_DIM=dv,
        NORM=core.eps is not None,
        BLOCK_M=block(keys),
        BLOCK_K=block(d),
        BLOCK_V=block(dv),
        PRECISION=precision_of(core.dtype),
    )


def _bytes(tensors: Mapping[str, Tensor | None]) -> int:
    return sum(t.nbytes for t in tensors.values() if t is not None)


def _normal(core: Core) -> Tensor:
    """LN(x), in the dtype of the products."""
    if core.eps is None:
        return core.x.to(core.dtype)
    out = torch.empty_like(core.x, dtype=core.dtype)
    layer_norm_launch(core, out).run()
    return out


def _queries_keys_values(core: Core, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, h, n, d) each, given LN(x)."""
    q = _linear(normal, core.query_weight, core.query_bias)
    k, v = core.keys_values.split([len(core.query_weight), core.out_weight.shape[1]], dim=-1)
    heads = len(core.table)
    return _heads(q, heads), _heads(k, heads), _heads(v, heads)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, h d) -> (B, h, n, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """(B, h, n, d) -> (B, n, h d)."""
    return x.transpose(1, 2).flatten(2)


def _rows(x: Tensor) -> Tensor:
    """(B, N, C) -> (B N, C), a view."""
    return x.flatten(0, 1)
