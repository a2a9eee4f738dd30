"""Time attention in training beside what else is public: ``python -m benchmarks.attention [--variant cmt_s] [--batch 128] [--dtype bfloat16]``.

The bias table is a float32 parameter that gets a gradient, q, k and v are in the dtype asked for: that of autocast. Forward and backward are
timed apart, and on a GPU the memory that both take together. Every provider is first verified, output and gradients, at the very shape that is
timed; what is wrong, or cannot run, gets no time and says why.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.run import QUICK_RESULTS, shapes
from benchmarks.store import RESULTS, ResultFile, timing_columns
from cmt_fast.functional import reduced_kv_attention
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.precision import precision
from cmt_fast.testing.results import error_line
from cmt_fast.testing.shapes import StageShape
from cmt_fast.testing.timing import measure_interleaved
from cmt_fast.testing.tolerance import compare
from cmt_fast.training.config import find_device

#: q (B, h, N, d_qk), k, v, and the table (h, N, M) float32 -> (B, h, N, d_v).
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As the reference has it under autocast: a float32 bias makes float32 logits."""
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + bias
    return logits.softmax(-1).to(v.dtype) @ v


def triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Ours; a bias wider than q is a matter of autocast."""
    with torch.autocast(q.device.type, q.dtype, enabled=q.dtype != torch.float32):
        return reduced_kv_attention(q, k, v, bias, backend="triton")


def sdpa(backend: SDPBackend) -> Attention:
    """One backend of PyTorch's SDPA, which wants the bias in the dtype of q."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype).expand(len(q), -1, -1, -1))

    return attention


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """FlexAttention with the table as a captured, learned bias."""
    return _flex_attention()(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[h, i, j])


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Its memory-efficient attention, which wants the bias expanded, rows of a multiple of 8."""
    from xformers.ops import memory_efficient_attention

    keys = bias.shape[-1]
    wide = F.pad(bias.to(q.dtype), (0, -keys % 8)).expand(len(q), -1, -1, -1)[..., :keys]
    parts = (t.transpose(1, 2) for t in (q, k, v))
    return memory_efficient_attention(*parts, attn_bias=wide).transpose(1, 2)


#: By name, the baseline first. A new one is one line.
PROVIDERS: dict[str, Attention] = {
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
    "triton": triton,
    "sdpa-math": sdpa(SDPBackend.MATH),
    "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "xformers": xformers,
}
DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; returns 1 if a provider was wrong."""
    options = _parser().parse_args(arguments)
    seconds = options.seconds or (0.05 if options.quick else 1.0)
    device = find_device(options.device)
    results = ResultFile(device, options.out or (QUICK_RESULTS if options.quick else RESULTS), "attention")
    print(f"{results.data['machine']}\n-> {results.path}", flush=True)
    any_wrong = False
    for shape in shapes(options):
        for dtype in options.dtype or ["bfloat16"]:
            for row in measure_shape(
                shape, precision(dtype).dtype, options.provider or list(PROVIDERS), device, seconds
            ):
                row = dict(op="attention in training", shape=str(shape), dtype=dtype, **row)
                results.add(row)
                any_wrong |= row["note"].startswith("wrong")
                print(_line(row), flush=True)
    return int(any_wrong)


def measure_shape(
    shape: StageShape, dtype: torch.dtype, providers: Sequence[str], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """Verify, then time the forward and the backward pass of every provider; yields their rows."""
    inputs, grad = _inputs(shape, dtype, device)
    exact, own = _gradients(eager, [t.double() for t in inputs], grad.double()), _gradients(eager, inputs, grad)
    notes, memory = {}, {}
    for name in providers:
        try:
            notes[name] = wrong(_gradients(PROVIDERS[name], inputs, grad), exact, own, dtype)
            memory[name] = _peak(PROVIDERS[name], inputs, grad, device)
        except Exception as error:
            notes[name] = error_line(error)
    del exact, own
    able = [name for name in providers if not notes[name]]
    for mode in ("forward", "backward"):
        calls = {name: _call(PROVIDERS[name], inputs, grad, mode) for name in able}
        timings = measure_interleaved(calls, seconds=seconds, device=device, cold_cache=True)
        for name in providers:
            t = timings.get(name)
            yield dict(
                provider=name,
                mode=mode,
                **timing_columns(t, timings.get("eager")),
                peak_bytes=memory.get(name),
                note=notes[name],
            )


def wrong(found: list[Tensor], exact: list[Tensor], own: list[Tensor], dtype: torch.dtype) -> str:
    """How output and gradients depart from float64 by more than the policy allows; empty if they do not."""
    names = ("out", "dq", "dk", "dv", "dbias")
    comparisons = [
        compare(name, *values, backward=name != "out", dtype=dtype) for name, *values in zip(names, found, exact, own)
    ]
    return "; ".join(f"wrong {c}" for c in comparisons if not c.passed)


def _inputs(shape: StageShape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the table as the layers of a model make them, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    b, h = shape.batch, shape.heads
    sizes = (
        (b, shape.queries, h, shape.qk_head_dim),
        (b, shape.keys, h, shape.qk_head_dim),
        (b, shape.keys, h, shape.v_head_dim),
        (b, shape.queries, h, shape.v_head_dim),
    )
    q, k, v, grad = (normal(*size).to(dtype).transpose(1, 2) for size in sizes)
    return [q, k, v, normal(h, shape.queries, shape.keys)], grad


def _gradients(attention: Attention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def _call(attention: Attention, inputs: list[Tensor], grad: Tensor, mode: str) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    if mode == "forward":
        return lambda: attention(*leaves)
    out = attention(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _peak(attention: Attention, inputs: list[Tensor], grad: Tensor, device: torch.device) -> int | None:
    """Bytes that a forward and backward pass take at most, beside the inputs; None on a CPU, which does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _gradients(attention, inputs, grad)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _line(row: dict[str, Any]) -> str:
    name = f"{row['shape']:<26} {row['dtype']:<9} {row['mode']:<9} {row['provider']:<15}"
    if row["median_us"] is None:
        return f"{name} {row['note']}"
    ratio = f"{row['ratio']:6.2f}x" if row["ratio"] else ""
    peak = f"{row['peak_bytes'] / 1e6:8.1f} MB" if row["peak_bytes"] else ""
    return f"{name} {row['median_us']:10.1f} us  {row['p20_us']:10.1f} .. {row['p80_us']:<10.1f} {ratio} {peak}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; cmt_s by default")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="may be repeated; all by default")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; bfloat16 by default")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=None, help="for each measurement; 1, or 0.05 with --quick")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--quick", action="store_true", help="one small shape: to see that everything runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
