"""Measuring the candidates of every kernel that a packed model launches, at the shapes of its stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch

from cmt_fast.backend import use_backend
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.ops._triton.launch import Launch, record_launches
from cmt_fast.ops._triton.tunable import Query, read_tables_again, trial
from cmt_fast.ops._triton.tuned_tables import Table
from cmt_fast.testing.packed_steps import STEPS, StepCall, judge, runs_in
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.results import error_line, write_json
from cmt_fast.testing.shapes import StageShape
from cmt_fast.testing.timing import Timing, measure_interleaved
from cmt_fast.testing.tolerance import Comparison

#: The best candidate and the rule are measured once more, against each other, this many times as long.
DECIDING = 5

#: Called with the number of steps done, their total, and what comes next.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """One launch of one kernel.

    Attributes:
        step, shape, dtype: of the packed step that launches it.
        kernel, key: ``module:function`` and the arguments of its rule, as in the table; empty where the step could not run.
        rule, best: configurations; ``best`` is the rule's where no other was faster by more than the spread.
        rule_us, best_us: median microseconds, of the same run.
        measured: candidates that were right and got a time. failed: those that did not compile or fit. wrong: those with wrong results.
        earlier: it was in the table already.
        note: why there are no times.
    """

    step: str
    shape: str
    dtype: str
    kernel: str = ""
    key: str = ""
    rule: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    rule_us: float | None = None
    best_us: float | None = None
    measured: int = 0
    failed: int = 0
    wrong: int = 0
    earlier: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The rule's time over the best one, above 1 where another configuration is faster."""
        return self.rule_us / self.best_us if self.rule_us and self.best_us else None


