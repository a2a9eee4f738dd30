"""The command line as a whole."""

import os
import subprocess
import sys

import pytest

import cmt_fast


def run(*arguments, **environment):
    command = [sys.executable, "-m", "cmt_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_version():
    assert run("--version").stdout.strip() == f"cmt-fast {cmt_fast.__version__}"


def test_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("info", "verify", "bench", "predict", "export", "train", "demo"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing"], "No such command"),
        (["info", "cmt_l"], "expected one of cmt_ti, cmt_xs, cmt_s, cmt_b"),
        (["info", "cmt_s", "--img-size", "8"], "both sides must be at least 31"),
    ],
)
def test_a_mistake_is_one_clear_message(arguments, words):
    result = run(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert words in " ".join(result.stderr.split())


def test_a_wrong_environment_variable_is_one_line():
    result = run("info", CMT_FAST_BACKEND="foo", COLUMNS="200")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "CMT_FAST_BACKEND must be one of 'auto', 'triton', 'native', 'reference', got 'foo'" in result.stderr
