"""The report: a budget, runs that are cut off and taken up again, pages and comparisons of the file alone."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    """A module of ``benchmarks/``, which is not part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


class Clock:
    """Time that passes only when a measurement says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def parts(module, tmp_path):
    """A report of made-up measurements; which ones ran."""
    measurement, store = module("report.measurement"), module("store")
    clock, ran = Clock(), []

    def section(title, names, share=1.0, seconds=10.0, wrong=(), expected=None):
        def run(name):
            ran.append(name)
            clock.now += seconds
            if name in wrong:
                raise ValueError(f"{name} is wrong\nand more")
            if name == "no message":
                raise AssertionError
            yield dict(op=name, provider="made up", mode="test", value=len(ran))

        def plan():
            for name in names:
                yield measurement.Measurement(name, lambda name=name: run(name), expected or seconds)

        return measurement.Section(title, plan, share)

    def report(**options):
        return measurement.Report(store.ResultFile("cpu", tmp_path, "report"), lambda line: None, clock, **options)

    return section, report, ran, clock


def test_a_run_within_its_budget_does_everything_once(parts):
    section, report, ran, _ = parts
    sections = {"a": section("A", ["a1", "a2"]), "b": section("B", ["b1"])}
    assert report().run(sections, 1000.0)
    assert ran == ["a1", "a2", "b1"]
    again = report()
    assert again.run(sections, 1000.0) and ran == ["a1", "a2", "b1"], "what is done is not done again"
    assert [(row["section"], row["op"]) for row in again.results.data["rows"]] == [
        ("a", "a1"),
        ("a", "a2"),
        ("b", "b1"),
    ]


def test_every_section_gets_its_share_before_any_gets_more(parts):
    section, report, ran, clock = parts
    sections = {"a": section("A", ["a1", "a2", "a3", "a4"]), "b": section("B", ["b1", "b2"], share=0.5)}
    first = report()
    assert not first.run(sections, 45.0)
    assert ran == ["a1", "a2", "a3", "b1"], "30 s for a, 15 s for b"
    assert clock.now <= 45.0
    assert first.state["a"]["missing"] == ["a4"] and first.state["b"]["missing"] == ["b2"]
    assert report().run(sections, 1000.0) and sorted(ran) == ["a1", "a2", "a3", "a4", "b1", "b2"]


def test_what_takes_longer_than_expected_is_expected_of_the_next(parts):
    section, report, ran, clock = parts
    assert not report().run({"a": section("A", ["a1", "a2", "a3"], expected=5.0)}, 26.0)
    assert ran == ["a1", "a2"] and clock.now <= 26.0, "a third would not end, though 5 s were expected of it"


class Probe:
    """A machine that is disturbed during the visits with these numbers, counted from 0."""

    def __init__(self, ran, *disturbed):
        self.ran, self.disturbed = ran, disturbed

    def __call__(self):
        return 1.5 if len(self.ran) - 1 in self.disturbed else 1.0


def repeated(section, **options):
    return {"a": replace(section("A", ["a1", "a2", "a3"], **options), repeated=True), "b": section("B", ["b1"])}


def test_a_second_visit_comes_first_where_the_machine_was_disturbed(parts):
    section, report, ran, _ = parts
    first = report(probe=Probe(ran, 1), visits=2)
    assert first.run(repeated(section), 1000.0)
    # around a2 and, as the probe before it is that after a2, a3
    assert ran == ["a1", "a2", "a3", "b1", "a2", "a3", "a1"]
    assert first.state["a"]["visits"] == {"a1": [1.0, 1.0], "a2": [1.5, 1.0], "a3": [1.5, 1.0]}
    assert report(visits=2).run(repeated(section), 1000.0) and len(ran) == 7, "enough, for a later run too"


def test_second_visits_end_with_the_budget(parts):
    section, report, ran, clock = parts
    # 16 s for a, 18 s for b, second visits, what is left of a, and second visits of that: everything is measured
    assert report(visits=2).run(repeated(section), 65.0)
    assert ran == ["a1", "b1", "a1", "a2", "a3", "a2"] and clock.now <= 65.0
    assert report(visits=2).run(repeated(section), 1000.0) and ran[6:] == ["a3"], "a later run goes on with them"


def test_a_machine_that_is_never_quiet_again_is_not_waited_for_forever(parts):
    section, report, ran, _ = parts
    assert report(probe=Probe(ran, *range(1, 100)), visits=2).run(repeated(section), 1e6)
    assert [ran.count(name) for name in ("a1", "a2", "a3")] == [2, 4, 4]


def test_a_machine_that_is_slow_all_along_is_known_from_earlier_reports(module, parts, tmp_path):
    """A report alone cannot tell: the quietest moment that it saw was none."""
    section, report, _, _ = parts
    measurement, store = module("report.measurement"), module("store")
    plan = {"a": replace(section("A", ["a1"]), repeated=True)}
    first = report()
    assert first.run(plan, 1000.0) and first.state["a"]["visits"] == {"a1": [1.0, 1.0, 1.0]}
    other = dict(first.results.data, machine=first.results.data["machine"] | {"cpu": "a faster one"})
    other["sections"] = {"a": {"visits": {"a1": [0.1]}}}
    store.write_json(tmp_path / "other-report.json", other)
    second = report(probe=lambda: 1.5)
    second.results.path = tmp_path / "amd-report2.json"
    second.results.data = {"machine": first.results.data["machine"], "rows": [], "sections": {}}
    second.state = second.results.data["sections"]
    folders = (tmp_path, first.results.path.parent)
    second.results.data["quietest_before"] = measurement.quietest_before(second.results, folders)
    assert second.results.data["quietest_before"] == [1.0], "of this machine only"
    assert second.run(plan, 1000.0) and second.state["a"]["visits"] == {"a1": [1.5] * 6}, "never quiet: twice as often"
    assert measurement.disturbed(second.state["a"], measurement.quietest(second.results.data)) == ["a1"]
    assert not measurement.disturbed(first.state["a"], measurement.quietest(first.results.data))


def test_what_takes_minutes_is_visited_once(parts):
    section, report, ran, _ = parts
    slow = {"c": replace(section("C", ["c1"], seconds=100.0), repeated=True)}
    assert report(visits=2).run({**slow, **repeated(section)}, 1e4)
    assert ran == ["c1", "a1", "a2", "a3", "b1", "a1", "a2", "a3"]


def test_second_visits_come_before_what_a_share_is_too_small_for(parts):
    section, report, ran, clock = parts
    sections = {
        "a": replace(section("A", ["a1", "a2", "a3", "a4", "a5"]), repeated=True),
        "b": section("B", ["b1"], share=0.5),
    }
    assert not report().run(sections, 90.0), "30 s for a, 15 s for b, and nothing is left of the others' 45 s"
    assert ran == ["a1", "a2", "a3", "b1", "a1", "a2", "a3", "a1", "a2"] and clock.now <= 90.0


def test_a_row_keeps_its_quietest_visit(module):
    quieter = module("store").quieter
    first, disturbed = dict(median_us=10.0, ratio=2.0, note=""), dict(median_us=13.0, ratio=1.6, note="")
    assert quieter(None, first) == first
    both = quieter(first, disturbed)
    assert both == first | {"visits": [[10.0, 20.0], [13.0, 20.8]]}
    assert quieter(disturbed, first) == first | {"visits": [[13.0, 20.8], [10.0, 20.0]]}
    # a visit in which the baseline alone was disturbed does not flatter, one in which it was not counts for it
    assert quieter(both, dict(median_us=9.5, ratio=2.6, note="")) == dict(
        median_us=9.5, ratio=20.0 / 9.5, note="", visits=[*both["visits"], [9.5, 24.7]]
    )
    assert quieter(first, dict(median_us=12.0, ratio=1.5, note=""))["ratio"] == 1.8
    baseline = quieter(dict(median_ms=5.0, ratio=1.0), dict(median_ms=4.0, ratio=1.0))
    assert (baseline["median_ms"], baseline["ratio"]) == (4.0, 1.0)
    untimed = dict(median_us=None, ratio=None, note="needs a GPU")
    assert quieter(first, untimed) == untimed and quieter(untimed, first) == first


def test_what_fails_at_a_second_visit_is_told(parts):
    section, report, ran, _ = parts
    wrong = []
    sections = repeated(section, wrong=wrong)

    def probe():
        wrong[:] = ["a1"] if "b1" in ran else []  # from the second visits on
        return 1.0

    first = report(probe=probe, visits=2)
    assert first.run(sections, 1000.0) and ran == ["a1", "a2", "a3", "b1", "a1", "a2", "a3"]
    assert first.state["a"]["failed"] == {"a1": "ValueError: a1 is wrong"}


def test_what_fails_is_told_and_tried_again(parts):
    section, report, ran, _ = parts
    first = report()
    assert first.run({"a": section("A", ["a1", "a2"], wrong=["a1"])}, 1000.0)
    assert first.state["a"]["failed"] == {"a1": "ValueError: a1 is wrong"} and first.state["a"]["done"] == ["a2"]
    second = report()
    assert second.run({"a": section("A", ["a1", "a2"])}, 1000.0)
    assert second.state["a"]["failed"] == {} and ran == ["a1", "a2", "a1"]


def test_a_lost_device_costs_one_measurement(parts, module):
    """As after an access out of bounds on a GPU: nothing runs in that process any more, and the next process goes on behind it."""
    section, report, ran, _ = parts
    measurement = module("report.measurement")
    sections = {"a": section("A", ["a1", "a2", "a3"], wrong=["a2"])}
    with pytest.raises(measurement.DeviceLost, match="a2: ValueError: a2 is wrong"):
        report(device_works=lambda: False).run(sections, 1000.0)
    after = report(keep_failed=True)
    assert after.run(sections, 1000.0) and ran == ["a1", "a2", "a3"]
    assert after.state["a"]["done"] == ["a1", "a3"] and list(after.state["a"]["failed"]) == ["a2"]


def test_a_lost_device_starts_a_new_process(module, monkeypatch, tmp_path):
    main, measurement = module("report.__main__"), module("report.measurement")

    def lost(self, sections, budget):
        raise measurement.DeviceLost("a2: it went out of bounds")

    class Replaced(Exception):
        pass

    def execv(path, command):
        raise Replaced(command)

    monkeypatch.setattr(measurement.Report, "run", lost)
    monkeypatch.setattr(os, "execv", execv)
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--budget", "100"]
    with pytest.raises(Replaced) as replaced:
        main.main(options)
    (command,) = replaced.value.args
    assert command[:-3] == [sys.executable, "-m", "benchmarks.report", *options]
    assert command[-3:-1] == ["--resume", "--keep-failed"]
    left = main._parser().parse_args(command[3:]).budget
    assert 90 < left <= 100, "of the same budget"
    assert main._computes(torch.device("cpu")) and not main._computes(torch.device("cuda:99"))


def test_what_an_earlier_run_left_out_stays_missing(parts):
    section, report, _, _ = parts
    assert not report().run({"a": section("A", ["a1", "a2", "a3"])}, 10.0)
    narrower = report()
    assert narrower.run({"a": section("A", ["a2"])}, 1000.0), "all of its plan"
    assert narrower.results.data["sections"]["a"]["missing"] == ["a3"]


def test_an_error_without_a_message_is_told_too(parts):
    section, report, _, _ = parts
    first = report()
    assert first.run({"a": section("A", ["no message", "a2"])}, 1000.0)
    assert list(first.state["a"]["failed"]) == ["no message"] and first.state["a"]["done"] == ["a2"]


def test_a_section_that_cannot_run_here_says_why(parts, module):
    measurement = module("report.measurement")
    _, report, _, _ = parts

    def plan():
        raise measurement.Unavailable("there is no such device")

    only = report()
    assert only.run({"a": measurement.Section("A", plan, 1.0)}, 10.0)
    assert only.state["a"]["note"] == "there is no such device"


def test_a_killed_run_loses_one_measurement(tmp_path):
    """The real command, killed in the middle of a measurement and taken up again."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.report",
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--only",
        "calibration",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("  matrix product:"):  # the second measurement is done, the third at work
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)
    (path,) = tmp_path.rglob("*.json")
    before = json.loads(path.read_text())
    done = before["sections"]["calibration"]["done"]
    assert done[:2] == ["copy", "matrix product"] and before["sections"]["calibration"]["missing"]
    resumed = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = json.loads(path.read_text())
    assert after["sections"]["calibration"]["missing"] == [] and list(tmp_path.rglob("*.json")) == [path]
    assert after["rows"][: len(before["rows"])] == before["rows"], "measured again"
    assert path.with_suffix("").joinpath("report.html").exists()


