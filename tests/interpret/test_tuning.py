"""Tuning without a GPU: every candidate is right, and what is chosen, kept and gone on with; times are made up."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cmt_fast.backend import use_backend
from cmt_fast.cli.app import app
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops._triton.tunable import trial
from cmt_fast.ops._triton.tuned_tables import Table, empty_table, read_table
from cmt_fast.ops.lpu import configs
from cmt_fast.testing.packed_steps import STEPS, runs_in, tensors_of
from cmt_fast.testing.shapes import StageShape
from cmt_fast.testing.timing import Timing
from cmt_fast.tuning import search
from cmt_fast.tuning.search import Row, tune

CPU = torch.device("cpu")
LIMITS = ARCHITECTURES[90]  # of the interpreter
#: Keys and values absorbed, and projected: in one kernel, or (float32) in three.
TINY = [StageShape("tiny/a", 1, 4, 4, 12, 2, 20, 2), StageShape("tiny/c", 1, 3, 6, 12, 1, 20, 1)]

#: What the LPU of the first of them asks for.
QUERY = configs.lpu_config.query(1, 4, 4, 16, 2, 2, LIMITS)


class Times:
    """In the place of the stopwatch: the k-th call timed takes ``first * ratio ** k``, and ``spread`` of that more or less."""

    def __init__(self, ratio: float = 1.0, spread: float = 0.01) -> None:
        self.ratio, self.spread, self.asked = ratio, spread, 0

    def __call__(self, fns, **options):
        self.asked += 1
        times = [1e-3 * self.ratio**i for i in range(len(fns))]
        return {n: Timing(t, t * (1 - self.spread), t * (1 + self.spread), 5) for n, t in zip(fns, times)}


@pytest.fixture
def times(monkeypatch):
    def set_times(**options: float) -> Times:
        fake = Times(**options)
        monkeypatch.setattr(search, "measure_interleaved", fake)
        return fake

    return set_times


def run(table: Table, steps=("lpu",), shapes=TINY, most: int | None = 2, **options: object) -> list[Row]:
    return tune(steps, shapes, [torch.float16], CPU, table, most=most, **options)


def new_table(tmp_path: Path) -> Table:
    return empty_table(tmp_path / "table.json", LIMITS)


# ---- candidates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shapes", "kernels"),
    [
        (
            torch.float16,
            TINY,
            {"lpu", "absorbed_attention", "projected_attention", "expand", "depthwise_project"},
        ),
        (torch.float32, TINY[1:], {"lpu", "linear", "reduced_kv_attention", "expand", "depthwise_gelu"}),
    ],
    ids=["float16", "float32"],
)
def test_every_candidate_is_right(tmp_path, times, dtype, shapes, kernels):
    times()
    rows = tune(list(STEPS), shapes, [dtype], CPU, new_table(tmp_path))
    assert {row.kernel.partition(":")[2].removesuffix("_kernel") for row in rows} == kernels
    for row in rows:
        assert not row.note and row.failed == row.wrong == 0 and row.measured >= 3, row


def test_a_wrong_or_broken_candidate_is_never_chosen(tmp_path, times, monkeypatch):
    times(ratio=0.5)  # the last candidate would be the fastest by far

    def candidates(rule, *args, **kwargs):
        yield configs.LPUConfig(rule.windows, 2 * rule.pairs, rule.block_c, rule.num_warps)
        yield configs.LPUConfig(rule.windows, 3, rule.block_c, rule.num_warps)  # no power of two: it does not compile
        yield configs.LPUConfig(
            rule.windows, rule.pairs, rule.block_c // 2, rule.num_warps
        )  # half of LayerNorm's channels

    monkeypatch.setattr(configs.lpu_config, "_candidates", candidates)
    (row,) = run(new_table(tmp_path), shapes=TINY[:1], most=None)
    assert (row.measured, row.failed, row.wrong) == (1, 1, 1)
    assert row.best["pairs"] == 2 * row.rule["pairs"] and row.ratio == pytest.approx(2)


def test_a_step_that_is_wrong_by_its_rule_is_not_tuned(tmp_path, times, monkeypatch):
    fake, run_step = times(), search._Step._run

    def doubled(self, chosen):
        outputs, *rest = run_step(self, chosen)
        return tuple(2 * y for y in outputs), *rest

    monkeypatch.setattr(search._Step, "_run", doubled)
    (row,) = run(new_table(tmp_path), shapes=TINY[:1])
    assert "wrong by the rule, so nothing is measured: output 0 FAILED" in row.note and not fake.asked


def test_a_step_that_cannot_run_says_why(tmp_path, times):
    times()
    (row,) = run(new_table(tmp_path), shapes=[StageShape("tiny/a", 1, 6, 6, 12, 2, 0, 3)])
    assert row.note.startswith("BackendError: ") and "k must be a power of two, got 3" in row.note


@pytest.mark.parametrize("step", STEPS)
def test_steps_compile_into_one_graph(step):
    """What chooses a backend while torch.compile traces asks no table."""
    torch.compiler.reset()  # the steps share the code below, which is compiled anew for each
    for shape in filter(partial(runs_in, step), TINY):
        call = STEPS[step](shape, torch.float16, CPU)
        with use_backend("triton"):
            expected = tensors_of(call.run(TRITON))
            actual = torch.compile(lambda call=call: call.run(TRITON), fullgraph=True, backend="eager")()
        assert all(map(torch.equal, tensors_of(actual), expected))


# ---- choice --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "spread", "better"), [(0.5, 0.01, True), (0.999, 0.01, False), (1.5, 0.01, False), (0.5, 0.9, False)]
)
def test_the_rule_stays_unless_another_is_faster_by_more_than_the_spread(tmp_path, times, ratio, spread, better):
    fake = times(ratio=ratio, spread=spread)
    table = new_table(tmp_path)
    (row,) = run(table, shapes=TINY[:1])
    assert (row.best != row.rule) == better
    assert row.rule_us == pytest.approx(1000)
    assert row.best_us == pytest.approx(1000 * ratio if better else 1000)  # in the second round, of two
    assert fake.asked == (1 if ratio > 1 else 2), "the best is measured again beside the rule"
    entry = read_table(table.path, LIMITS).entries(row.kernel)[row.key]
    assert entry["config"] == (row.best if better else None)
    assert QUERY.key == row.key and (not better or QUERY.named(entry["config"]))


def test_a_chosen_configuration_is_what_a_call_launches():
    call = STEPS["lpu"](TINY[0], torch.float16, CPU)
    candidate = QUERY.candidates()[0]
    step = search._Step(call, CPU, 0.01)
    assert step.queries() == [QUERY]
    _, (launch,), _ = step._run({QUERY: candidate})
    assert launch.num_warps == candidate.num_warps and launch.constants["PAIRS"] == candidate.pairs
    with trial():
        assert configs.lpu_config(1, 4, 4, 16, 2, 2, LIMITS) == QUERY.rule()


# ---- going on ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path, times, monkeypatch):
    fake, table = times(ratio=0.5), new_table(tmp_path)

    def stop(row: Row) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(table, on_row=stop)
    kept = read_table(table.path, LIMITS)
    assert kept.problem is None and kept.launches() == 1 and fake.asked == 2
    rows = run(kept)
    assert [row.earlier for row in rows] == [True, False] and fake.asked == 4
    assert rows[0].ratio == pytest.approx(2)
    assert [row.earlier for row in run(read_table(table.path, LIMITS))] == [True, True] and fake.asked == 4
    assert [row.earlier for row in run(kept, again=True)] == [False, False] and fake.asked == 8


def test_a_quick_run_does_not_stand_in_the_way_of_a_whole_one(tmp_path, times):
    times()
    table = new_table(tmp_path)
    assert [row.measured for row in run(table, shapes=TINY[:1], most=1)] == [1]
    assert [row.earlier for row in run(table, shapes=TINY[:1], most=1)] == [True]
    (row,) = run(table, shapes=TINY[:1], most=3)
    assert row.measured == 3 and not row.earlier


# ---- the command ---------------------------------------------------------------------------------------------------------

DRY = ["tune", "--device", "cpu", "--model", "cmt_ti", "--img-size", "32", "--batch", "1", "--step", "lpu", "--quick"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("CMT_FAST_TUNING", str(tmp_path / "tables"))
    return tmp_path


def test_a_dry_run_goes_all_the_way_and_writes_nothing(home, times):
    times(ratio=0.5)
    result = CliRunner().invoke(app, [*DRY, "--json", str(home / "rows.json")])
    assert result.exit_code == 0, result.output
    assert "Dry run on cpu in Triton's interpreter: the times mean nothing and nothing is written." in result.output
    assert (
        "4 launches, 4 faster than by the rule" in result.output and "a dry run, nothing was written" in result.output
    )
    assert not (home / "tables").exists()
    written = json.loads((home / "rows.json").read_text())
    assert written["machine"]["torch"] and [row["measured"] for row in written["rows"]] == [4] * 4
    assert all(
        row["ratio"] == pytest.approx(16, rel=0.01) or row["ratio"] == pytest.approx(2) for row in written["rows"]
    )


def test_an_interrupted_command_says_so(home, monkeypatch):
    def stop(*args, on_row, **kwargs):
        on_row(Row("lpu", "tiny", "float16", "module:lpu_kernel", "k", {"pairs": 2}, {"pairs": 4}, 2.0, 1.0, 3))
        raise KeyboardInterrupt

    monkeypatch.setattr("cmt_fast.cli.tune.search", stop)
    result = CliRunner().invoke(app, DRY)
    assert result.exit_code == 130
    assert "1 launches, 1 faster than by the rule (2.00 times on average): a dry run" in result.output
    assert "pairs=4 (rule 2)" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bfloat16"], "interpreter does not compute in bfloat16"),
        (["--output", "x.json"], "a dry run on a CPU writes no table: leave out --output x.json"),
        (["--step", "mlp"], "unknown step 'mlp'; expected one of stem"),
        (["--dtype", "half"], "unknown dtype 'half'"),
        (["--model", "vit"], "unknown model 'vit'"),
        (["--batch", "0"], "batch and seconds must be positive"),
    ],
)
def test_bad_options(home, options, message):
    result = CliRunner().invoke(app, [*DRY, *options])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
