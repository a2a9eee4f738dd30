"""Launch configurations that can be measured: a rule, what may stand in its place, and the choice between them.

Each operation's ``configs.py`` has a rule that chooses tiles, warps and stages from shape, dtype and device. :func:`tunable` around it lets
``cmt-fast tune`` measure others on a GPU, and a launcher that asks the rule gets what was measured best there, if anything was. Nothing is
measured in a call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

from cmt_fast.ops._triton import tuned_tables
from cmt_fast.ops._triton.device import DeviceLimits

P = ParamSpec("P")
R = TypeVar("R")


def tunable(kernel: str, candidates: Callable[..., Iterable[Any]]) -> Callable[[Callable[P, R]], Tunable[P, R]]:
    """Decorate the rule of a kernel.

    Args:
        kernel: ``module:function`` that the configurations are for. The module is imported when a table is consulted.
        candidates: from the rule's configuration and arguments to others that compute the same and fit on the device.

    The rule takes ``limits``, a :class:`DeviceLimits`, and hashable arguments that together settle what is measured: shape, dtype. It returns a
    dataclass, or None where the kernel is not to be used, which no table changes.
    """
    return lambda rule: Tunable(rule, kernel, candidates)


class Tunable(Generic[P, R]):
    """A rule that :func:`tunable` decorates. Called as the rule is, it returns the configuration to launch with.

    Attributes:
        kernel: ``module:function``.
        rule: without any table. It alone decides whether there is a configuration at all, and ``torch.compile`` can trace it.
    """

    def __init__(self, rule: Callable[P, R], kernel: str, candidates: Callable[..., Iterable[Any]]) -> None:
        functools.update_wrapper(self, rule)
        self.kernel, self.rule = kernel, rule
        self._candidates, self._signature = candidates, inspect.signature(rule)
        self._chosen = functools.lru_cache(maxsize=1024)(self._choose)
        _all.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if _trial is not None:
            return cast(R, _trial.answer(self.query(*args, **kwargs)))
        return self._chosen(*cast(tuple[Hashable, ...], args), **cast(dict[str, Hashable], kwargs))

    def query(self, *args: P.args, **kwargs: P.kwargs) -> Query:
        """The question that these arguments ask."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        limits = cast(DeviceLimits, arguments.pop("limits"))
        return Query(self, tuple(arguments.items()), limits)

    def _choose(self, *args: P.args, **kwargs: P.kwargs) -> R:
        query = self.query(*args, **kwargs)
        rule = cast(R, query.rule())
        measured = None if rule is None else tuned_tables.look_up(query.limits, self.kernel, query.key)
        if measured is None:
            return rule
        config = query.named(measured)
        if config is None:
            tuned_tables.warn_once(
                f"the table of {query.limits.name} has a configuration of {self.kernel} that is none of this version's: "
                f"{measured} for {query.key}. The rule is used instead; `cmt-fast tune` measures again"
            )
        return rule if config is None else cast(R, config)


@dataclass(frozen=True)
class Query:
    """A configuration asked for.

    Attributes:
        tunable: which was asked.
        arguments: of its rule by name, but for ``limits``.
        limits: of the device.
    """

    tunable: Tunable[..., Any]
    arguments: tuple[tuple[str, Hashable], ...]
    limits: DeviceLimits

    @property
    def key(self) -> str:
        """The arguments, as tables have them."""
        return " ".join(f"{name}={value}" for name, value in self.arguments)

    def rule(self) -> Any:
        """What the rule says."""
        return self.tunable.rule(**dict(self.arguments), limits=self.limits)

    def candidates(self) -> list[Any]:
        """What may stand in its place: distinct, in a fixed order."""
        rule = self.rule()
        if rule is None:
            return []
        found = self.tunable._candidates(rule, **dict(self.arguments), limits=self.limits)
        return [candidate for candidate in dict.fromkeys(found) if candidate != rule]

    def named(self, fields: Mapping[str, Any]) -> Any:
        """The rule's configuration or the candidate that has these fields, or None: no other is ever launched."""
        return next((config for config in (self.rule(), *self.candidates()) if asdict(config) == fields), None)


@contextlib.contextmanager
def trial(chosen: Mapping[Query, Any] | None = None) -> Iterator[dict[Query, Any]]:
    """Meanwhile every rule is followed, no table is read, and a query in ``chosen`` gets its configuration from there.

    For the tuner, on one thread of a process that does nothing else.

    Yields:
        What was asked for, and answered, so far.
    """
    global _trial
    if _trial is not None:
        raise RuntimeError("a trial is under way already: one at a time")
    _trial = _Trial(chosen or {})
    try:
        yield _trial.answers
    finally:
        _trial = None


def read_tables_again() -> None:
    """Forget tables and choices: the next call reads the files anew."""
    tuned_tables.forget()
    for each in _all:
        each._chosen.cache_clear()


class _Trial:
    def __init__(self, chosen: Mapping[Query, Any]) -> None:
        self.chosen, self.answers = chosen, dict[Query, Any]()

    def answer(self, query: Query) -> Any:
        config = self.chosen[query] if query in self.chosen else query.rule()
        self.answers[query] = config
        return config


_trial: _Trial | None = None
_all: list[Tunable[..., Any]] = []
