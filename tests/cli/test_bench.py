"""``cmt-fast bench``: exit codes, what it says, what it writes."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import cmt_fast.cli
from cmt_fast.cli.app import app
from cmt_fast.modules import IRFFN

TINY = ["bench", "--device", "cpu", "--model", "cmt_ti", "--img-size", "32", "--seconds", "0.01"]


def test_a_table_and_a_file(tmp_path):
    path = tmp_path / "rows.json"
    options = ["--provider", "original", "--provider", "reference", "--batch", "1", "--batch", "2", "--json", str(path)]
    result = CliRunner().invoke(app, [*TINY, *options])
    assert result.exit_code == 0, result.output
    assert f"torch {torch.__version__}" in result.output and "threads: " in result.output
    assert "cmt_ti, 32 pixels, batch 2, float32, inference" in result.output
    written = json.loads(path.read_text())
    assert written["machine"]["cpu"] and len(written["rows"]) == 4
    assert [row["ratio"] for row in written["rows"] if row["provider"] == "original"] == [1.0, 1.0]


def test_a_wrong_provider_gets_no_time_and_exit_1(monkeypatch, tmp_path):
    forward = IRFFN.forward
    monkeypatch.setattr(IRFFN, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 1.01)
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(app, [*TINY, "--provider", "original", "--provider", "reference", "--json", str(path)])
    assert result.exit_code == 1
    assert "reference has no time: wrong: output FAILED: error" in " ".join(result.output.split())
    original, reference = json.loads(path.read_text())["rows"]
    assert original["median_ms"] > 0 and reference["median_ms"] is None and reference["ratio"] is None


def test_threads_are_set_and_recorded(tmp_path):
    before = torch.get_num_threads()
    path = tmp_path / "rows.json"
    torch.set_num_threads(2)
    try:
        options = ["--provider", "original", "--threads", "1", "--json", str(path)]
        result = CliRunner().invoke(app, [*TINY, *options])
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["machine"]["threads"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "cmt_xl"], "unknown model 'cmt_xl'; expected one of cmt_ti, cmt_xs, cmt_s, cmt_b"),
        (
            ["--provider", "theirs"],
            "unknown provider 'theirs'; expected one of original, original-code, original-channels-last, reference",
        ),
        (["--dtype", "int8"], "unknown dtype 'int8'; expected one of float32, bfloat16"),
        (["--mode", "train"], "unknown mode 'train'; expected one of inference, training"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--seconds", "0"], "seconds must be positive, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--batch", "many"], "unable to parse string as an integer"),
    ],
)
def test_a_bad_option_exits_2_with_help(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cmt-fast", "bench", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as exit:
        cmt_fast.cli.main()
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
