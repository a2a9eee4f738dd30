"""The steps of a report, in their order."""

from __future__ import annotations

from functools import partial

from benchmarks.report import accuracy, calibration, kernels, models, peers
from benchmarks.report.measurement import Section
from benchmarks.report.settings import Settings


def sections(settings: Settings) -> dict[str, Section]:
    """By name. The names are those of ``--only``, and the ``section`` of the rows."""
    return {
        "tests": Section("Tests on this device", partial(accuracy.tests_plan, settings), 2.5),
        "accuracy": Section("Errors against float64", partial(accuracy.plan, settings), 1.5),
        "calibration": Section("What this machine does at best", partial(calibration.plan, settings), 1.5),
        "inference": Section(
            "Whole models, inference", partial(models.plan, settings, "inference"), 3.0, repeated=True
        ),
        "kernels": Section("Operations and steps", partial(kernels.plan, settings), 3.0, repeated=True),
        "training": Section("Whole models, training", partial(models.plan, settings, "training"), 1.5, repeated=True),
        "memory": Section("Memory", partial(models.memory_plan, settings), 1.0),
        "peers": Section("Other networks", partial(peers.plan, settings), 2.5, repeated=True),
    }
