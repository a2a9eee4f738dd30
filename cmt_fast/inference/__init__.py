"""A trained model packed for inference: one program of plain tensors, for every backend.

>>> packed = pack(model, dtype=torch.bfloat16)      # doctest: +SKIP
>>> logits = run(packed, images)                    # doctest: +SKIP
>>> save_packed(packed, "cmt_s.safetensors")        # doctest: +SKIP
"""

from cmt_fast.inference.pack import pack
from cmt_fast.inference.packed_io import load_packed, save_packed
from cmt_fast.inference.program import PackedModel, Padding
from cmt_fast.inference.run import run, run_features

__all__ = ["PackedModel", "Padding", "load_packed", "pack", "run", "run_features", "save_packed"]