def test_without_a_resume_a_run_has_its_own_file(module, tmp_path):
    main = module("report.__main__")
    settings = module("report.settings").default_settings(torch.device("cpu"), quick=True)
    first = main._result_file(settings, tmp_path, resume=False)
    first.add_all([])
    second = main._result_file(settings, tmp_path, resume=False)
    assert second.path != first.path
    assert main._result_file(settings, tmp_path, resume=True).path == first.path


# ---- what a GPU would be asked, without one --------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(module):
    """Settings of a GPU whose measurements run on this CPU. Nothing here writes into the folder of results."""
    settings = module("report.settings")

    class AsOnAGPU(settings.Settings):
        gpu = True

    quick = settings.default_settings(torch.device("cpu"), quick=True)
    return AsOnAGPU(**vars(replace(quick, dtypes=("float32",))))


def test_every_plan_of_a_gpu_can_be_made(module, monkeypatch):
    settings = module("report.settings").default_settings(torch.device("cuda"))
    sections = module("report.sections").sections(settings)
    for name, section in sections.items():
        if name == "memory":
            with pytest.raises(module("report.measurement").Unavailable, match="their rows have it"):
                list(section.plan())
        else:
            names = [m.name for m in section.plan()]
            assert names and len(set(names)) == len(names), name
    tests = [m.name for m in sections["tests"].plan()]
    assert "tests/ops/test_lpu_gpu.py" in tests and "tests/ops/test_attention_gpu.py" in tests
    peers = [m.name for m in sections["peers"].plan()]
    assert "convnext_tiny batch 256 compile-channels-last" in peers and "cmt_s batch 1 optimize" in peers


