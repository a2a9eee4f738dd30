"""``cmt-fast verify``: exit codes, what it says, what it writes."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import cmt_fast.cli
import cmt_fast.ops.lpu.api as lpu_api
from cmt_fast.backend import machine_reasons
from cmt_fast.cli.app import app
from cmt_fast.testing import verification

ONE = ["verify", "--device", "cpu", "--backend", "reference", "--op", "lpu", "--dtype", "float32", "--quick"]


def test_right_numbers_exit_0_and_are_written(tmp_path):
    path = tmp_path / "checks.json"
    result = CliRunner().invoke(app, [*ONE, "--op", "irffn", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "comparisons passed on cpu" in result.output
    written = json.loads(path.read_text())
    assert written["machine"]["torch"]
    assert {check["op"] for check in written["checks"]} == {"lpu", "irffn"}
    assert all(check["passed"] for check in written["checks"])


def test_wrong_numbers_exit_1_and_are_named(monkeypatch):
    right, run = lpu_api.lpu_reference, verification.run

    def run_broken(*args, backend="reference", **kwargs):
        wrong = lambda x, conv: right(x, conv) * 1.01
        monkeypatch.setattr(lpu_api, "lpu_reference", wrong if backend == "auto" else right)
        return run(*args, backend="reference", **kwargs)

    monkeypatch.setattr(verification, "run", run_broken)
    result = CliRunner().invoke(app, [*ONE, "--backend", "auto"])
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert "FAILED lpu auto float32 (" in text and "output: error" in text and "plain PyTorch" in text
    assert "FAILED lpu reference" not in text
    assert "comparisons failed on cpu" in text


def test_a_backend_that_cannot_run_is_no_success():
    if not machine_reasons("triton"):
        pytest.skip("triton runs here, so nothing is unavailable")
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", "--backend", "triton", "--op", "lpu"])
    assert result.exit_code == 1
    assert "not verified: triton" in result.output and "Nothing was verified" in result.output
    assert "passed" not in result.output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--op", "attention"], "unknown op 'attention'; expected one of depthwise_conv3x3"),
        (["--backend", "cuda"], "unknown backend 'cuda'; expected one of auto, triton, native, reference"),
        (["--dtype", "half"], "unknown dtype 'half'; expected one of float64, float32"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--op", "lpu", "--dtype", "float64"], "nothing to verify: float64 compares whole models only"),
        (["--json", "/missing/folder/x.json"], "the folder /missing/folder does not exist: create it first"),
        (["--nonsense"], "No such option: --nonsense"),
    ],
)
def test_a_bad_option_exits_2_with_help(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cmt-fast", "verify", *options])
    with pytest.raises(SystemExit) as exit:
        cmt_fast.cli.main()
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "cmt_fast", *ONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
