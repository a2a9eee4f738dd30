"""What a report is made of: measurements, each finished and written alone, run within a budget, taken up again, and repeated."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.store import ResultFile, key, load, quieter
from cmt_fast.testing.results import clocks_power, error_line

Rows = Iterable[Mapping[str, Any]]

#: What two result files have in common if they are of one machine.
_SAME = ("cpu", "gpu", "cores", "threads", "torch")
#: A machine is quiet while its probe takes at most so many times what it took at best.
QUIET = 1.04
#: Visits of a measurement if the machine was quiet in one of them; twice as many at most.
VISITS = 3
#: What takes longer, as compiling does, is measured once.
_SLOW_SECONDS = 60.0
#: What second visits get of the budget, relative to all sections together: few numbers that hold before many that may not.
_REPEATS = 1.0


@dataclass(frozen=True)
class Measurement:
    """The smallest piece that a run loses if it is cut off.

    Attributes:
        name: unique in its section.
        run: makes the rows of the result file.
        expected_s: seconds that it takes, roughly: it does not start where fewer are left. Compiling takes minutes.
    """

    name: str
    run: Callable[[], Rows]
    expected_s: float = 5.0


@dataclass(frozen=True)
class Section:
    """A step of the report.

    Attributes:
        title: of its part of the page.
        plan: makes the measurements, the most telling first; a section that cannot run here raises :class:`Unavailable`.
        share: of the budget, relative to the others.
        repeated: it is timed, so that a second visit in a quieter moment can only be nearer to the truth.
    """

    title: str
    plan: Callable[[], Iterable[Measurement]]
    share: float
    repeated: bool = False


def quietest(data: Mapping[str, Any]) -> float:
    """What the probe took at best around the visits of a result file, and of earlier ones where it knows them; in seconds, 0 if never."""
    visits = itertools.chain(*(state.get("visits", {}).values() for state in data.get("sections", {}).values()))
    return min([*itertools.chain(*visits), *data.get("quietest_before", [])], default=0.0)


def quietest_before(results: ResultFile, folders: Iterable[Path]) -> list[float]:
    """What the probe took at best in each earlier report of the same machine and PyTorch.

    A machine can be slow for as long as a whole report takes, which it cannot know from itself.
    """
    facts = results.data["machine"]
    found = []
    for path in sorted({path for folder in folders for path in folder.glob("*-report*.json")} - {results.path}):
        data = load(path)
        if all(data["machine"].get(name) == facts.get(name) for name in _SAME) and quietest(data):
            found.append(quietest(data))
    return found


def disturbed(state: Mapping[str, Any], best: float) -> list[str]:
    """What a section that is timed measured only while the machine was not quiet; ``best``: what the probe takes if it is."""
    if not state.get("repeated"):
        return []
    return [name for name, visits in state.get("visits", {}).items() if min(visits) > QUIET * best]


class Unavailable(Exception):
    """Why a section cannot run on this machine."""


class DeviceLost(Exception):
    """A measurement left the device in a state in which nothing runs in this process any more; the file has it as failed."""


class Report:
    """A result file with its state: which measurements are done.

    Args:
        results: the file; ``data["sections"]`` says for each section what is done, what failed and what is missing, and of
            each visit of a measurement what the probe took around it.
        say: called with each line of progress.
        clock: seconds, monotonic.
        probe: times work that is always the same: seconds, more of them while something else slows this machine.
        visits: of each measurement that is repeated, if the machine was quiet in one; twice as many at most. 1: no second visits.
        device_works: whether the device still computes; asked after a failure.
        keep_failed: what failed in an earlier run is not tried again.
    """

    def __init__(
        self,
        results: ResultFile,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        probe: Callable[[], float] = lambda: 1.0,
        visits: int = VISITS,
        device_works: Callable[[], bool] = lambda: True,
        keep_failed: bool = False,
    ) -> None:
        self.results, self.say, self.clock = results, say, clock
        self.probe, self.visits = probe, visits
        self.device_works, self.keep_failed = device_works, keep_failed
        self.state: dict[str, dict[str, Any]] = results.data.setdefault("sections", {})
        self._slower: dict[str, float] = {}  # by section: times as long as expected that the last measurement took
        self._probed = 0.0  # what the probe took after the last measurement
        self._took: dict[tuple[str, str], float] = {}  # by section and measurement: seconds of its last visit

    def run(self, sections: Mapping[str, Section], budget: float) -> bool:
        """Run what is not done, in three turns: each section within its share of the budget, what one leaves goes to the next;
        second visits of what was measured, see :meth:`_repeat`; what the shares were too small for.

        Returns:
            Whether everything is done (or failed).

        Raises:
            DeviceLost: if nothing more can be measured in this process.
        """
        deadline = self.clock() + budget
        plans = {name: self._plan(name, section) for name, section in sections.items()}
        repeated = {name: plan for name, plan in plans.items() if sections[name].repeated and self.visits > 1}
        shares = sum(sections[name].share for name in plans) * (1 + (_REPEATS if repeated else 0))
        for name, plan in plans.items():
            left = deadline - self.clock()
            self._section(name, plan, min(deadline, self.clock() + left * sections[name].share / shares))
            shares -= sections[name].share
        self._repeat(repeated, deadline)
        for name, plan in plans.items():
            self._section(name, plan, deadline)
        self._repeat(repeated, deadline)
        self.results.add_all([])  # what is missing is in the file even if nothing ran
        names = {name: {m.name for m in plan} for name, plan in plans.items()}
        return not any(names[name] & set(self.state[name]["missing"]) for name in plans)

    def _plan(self, name: str, section: Section) -> list[Measurement]:
        state = self.state.setdefault(
            name, {"title": section.title, "done": [], "failed": {}, "missing": [], "note": ""}
        )
        state.setdefault("visits", {})
        state["repeated"] = section.repeated
        if not self.keep_failed:
            state["failed"] = {}  # tried once more
        try:
            plan = list(section.plan())
            state["note"] = ""
        except Unavailable as reason:
            plan = []
            state["note"] = str(reason)
            self.say(f"== {section.title}: not here: {reason}")
        self._missing(name, plan)
        return plan

    def _section(self, name: str, plan: list[Measurement], deadline: float) -> None:
        state = self.state[name]
        told = False
        for m in plan:
            expected = self._slower.get(name, 1.0) * m.expected_s
            if m.name in state["done"] or m.name in state["failed"] or self.clock() + expected > deadline:
                continue
            if not told:
                self.say(f"== {state['title']}")
                told = True
            self._visit(name, m)
            if m.expected_s > 0:  # as slow as this one was, the next may be
                self._slower[name] = max(1.0, self._took[name, m.name] / m.expected_s)

    def _repeat(self, plans: Mapping[str, list[Measurement]], deadline: float) -> None:
        """Visit again what was measured least often, of that first what was never measured while the machine was quiet.

        Virtual machines share clocks, caches and memory with others, for minutes: longer than any measurement, so that more
        samples at one time do not help, but a visit at another time does. Each row keeps its quietest visit.
        """
        told = False
        while again := self._worst([(name, m) for name, plan in plans.items() for m in plan], deadline):
            if not told:
                self.say("== Again, at another time")
                told = True
            self._visit(*again)

    def _worst(
        self, measurements: Iterable[tuple[str, Measurement]], deadline: float
    ) -> tuple[str, Measurement] | None:
        """What gains most from one more visit, and has time for it."""
        best = quietest(self.results.data)
        waiting = []
        for name, m in measurements:
            state, expected = self.state[name], self._took.get((name, m.name), m.expected_s)
            visits = state["visits"].get(m.name, [])
            quiet = min(visits, default=math.inf) <= QUIET * best
            done = m.name in state["done"] and m.name not in state["failed"]
            enough = len(visits) >= (self.visits if quiet else 2 * self.visits)
            if done and not enough and expected <= _SLOW_SECONDS and self.clock() + expected <= deadline:
                waiting.append((len(visits), quiet, name, m))
        return min(waiting, key=lambda one: one[:2])[2:] if waiting else None

    def _visit(self, name: str, m: Measurement) -> None:
        state = self.state[name]
        before, start = self._probed or self.probe(), self.clock()
        rows: list[dict[str, Any]] = []
        try:
            rows = [{"section": name, **row} for row in m.run()]
            if m.name not in state["done"]:
                state["done"].append(m.name)
        except Exception as error:
            state["failed"][m.name] = error_line(error)
        seconds = self._took[name, m.name] = self.clock() - start
        if "gpu" in self.results.data["machine"]:  # a GPU that throttled shows here
            state.setdefault("clocks_power", {})[m.name] = clocks_power()
        failure = state["failed"].get(m.name)
        works = not failure or self.device_works()
        if works:
            self._probed = self.probe()
        if not failure:
            state["visits"].setdefault(m.name, []).append(float(f"{max(before, self._probed):.4g}"))
        self._missing(name)
        earlier = {key(row): row for row in self.results.data["rows"]}
        self.results.add_all(quieter(earlier.get(key(row)), row) for row in rows)  # with the state, in one piece
        self.say(f"  {m.name}: {f'failed: {failure}' if failure else f'{seconds:.1f} s'}")
        if not works:
            raise DeviceLost(f"{m.name}: {failure}")

    def _missing(self, name: str, plan: Iterable[Measurement] = ()) -> None:
        """Of the plan, and of those that were missing before: an earlier run may have asked for more."""
        state = self.state[name]
        names = dict.fromkeys([*(m.name for m in plan), *state["missing"]])
        state["missing"] = [m for m in names if m not in state["done"] and m not in state["failed"]]
