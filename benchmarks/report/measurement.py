"""What a report is made of: measurements, each finished and written alone, run within a budget and taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.store import ResultFile
from cmt_fast.testing.results import clocks_power, error_line

Rows = Iterable[Mapping[str, Any]]


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
    """

    title: str
    plan: Callable[[], Iterable[Measurement]]
    share: float


class Unavailable(Exception):
    """Why a section cannot run on this machine."""


class DeviceLost(Exception):
    """A measurement left the device in a state in which nothing runs in this process any more; the file has it as failed."""


class Report:
    """A result file with its state: which measurements are done.

    Args:
        results: the file; ``data["sections"]`` says for each section what is done, what failed and what is missing.
        say: called with each line of progress.
        clock: seconds, monotonic.
        device_works: whether the device still computes; asked after a failure.
        keep_failed: what failed in an earlier run is not tried again.
    """

    def __init__(
        self,
        results: ResultFile,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        device_works: Callable[[], bool] = lambda: True,
        keep_failed: bool = False,
    ) -> None:
        self.results, self.say, self.clock = results, say, clock
        self.device_works, self.keep_failed = device_works, keep_failed
        self.state: dict[str, dict[str, Any]] = results.data.setdefault("sections", {})
        self._slower: dict[str, float] = {}  # by section: times as long as expected that the last measurement took

    def run(self, sections: Mapping[str, Section], budget: float) -> bool:
        """Run what is not done. Each section first gets its share of the budget, what one leaves goes to the next; then those that
        had too little get the rest, in their order.

        Returns:
            Whether everything is done (or failed).

        Raises:
            DeviceLost: if nothing more can be measured in this process.
        """
        deadline = self.clock() + budget
        plans = {name: self._plan(name, section) for name, section in sections.items()}
        shares = sum(sections[name].share for name in plans)
        for name, plan in plans.items():
            left = deadline - self.clock()
            self._section(name, plan, min(deadline, self.clock() + left * sections[name].share / shares))
            shares -= sections[name].share
        for name, plan in plans.items():
            self._section(name, plan, deadline)
        self.results.add_all([])  # what is missing is in the file even if nothing ran
        names = {name: {m.name for m in plan} for name, plan in plans.items()}
        return not any(names[name] & set(self.state[name]["missing"]) for name in plans)

    def _plan(self, name: str, section: Section) -> list[Measurement]:
        state = self.state.setdefault(
            name, {"title": section.title, "done": [], "failed": {}, "missing": [], "note": ""}
        )
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
            start = self.clock()
            rows: list[dict[str, Any]] = []
            try:
                rows = [{"section": name, **row} for row in m.run()]
                state["done"].append(m.name)
            except Exception as error:
                state["failed"][m.name] = error_line(error)
            if m.expected_s > 0:  # as slow as this one was, the next may be
                self._slower[name] = max(1.0, (self.clock() - start) / m.expected_s)
            if "gpu" in self.results.data["machine"]:  # a GPU that throttled shows here
                state.setdefault("clocks_power", {})[m.name] = clocks_power()
            self._missing(name, plan)
            self.results.add_all(rows)  # with the state, in one piece
            failure = state["failed"].get(m.name)
            self.say(f"  {m.name}: {f'failed: {failure}' if failure else f'{self.clock() - start:.1f} s'}")
            if failure and not self.device_works():
                raise DeviceLost(f"{m.name}: {failure}")

    def _missing(self, name: str, plan: list[Measurement]) -> None:
        """Of the plan, and of those of earlier runs that asked for more."""
        state = self.state[name]
        names = dict.fromkeys([*(m.name for m in plan), *state["missing"]])
        state["missing"] = [m for m in names if m not in state["done"] and m not in state["failed"]]
