"""What a user would pick instead, from timm, each at its own input size; beside CMT, in turns with DeiT-S."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.report.measurement import Measurement, Unavailable
from benchmarks.report.settings import QUICK_SIZE, Settings
from benchmarks.store import timing_columns
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.benchmark import make_images, make_model
from cmt_fast.testing.precision import Precision, precision
from cmt_fast.testing.providers import PROVIDERS
from cmt_fast.testing.timing import measure_interleaved


@dataclass(frozen=True)
class Peer:
    """A published model.

    Attributes:
        model: timm's name, or that of a CMT.
        img_size: side in pixels of its published accuracy.
        top1: ImageNet-1k accuracy in percent, trained on ImageNet-1k alone; None where it was not published so.
        source: of the accuracy.
        any_size: it takes other inputs too, so that a quick run may be small.
    """

    model: str
    img_size: int
    top1: float | None
    source: str
    any_size: bool = True


_SURVEY = "Han et al., A Survey on Vision Transformer, table 1"
#: The first is what all others take turns with.
PEERS = (
    Peer("deit_small_patch16_224", 224, 79.8, _SURVEY, any_size=False),
    Peer(
        "vit_small_patch16_224",
        224,
        None,
        "the network of DeiT-S; published with other data and recipes",
        any_size=False,
    ),
    Peer("resnet50", 224, 79.1, _SURVEY),
    Peer("swin_tiny_patch4_window7_224", 224, 81.3, _SURVEY, any_size=False),
    Peer("twins_svt_small", 224, 81.7, _SURVEY),
    Peer("twins_pcpvt_small", 224, 81.2, "Chu et al., Twins"),
    Peer("pvt_v2_b2", 224, 82.0, "Wang et al., PVT v2"),
    Peer("convnext_tiny", 224, 82.1, "Liu et al., A ConvNet for the 2020s"),
    Peer("tf_efficientnet_b4", 380, 82.9, _SURVEY),
    Peer("tf_efficientnet_b7", 600, 84.3, "Tan and Le, EfficientNet"),
    Peer("mobilenetv1_100", 224, 70.6, "Howard et al., MobileNets"),
)
CMT = tuple(
    Peer(name, variant.resolution, variant.paper_top1, "the original repository")
    for name, variant in sorted(VARIANTS.items(), key=lambda item: item[0] != "cmt_s")
)

#: How a peer runs: in eager mode, and compiled, with images in channels_last too.
MODES = ("eager", "compile", "compile-channels-last")


def plan(settings: Settings) -> Iterator[Measurement]:
    """CMT first; then the peers in eager mode, at last compiled."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise Unavailable("timm is not installed: pip install 'cmt-fast[train]'") from error
    peers = PEERS[:3] if settings.quick else PEERS
    batches = settings.batches if settings.gpu else settings.batches[:1]
    for batch in batches:
        for peer in CMT[1:2] if settings.quick else CMT:
            for provider in ("optimize", "original"):
                yield _measurement(settings, peer, batch, provider, 15.0 if settings.gpu else 4.0)
        for peer in peers:
            yield _measurement(settings, peer, batch, "eager", 15.0 if settings.gpu else 4.0)
    for batch in batches:
        for peer in () if settings.quick and not settings.gpu else peers:
            for mode in MODES[1:] if settings.gpu else MODES[1:2]:
                yield _measurement(settings, peer, batch, mode, 90.0)


def _measurement(settings: Settings, peer: Peer, batch: int, provider: str, expected_s: float) -> Measurement:
    name = f"{peer.model} batch {batch} {provider}"
    return Measurement(name, partial(_rows, settings, peer, batch, provider), 0.0 if settings.quick else expected_s)


def _rows(settings: Settings, peer: Peer, batch: int, provider: str) -> Iterator[dict[str, Any]]:
    """One row: the model in turns with the first peer."""
    p, anchor = precision(settings.dtypes[0]), PEERS[0]
    size = QUICK_SIZE if settings.quick and peer.any_size else peer.img_size
    make = _cmt_call if peer.model in VARIANTS else timm_call
    calls = {
        "this": make(peer.model, batch, size, provider, p, settings.device),
        "anchor": _anchor_call(anchor.model, batch, anchor.img_size, "eager", p, settings.device),
    }
    timings = measure_interleaved(calls, seconds=settings.seconds, device=settings.device)
    t, base = timings["this"], timings["anchor"]
    yield dict(
        model=peer.model,
        img_size=size,
        batch=batch,
        provider=provider,
        dtype=p.name,
        mode="inference",
        **timing_columns(t, base),
        images_per_s=batch / t.median,
        anchor_images_per_s=batch / base.median,
        top1=peer.top1,
        source=peer.source,
    )


def _cmt_call(
    name: str, batch: int, size: int, provider: str, p: Precision, device: torch.device
) -> Callable[[], object]:
    model, images = make_model(name, size, p, device), make_images(batch, size, p, device)
    forward = PROVIDERS[provider].make(model, images, p)

    def call() -> object:
        with torch.inference_mode():
            return forward(images)

    return call


def timm_call(name: str, batch: int, size: int, mode: str, p: Precision, device: torch.device) -> Callable[[], object]:
    """``mode``: eager, or compile with torch.compile's own modes and ``-channels-last`` behind it: compile-max-autotune-channels-last."""
    import timm

    model: nn.Module = timm.create_model(name).to(device, p.dtype).eval()
    images = make_images(batch, size, p, device)
    if mode.endswith("-channels-last"):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if mode != "eager":
        own = mode.removesuffix("-channels-last").removeprefix("compile").removeprefix("-") or "default"
        model = torch.compile(model, dynamic=False, mode=own)  # type: ignore[assignment]

    def call() -> object:
        with torch.inference_mode(), p.context(device):
            return model(images)

    if not torch.isfinite(call()).all():  # type: ignore[call-overload]
        raise ValueError(f"{name} returned values that are not finite")
    return call


#: The same for every network of a batch: made once.
_anchor_call = functools.lru_cache(maxsize=1)(timm_call)
