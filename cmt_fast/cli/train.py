"""``cmt-fast train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from cmt_fast.cli.console import console, errors
from cmt_fast.cli.program import command_line
from cmt_fast.models.variants import VARIANTS
from cmt_fast.training.config import SMALL_MODELS, TrainConfig
from cmt_fast.training.history import Record
from cmt_fast.training.run import LAST, Observer, Outcome, fit, read_resume

#: What training on the digits changes from TrainConfig's defaults, which are for folders of photographs.
DIGITS_RECIPE: dict[str, Any] = dict(model="cmt_digits", epochs=20, lr=2e-3, warmup_epochs=2.0, clip_grad=1.0)
#: What may differ when a run is resumed: it does not change what is computed, or only by rounding.
MAY_CHANGE = ("data", "device", "workers", "backend")

MODEL, RECIPE, REGULARISE, MACHINE = "Model", "Recipe", "Augmentation and regularisation", "Machine and files"


def train(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or 'digits' for the built-in handwritten digits. "
            "May be left out with --resume.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join([*VARIANTS, *SMALL_MODELS])}. \\[default: cmt_s; cmt_digits for digits]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    embed_dims: Annotated[
        str | None,
        typer.Option(
            help="Channels of the four stages instead of the model's own: 24,48,96,192", rich_help_panel=MODEL
        ),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Blocks of the four stages: 1,1,2,1", rich_help_panel=MODEL)
    ] = None,
    num_heads: Annotated[
        str | None, typer.Option(help="Attention heads of the four stages: 1,2,4,8", rich_help_panel=MODEL)
    ] = None,
    sr_ratios: Annotated[
        str | None,
        typer.Option(
            help="How much each stage reduces keys and values in each direction: 8,4,2,1. Small images need small ones.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained",
            help="Start from the original's published ImageNet weights (downloaded once); the classifier starts anew "
            "if the number of classes differs.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Start from the weights of this checkpoint instead.", rich_help_panel=MODEL),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the square input in pixels. \\[default: the model's published size; 32 for digits]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images. \\[default: 300; 20 for digits]", rich_help_panel=RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step (and process). \\[default: 64]", rich_help_panel=RECIPE)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of AdamW; it falls along a cosine. The original's CMT-S: 1e-3 at a total batch of 1024. "
            "\\[default: 1e-3; 2e-3 for digits]",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        typer.Option(
            help="Epochs in which the rate rises to --lr. \\[default: 5; 2 for digits]", rich_help_panel=RECIPE
        ),
    ] = None,
    min_lr: Annotated[
        float | None, typer.Option(help="Where the cosine ends. \\[default: 1e-5]", rich_help_panel=RECIPE)
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Not applied to biases, norms and the position bias. \\[default: 0.05]", rich_help_panel=RECIPE
        ),
    ] = None,
    clip_grad: Annotated[
        float | None,
        typer.Option(help="Largest norm of the gradient; 0: off. \\[default: 0; 1 for digits]", rich_help_panel=RECIPE),
    ] = None,
    mixup: Annotated[
        float | None,
        typer.Option(
            help="Blend pairs of images: alpha of the Beta distribution, 0.8 in the original; 0: off. \\[default: 0]",
            rich_help_panel=REGULARISE,
        ),
    ] = None,
    cutmix: Annotated[
        float | None,
        typer.Option(
            help="Paste patches between pairs of images: alpha, 1.0 in the original; 0: off. \\[default: 0]",
            rich_help_panel=REGULARISE,
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(help="Share of the target spread over all classes. \\[default: 0.1]", rich_help_panel=REGULARISE),
    ] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(
            help="Stochastic depth: how often the last block is skipped; it grows linearly from 0. \\[default: 0.1]",
            rich_help_panel=REGULARISE,
        ),
    ] = None,
    auto_augment: Annotated[
        str | None,
        typer.Option(
            help="Of folders, in timm's notation; '' for none. \\[default: rand-m9-mstd0.5-inc1]",
            rich_help_panel=REGULARISE,
        ),
    ] = None,
    erase: Annotated[
        float | None,
        typer.Option(help="Probability of random erasing, of folders. \\[default: 0.25]", rich_help_panel=REGULARISE),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema",
            help="Keep a moving average of the weights; it is what is evaluated and saved as best.pth.",
            rich_help_panel=REGULARISE,
        ),
    ] = None,
    ema_decay: Annotated[
        float | None,
        typer.Option(help="Its decay, reached by a warm-up. \\[default: 0.9998]", rich_help_panel=REGULARISE),
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(
            help="Autocast: auto, off, bf16 or fp16. \\[default: auto: bf16 or fp16 on a GPU, off on a CPU]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    residual: Annotated[
        str | None,
        typer.Option(
            help="Under autocast the residual stream of the blocks: low (16 bits: less memory, see docs/training.md) or full (float32, as the "
            "original's). \\[default: low]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last", help="NHWC memory for the images.", rich_help_panel=MACHINE),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto, cpu, cuda or cuda:N. \\[default: auto: a GPU if there is one]", rich_help_panel=MACHINE
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Which implementation runs: auto, triton, native or reference (see: cmt-fast info). \\[default: auto]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read images; 0: the main one reads. \\[default: 0]", rich_help_panel=MACHINE),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of weights, order and augmentation: the same seed, the same run. \\[default: 0]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder for last.pth, best.pth, history.jsonl and curves.png. \\[default: runs/train]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Go on from a last.pth, with its settings; DATA, --device, --workers and --backend may be given anew.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Train a CMT on your images, or on the built-in digits.

    Try it: cmt-fast train digits

    Fine-tune the published model: cmt-fast train FOLDER --pretrained --epochs 30 --lr 1e-4

    Several GPUs: torchrun --nproc-per-node 8 -m cmt_fast train FOLDER

    Ctrl-C is safe: every finished epoch is saved, and --resume goes on as if nothing had happened.
    """
    given = {name: value for name, value in locals().items() if name in TrainConfig.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    lists = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "sr_ratios": sr_ratios}
    model_args = {name: four_numbers(name, text) for name, text in lists.items() if text is not None}
    if model_args:
        given["model_args"] = model_args
    config = settings(given) if resume is None else resumed_settings(given, resume)
    progress = TrainingProgress(console)
    try:
        with progress:
            outcome = fit(config, progress, resume)
    except KeyboardInterrupt:
        errors.print(f"\n[yellow]interrupted[/]; {how_to_resume(config)}")
        raise typer.Exit(130) from None
    if progress.is_first:
        console.print(summary(config, outcome))
        command = command_line("predict", "IMAGE", "--checkpoint", outcome.best_checkpoint)
        console.print(f"predict with it: {command}", highlight=False, soft_wrap=True)


