"""Time the steps of packed models: ``python -m benchmarks.steps [--variant cmt_s] [--batch 1] [--dtype bfloat16] [--quick]``.

Every kind of step is timed once a stage, over all of the stage's blocks in turn with the inputs that they have inside the model, in
plain PyTorch and by the compiled kernels, after a comparison with float64. GB/s count each tensor read or written once, GFLOP/s the
matrix products and convolutions; beside them stands what this machine copies and multiplies at best.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.calls import count_flops
from benchmarks.registry import BASELINE
from benchmarks.run import QUICK_RESULTS
from benchmarks.store import RESULTS, ResultFile, rate_columns, timing_columns
from cmt_fast.inference import PackedModel, pack, run
from cmt_fast.inference.native import prepare
from cmt_fast.inference.torch_steps import TORCH, StepFunctions
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.benchmark import make_images, make_model
from cmt_fast.testing.precision import precision
from cmt_fast.testing.results import error_line
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.timing import measure, measure_interleaved
from cmt_fast.testing.tolerance import compare

DTYPES = ("float32", "bfloat16")
STEPS = tuple(field.name for field in dataclasses.fields(StepFunctions) if getattr(TORCH, field.name) is not None)
STAGES = "abcd"

Results = tuple[Tensor, ...]


#: How each provider runs a packed model, the baseline first: plain PyTorch.
PROVIDERS: dict[str, Callable[[PackedModel], tuple[PackedModel, StepFunctions]]] = {
    BASELINE: lambda packed: (packed, TORCH),
    "native": prepare,
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a step inside a model.

    Attributes:
        name, stage: of the step.
        function: what runs it.
        arguments: the step's data, then tensors (attention: also the data of K/V, and last the stage's table).
        own: which of the arguments belong to the program; the others are maps.
    """

    name: str
    stage: str
    function: Callable[..., Tensor | Results]
    arguments: tuple[Any, ...]
    own: tuple[bool, ...]

    def __call__(self) -> Results:
        result = self.function(*self.arguments)
        return result if isinstance(result, tuple) else (result,)

    def on_maps_of(self, other: Call) -> Call:
        """The same step on the maps of another program's run."""
        pairs = zip(self.arguments, other.arguments, self.own)
        return dataclasses.replace(self, arguments=tuple(mine if own else theirs for mine, theirs, own in pairs))

    def in_double(self) -> Call:
        return dataclasses.replace(self, arguments=tuple(map(_double, self.arguments)))

    def flops(self) -> int:
        return count_flops(self)

    def bytes(self) -> int:
        """Of the step's tensors, its inputs and outputs, each once."""
        step, *others = self.arguments
        tensors = [*vars(step).values(), *others, *self()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def in_turn(calls: Sequence[Call]) -> Callable[[], Results]:
    """What runs the next of the calls each time. A single block's weights would stay in a cache, as they do not inside the model."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def record_calls(packed: PackedModel, functions: StepFunctions, images: Tensor) -> dict[tuple[str, str], list[Call]]:
    """Run a model and keep the calls of each step in all blocks of a stage, by (step, stage)."""
    calls: dict[tuple[str, str], list[Call]] = {}
    tables = [stage.table for stage in packed.stages]
    embedded = 0

    def call(name: str, *arguments: Any) -> Tensor | Results:
        nonlocal embedded
        embedded += name == "patch_embed"
        stage = STAGES[max(embedded - 1, 0)]
        function = getattr(functions, name)
        own = tuple(not isinstance(x, Tensor) or any(x is table for table in tables) for x in arguments)
        calls.setdefault((name, stage), []).append(Call(name, stage, function, arguments, own))
        return function(*arguments)

    run(packed, images, StepFunctions(**{name: partial(call, name) for name in STEPS}))
    return calls


def measure_steps(
    variant: str,
    batch: int,
    dtype: str,
    providers: Sequence[str],
    steps: Sequence[str],
    seconds: float,
    size: int | None,
) -> Iterator[dict[str, Any]]:
    """Compare and time every step of a variant; yields the rows."""
    p = precision(dtype)
    size = size or VARIANTS[variant].resolution
    packed = pack(make_model(variant, size, p), dtype=p.dtype)
    images = make_images(batch, size, p)
    recorded: dict[str, dict[tuple[str, str], list[Call]]] = {BASELINE: record_calls(packed, TORCH, images)}
    notes = {}
    for provider in set(providers) - recorded.keys():
        try:
            recorded[provider] = record_calls(*PROVIDERS[provider](packed), images)
        except Exception as error:
            notes[provider] = error_line(error)
    shapes = dict(zip(STAGES, stage_shapes(variant, batch, size)))
    for (step, stage), base in recorded[BASELINE].items():
        if step not in steps:
            continue
        calls = {name: on_maps_of(base, recorded[name][step, stage]) for name in providers if name in recorded}
        wrongs = wrong(base, calls, p.low)
        timings = measure_interleaved({n: in_turn(c) for n, c in calls.items() if n not in wrongs}, seconds=seconds)
        flops, size_bytes = base[0].flops(), base[0].bytes()
        for provider in providers:
            t, first = timings.get(provider), timings.get(BASELINE)
            yield dict(
                op=f"packed {step}",
                shape=str(shapes[stage]),
                provider=provider,
                dtype=dtype,
                mode="inference",
                **timing_columns(t, first),
                **rate_columns(t, size_bytes, flops),
                note=notes.get(provider) or wrongs.get(provider, ""),
            )


def measure_machine(dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """What this machine copies from memory to memory (read and written, in GB/s) and multiplies (in GFLOP/s)."""
    source, target = torch.zeros(2, 1 << 25)
    a, b = torch.zeros(2, 1024, 1024, dtype=dtype)
    copy = measure(lambda: target.copy_(source), seconds=seconds)
    product = measure(lambda: a @ b, seconds=seconds)
    return {
        "copy_gb_s": 2 * source.nbytes / copy.median * 1e-9,
        f"mm_{str(dtype).removeprefix('torch.')}_gflop_s": 2 * 1024**3 / product.median * 1e-9,
    }


def on_maps_of(others: Sequence[Call], calls: Sequence[Call]) -> list[Call]:
    """:meth:`Call.on_maps_of`, block by block."""
    return [call.on_maps_of(other) for call, other in zip(calls, others)]


def wrong(base: Sequence[Call], calls: dict[str, list[Call]], dtype: torch.dtype) -> dict[str, str]:
    """Why a provider gets no time for a step: how it departs from float64 by more than the policy allows, by the providers that do."""
    notes = {}
    for block, plain_call in enumerate(base):
        exact, plain = plain_call.in_double()(), plain_call()
        for provider, blocks in calls.items():
            for i, result in enumerate(blocks[block]()):
                result = result[..., : exact[i].shape[-1]]  # a kernel may leave room between the pixels of a map
                judged = compare(f"output {i}", result, exact[i], plain[i], dtype=dtype)
                if not judged.passed:
                    notes[provider] = f"wrong: {judged}"
    return notes


def _double(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.double()
    tensors = {name: value.double() for name, value in vars(argument).items() if isinstance(value, Tensor)}
    return dataclasses.replace(argument, **tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; returns 1 if a provider was wrong."""
    options = _parser().parse_args(arguments)
    seconds = options.seconds or (0.02 if options.quick else 0.5)
    results = ResultFile("cpu", options.out or (QUICK_RESULTS if options.quick else RESULTS), "steps")
    any_wrong = False
    with torch.inference_mode():
        for dtype in options.dtype:
            results.data["machine"] |= measure_machine(precision(dtype).dtype, seconds)
        print(f"{results.data['machine']}\n-> {results.path}", flush=True)
        size = 64 if options.quick else None
        for variant in options.variant:
            for dtype in options.dtype:
                for row in measure_steps(variant, options.batch, dtype, options.provider, options.step, seconds, size):
                    results.add(row)
                    any_wrong |= row["note"].startswith("wrong")
                    print(_line(row), flush=True)
    return int(any_wrong)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['op']:<25} {row['shape']:<28} {row['dtype']:<9} {row['provider']:<10}"
    if row["median_us"] is None:
        return f"{name} {row['note']}"
    ratio = f"{row['ratio']:6.2f}x" if row["ratio"] else ""
    return f"{name} {row['median_us']:10.1f} us {row['gb_s']:7.1f} GB/s {row['gflop_s']:8.1f} GFLOP/s {ratio}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["cmt_s"], metavar="NAME")
    parser.add_argument("--step", nargs="+", choices=STEPS, default=STEPS, metavar="NAME", help=", ".join(STEPS))
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=tuple(PROVIDERS), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="for each measurement; 0.5, or 0.02 with --quick")
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--quick", action="store_true", help="images of 64 pixels: to see that everything runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
