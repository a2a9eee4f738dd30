"""Timing whole models against the original's operation order: only what computes the right numbers gets a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_fast.backend import BACKENDS, machine_reasons
from cmt_fast.models.cmt import CMT
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.inputs import in_double
from cmt_fast.testing.original_order import OriginalOrder
from cmt_fast.testing.precision import Precision, one_of, precision
from cmt_fast.testing.providers import BASELINE, PROVIDERS, Forward, eager
from cmt_fast.testing.results import error_line
from cmt_fast.testing.timing import Timing, measure_interleaved, peak_memory
from cmt_fast.testing.tolerance import compare

DTYPES = ("float32", "bfloat16", "autocast-bfloat16", "float16", "autocast-float16")
MODES = ("inference", "training")

#: Images that the correctness gate looks at: a float64 run of a large batch would take longer than the measurement.
GATE_IMAGES = 4

_EXACT = Precision("exact", torch.float64)

#: Called with the number of steps done, their total, and the next step.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model, provider, batch, dtype, mode, img_size: what ran.
        median_ms, p20_ms, p80_ms: milliseconds a batch; None where nothing was measured, and ``note`` says why.
        images_per_s: batch over median.
        ratio: the baseline's median over this one's, above 1 where this is faster; None where one of them is missing.
        peak_mib: memory that a call needs at its peak beyond what stays between calls, in MiB; on a CPU only where
            :mod:`cmt_fast.testing.fresh` measured it.
        kept_mib, ready_s: what the provider holds between calls beyond the loaded model, in MiB, and seconds from the loaded
            model to the first result; only where :mod:`cmt_fast.testing.fresh` measured them.
        runs: calls measured.
        samples_ms: milliseconds a batch of each sample.
        note: why there is no number.
    """

    model: str
    provider: str
    batch: int
    dtype: str
    mode: str
    img_size: int
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    images_per_s: float | None = None
    ratio: float | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None
    ready_s: float | None = None
    runs: int | None = None
    samples_ms: tuple[float, ...] = ()
    note: str = ""


def bench(
    models: Sequence[str] = ("cmt_s",),
    providers: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = ("float32",),
    device: torch.device | str = "cpu",
    mode: str = "inference",
    img_size: int | None = None,
    seconds: float = 2.0,
    progress: Progress | None = None,
    *,
    on_rows: Callable[[list[Row]], None] | None = None,
    make_subject: Callable[[str, int, int, Precision, torch.device, str], Subject] | None = None,
) -> list[Row]:
    """Time providers side by side, in turns, on the same weights and images.

    Before anything is timed, the output of each (in training, gradients too) is compared with a float64 run of the baseline
    by the tolerance policy. One that fails or cannot run gets a row without a number.

    Args:
        models: names of published variants.
        providers: among :data:`cmt_fast.testing.providers.PROVIDERS`, by default :func:`default_providers`.
        batches: batch sizes.
        dtypes: among :data:`DTYPES`.
        device: where to run.
        mode: ``inference`` (evaluation mode, no gradients) or ``training`` (forward, backward, gradients reset).
        img_size: side in pixels; by default each variant's published resolution.
        seconds: to spend on each measurement, roughly.
        progress: see :data:`Progress`.
        on_rows: called with the rows of each model, dtype and batch as soon as they are measured.
        make_subject: makes each :class:`Subject`; one that remembers its last spares a second call the float64 run.

    Returns:
        A :class:`Row` for every combination.

    Raises:
        ValueError: on an unknown name or a batch that is not positive; the message lists what is valid.
    """
    device = torch.device(device)
    models = [one_of("model", name, VARIANTS) for name in models]
    one_of("mode", mode, MODES)
    providers = [one_of("provider", name, PROVIDERS) for name in providers or default_providers(mode)]
    precisions = [precision(one_of("dtype", name, DTYPES)) for name in dtypes]
    if not batches or min(batches) < 1:
        raise ValueError(f"batch must be at least 1, got {', '.join(map(str, batches))}")
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")

    settings = [(name, p, batch) for name in models for p in precisions for batch in batches]
    done, total = 0, len(settings) * (len(providers) + 1)
    rows: list[Row] = []
    for name, p, batch in settings:
        size = img_size or VARIANTS[name].resolution
        subject = (make_subject or Subject)(name, size, batch, p, device, mode)
        entries: list[_Entry] = []
        for provider in providers:
            if progress is not None:
                progress(done, total, f"checking {provider}: {subject}")
            entries.append(subject.check(provider))
            done += 1
        if progress is not None:
            progress(done, total, f"timing {subject}")
        calls = {entry.provider: entry.call for entry in entries if entry.call is not None}
        timings = measure_interleaved(calls, seconds=seconds, device=device)
        done += 1
        new = [subject.row(entry, timings) for entry in entries]
        rows += new
        if on_rows is not None:
            on_rows(new)
    if progress is not None:
        progress(total, total, "done")
    return rows


