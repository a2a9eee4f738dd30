"""Whole models in training through every fused operation, in the interpreter: one step beside the original's golden one, and many."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import cmt_fast
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops.depthwise import configs
from cmt_fast.ops.irffn import train_configs
from cmt_fast.ops.lmhsa import reduce_configs
from cmt_fast.testing.original_order import OriginalOrder
from cmt_fast.testing.shapes import SMALL_MODELS
from cmt_fast.testing.tolerance import compare

ROOT = Path(__file__).parents[2]
Tensors = dict[str, Tensor]


def large_tiles(patch: pytest.MonkeyPatch) -> None:
    """The interpreter's time is that of programs times operations."""
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setattr(reduce_configs, "_PROGRAMS", 1)
    patch.setattr(train_configs, "PROGRAMS", 1)
    patch.setattr(configs, "ELEMENTS", 128)
    patch.setattr(configs, "ELEMENTS_WITH_SUMS", 128)
    for config in CACHED:
        config.cache_clear()


CACHED = (
    *(train_configs.product_config, train_configs.weight_config, train_configs.strip_config),
    *(configs.conv3x3_config, configs.conv3x3_backward_config),
)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    large_tiles(monkeypatch)
    yield
    for config in CACHED:
        config.cache_clear()


class Golden:
    """A training step of the original code in float64."""

    def __init__(self, name: str) -> None:
        with safe_open(ROOT / "tests" / "golden" / f"{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        blocks, stages = sum(self.config["depths"]), len(self.config["depths"])
        self.calls = dict(lmhsa=blocks, activated_conv=3, layer_norm=4)
        self.calls |= dict(
            lpu=stages, irffn=stages, irffn_lpu=blocks - stages
        )  # the first LPU and the last IRFFN of a stage stand alone

    def part(self, prefix: str) -> Tensors:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def model(self, dtype: torch.dtype = torch.float32) -> cmt_fast.CMT:
        model = cmt_fast.CMT(**self.config).train()
        model.load_state_dict(self.part("state."))
        return model.to(dtype)

    @property
    def exact(self) -> Tensors:
        logits = self.tensors["train.logits"]
        loss = (logits * self.tensors["grad_output"]).sum()
        step = {"loss": loss, "logits": logits, "x": self.tensors["train.grad_input"]}
        return {**step, **self.part("train.grad."), **self.part("train.buffer.")}


@pytest.fixture(scope="module", params=SMALL_MODELS)
def golden(request) -> Golden:
    return Golden(request.param)


def step(model: nn.Module, x: Tensor, grad: Tensor, backend: str, call: Callable | None = None) -> Tensors:
    """Loss, logits, gradients and buffers of a copy; the loss is the product of logits and ``grad``."""
    model = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    x = x.to(dtype).requires_grad_()
    with cmt_fast.use_backend(backend):
        logits = (call or nn.Module.__call__)(model, x)
        loss = (logits.to(dtype) * grad.to(dtype)).sum()
        loss.backward()
    gradients = {name: p.grad for name, p in [("x", x), *model.named_parameters()] if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients, **dict(model.named_buffers())}


def original(model: nn.Module, x: Tensor) -> Tensor:
    return OriginalOrder(model)(x)


def failures(actual: Tensors, exact: Tensors, *plain: Tensors, dtype: torch.dtype | None = None) -> list[str]:
    """By the policy, plain PyTorch being the worse of its runs, which add in different orders."""
    assert actual.keys() == exact.keys()
    found = []
    for name, target in exact.items():
        worse = max((run[name] for run in plain), key=lambda t: (t - target).abs().max())
        beside = exact.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
        scale = None if beside is None else beside.abs().max().item()
        low = dtype if target.is_floating_point() else None
        result = compare(name, actual[name], target, worse, backward=True, dtype=low, scale=scale)
        if not result.passed:
            found.append(str(result))
    return found


def assert_same(actual: Tensors, expected: Tensors, but: tuple[str, ...] = ()) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert name in but or torch.equal(actual[name], tensor), name


# ---- one step ------------------------------------------------------------------------------------------------------------------------


def test_a_step_in_float32(golden):
    """Loss, logits, every gradient and every buffer; ``auto`` takes the kernels for every block."""
    calls: list[Counter] = []

    def explained(model: nn.Module, x: Tensor) -> Tensor:
        out = []
        calls.append(cmt_fast.explain(lambda: out.append(model(x))).calls)
        return out[0]

    model, inputs = golden.model(), (golden.tensors["input"], golden.tensors["grad_output"])
    actual = step(model, *inputs, "auto", explained)
    assert calls == [Counter({(op, "triton"): count for op, count in golden.calls.items()})]
    plain = step(model, *inputs, "reference"), step(model, *inputs, "reference", original)
    assert failures(actual, golden.exact, *plain) == []


# ---- a smaller model -----------------------------------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32) -> cmt_fast.CMT:
    torch.manual_seed(0)
    config = dict(embed_dims=(4, 6, 8, 10), num_heads=(1, 1, 1, 2), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
    sizes = dict(img_size=64, num_classes=3, stem_channel=4, fc_dim=8, dp=0.0)
    return cmt_fast.CMT(**config, **sizes).train().to(dtype)


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 64, 64, generator=generator), torch.randn(2, 3, generator=generator)


@pytest.fixture(scope="module")
def fused() -> Tensors:
    with pytest.MonkeyPatch.context() as patch:
        large_tiles(patch)
        return step(small(), *batch(), "triton")


def test_checkpointing_repeats_every_bit_and_updates_buffers_once(fused):
    """The recomputed forward pass, in another run, under PyTorch's deterministic algorithms."""
    model = small()
    model.set_grad_checkpointing()
    torch.use_deterministic_algorithms(True)
    try:
        again = step(model, *batch(), "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(again, fused)
    assert all(tensor == 1 for name, tensor in again.items() if name.endswith("num_batches_tracked"))


def test_frozen_stages(fused, monkeypatch):
    """Stem and the first two stages get no gradient and no kernel of a backward pass; everything else gets the same bits."""
    model, frozen = (
        small(),
        ("stem_", "patch_embed_a", "patch_embed_b", "blocks_a", "blocks_b", "relative_pos_a", "relative_pos_b"),
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    launched: list[str] = []
    launch = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.kernel.__name__), launch(self)))
    x, grad = batch()
    with cmt_fast.use_backend("triton"):
        (model(x) * grad).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert trained.keys() == {name for name, _ in model.named_parameters() if not name.startswith(frozen)}
    for name, gradient in trained.items():
        assert torch.equal(gradient, fused[name]), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, fused[name]), "frozen parameters do not stop the statistics"
    for kernel in (
        "conv3x3_backward_kernel",
        "dw_gradient_kernel",
        "expand_input_kernel",
    ):
        assert launched.count(kernel) == 2, kernel
    assert launched.count("norm_reduce_backward_kernel") == 4, "those of the patch embeddings too"
    assert launched.count("dw_kernel") == 4
    assert launched.count("activation_moments_kernel") == 3 and "activation_gradient_kernel" not in launched


