"""Tuning on a GPU: what is measured is right, is written, and is what the next call launches."""

from __future__ import annotations

import pytest
import torch

from cmt_fast.backend import use_backend
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.ops._triton.device import device_limits
from cmt_fast.ops._triton.launch import record_launches
from cmt_fast.ops._triton.tunable import read_tables_again
from cmt_fast.ops._triton.tuned_tables import empty_table, file_name, read_table
from cmt_fast.testing.packed_steps import STEPS, judge
from cmt_fast.testing.results import write_json
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.tuning.search import tune

pytestmark = pytest.mark.gpu


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("CMT_FAST_TUNING", str(tmp_path))
    limits = device_limits(torch.device("cuda"))
    empty = empty_table(tmp_path / file_name(limits.name), limits)
    write_json(empty.path, empty.data)
    read_tables_again()
    yield empty
    read_tables_again()


@pytest.mark.parametrize("stage", range(4), ids="abcd")
@pytest.mark.parametrize("step", STEPS)
def test_a_table_is_measured_and_used(table, step, stage):
    device, shape = torch.device("cuda", torch.cuda.current_device()), stage_shapes("cmt_s", 8)[stage]
    rows = tune([step], [shape], [torch.bfloat16], device, table, seconds=0.02, most=6)
    for row in rows:
        assert not row.note and row.wrong == 0 and row.measured > 0 and row.rule_us > 0, row
        assert row.best == row.rule or row.ratio > 1, row
    written = read_table(table.path, device_limits(device))
    assert written.problem is None and written.launches() == len({row.key for row in rows})
    call = STEPS[step](shape, torch.bfloat16, device)
    with torch.inference_mode(), use_backend("triton"), record_launches() as launches:
        outputs = call.run(TRITON)
    assert all(c.passed for c in judge(outputs, call.double().run(TORCH), call.run(TORCH)))
    assert {launch.num_warps for launch in launches} == {row.best["num_warps"] for row in rows}