def tune(
    steps: Sequence[str],
    shapes: Sequence[StageShape],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    table: Table,
    *,
    write: bool = True,
    seconds: float = 0.2,
    most: int | None = None,
    again: bool = False,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure each launch of the steps with every candidate of its kernel, and enter the best into ``table``.

    The result of a candidate is compared with float64 by the tolerance policy before it is timed: a wrong one is never chosen, and one that does not
    compile or fit is left out. The fastest is then measured again beside the rule, and the rule stays unless 80 % of the candidate's times are
    below 80 % of the rule's.

    Args:
        steps: among :data:`cmt_fast.testing.packed_steps.STEPS`.
        shapes: of the stages, with their batch.
        dtypes: of the maps.
        device: a CUDA device; or, in Triton's interpreter, the CPU, whose times mean nothing.
        table: of the device; what it has from as many candidates is not measured again.
        write: the table to its file, after every launch. Its folder must exist.
        seconds: to spend on a candidate, roughly.
        most: candidates of a launch at most, the first ones.
        again: measure also what the table has.
        progress: see :data:`Progress`.
        on_row: called with each row as soon as it is there.

    Returns:
        A row a launch; equal launches of several steps are one in the table.
    """
    rows: list[Row] = []
    tasks = [(step, shape, dtype) for shape in shapes for dtype in dtypes for step in steps if runs_in(step, shape)]

    def add(row: Row) -> None:
        rows.append(row)
        if on_row is not None:
            on_row(row)

    with contextlib.ExitStack() as stack:
        stack.callback(read_tables_again)
        stack.enter_context(torch.inference_mode())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        for done, (name, shape, dtype) in enumerate(tasks):
            where = (name, str(shape), str(dtype).removeprefix("torch."))

            def report(what: str, done: int = done, where: tuple[str, ...] = where) -> None:
                if progress is not None:
                    progress(done, len(tasks), f"{' '.join(where)}: {what}")

            report("the rule")
            step = _Step(STEPS[name](shape, dtype, device), device, seconds)
            try:
                queries = step.queries()
                fresh = [q for q in queries if again or not _known(q, table, most)]
                if fresh:
                    step.require_right()
            except torch.AcceleratorError:  # nothing runs on the device after that
                raise
            except Exception as error:
                add(Row(*where, note=error_line(error)))
                continue
            for query in queries:
                if query in fresh:
                    table.add(query.tunable.kernel, query.key, step.measure(query, most, report))
                    if write:
                        write_json(table.path, table.data)
                add(_row(where, query, table, earlier=query not in fresh))
    if progress is not None:
        progress(len(tasks), len(tasks), "done")
    return rows


def _known(query: Query, table: Table, most: int | None) -> bool:
    """Whether the table has an entry that can be used, from as many candidates as would be tried now."""
    entry = table.entries(query.tunable.kernel).get(query.key)
    if entry is None or (entry["config"] is not None and query.named(entry["config"]) is None):
        return False
    return entry.get("tried", 0) >= len(query.candidates()[:most])


def _row(where: tuple[str, str, str], query: Query, table: Table, earlier: bool) -> Row:
    entry = table.entries(query.tunable.kernel)[query.key]
    rule = asdict(query.rule())
    numbers = {name: entry[name] for name in ("rule_us", "best_us", "measured", "failed", "wrong") if name in entry}
    best = entry["config"] or rule
    return Row(*where, query.tunable.kernel, query.key, rule, best, earlier=earlier, **numbers)


class _Step:
    """One step at one shape: what it launches, whether results are right, how long launches take."""

    def __init__(self, call: StepCall, device: torch.device, seconds: float) -> None:
        self.call, self.device, self.seconds = call, device, seconds

    def queries(self) -> list[Query]:
        """The configurations that the step asks for. It runs by the rules."""
        self.outputs, self.launches, answers = self._run({})
        return [query for query, config in answers.items() if config is not None]

    def require_right(self) -> None:
        """Require the rules' results to be right."""
        if wrong := [str(c) for c in self._judge(self.outputs) if not c.passed]:
            raise ValueError(f"wrong by the rule, so nothing is measured: {'; '.join(wrong)}")

    def measure(self, query: Query, most: int | None, report: Callable[[str], None]) -> dict[str, Any]:
        """The table's entry."""
        kernel = query.tunable.kernel.partition(":")[2]
        configs, calls, rule, failed, wrong = [], [], self.launches, 0, 0
        candidates = query.candidates()[:most]
        for i, config in enumerate(candidates):
            report(f"checking candidate {i + 1} of {len(candidates)} of {kernel}")
            try:
                outputs, launches, _ = self._run({query: config})
                right = all(c.passed for c in self._judge(outputs))
            except torch.AcceleratorError:
                raise
            except Exception:  # whatever the compiler has against it
                failed += 1
                continue
            if not right:
                wrong += 1
                continue
            changed = [i for i, (a, b) in enumerate(zip(self.launches, launches, strict=True)) if _plan(a) != _plan(b)]
            if changed:
                configs.append(config)
                calls.append([launches[i] for i in changed])
                rule = [self.launches[i] for i in changed]
        report(f"timing {len(configs)} candidates of {kernel}")
        times = self._time([rule, *calls], self.seconds)
        best = min(range(len(times)), key=lambda i: times[i].median)
        chosen, of_rule, of_best = None, times[0], times[0]
        if best > 0:
            of_rule, again = self._time([rule, calls[best - 1]], DECIDING * self.seconds)
            chosen, of_best = (configs[best - 1], again) if again.p80 < of_rule.p20 else (None, of_rule)
        return {
            "config": None if chosen is None else asdict(chosen),
            "rule": asdict(query.rule()),
            "rule_us": of_rule.median * 1e6,
            "best_us": of_best.median * 1e6,
            "tried": len(candidates),
            "measured": len(configs),
            "failed": failed,
            "wrong": wrong,
        }

    def _run(self, chosen: dict[Query, Any]) -> tuple[object, list[Launch], dict[Query, Any]]:
        """Outputs, launches, and what was asked and answered."""
        from cmt_fast.inference.triton_steps import TRITON

        with use_backend("triton"), trial(chosen) as answers, record_launches() as launches, poisoned_empty():
            return self.call.run(TRITON), launches, answers

    @cached_property
    def _expected(self) -> tuple[object, object]:
        return self.call.double().run(TORCH), self.call.run(TORCH)

    def _judge(self, outputs: object) -> list[Comparison]:
        return judge(outputs, *self._expected)

    def _time(self, launches: Sequence[Sequence[Launch]], seconds: float) -> list[Timing]:
        """Of each list the launches in a row, all lists in turns."""
        calls = {str(i): partial(_launch, each) for i, each in enumerate(launches)}
        if self.device.type == "cuda":
            return list(measure_interleaved(calls, seconds=seconds, device=self.device, cold_cache=True).values())
        return list(measure_interleaved(calls, seconds=seconds, min_runs=1).values())


def _launch(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def _plan(launch: Launch) -> tuple[object, ...]:
    """What a configuration settles of a launch."""
    return launch.grid, launch.constants, launch.num_warps, launch.num_stages
