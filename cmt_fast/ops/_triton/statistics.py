"""Launching what lies between two kernels of a BatchNorm: merging moments, statistics, sums of its gradients, ordered sums of partials.

How the work is cut depends on shapes alone, and partials are merged in the order of their indices: a run repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.batch_norm import (
    add_partials_kernel,
    gradient_sums_kernel,
    merge_moments_kernel,
    statistics_kernel,
)
from cmt_fast.ops._triton.launch import Launch

#: Partials that one program merges.
GROUP = 256


def merge_moments(partials: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """partials (P, 2, C) and counts (P,) -> (1, 2, C) and (1,): the moments of everything."""
    partials, counts = _merged(*_merged_to(GROUP, partials, counts))
    return partials, counts


def batch_norm_statistics(
    partials: Tensor, counts: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """partials (P, 2, C), counts (P,), weight and bias (C,) or None -> the statistics (6, C): see ``batch_norm.py``."""
    partials, counts = _merged_to(GROUP, partials, counts)
    statistics = torch.empty(6, partials.shape[2], dtype=torch.float32, device=partials.device)
    statistics_launch(partials, counts, weight, bias, eps, statistics).run()
    return statistics


def gradient_sums(grad: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    """grad and x (..., C), statistics (6, C) -> (2, C) float32: the sums of grad and of grad * x_hat over all pixels."""
    grad, x = grad.contiguous(), x.contiguous()
    launch = gradient_sums_launch(grad, x, statistics)
    launch.run()
    return add_partials(launch.arguments["partials"])  # type: ignore[arg-type]


def add_partials(partials: Tensor) -> Tensor:
    """(P, ...) float32 -> (...), added in the order of the first dimension."""
    launches = add_partials_launches(partials.contiguous())
    for launch in launches:
        launch.run()
    return launches[-1].arguments["sums"][0]  # type: ignore[index]


def merge_launch(partials: Tensor, counts: Tensor, merged: Tensor, merged_counts: Tensor) -> Launch:
    """partials (P, 2, C), counts (P,) into merged (G, 2, C), merged_counts (G,), G = ceil(P / GROUP); all contiguous."""
    programs, _, c = partials.shape
    return Launch(
        kernel=merge_moments_kernel,
        grid=(len(merged) * -(-c // _BLOCK_C),),
        arguments=dict(partials=partials, counts=counts, merged=merged, merged_counts=merged_counts, programs=programs),
        constants=dict(C=c, GROUP=GROUP, BLOCK_P=_block_p(programs), BLOCK_C=_BLOCK_C),
        num_warps=4,
        num_stages=1,
        reads=partials.nbytes + counts.nbytes,
        writes=merged.nbytes + merged_counts.nbytes,
        flops=0,
        elements=partials.numel(),
        loops=_loops(programs),
    )


def statistics_launch(
    partials: Tensor, counts: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: Tensor
) -> Launch:
    """partials (P, 2, C), counts (P,), weight and bias (C,) or None, into statistics (6, C); all contiguous."""
    programs, _, c = partials.shape
    return Launch(
        kernel=statistics_kernel,
        grid=(-(-c // _BLOCK_C),),
        arguments=dict(
            partials=partials,
            counts=counts,
            weight=weight,
            bias=bias,
            statistics=statistics,
            programs=programs,
            eps=eps,
        ),
        constants=dict(C=c, BLOCK_P=_block_p(programs), BLOCK_C=_BLOCK_C),
        num_warps=4,
        num_stages=1,
        reads=sum(t.nbytes for t in (partials, counts, weight, bias) if t is not None),
        writes=statistics.nbytes,
        flops=0,
        elements=partials.numel(),
        loops=_loops(programs),
    )


def gradient_sums_launch(grad: Tensor, x: Tensor, statistics: Tensor) -> Launch:
    """grad and x (..., C), statistics (6, C), contiguous, into new partials (P, 2, C)."""
    c = x.shape[-1]
    rows = x.numel() // c
    block_c = min(64, 1 << (c - 1).bit_length())
    block_n = 2048 // block_c
    steps = max(1, min(8, rows // (block_n * 256)))
    programs = -(-rows // (block_n * steps))
    return Launch(
        kernel=gradient_sums_kernel,
        grid=(programs * -(-c // block_c),),
        arguments=dict(
            grad=grad,
            x=x,
            statistics=statistics,
            partials=torch.empty(programs, 2, c, dtype=torch.float32, device=x.device),
            rows=rows,
        ),
        constants=dict(C=c, STEPS=steps, BLOCK_N=block_n, BLOCK_C=block_c),
        num_warps=4,
        num_stages=1,
        reads=grad.nbytes + x.nbytes + statistics.nbytes,
        writes=programs * 2 * c * 4,
        flops=0,
        elements=x.numel(),
        loops=(steps,) if steps > 1 else (),
    )


def add_partials_launches(partials: Tensor) -> list[Launch]:
    """partials (P, ...), contiguous, into new sums (ceil(P / GROUP), ...), and so on until there is one: once at least, as the result of an
    operator is no view of its argument."""
    programs, width = len(partials), partials[0].numel()
    sums = partials.new_empty(-(-programs // GROUP), *partials.shape[1:])
    launch = Launch(
        kernel=add_partials_kernel,
        grid=(len(sums) * -(-width // _BLOCK_C),),
        arguments=dict(partials=partials, sums=sums, programs=programs, width=width),
        constants=dict(GROUP=GROUP, BLOCK_P=_block_p(programs), BLOCK_W=_BLOCK_C),
        num_warps=4,
        num_stages=1,
        reads=partials.nbytes,
        writes=sums.nbytes,
        flops=0,
        elements=partials.numel(),
        loops=_loops(programs),
    )
    return [launch] if len(sums) == 1 else [launch, *add_partials_launches(sums)]


_BLOCK_C = 32  # channels of a tile of partials: 128 bytes of a row


def _block_p(programs: int) -> int:
    """Partials of a tile."""
    return min(64, 1 << (programs - 1).bit_length())


def _loops(programs: int) -> tuple[int, ...]:
    """How often the loop over tiles of partials runs."""
    return (-(-min(programs, GROUP) // _block_p(programs)),)


def _merged_to(most: int, partials: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """As few merges as leave at most ``most`` partials."""
    partials, counts = partials.contiguous(), counts.contiguous()
    while len(partials) > most:
        partials, counts = _merged(partials, counts)
    return partials, counts


def _merged(partials: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """One launch of the merging kernel: P partials become ceil(P / GROUP)."""
    groups = -(-len(partials) // GROUP)
    merged, merged_counts = partials.new_empty(groups, *partials.shape[1:]), counts.new_empty(groups)
    merge_launch(partials, counts, merged, merged_counts).run()
    return merged, merged_counts