def test_the_measurements_of_a_gpu_run(module, as_on_a_gpu, monkeypatch, tmp_path):
    """One of each kind, timed by nothing, into a file that says so: every number is made up."""
    from cmt_fast.testing import timing

    def fake(fns, **options):
        for fn in fns.values():
            fn()
        return {name: timing.Timing(1.0, 1.0, 1.0, 1, (1.0,)) for name in fns}

    for user in ("run", "kernels", "attention", "report.peers"):
        monkeypatch.setattr(module(user), "measure_interleaved", fake)
    monkeypatch.setattr(module("report.calibration"), "measure", lambda fn, **_: fake({"": fn})[""])
    monkeypatch.setattr("cmt_fast.testing.benchmark.measure_interleaved", fake)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    attention = module("attention")
    here = {name: attention.PROVIDERS[name] for name in ("eager", "triton", "sdpa-math")}
    monkeypatch.setattr(attention, "PROVIDERS", here)
    sections = module("report.sections").sections(as_on_a_gpu)
    calibration = [m.name for m in sections["calibration"].plan() if m.name != "launch"]
    wanted = {
        "calibration": calibration,
        "kernels": [
            "packed lpu cmt_ti/d",
            "lpu cmt_ti/d training float32",
            "attention cmt_ti/d in training, beside SDPA and FlexAttention",
        ],
        "inference": ["cmt_ti batch 2 float32 optimize"],
        "accuracy": ["depthwise_conv3x3 float32"],
        "peers": ["cmt_ti batch 2 original", "resnet50 batch 2 compile-channels-last"],
    }
    for name, names in wanted.items():
        every = {m.name: m for m in sections[name].plan()}
        plan = [every[measurement] for measurement in names]
        wanted[name] = replace(sections[name], plan=lambda plan=plan: plan)
    results = module("store").ResultFile("cpu", tmp_path, "made-up-numbers")
    results.data["machine"] |= dict(gpu="no GPU, made-up numbers")
    report = module("report.measurement").Report(results, lambda line: None)
    assert report.run(wanted, 1000.0)
    assert not [state["failed"] for state in report.state.values() if state["failed"]]
    assert len(report.state["kernels"]["clocks_power"]) == 3
    rows = results.data["rows"]
    assert {row["mode"] for row in rows if row["section"] == "calibration"} == {
        "inference",
        "training",
        "input gradient",
        "weight gradient",
    }
    for row in rows:
        assert row.get("median_us", 1e6) == 1e6 or row["provider"] in ("triton", "copy"), row
    work = [row for row in rows if row["section"] == "kernels" and row["provider"] in ("torch", "reference")]
    assert len(work) == 2 and all(row["bytes"] > 0 and row["flops"] > 0 for row in work), "under the roofline"
    module("report.page").write_page(results.data, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "# cmt_fast on no GPU, made-up numbers" in page and "of products" in page


# ---- the page, and comparisons -----------------------------------------------------------------------------------------------


def kernel(provider, us, ratio):
    first = dict(
        section="kernels", op="packed lpu", shape="cmt_s/a", provider=provider, dtype="float32", mode="inference"
    )
    return first | dict(
        median_us=us, p20_us=us, p80_us=us, ratio=ratio, bytes=100, flops=50, gb_s=1.0, gflop_s=2.0, note=""
    )


def best(op, gb_s, gflop_s):
    first = dict(section="calibration", op=op, shape="large", provider="torch", dtype="float32", mode="inference")
    return first | dict(median_us=1.0, p20_us=1.0, p80_us=1.0, bytes=100, flops=50, gb_s=gb_s, gflop_s=gflop_s)


def peer(model, provider, speed, top1):
    first = dict(
        section="peers", model=model, img_size=224, batch=1, provider=provider, dtype="float32", mode="inference"
    )
    return first | dict(images_per_s=speed, ratio=speed / 10, top1=top1, source="a paper", median_us=1.0)


MADE_UP = {
    "machine": dict(cpu="a CPU", cores=2, threads=1, torch="2", cmt_fast="0", commit="c0ffee", date="2026-01-01"),
    "sections": {
        "kernels": dict(
            title="Operations",
            repeated=True,
            visits={"packed lpu": [0.015, 0.013], "packed stem": [0.011], "packed attention": [0.0100]},
            done=["packed lpu"],
            failed={"packed kv": "ValueError: wrong"},
            missing=["packed head"],
            note="",
        ),
        "peers": dict(title="Other networks", done=[], failed={}, missing=[], note="timm is not installed"),
    },
    "rows": [
        best("copy", 4.0, 0.0),
        best("matrix product", 1.0, 8.0),
        kernel("reference", 10.0, 1.0),
        kernel("native", 20.0, 0.5),
        peer("deit_small_patch16_224", "eager", 10.0, 79.8),
        peer("cmt_s", "original", 8.0, 83.5),
        peer("cmt_s", "optimize", 16.0, 83.5),
    ],
}


def test_the_page_tells_what_is_measured_and_what_is_not(module, tmp_path):
    module("report.page").write_page(MADE_UP, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "| packed lpu | cmt_s/a | float32 | inference | native | 20 | 20 .. 20 | 0.50x | 0.50 .. 0.50 (1) | 1 | 2 | 25% | 25% |  |"
        in text
    ), "rows that lose stay"
    assert "Measured only while something else slowed the machine (2 of 3): packed lpu, packed stem." in text
    assert "Failed: packed kv: ValueError: wrong" in text
    assert "Not measured yet (1): packed head" in text
    assert "Not here: timm is not installed" in text
    if "matplotlib" in sys.modules or importlib.util.find_spec("matplotlib"):
        assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "operations.png", "roofline.png"}