def settings(given: dict[str, Any]) -> TrainConfig:
    """The settings of a new run: what was given, over the recipe of the data.

    Raises:
        ValueError: if no data was given.
    """
    if "data" not in given:
        raise ValueError("which images? Give a folder with train/ and val/, or 'digits': cmt-fast train digits")
    recipe = DIGITS_RECIPE if given["data"] == "digits" else {}
    if "epochs" in given and "warmup_epochs" not in given:  # a short trial run should not fail for a long warm-up
        usual = recipe.get("warmup_epochs", TrainConfig.warmup_epochs)
        recipe = {**recipe, "warmup_epochs": min(usual, given["epochs"] / 4)}
    return TrainConfig(**{**recipe, **given})


def resumed_settings(given: dict[str, Any], resume: str) -> TrainConfig:
    """The settings saved in ``resume``, with what may change replaced. The run goes on in the checkpoint's folder.

    Raises:
        ValueError: if something was given that would make it another run.
    """
    config = read_resume(resume)
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(config, name):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} contradicts {resume}, which has {getattr(config, name)}: leave it out "
                "to go on, or start a new run with --init-from"
            )
        setattr(config, name, value)
    config.output = str(Path(resume).parent)
    return config


def four_numbers(name: str, text: str) -> list[int]:
    """``24,48,96,192`` as a list.

    Raises:
        ValueError: if these are not four whole numbers.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise ValueError(
            f"--{name.replace('_', '-')} takes four whole numbers, one a stage, as 24,48,96,192; got {text!r}"
        )
    return numbers


def how_to_resume(config: TrainConfig) -> str:
    """What to tell after an interruption."""
    last = Path(config.output) / LAST
    if not last.exists():
        return "no epoch was finished, so nothing was saved"
    return f"every finished epoch is saved; go on with\n  {command_line('train', '--resume', last)}"


class TrainingProgress(Observer):
    """Bars and a line an epoch on ``console``. Use it as a context manager around :func:`fit`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.is_first = False
        self.config: TrainConfig | None = None
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.run: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def message(self, text: str) -> None:
        self.bars.console.print(text, style="dim", markup=False)

    def started(self, config, data, model, steps, first_epoch) -> None:
        self.is_first, self.config, self.steps = True, config, steps
        parameters = sum(p.numel() for p in model.parameters())
        device = next(model.parameters()).device
        height, width = data.preprocess.img_size
        self.bars.console.print(
            f"[bold]{config.model}[/] ({parameters / 1e6:.2f} M parameters) on {device}, {height}x{width} pixels; "
            f"{data.train_count} images to train on, {data.val_count} held out, {len(data.class_names)} classes"
        )
        total = config.epochs * steps
        self.run = self.bars.add_task("training", total=total, completed=(first_epoch - 1) * steps, numbers="")

    def stepped(self, epoch, step, result) -> None:
        assert self.config is not None and self.run is not None
        accuracy = f"  acc {100 * result.accuracy:.1f} %" if result.accuracy == result.accuracy else ""
        self.bars.update(
            self.run,
            description=f"epoch {epoch}/{self.config.epochs}",
            completed=(epoch - 1) * self.steps + step,
            numbers=f"loss {result.loss:.3f}{accuracy}  {result.images_per_s:.0f} images/s",
        )

    def evaluating(self, epoch) -> None:
        assert self.run is not None
        self.bars.update(self.run, numbers="evaluating …")

    def finished_epoch(self, record: Record) -> None:
        assert self.config is not None
        accuracy = record["train_accuracy"]
        training = f"loss {record['train_loss']:.3f}" + (f" {100 * accuracy:5.1f} %" if accuracy is not None else "")
        self.bars.console.print(
            f"epoch {record['epoch']:>3}/{self.config.epochs}  training {training}  "
            f"held out loss {record['val_loss']:.3f} [bold]{100 * record['val_accuracy']:6.2f} %[/]  "
            f"{record['train_seconds'] + record['val_seconds']:.1f} s",
            highlight=False,
        )


def summary(config: TrainConfig, outcome: Outcome) -> Table:
    """The table at the end of a run."""
    last, best = outcome.history[-1], outcome.best
    table = Table(title="Result", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    table.add_row("accuracy on held-out images, last epoch", f"[bold]{100 * last['val_accuracy']:.2f} %[/]")
    table.add_row("best epoch", f"{100 * best['val_accuracy']:.2f} % (epoch {best['epoch']})")
    table.add_row("loss, training / held out", f"{last['train_loss']:.4f} / {last['val_loss']:.4f}")
    table.add_row("training speed", f"{last['images_per_s']:.0f} images/s")
    table.add_row("time", f"{outcome.seconds:.0f} s")
    table.add_row("files", f"{outcome.output}/ (best.pth, last.pth, history.jsonl, curves.png)")
    return table
