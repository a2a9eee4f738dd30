"""The parts of a CMT as modules, with the original's attribute and parameter names."""

from cmt_fast.modules.block import Block
from cmt_fast.modules.drop_path import DropPath
from cmt_fast.modules.irffn import IRFFN
from cmt_fast.modules.lmhsa import LMHSA
from cmt_fast.modules.patch_embed import PatchEmbed
from cmt_fast.modules.pointwise import PointwiseConv
from cmt_fast.modules.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "IRFFN",
    "LMHSA",
    "Block",
    "DropPath",
    "PatchEmbed",
    "PointwiseConv",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
]