def test_a_page_without_matplotlib(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    module("report.page").write_page(MADE_UP, tmp_path)
    assert "No figures: plots need matplotlib" in (tmp_path / "report.md").read_text()


def test_what_became_slower_fails(module, tmp_path, capsys):
    compare = module("compare")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(MADE_UP))
    changed = [row | {"ratio": 0.4} if row["provider"] == "native" else row for row in MADE_UP["rows"]]
    new.write_text(json.dumps(MADE_UP | {"rows": changed}))
    assert compare.main([str(old), str(new)]) == 0
    assert compare.main([str(old), str(new), "--fail-if-slower", "0.25"]) == 0
    assert module("report.__main__").main(["--compare", str(old), str(new), "--fail-if-slower", "0.1"]) == 1
    out = capsys.readouterr().out
    assert "-20.0%     0.50x ->    0.40x  kernels packed lpu cmt_s/a native float32 inference" in out
    assert "1 of 3 are slower by more than 10%" in out
    new.write_text(json.dumps(MADE_UP | {"machine": MADE_UP["machine"] | {"cpu": "another"}}))
    with pytest.raises(ValueError, match="of two devices, a CPU and another"):
        compare.main([str(old), str(new)])


def test_it_runs_with_nothing_but_torch_timm_and_pytest(tmp_path):
    """As on a borrowed machine: no rich, typer, matplotlib, scikit-learn, safetensors or onnx."""
    blocked = ("rich", "typer", "matplotlib", "sklearn", "safetensors", "onnx", "onnxscript", "onnxruntime")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}, None)); from benchmarks.report.__main__ import main; sys.exit(main())"
    options = [
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--only",
        "inference",
        "peers",
        "memory",
        "--budget",
        "1e-9",
    ]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not finished" in done.stdout and time.monotonic() - start < 200
