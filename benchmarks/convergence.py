"""Does a residual stream in 16 bits cost accuracy? Whole training runs in both settings, from several seeds: ``python -m benchmarks.convergence``.

A run is that of ``cmt-fast train digits`` with a narrow CMT of CMT-Ti's depths (``--set data=FOLDER``: that of ``cmt-fast train FOLDER``), once a setting
and seed: ``full`` and ``low`` under autocast in bfloat16, which are ``--residual full`` and ``--residual low``, and ``float32`` for scale. Runs of one seed
start from the same weights and see the same images, so their differences are paired; the difference between full and float32 tells what autocast itself
does, and the spread over seeds what chance does. On a CPU the arithmetic is that of CUDA's autocast
(:class:`cmt_fast.testing.cuda_autocast.CudaAutocast`), in plain PyTorch. At the weights that a run ends with, the gradient of one batch in either setting is
compared with float32's.

Every finished run is in the result file; the same command, on the same day and commit, goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.run import QUICK_RESULTS
from benchmarks.store import RESULTS, ResultFile, key, load
from cmt_fast.backend import use_backend
from cmt_fast.cli.progress import bar
from cmt_fast.cli.train import DIGITS_RECIPE
from cmt_fast.models.cmt import CMT
from cmt_fast.modules.drop_path import DropPath
from cmt_fast.testing.cuda_autocast import CudaAutocast
from cmt_fast.training import engine
from cmt_fast.training.config import TrainConfig
from cmt_fast.training.data import Data, load_data, val_loader
from cmt_fast.training.distributed import Processes
from cmt_fast.training.engine import Result
from cmt_fast.training.run import Observer, fit

#: What the settings train with; ``low`` is judged beside ``full``, ``float32`` is for scale.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": dict(amp="bf16", residual="full"),
    "low": dict(amp="bf16", residual="low"),
    "float32": dict(amp="off"),
}
PAIRS = (("low", "full"), ("full", "float32"))
#: Of the last epoch: the training loss is the mean over its steps.
QUANTITIES = ("train_loss", "val_loss", "val_accuracy")

#: Sixteen blocks, 48 sums of the stream: the digits' recipe with a deeper and narrower model, and fewer epochs.
RECIPE: dict[str, Any] = {
    **DIGITS_RECIPE,
    "data": "digits",
    "epochs": 12,
    "backend": "reference",
    "model_args": dict(embed_dims=[16, 32, 64, 128], stem_channel=8, depths=[2, 2, 10, 2], fc_dim=128),
}
SEEDS = 6
QUICK: dict[str, Any] = dict(
    epochs=1,
    batch_size=256,
    warmup_epochs=0.5,
    model_args=dict(embed_dims=[8, 8, 16, 16], stem_channel=4, depths=[1] * 4, num_heads=[1] * 4, fc_dim=16),
)
QUICK_SEEDS = 2

Row = dict[str, Any]


class _Watch(Observer):
    """Keeps the model, and reports the steps of a run to a bar."""

    def __init__(self, report: Any, label: str, before: int, runs: int) -> None:
        self.report, self.label, self.before, self.runs = report, label, before, runs

    def started(self, config: TrainConfig, data: Data, model: nn.Module, steps: int, first_epoch: int) -> None:
        self.config, self.model, self.steps = config, model, steps

    def stepped(self, epoch: int, step: int, result: Result) -> None:
        one = self.config.epochs * self.steps
        self.report(self.before * one + (epoch - 1) * self.steps + step, self.runs * one, self.label)


def train(config: TrainConfig, watch: _Watch) -> Row:
    """One run: the quantities of every epoch, those of the last, and the errors of a gradient at its end."""
    device = config.torch_device()
    with _cuda_rules(device):
        outcome = fit(config, watch)
        data = load_data(config)
        images, classes = next(iter(val_loader(data, config, Processes(), pin=False)))
        with use_backend(config.backend):
            errors = gradient_errors(watch.model, images.to(device), classes.to(device))
    curves = {name: [record[name] for record in outcome.history] for name in QUANTITIES}
    last = {name: curve[-1] for name, curve in curves.items()}
    return dict(
        **last, gradient_error=errors, curves=curves, steps=watch.steps * config.epochs, seconds=outcome.seconds
    )


def gradient_errors(model: CMT, images: Tensor, classes: Tensor) -> dict[str, float]:
    """How far the loss's gradient under bfloat16 autocast is from float32's at the same weights, for each stream.

    2-norms over all parameters, the error's over the gradient's; BatchNorm in training mode, without stochastic depth and dropout.
    """

    def gradient(dtype: torch.dtype | None, low: bool) -> Tensor:
        model.set_low_residual(low)
        with engine.autocast(images.device, dtype):
            scores = model(images)
        loss = F.cross_entropy(scores.float(), classes)
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(model.parameters()))])

    model.train()
    for module in model.modules():
        if isinstance(module, (DropPath, nn.Dropout)):
            module.eval()
    exact = gradient(None, False)
    errors = {name: gradient(torch.bfloat16, name == "low") - exact for name in ("full", "low")}
    return {name: (error.norm() / exact.norm()).item() for name, error in errors.items()}


@contextlib.contextmanager
def _cuda_rules(device: torch.device) -> Iterator[None]:
    """On a CPU, CUDA's autocast in place of the CPU's own, whose LayerNorm returns 16 bits: there the stream is never float32."""

    def autocast(_: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if dtype is None else CudaAutocast(dtype)

    with contextlib.nullcontext() if device.type == "cuda" else mock.patch.object(engine, "autocast", autocast):
        yield


def run_all(
    results: ResultFile, settings: Sequence[str], seeds: int, recipe: Mapping[str, Any], console: Console
) -> None:
    """Every run that the file does not have yet, seed by seed, so that what is there at any time is paired."""
    wanted = [(seed, setting) for seed in range(seeds) for setting in settings]

    def identity(row: Row) -> tuple[Any, str]:
        return key(row), json.dumps(row["recipe"], sort_keys=True)

    done = {identity(row) for row in results.data["rows"]}
    with bar(console) as report:
        for i, (seed, setting) in enumerate(wanted):
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig(**{**recipe, **SETTINGS[setting], "seed": seed, "output": folder})
                row = _about(config, setting)
                if identity(row) not in done:
                    row |= train(config, _Watch(report, f"seed {seed}, {setting}", i, len(wanted)))
                    results.add(row)
                    numbers = ", ".join(f"{name} {row[name]:.4f}" for name in QUANTITIES)
                    console.print(f"seed {seed}, {setting}: {numbers} in {row['seconds']:.0f} s", highlight=False)


def _about(config: TrainConfig, setting: str) -> Row:
    """What identifies a run, and everything that decides its numbers."""
    args = config.constructor_args()
    return dict(
        section="convergence",
        model=config.model,
        img_size=args["img_size"],
        batch=config.batch_size,
        provider=setting,
        dtype="float32" if config.amp == "off" else "autocast-bfloat16",
        mode="training",
        seed=config.seed,
        recipe={**config.as_dict(), "output": "", "model_args": args},
    )


# ---- what came out -------------------------------------------------------------------------------------------------------


def values(rows: Sequence[Row], setting: str, quantity: str) -> dict[int, float]:
    """The final value of every run of a setting, by seed."""
    return {row["seed"]: row[quantity] for row in rows if row["provider"] == setting}


def differences(rows: Sequence[Row], of: str, minus: str, quantity: str) -> dict[int, float]:
    """Of the seeds that both settings have, by seed."""
    first, second = values(rows, of, quantity), values(rows, minus, quantity)
    return {seed: first[seed] - second[seed] for seed in first.keys() & second.keys()}


def tables(rows: Sequence[Row]) -> list[Table]:
    """The final values of all runs; the paired differences; the errors of gradients."""
    seeds = sorted({row["seed"] for row in rows})
    final = Table("", "setting", *(f"seed {seed}" for seed in seeds), "mean", "std", title="Last epoch")
    paired = Table(
        "", "", *(f"seed {seed}" for seed in seeds), "mean", "std", "std of mean", title="Paired differences"
    )
    for quantity in QUANTITIES:
        for setting in SETTINGS:
            _add(final, [quantity, setting], values(rows, setting, quantity), seeds, "{:.4f}")
        for of, minus in PAIRS:
            both = differences(rows, of, minus, quantity)
            last = f"{statistics.stdev(both.values()) / len(both) ** 0.5:.4f}" if len(both) > 1 else "-"
            _add(paired, [quantity, f"{of} - {minus}"], both, seeds, "{:+.4f}", last)
    errors = Table("after runs in", "full", "low", "low / full", title="Error of a gradient, mean over the seeds")
    for setting in SETTINGS:
        mine = [row["gradient_error"] for row in rows if row["provider"] == setting]
        if mine:
            full, low = (statistics.mean(error[name] for error in mine) for name in ("full", "low"))
            ratio = statistics.mean(error["low"] / error["full"] for error in mine)
            errors.add_row(setting, f"{full:.4f}", f"{low:.4f}", f"{ratio:.3f}")
    return [final, paired, errors]


def _add(
    table: Table, names: list[str], of_seed: Mapping[int, float], seeds: Sequence[int], form: str, *last: str
) -> None:
    """A row of what there is of every seed, its mean and its standard deviation; none where there is nothing."""
    if of_seed:
        cells = [form.format(of_seed[seed]) if seed in of_seed else "-" for seed in seeds]
        std = f"{statistics.stdev(of_seed.values()):.4f}" if len(of_seed) > 1 else "-"
        table.add_row(*names, *cells, form.format(statistics.mean(of_seed.values())), std, *last)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.table:
        data = load(options.table)
    else:
        recipe = _recipe(dict(options.set), options.quick)
        device = TrainConfig(**recipe).torch_device()
        results = ResultFile(device, options.out or (QUICK_RESULTS if options.quick else RESULTS), "convergence")
        console.print(f"{results.data['machine']}\n-> {results.path}", highlight=False, soft_wrap=True)
        seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
        run_all(results, options.setting, seeds, recipe, console)
        data = results.data
    for table in tables([row for row in data["rows"] if row.get("section") == "convergence"]):
        console.print(table)
    return 0


def _recipe(given: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What all settings have in common. Of other data than digits it is what ``cmt-fast train`` has by itself."""
    return {**(RECIPE if given.get("data", "digits") == "digits" else {}), **(QUICK if quick else {}), **given}


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name not in TrainConfig.__dataclass_fields__:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE with a field of TrainConfig, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=tuple(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, help=f"runs of each setting; {SEEDS}, with --quick {QUICK_SEEDS}")
    parser.add_argument(
        "--set",
        nargs="+",
        type=_field,
        default=[],
        metavar="FIELD=VALUE",
        help="fields of cmt_fast.training.TrainConfig in place of the recipe's, in JSON or as text: data=FOLDER epochs=90 workers=16",
    )
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one epoch: to see that everything runs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a result file, run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
