"""Measure this machine and write a report: ``python -m benchmarks.report [--budget 600] [--only peers] [--resume]``.

What is correct, how fast it is beside everything that a user would pick instead, and how far from the hardware's limit. Each finished
measurement is in the result file at once; ``--resume`` goes on with the newest one of this device and commit. The page and its figures
are made from the file alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.compare import add_comparison, compare_files
from benchmarks.report.measurement import VISITS, DeviceLost, Report, disturbed, quietest, quietest_before
from benchmarks.report.page import write_page
from benchmarks.report.probe import probe
from benchmarks.report.sections import sections
from benchmarks.report.settings import Settings, default_settings
from benchmarks.run import QUICK_RESULTS
from benchmarks.store import RESULTS, ResultFile, load
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.precision import PRECISIONS
from cmt_fast.training.config import find_device

#: Of the budget, for the page and its figures, and for a measurement that took longer than was expected.
PAGE_SHARE = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if something was wrong, failed, or (with ``--compare``) slower than allowed."""
    parser = _parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    if options.compare:
        return compare_files(*options.compare, options.fail_if_slower)
    if options.original:
        os.environ["CMT_FAST_ORIGINAL"] = str(options.original)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = default_settings(
        find_device(options.device),
        quick=options.quick,
        seconds=options.seconds,
        variants=options.variant,
        batches=options.batch,
        dtypes=options.dtype,
    )
    every = sections(settings)
    chosen = {name: section for name, section in every.items() if not options.only or name in options.only}
    results = _result_file(settings, options.out, options.resume)
    folders = (results.path.parent, RESULTS / results.path.parent.name)
    results.data["quietest_before"] = quietest_before(results, folders)
    print(f"{results.data['machine']}\n-> {results.path}", flush=True)
    report = Report(
        results,
        lambda line: print(line, flush=True),
        probe=partial(probe, settings.device),
        visits=1 if settings.quick else VISITS,
        device_works=partial(_computes, settings.device),
        keep_failed=options.keep_failed,
    )
    try:
        complete = report.run(chosen, (1 - PAGE_SHARE) * options.budget)
    except DeviceLost as lost:
        print(f"the device is lost to this process ({lost}): going on in a new one", flush=True)
        left = f"--budget={max(0.0, deadline - time.monotonic())}"
        again = [sys.executable, "-m", "benchmarks.report", *arguments, "--resume", "--keep-failed", left]
        os.execv(sys.executable, again)
    except KeyboardInterrupt:
        print("interrupted: what is finished is in the file", flush=True)
        complete = False
    page = write_page(load(results.path), results.path.with_suffix("")) if results.path.exists() else None
    if not complete:
        print(f"not finished: python -m benchmarks.report --resume goes on (--budget SECONDS, now {options.budget:g})")
    print(f"report: {page}")
    states = [results.data["sections"][name] for name in chosen]
    best = quietest(results.data)
    if slow := sum(len(disturbed(state, best)) for state in states):
        print(
            f"{slow} were measured only while something else slowed the machine, and their ratios may differ by a fifth: "
            "better at another time"
        )
    wrong = any(row.get("failed") for row in results.data["rows"])
    return int(wrong or any(state["failed"] for state in states))


def _computes(device: torch.device) -> bool:
    """Whether the device does; after an access out of bounds a GPU refuses everything of the process that made it."""
    try:
        return int(torch.ones(2, device=device).sum()) == 2
    except (RuntimeError, AssertionError):  # the second of a PyTorch without CUDA
        return False


def _result_file(settings: Settings, out: Path | None, resume: bool) -> ResultFile:
    """A new file, or the newest of this device, day and commit."""
    root = out or (QUICK_RESULTS if settings.quick else RESULTS)
    newest = None
    for run in itertools.count(1):
        file = ResultFile(settings.device, root, "report" if run == 1 else f"report{run}")
        if not file.path.exists():
            return newest if resume and newest else file
        newest = file
    raise AssertionError


def _parser() -> argparse.ArgumentParser:
    names = list(sections(default_settings(torch.device("cpu"))))
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="start nothing that would not end within these",
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument(
        "--resume", action="store_true", help="go on with the newest file of this device, day and commit"
    )
    parser.add_argument("--keep-failed", action="store_true", help="with --resume: do not try again what failed")
    parser.add_argument(
        "--original", type=Path, metavar="FOLDER", help="of the original's cmt.py, which is then timed too"
    )
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, metavar="NAME", help="; ".join(VARIANTS))
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="of whole models in inference")
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, metavar="NAME", help=", ".join(PRECISIONS))
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--threads", type=int, help="of a CPU; PyTorch's choice by default")
    parser.add_argument("--seconds", type=float, help="for each time; 1 on a GPU, 0.5 on a CPU, 0.02 with --quick")
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--quick", action="store_true", help="small images: to see that everything runs")
    add_comparison(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
