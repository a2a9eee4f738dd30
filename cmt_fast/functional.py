"""The operations of CMT as functions, for networks of your own.

Maps are (B, H, W, C). Every function takes ``backend=None`` (see :func:`cmt_fast.use_backend`); the mathematics of each
stands in ``cmt_fast/ops/<op>/reference.py``.
"""

from cmt_fast.ops.attention.api import reduced_kv_attention
from cmt_fast.ops.attention.relative_pos import resize_relative_pos
from cmt_fast.ops.depthwise.api import depthwise_conv3x3, depthwise_reduce
from cmt_fast.ops.irffn.api import irffn, irffn_lpu
from cmt_fast.ops.lmhsa.api import lmhsa
from cmt_fast.ops.lpu.api import lpu

__all__ = [
    "depthwise_conv3x3",
    "depthwise_reduce",
    "irffn",
    "irffn_lpu",
    "lmhsa",
    "lpu",
    "reduced_kv_attention",
    "resize_relative_pos",
]