@pytest.mark.parametrize("low_residual", [False, True])
def test_a_step_in_float16_autocast_with_the_gradient_scaler(low_residual):
    def call(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(x)

    def scaled(model: nn.Module, backend: str, call: Callable) -> Tensors:
        """One step of SGD: gradients unscaled, and the parameters after it."""
        model, (x, grad) = copy.deepcopy(model), batch(2)
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), 0.1)
        with cmt_fast.use_backend(backend):
            loss = (call(model, x).float() * grad).sum()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0, "nothing overflowed"
        moved = {f"moved {name}": p.detach().clone() for name, p in model.named_parameters()}
        return {"loss": loss.detach(), **gradients, **moved, **dict(model.named_buffers())}

    model = small()
    model.set_low_residual(low_residual)
    exact = step(small(torch.float64), *batch(2), "reference")
    after = {f"moved {name}": p.detach().double() - 0.1 * exact[name] for name, p in model.named_parameters()}
    plain = [scaled(model, "reference", call)]
    if not low_residual:  # whose stream the original does not have
        plain.append(scaled(model, "reference", lambda model, x: call(OriginalOrder(model), x)))
    actual = scaled(model, "triton", call)
    target = {name: {**exact, **after}[name] for name in actual}
    assert failures(actual, target, *plain, dtype=torch.float16) == []


def train(dtype: torch.dtype, backend: str, call: Callable | None = None, steps: int = 4) -> Tensor:
    """The loss before each step of SGD on one batch, from one seed."""
    model, (x, _) = small(dtype), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(steps):
        with cmt_fast.use_backend(backend):
            loss = F.cross_entropy((call or nn.Module.__call__)(model, x.to(dtype)), torch.tensor([0, 2]))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_the_loss_curve_is_the_reference_s():
    """As far from float64's, at most, as the policy lets it be beside plain PyTorch's two summation orders."""
    exact = train(torch.float64, "reference")
    plain = [train(torch.float32, "reference"), train(torch.float32, "reference", original)]
    assert (
        failures({"loss": train(torch.float32, "triton")}, {"loss": exact}, *({"loss": curve} for curve in plain)) == []
    )
    assert exact[-1] < 0.5 * exact[0]
