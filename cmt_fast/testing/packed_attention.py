"""A seeded attention step of a packed model with its inputs: what tests and benchmarks of its kernels run on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.inference.program import Padding, round_up
from cmt_fast.inference.torch_steps import StepFunctions, kv
from cmt_fast.testing.packed_double import in_double
from cmt_fast.testing.shapes import StageShape


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of :func:`cmt_fast.inference.torch_steps.attention`."""

    step: program.Attention
    kv_step: program.KV
    y: Tensor
    keys_values: Tensor
    table: Tensor

    def run(self, functions: StepFunctions) -> Tensor:
        """(B, H, W, C)."""
        return functions.attention(self.step, self.kv_step, self.y, self.keys_values, self.table)

    def images(self, indices: list[int]) -> AttentionCall:
        """Some images of the batch."""
        return dataclasses.replace(self, y=self.y[indices], keys_values=self.keys_values[indices])

    def double(self) -> AttentionCall:
        """The same numbers in float64."""
        return in_double(self)


def attention_call(
    shape: StageShape,
    dtype: torch.dtype,
    *,
    absorbed: bool,
    base2: bool = True,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionCall:
    """The attention of one block at ``shape``: activations and logits of size 1, padded channels 0, no other term 0.

    Args:
        dtype: of maps and matrices; biases are float32.
        absorbed: with G and V' for keys and values, or with query and output weights.
        base2: the logits are exponents of 2.
        padding: of the widths, ``Padding()`` by default.
    """
    generator = torch.Generator().manual_seed(seed)
    pad = padding or Padding()
    b, c, h = shape.batch, shape.dim, shape.heads
    width = round_up(c, pad.channels)
    unit = math.log2(math.e) if base2 else 1.0

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator) * std

    def place(x: Tensor, to: torch.dtype = dtype) -> Tensor:
        return x.to(device, to)

    def matrix(rows: int, row_groups: int, row_multiple: int, columns: int, groups: int, multiple: int, std: float):
        """Random, rows and columns padded group by group."""
        x = normal(row_groups, rows // row_groups, groups, columns // groups, std=std)
        x = _pad(_pad(x, 1, row_multiple), 3, multiple)
        return x.flatten(2).flatten(0, 1)

    if absorbed:
        key_dim = value_dim = width
        bias_dim = round_up(h, pad.channels)
        keys = matrix(h * c, h, pad.channels, c, 1, pad.channels, unit / c)
        values = matrix(h * c, h, pad.channels, c, 1, pad.channels, c**-0.5)
        biases = matrix(h, 1, pad.channels, c, 1, pad.channels, c**-0.5)
        weight = torch.cat([keys, values, biases])
        query_weight = query_bias = out_weight = None
    else:
        d, dv, bias_dim = shape.qk_head_dim, shape.v_head_dim, 0
        key_dim, value_dim = round_up(d, pad.head), round_up(dv, pad.head)
        keys = matrix(h * d, h, pad.head, c, 1, pad.channels, c**-0.5)
        values = matrix(h * dv, h, pad.head, c, 1, pad.channels, c**-0.5)
        weight = torch.cat([keys, values])
        query_weight = place(matrix(h * d, h, pad.head, c, 1, pad.channels, unit * (c * d) ** -0.5))
        bias = _pad(normal(h, d, std=0.2 * unit * d**-0.5), 1, pad.head)
        query_bias = place(bias.flatten(), torch.float32)
        out_weight = place(matrix(c, 1, pad.channels, h * dv, h, pad.head, (h * dv) ** -0.5))
    kv_step = program.KV(place(weight), h, key_dim, value_dim, bias_dim)
    step = program.Attention(
        query_weight=query_weight,
        query_bias=query_bias,
        out_weight=out_weight,
        out_bias=place(_pad(normal(c, std=0.2), 0, pad.channels), torch.float32),
        heads=h,
        base2=base2,
        channels=c,
        eps=1e-6,
    )
    reduced = place(_pad(normal(b, shape.height // shape.sr_ratio, shape.width // shape.sr_ratio, c), 3, pad.channels))
    return AttentionCall(
        step=step,
        kv_step=kv_step,
        y=place(_pad(normal(b, shape.height, shape.width, c) + 1, 3, pad.channels)),
        keys_values=kv(kv_step, reduced),
        table=place(normal(h, shape.queries, shape.keys, std=unit)),
    )


def _pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros after ``dim``, up to a multiple."""
    sizes = list(x.shape)
    sizes[dim] = round_up(sizes[dim], multiple) - sizes[dim]
    return torch.cat([x, x.new_zeros(sizes)], dim)
