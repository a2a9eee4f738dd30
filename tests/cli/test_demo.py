"""``cmt-fast demo --quick``: every step, in its smallest form."""

import pytest
import torch
from PIL import Image

from cmt_fast.cli import demo as command
from cmt_fast.models.checkpoint import load_model
from cmt_fast.testing.benchmark import Row
from cmt_fast.testing.verification import Check
from cmt_fast.training.plots import plot_benchmark
from cmt_fast.training.report import Report

pytestmark = pytest.mark.needs("timm", "torchvision")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "report"


def test_quick(cmt_fast, output):
    code, out, err = cmt_fast("demo", "--quick", "--device", "cpu", "--output", output)
    assert code == 0, err
    for step in range(1, 6):
        assert f"{step}/5" in out
    page = (output / "report.html").read_text()
    markdown = (output / "report.md").read_text()
    for text in ("held-out digits", "comparisons with float64", "reference", "original", "images/s"):
        assert text in page and text in markdown
    for name in ("curves", "confusion", "predictions", "benchmark"):
        assert Image.open(output / f"{name}.png").size[0] > 600
        assert f"({name}.png)" in markdown
    assert page.count("data:image/png;base64,") == 4
    assert load_model(output / "model.pth").in_chans == 1
    assert str(output / "report.html") in out

    # what it says to try next works, and a second demo replaces the first
    command_line = next(line for line in out.splitlines() if line.startswith("Try next:")).split()[3:]
    code, out, err = cmt_fast(*command_line)
    assert code == 0, err
    assert f"{command.SAMPLES} images in" in out


def test_fails_if_numbers_are_wrong(cmt_fast, output, monkeypatch):
    wrong = Check("lpu", "reference", "float32", "a case", "output", 1.0, 0.1, 0.2, False)
    monkeypatch.setattr(command, "verify", lambda *args, **kwargs: [wrong])
    monkeypatch.setattr(command, "bench", lambda *args, **kwargs: [Row("cmt_ti", "original", 1, "float32", "inference", 64, note="broken")])  # fmt: skip
    code, out, _ = cmt_fast("demo", "--quick", "--device", "cpu", "--output", output)
    assert code == 1
    assert "1 comparisons with float64 failed" in out
    assert "1, of which 1 failed" in (output / "report.md").read_text()
    assert "broken" in (output / "report.md").read_text()


def test_fails_if_the_accuracy_is_low(cmt_fast, output, monkeypatch):
    judged = command.Effort(**{**command.QUICK.__dict__, "judged": True})
    monkeypatch.setattr(command, "QUICK", judged)
    monkeypatch.setattr(command, "verify", lambda *args, **kwargs: [])
    monkeypatch.setattr(command, "bench", lambda *args, **kwargs: [])
    code, out, _ = cmt_fast("demo", "--quick", "--device", "cpu", "--output", output)
    assert code == 1 and "below the 97 % required" in out


@pytest.mark.parametrize("spread, text", [(1.0, "2.00 times the images a second"), (30.0, "no reliable figure")])
def test_busy_machine_gets_no_ratio(tmp_path, monkeypatch, spread, text):
    def row(provider, median):
        return Row("cmt_ti", provider, 1, "float32", "inference", 64, median, median - spread, median + spread, 1000 / median, 100 / median)  # fmt: skip

    monkeypatch.setattr(command, "bench", lambda *args, **kwargs: [row("original", 100.0), row("auto", 50.0)])
    report = Report("title", "introduction")
    command._bench(report, command.QUICK, torch.device("cpu"), tmp_path)
    assert [text in result for _, result in report.summary] == [True]


def test_bad_device(cmt_fast, tmp_path):
    code, _, err = cmt_fast("demo", "--device", "cuda:88", "--output", tmp_path / "x")
    assert code == 2 and "no device cuda:88" in err and not (tmp_path / "x").exists()


def test_verification_rows():
    def check(op, error, passed):
        return Check(op, "native", "float32", "case", "output", error, 0.1, 0.2, passed)

    rows = command.verification_rows([check("lpu", 0.1, True), check("lpu", 0.3, False), check("irffn", 0.0, None)])
    assert rows == [["lpu", "native", "float32", 2, 1, "1.50"]]


def test_report_escapes_and_embeds(tmp_path):
    plot_benchmark(["a"], [2.0], [(1.0, 3.0)], "title", tmp_path / "x.png")
    report = Report("a < b", "introduction", [("what", "1 & 2")])
    report.table(["name", "count"], [["<x>", 3]])
    report.figure(tmp_path / "x.png", 'a "figure"')
    page = report.write(tmp_path).read_text()
    assert "<title>a &lt; b</title>" in page and "&lt;x&gt;" in page and "1 &amp; 2" in page
    assert '<td class="number">3</td>' in page and "data:image/png;base64," in page
    assert "| <x> | 3 |" in (tmp_path / "report.md").read_text()
