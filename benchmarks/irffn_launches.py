"""The launches of a training step of the inverted residual feed-forward network, from tensors without memory."""

from __future__ import annotations

from functools import partial

import torch

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops.irffn import triton_train_launch as train
from cmt_fast.ops.irffn.triton_output_lpu_launch import output_lpu_gradient_launch, output_lpu_launch
from cmt_fast.testing.shapes import StageShape

_vector = partial(torch.empty, device="meta", dtype=torch.float32)


def irffn_train(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """A training step: four launches forward; backward the sums and gradient of BN3, the projection's, the convolution's, the expansion's."""
    c, r, map_ = shape.dim, shape.hidden, (shape.batch, shape.height, shape.width)
    matrix = partial(torch.empty, device="meta", dtype=dtype)
    x, h = matrix(*map_, c), matrix(*map_, r)
    w1, w2, taps, factor = matrix(r, c), matrix(c, r), _vector(r, 1, 3, 3), matrix(shape.batch)
    narrow, wide, sums_narrow, sums_wide = _vector(6, c), _vector(6, r), _vector(2, c), _vector(2, r)
    moments = _vector(x.numel() // c, 2)
    *before, project_weight = train.project_weight_launches(x, x, narrow, sums_narrow, factor, h, wide, x)
    expand_weight = train.expand_weight_launch(h, h, wide, sums_wide, x, moments)
    sums = []
    for launch, weight, out, in_ in ((project_weight, w2, c, r), (expand_weight, w1, r, c)):
        parts = launch.arguments["products"], launch.arguments["biases"]
        sums.append(
            train.weight_gradient_launch(
                *parts, weight, _vector(in_), _vector(in_), _vector(out, in_), _vector(out), _vector(2, in_)
            )
        )
    return [
        train.expand_launch(x, w1, _vector(r), h, 1e-6, True),
        train.dw_launch(h, wide, taps, _vector(r), h, True),
        train.project_launch(h, wide, w2, _vector(c), x, True),
        train.output_launch(x, narrow, factor, x, x),
        train.output_sums_launch(x, x, narrow, factor),
        *before,
        project_weight,
        sums[0],
        train.project_input_launch(x, w2, h, wide, sums_wide, h),
        train.dw_gradient_launch(h, h, wide, taps, h),
        *train.expand_input_launches(h, h, wide, sums_wide, w1, x, x, x, moments, 1e-6),
        expand_weight,
        sums[1],
    ]


def irffn_output_lpu(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """The end of the IRFFN with the LPU of the next block, in the place of the outputs above and of that LPU's two kernels."""
    c = shape.dim
    x = torch.empty(shape.batch, shape.height, shape.width, c, dtype=dtype, device="meta")
    output = (x, _vector(6, c), x.new_empty(shape.batch), x, _vector(c, 1, 3, 3))
    return [output_lpu_launch(*output, _vector(c), x), output_lpu_gradient_launch(x, *output, x, True, True)]
