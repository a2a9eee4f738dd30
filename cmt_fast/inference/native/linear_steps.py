"""The steps of a packed model around PyTorch's own matrix products: for bfloat16 on CPUs with bfloat16 arithmetic.

There oneDNN multiplies in bfloat16, several times as fast as the float32 arithmetic of our products. The compiled library
computes what lies between; stem, patch embeddings and head, which are mostly products, are the plain ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.inference.native import schema
from cmt_fast.inference.native.steps import lpu
from cmt_fast.inference.torch_steps import TORCH, StepFunctions, linear


def attention(step: program.Attention, kv_step: program.KV, y: Tensor, keys_values: Tensor, table: Tensor) -> Tensor:
    h, dims = step.heads, (kv_step.key_dim, kv_step.value_dim)
    if step.query_weight is None or step.out_weight is None:
        bias = F.pad(step.out_bias, (0, -len(step.out_bias) % schema.PANEL))
        return schema.packed_attention(
            y, keys_values, table, None, None, None, bias, h, *dims, step.channels, step.eps, step.base2
        )
    q = linear(schema.packed_normalise(y, step.channels, step.eps), step.query_weight, step.query_bias)
    o = schema.packed_attention_core(q, keys_values, table, h, *dims, step.base2)
    return y + linear(o, step.out_weight, step.out_bias)


def expand(step: program.Expand, z: Tensor) -> Tensor:
    x = linear(schema.packed_normalise(z, step.channels, step.eps), step.weight, step.bias)
    return schema.packed_gelu_affine(x, step.scale, step.shift)


def depthwise_project(step: program.DepthwiseProject, hidden: Tensor, z: Tensor) -> Tensor:
    g = schema.packed_depthwise_gelu(hidden, step.taps, step.bias)
    return z + linear(g, step.weight, step.out_bias)


#: The compiled library between PyTorch's products.
NATIVE_BETWEEN = StepFunctions(
    stem=TORCH.stem,
    patch_embed=TORCH.patch_embed,
    lpu=lpu,
    kv=TORCH.kv,
    attention=attention,
    expand=expand,
    depthwise_project=depthwise_project,
    head=TORCH.head,
)