def default_providers(mode: str = "inference") -> list[str]:
    """The baseline, ``reference``, ``auto`` where a faster backend can run (else it is the same), and for inference ``optimize``."""
    fused = [backend for backend in BACKENDS[:-1] if not machine_reasons(backend)]
    return [BASELINE, "reference", *(["auto"] if fused else []), *(["optimize"] if mode == "inference" else [])]


@dataclass(frozen=True)
class _Entry:
    """A provider that has been checked: what to time, or why not."""

    provider: str
    call: Callable[[], object] | None = None
    peak: int | None = None
    note: str = ""


def make_model(name: str, size: int, p: Precision, device: torch.device | str = "cpu") -> CMT:
    """A seeded model in evaluation mode, its weights rounded to the low dtype; without dropout, so that outputs compare."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CMT(**{**VARIANTS[name].config, "dp": 0.0}, img_size=size)
    return model.to(p.low).to(device, p.dtype).eval()


def make_images(batch: int, size: int, p: Precision, device: torch.device | str = "cpu") -> Tensor:
    """Seeded images (batch, 3, size, size), rounded to the low dtype."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.to(p.low).to(device, p.dtype)


class Subject:
    """One model, batch, dtype and mode: makes the providers, judges them, and writes their rows.

    Args:
        name: of a published variant.
        size: of the images, in pixels.
        batch, p, device, mode: as in :func:`bench`.
    """

    def __init__(self, name: str, size: int, batch: int, p: Precision, device: torch.device, mode: str) -> None:
        self.name, self.size, self.p, self.device, self.mode = name, size, p, device, mode
        self.training = mode == "training"
        self.model = make_model(name, size, p, device).train(self.training)
        self.images = make_images(batch, size, p, device)
        grad = torch.randn(batch, self.model.num_classes, generator=torch.Generator().manual_seed(1))
        self.grad = grad.to(p.low).to(device)
        gate, double = self.images[:GATE_IMAGES], in_double(self.model)
        self.exact = self._results(double, eager(OriginalOrder(double), _EXACT), gate.double())
        self.plain = self._results(self.model, eager(OriginalOrder(self.model), p), gate)

    def __str__(self) -> str:
        return f"{self.name} {self.size} batch {self.images.shape[0]} {self.p.name}"

    def check(self, name: str) -> _Entry:
        """Make a provider, run it, compare it, and measure its memory."""
        provider = PROVIDERS[name]
        if reason := provider.unsupported(self.p, self.mode):
            return _Entry(name, note=reason)
        images = self.images.contiguous(memory_format=provider.memory_format)
        try:
            forward = provider.make(self.model, images, self.p)

            def call() -> None:
                self._step(forward, images)
                if self.training:
                    self.model.zero_grad(set_to_none=True)

            if red := self._wrong(self._results(self.model, forward, images)):
                return _Entry(name, note=f"wrong: {red}")
            return _Entry(name, call, peak_memory(call, self.device))
        except Exception as error:
            self.model.zero_grad(set_to_none=True)
            return _Entry(name, note=error_line(error))

    def row(self, entry: _Entry, timings: dict[str, Timing]) -> Row:
        batch = self.images.shape[0]
        row = (self.name, entry.provider, batch, self.p.name, self.mode, self.size)
        if entry.note:
            return Row(*row, note=entry.note)
        t, base = timings[entry.provider], timings.get(BASELINE)
        return Row(
            *row,
            median_ms=t.median * 1e3,
            p20_ms=t.p20 * 1e3,
            p80_ms=t.p80 * 1e3,
            runs=t.runs,
            samples_ms=tuple(float(f"{sample * 1e3:.5g}") for sample in t.samples),
            images_per_s=batch / t.median,
            ratio=base.median / t.median if base else None,
            peak_mib=None if entry.peak is None else entry.peak / 2**20,
        )

    def _step(self, forward: Forward, images: Tensor) -> Tensor:
        """One forward pass, in training also the backward pass. The same for the gate and the clock."""
        if not self.training:
            with torch.inference_mode():
                return forward(images)
        output = forward(images)
        output.backward(self.grad[: len(images)].to(output))
        return output

    def _results(self, model: CMT, forward: Forward, images: Tensor) -> dict[str, Tensor]:
        """Of the gate's images the output, in training also gradients that the whole backward pass leads to."""
        if not self.training:  # the call that is timed, as images do not depend on each other
            return {"output": self._step(forward, images)[:GATE_IMAGES]}
        results = {"output": self._step(forward, images[:GATE_IMAGES])}
        for name, parameter in model.named_parameters():
            if name.startswith("relative_pos_") or name == "stem_conv1.weight":
                assert parameter.grad is not None
                results[f"grad {name}"] = parameter.grad
        model.zero_grad(set_to_none=True)
        return results

    def _wrong(self, actual: dict[str, Tensor]) -> str | None:
        for name, exact in self.exact.items():
            backward = name.startswith("grad ")
            result = compare(name, actual[name], exact, self.plain[name], backward=backward, dtype=self.p.low)
            if not result.passed:
                return str(result)
        return None
