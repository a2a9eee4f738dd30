"""Time the kernels of packed steps on a GPU beside a copy: ``python -m benchmarks.kernels [--step lpu] [--variant cmt_s] [--batch 256] [--dtype bfloat16]``.

A step is bound by memory if it takes as long as copying what it must read and write; that share of copy bandwidth is the last column. Each
step is first verified at the very shape that is timed, and one that is wrong gets no time. All providers run in turns, and every row is in
the result file as soon as it is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.calls import count_flops
from benchmarks.run import QUICK_RESULTS
from benchmarks.store import RESULTS, ResultFile, rate_columns, timing_columns
from cmt_fast.backend import use_backend
from cmt_fast.inference.program import Padding
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.packed_attention import AttentionCall, attention_call
from cmt_fast.testing.packed_irffn import DepthwiseProjectCall, depthwise_project_call
from cmt_fast.testing.packed_steps import STEPS, judge, runs_in, tensors_of
from cmt_fast.testing.precision import precision
from cmt_fast.testing.results import error_line
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.timing import Timing, measure_interleaved
from cmt_fast.training.config import find_device

#: By name of a step: the same in plain operations on widths that are not padded, as a model without a packed program has it.
CHAINS: dict[str, Callable[[StageShape, torch.dtype, torch.device], AttentionChain | DepthwiseProjectChain]] = {
    "attention": lambda shape, dtype, device: AttentionChain(
        attention_call(shape, dtype, absorbed=False, base2=False, padding=Padding(1, 1, 1), device=device)
    ),
    "depthwise_project": lambda shape, dtype, device: DepthwiseProjectChain(
        depthwise_project_call(shape, dtype, padding=Padding(1, 1, 1), device=device)
    ),
}
PROVIDERS = ("torch", "compile", "chain", "chain-compile", "triton", "copy")
DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; returns 1 if a kernel was wrong."""
    options = _parser().parse_args(arguments)
    seconds = options.seconds or (0.05 if options.quick else 1.0)
    device = find_device(options.device)
    results = ResultFile(device, options.out or (QUICK_RESULTS if options.quick else RESULTS), "kernels")
    print(f"{results.data['machine']}\n-> {results.path}", flush=True)
    any_wrong = False
    for step in options.step or STEPS:
        for shape in filter(partial(runs_in, step), _shapes(options)):
            for dtype in options.dtype or ["bfloat16"]:
                inputs = shape, precision(dtype).dtype, device
                chain = CHAINS[step](*inputs) if step in CHAINS else None
                for row in measure_step(STEPS[step](*inputs), chain, options.provider or PROVIDERS, device, seconds):
                    row = dict(op=f"packed {step}", shape=str(shape), dtype=dtype, mode="inference", **row)
                    results.add(row)
                    any_wrong |= row["note"].startswith("wrong")
                    print(_line(row), flush=True)
    return int(any_wrong)


