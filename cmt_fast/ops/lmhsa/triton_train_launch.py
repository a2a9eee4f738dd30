"""Launching the core of the attention sub-layer in a training step: one kernel each way where it fits, else products and the primitive's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.parts import sum_parts_launch, whole_vectors
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.table import aligned, table_layout
from cmt_fast.ops._triton.tiling import block
from cmt_fast.ops.attention.configs import holds_all_keys
from cmt_fast.ops.attention.schema import reduced_kv_attention_bwd, reduced_kv_attention_fwd
from cmt_fast.ops.lmhsa.configs import core_backward_config, core_forward_config, layer_norm_config
from cmt_fast.ops.lmhsa.triton_train_kernels import core_backward_kernel, core_forward_kernel, layer_norm_kernel

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes: ``schema.py``."""
    core = _core(
        x, norm_weight, norm_bias, eps, query_weight, query_bias, keys_values, table, out_weight, row_scale, scale
    )
    grad = grad.contiguous()
    need_y, need_kv, need_table, need_wq, need_bq, need_wo, need_bo = needs

    def empty(needed: bool, like: Tensor, dtype: torch.dtype = core.dtype) -> Tensor:
        return torch.empty(like.shape[0] if needed else 0, *like.shape[1:], dtype=dtype, device=x.device)

    dy, dkv, dtable = empty(need_y, x), empty(need_kv, keys_values), empty(need_table, table, torch.float32)
    dwq, dbq = empty(need_wq, query_weight), empty(need_bq, query_weight[:, 0], torch.float32)
    dwo, dbo = empty(need_wo, out_weight), empty(need_bo, out_weight[:, 0], torch.float32)
    found = dy, dkv, dtable, dwq, dbq, dwo, dbo
    if not x.numel():  # sums of nothing
        for t in found:
            t.zero_()
        return found
    wanted = Wanted(
        dkv=dkv if need_kv else None,
        dtable=dtable if need_table else None,
        dq=need_y or need_wq or need_bq,
        normal=need_wq,
        attended=need_wo,
        sums=need_bq or need_bo,
    )
    fused = core_backward_launches(core, grad, lse, wanted, device_limits(x.device))
    if fused is None:
        parts = _composed_backward(core, grad, lse, wanted)
    else:
        launches, parts = fused
        for launch in launches:
            launch.run()
    if need_y:
        torch.mm(_rows(parts.dq), core.query_weight, out=_rows(dy))
    if need_wq:
        torch.mm(_rows(parts.dq).t(), _rows(parts.normal), out=dwq)
    if need_wo:
        torch.mm(_rows(parts.grad).t(), _rows(parts.attended), out=dwo)
    if parts.sums is not None:
        dq_sum, grad_sum = parts.sums.sum((0, 1)).split([len(query_weight), x.shape[2]])
        if need_bq:
            dbq.copy_(dq_sum)
        if need_bo:
            dbo.copy_(grad_sum)
    return found


@dataclass(frozen=True)
class Wanted:
    """What a backward pass shall write: into tensors, or for the products that follow it."""

    dkv: Tensor | None
    dtable: Tensor | None
    dq: bool
    normal: bool
    attended: bool
    sums: bool


@dataclass(frozen=True)
class Products:
    """What the gradients of the weights are made of; None where it is not wanted.

    dy = dq Wq, dWq = dq^T normal and dWo = grad^T attended, each (B, N, ...) in the dtype of the products, stochastic depth's factor in either
    ``grad`` or ``attended``; sums (tiles, B, h d_qk + C) float32: of dq and of grad with that factor, over the tokens of a tile of an image.
    """

    dq: Tensor | None
    normal: Tensor | None
    grad: Tensor
    attended: Tensor | None
    sums: Tensor | None


