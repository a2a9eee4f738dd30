"""A packed model on the CPU kernels of ``csrc/cpu/packed``.

>>> program, functions = prepare(packed)            # doctest: +SKIP
>>> logits = run(program, images, functions)        # doctest: +SKIP
"""

from cmt_fast.inference.native.layout import prepare
from cmt_fast.inference.native.reasons import native_reasons

__all__ = ["native_reasons", "prepare"]
