"""The candidates that stand beside each rule, at the shapes of the variants on every architecture: tiles that can be launched."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops._triton.tunable import Query, trial
from cmt_fast.testing.shapes import stage_shapes

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, not installed here")


@pytest.fixture
def launches(monkeypatch):
    """By name, of tensors without memory: those of the static table."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.launches").LAUNCHES


def queries(launches, variant: str, arch: int, dtype: torch.dtype) -> list[Query]:
    with trial() as asked:
        for shape in (*stage_shapes(variant, 1), *stage_shapes(variant, 256), *stage_shapes(variant, 2, 800)):
            for make in launches.values():
                make(shape, dtype, ARCHITECTURES[arch])
    return [query for query, config in asked.items() if config is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_candidates_are_near_the_rule_and_can_be_launched(launches, arch, dtype):
    for variant in VARIANTS:
        for query in queries(launches, variant, arch, dtype):
            rule, candidates = asdict(query.rule()), query.candidates()
            assert 3 <= len(candidates) <= 48, (query.key, len(candidates))
            assert len(set(candidates)) == len(candidates) and candidates == query.candidates()
            for candidate in candidates:
                fields = asdict(candidate)
                assert 1 <= sum(value != rule[name] for name, value in fields.items()) <= 2, candidate
                free = ("windows", "held", "chunks", "num_stages", "block_rest")  # the last is 0 where there is no rest
                sizes = {name: value for name, value in fields.items() if name not in free}
                assert all(size > 0 and size & (size - 1) == 0 for size in sizes.values()), candidate
                assert 2 <= candidate.num_warps <= 8 and 1 <= fields.get("num_stages", 1) <= 4, candidate
                assert query.named(fields) == candidate


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_candidate_is_what_is_launched(launches, variant):
    """Whatever a rule is asked for, its candidate reaches the launch; grids cover the same map."""
    shape, limits = stage_shapes(variant, 2)[2], ARCHITECTURES[90]
    for make in launches.values():
        with trial() as asked:
            base = make(shape, torch.bfloat16, limits)
        for query in [query for query, config in asked.items() if config is not None]:
            for candidate in query.candidates():
                with trial({query: candidate}):
                    changed = make(shape, torch.bfloat16, limits)
                assert len(changed) == len(base)
                assert any(
                    (a.grid, a.constants, a.num_warps, a.num_stages) != (b.grid, b.constants, b.num_warps, b.num_stages)
                    for a, b in zip(base, changed)
                ), candidate