def _composed_backward(core: Core, grad: Tensor, lse: Tensor, wanted: Wanted) -> Products:
    """By products, and the kernels of the primitive."""
    heads, dtype, b = len(core.table), core.dtype, len(grad)
    grad_sum = None
    if core.row_scale is not None:
        grad = grad * core.row_scale.to(torch.float32)[:, None, None]
    if wanted.sums:
        grad_sum = grad.sum(1, dtype=torch.float32)  # (B, C)
    grad = grad.to(dtype)
    normal = _normal(core)
    q, k, v = _queries_keys_values(core, normal)
    dvalues = _heads(grad @ core.out_weight, heads)
    out = None
    if wanted.attended or not holds_all_keys(k.shape[2], max(core.head_dims), q.element_size()):
        out, _ = reduced_kv_attention_fwd(q, k, v, core.table, core.scale)
    needs = [wanted.dq, wanted.dkv is not None, wanted.dkv is not None, wanted.dtable is not None]
    dq, dk, dv, dtable = reduced_kv_attention_bwd(dvalues, q, k, v, core.table, lse, out, core.scale, needs)
    dq = _tokens(dq)
    if wanted.dkv is not None:
        torch.cat([_tokens(dk), _tokens(dv)], dim=-1, out=wanted.dkv)
    if wanted.dtable is not None:
        wanted.dtable.copy_(dtable)
    sums = None
    if grad_sum is not None:
        dq_sum = dq.sum(1, dtype=torch.float32) if wanted.dq else grad.new_zeros(b, len(core.query_weight))
        sums = torch.cat([dq_sum, grad_sum], dim=-1)[None]
    return Products(dq, normal, grad, None if out is None else _tokens(out), sums)


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
    core: Core, grad: Tensor, lse: Tensor, wanted: Wanted, limits: DeviceLimits
) -> tuple[list[Launch], Products] | None:
    """The launches of the backward pass, in order, and what they write for the products that follow; None where one kernel does not fit."""
    config = core_backward_config(*core.sizes, limits)
    if config is None:
        return None
    images, heads, tokens, keys, channels, d, dv, itemsize, _ = core.sizes

    def empty(needed: bool, *size: int, dtype: torch.dtype = core.dtype) -> Tensor | None:
        return torch.empty(size, dtype=dtype, device=grad.device) if needed else None

    dq = empty(wanted.dq, images, tokens, heads * d)
    attended = empty(wanted.attended, images, tokens, heads * dv)
    as_it_is = core.eps is None and core.x.dtype == core.dtype
    normal = empty(wanted.normal and not as_it_is, images, tokens, channels)
    low_grad = empty(wanted.attended and grad.dtype != core.dtype, images, tokens, channels)
    sums = empty(wanted.sums, -(-tokens // config.block_n), images, heads * d + channels, dtype=torch.float32)
    dlogits = empty(wanted.dtable is not None, images, heads, tokens, whole_vectors(keys, itemsize))
    dkv = wanted.dkv
    if dkv is not None:
        dkv = dkv[None] if config.parts == 1 else empty(True, config.parts, *dkv.shape, dtype=torch.float32)
    written = dict(
        dq=dq, attended=attended, normal=normal, low_grad=low_grad, dkeys_values=dkv, dlogits=dlogits, sums=sums
    )
    read = dict(**_arguments(core), lse=lse, grad=grad)
    chunks = -(-channels // min(CHUNK, block(channels)))
    dots = 2 * (d + dv) * keys + 2 * (d + dv) * keys + channels * (d + dv)
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
            loops=tuple(steps for steps in (config.part_queries / config.block_n, *3 * [chunks]) if steps > 1),
        )
    ]
    if dlogits is not None and wanted.dtable is not None:
        launches.append(sum_parts_launch(dlogits, wanted.dtable))
    if dkv is not None and wanted.dkv is not None and config.parts > 1:
        launches.append(sum_parts_launch(dkv, wanted.dkv))
    return launches, Products(
        dq, core.x if as_it_is else normal, grad if low_grad is None else low_grad, attended, sums
    )


def layer_norm_launch(core: Core, out: Tensor) -> Launch:
    """out (B, N, C) = LN(x), in the dtype of out."""
    assert core.eps is not None
    channels = core.x.shape[2]
    rows = core.x.numel() // channels
    config = layer_norm_config(rows, channels)
    return Launch(
        kernel=layer_norm_kernel,
        grid=(-(-rows // config.block_n),),
        arguments=dict(x=core.x, weight=core.norm_weight, bias=core.norm_bias, out=out, rows=rows, eps=float(core.eps)),
        constants=dict(C=channels, BLOCK_N=config.block_n, BLOCK_C=block(channels)),
        num_warps=config.num_warps,
        num_stages=1,
        reads=core.x.nbytes,
        writes=out.nbytes,
        flops=0,
        elements=out.numel(),
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


def _rows(x: Tensor | None) -> Tensor:
    """(B, N, C) -> (B N, C), a view; of what was wanted, and so is there."""
    assert x is not None
    return x.flatten(0, 1)
