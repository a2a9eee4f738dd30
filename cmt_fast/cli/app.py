"""The application: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

from cmt_fast._version import __version__
from cmt_fast.cli import bench, demo, export, info, predict, train, tune, verify

app = typer.Typer(
    name="cmt-fast",
    help="CMT, the hybrid CNN / transformer backbone, as fast as its FLOP count.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    info.info,
    verify.verify,
    bench.bench,
    tune.tune,
    predict.predict,
    export.export,
    train.train,
    demo.demo,
)
for command in COMMANDS:
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cmt-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