def measure_step(
    call: Any,
    chain: AttentionChain | DepthwiseProjectChain | None,
    providers: Sequence[str],
    device: torch.device,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Verify, then time every provider of one step; yields their rows."""
    moved = _bytes(call) + _bytes(call.run(TORCH))
    half = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    compiled = torch.compile(lambda: call.run(TORCH), dynamic=False)
    possible: dict[str, Callable[[], object]] = {
        "torch": lambda: call.run(TORCH),
        "compile": compiled,
        "triton": lambda: by_kernels(call),
        "copy": lambda: other.copy_(half),
    }
    judges = dict.fromkeys(possible, call)
    if chain is not None:
        possible |= {"chain": chain, "chain-compile": torch.compile(chain, dynamic=False)}
        judges |= {"chain": chain.call, "chain-compile": chain.call}
    providers = [name for name in providers if name in possible]
    calls, notes = {}, {}
    with torch.inference_mode():
        flops = count_flops(possible["torch"])
        for provider in providers:
            try:
                notes[provider] = wrong(judges[provider], possible[provider]()) if provider != "copy" else ""
            except Exception as error:
                notes[provider] = error_line(error)
            if not notes[provider]:
                calls[provider] = possible[provider]
        timings = measure_interleaved(calls, seconds=seconds, device=device, cold_cache=True)
    for provider in providers:
        t = timings.get(provider)
        yield dict(
            provider=provider,
            **timing_columns(t, timings.get("torch")),
            **rate_columns(t, moved, flops if provider != "copy" else 0),
            over_chain=_ratio(timings.get("chain"), t),
            of_copy=_ratio(timings.get("copy"), t),
            note=notes[provider],
        )


@dataclass(frozen=True)
class AttentionChain:
    """LayerNorm, the query's linear, SDPA, the output's linear and the shortcut.

    Attributes:
        call: projected, with the softmax in base e and no padding.
    """

    call: AttentionCall

    def __call__(self) -> Tensor:
        """(B, H, W, C)."""
        step, y, h = self.call.step, self.call.y, self.call.step.heads
        assert step.query_weight is not None and step.query_bias is not None and step.out_weight is not None
        x = F.layer_norm(y.flatten(1, 2), y.shape[-1:], eps=step.eps)
        key_values = self.call.keys_values.tensor_split([h * self.call.kv_step.key_dim], -1)
        parts = (F.linear(x, step.query_weight, step.query_bias.to(y.dtype)), *key_values)
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(q, k, v, self.call.table[None], scale=1.0).transpose(1, 2).flatten(2)
        return y + F.linear(out, step.out_weight, step.out_bias.to(y.dtype)).view_as(y)


@dataclass(frozen=True)
class DepthwiseProjectChain:
    """The depthwise convolution and its shortcut in the dtype of the map, GELU, the linear layer and the block's shortcut.

    Attributes:
        call: without padding.
    """

    call: DepthwiseProjectCall

    def __call__(self) -> Tensor:
        """(B, H, W, C)."""
        step, hidden, z = self.call.step, self.call.hidden.permute(0, 3, 1, 2), self.call.z  # NCHW, channels last
        taps = step.taps.clone()
        taps[4] -= 1.0
        weight = taps.t().reshape(-1, 1, 3, 3).to(z.dtype)
        u = F.conv2d(hidden, weight, step.bias.to(z.dtype), padding=1, groups=len(weight)) + hidden
        return z + F.linear(F.gelu(u).permute(0, 2, 3, 1), step.weight, step.out_bias.to(z.dtype))


def wrong(call: Any, actual: object) -> str:
    """How a result departs from float64 by more than the policy allows; empty if it does not."""
    comparisons = judge(actual, call.double().run(TORCH), call.run(TORCH))
    return "; ".join(f"wrong {c}" for c in comparisons if not c.passed)


def by_kernels(call: Any) -> object:
    """What a step returns by the Triton kernels, or :class:`cmt_fast.BackendError`."""
    with use_backend("triton"):
        return call.run(TRITON)


def _bytes(x: object) -> int:
    """Of all tensors but the weight of the keys and values, which come multiplied already."""
    if isinstance(x, AttentionCall):
        return _bytes((x.step, x.y, x.keys_values, x.table))
    return sum(t.nbytes for t in tensors_of(x))


def _ratio(base: Timing | None, t: Timing | None) -> float | None:
    return base.median / t.median if base and t else None


def _shapes(options: argparse.Namespace) -> Iterator[StageShape]:
    for variant in options.variant or ["cmt_s"]:
        yield from stage_shapes(variant, options.batch, 64 if options.quick else None)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['op']:<16} {row['shape']:<26} {row['dtype']:<9} {row['provider']:<13}"
    if row["median_us"] is None:
        return f"{name} {row['note']}"
    ratio = f"{row['ratio']:6.2f}x" if row["ratio"] else ""
    ratio += f" {row['over_chain']:6.2f}x of the chain" if row["over_chain"] else ""
    share = f"{row['of_copy']:6.1%} of copy" if row["of_copy"] else ""
    return f"{name} {row['median_us']:10.1f} us  {row['p20_us']:10.1f} .. {row['p80_us']:<10.1f} {ratio} {share}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--step", action="append", choices=STEPS, help="may be repeated; all by default")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; cmt_s by default")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="may be repeated; all by default")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; bfloat16 by default")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=None, help="for each measurement; 1, or 0.05 with --quick")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--quick", action="store_true", help="64 x 64 images: to see that everything runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
