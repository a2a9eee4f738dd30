"""Checking every operation and whole models against float64, on any backend."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmt_fast.backend import BACKENDS, BackendError, machine_reasons, use_backend
from cmt_fast.models.cmt import CMT
from cmt_fast.testing.inputs import Case, all_cases, in_double, strided_randn
from cmt_fast.testing.original_order import OriginalOrder
from cmt_fast.testing.packed_cases import PACKED_OPS, PackedCase, packed_cases
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.precision import Precision, one_of, precision
from cmt_fast.testing.results import error_line
from cmt_fast.testing.tolerance import compare

#: What can be verified: the operations of ``cmt_fast.functional``; ``cmt``, the whole model; steps of packed models, and these as a whole.
OPS = (
    "depthwise_conv3x3",
    "depthwise_reduce",
    "reduced_kv_attention",
    "lpu",
    "lmhsa",
    "irffn",
    "irffn_lpu",
    "cmt",
    *PACKED_OPS,
)
DTYPES = ("float64", "float32", "bfloat16", "float16", "autocast-bfloat16", "autocast-float16")

Results = dict[str, Tensor]

#: Called with the number of cases done, their total, and the next case.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Check:
    """One tensor of one case on one backend.

    Attributes:
        op, backend, dtype: what ran.
        case: shape and mode.
        quantity: ``output``, ``grad <input or parameter>``, ``buffer <name>``, or ``call`` where nothing could be compared.
        error: largest absolute error against the float64 run of the reference.
        own_error: the same of plain PyTorch in the same dtype and autocast mode.
        bound: largest error that the tolerance policy allows.
        passed: whether it is allowed; None where the backend cannot run the case, which is neither a pass nor a failure.
        detail: the worst element, or why nothing was compared.
    """

    op: str
    backend: str
    dtype: str
    case: str
    quantity: str
    error: float
    own_error: float
    bound: float
    passed: bool | None
    detail: str = ""

    @property
    def ratio(self) -> float:
        """``error / bound``: at most 1 where it passed."""
        if self.bound > 0:
            return self.error / self.bound
        return 0.0 if self.error == 0 else math.inf


def verify(
    backends: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    *,
    quick: bool = False,
) -> list[Check]:
    """Compare outputs, every gradient and the running statistics with a float64 run, beside plain PyTorch's own error.

    Operations are compared with their reference, whole models with the model on the reference backend; gradients are
    taken in training and in evaluation mode. Of a backend that has no gradients for a case the output is compared. ``float64`` checks that reference itself, once and for whole models: it must
    equal the original's operation order, which shares no code with the operations, to one rounding unit of float32.
    Of packed models, which are for inference and know no autocast, the outputs are compared: of every step that has kernels with plain PyTorch's, of the
    whole with the model's that was packed.

    Args:
        backends: names, by default :func:`default_backends`.
        ops: among :data:`OPS`, by default all.
        dtypes: among :data:`DTYPES`, by default all.
        device: where to run.
        progress: see :data:`Progress`.
        quick: two shapes an operation and one model.

    Returns:
        One :class:`Check` a tensor. A backend or dtype that cannot run here is one check an operation, with ``passed=None``
        and the reasons.

    Raises:
        ValueError: on an unknown backend, op or dtype; the message lists the valid ones.
    """
    device = torch.device(device)
    backends = [one_of("backend", name, ("auto", *BACKENDS)) for name in backends or default_backends()]
    ops = [one_of("op", name, OPS) for name in ops or OPS]
    precisions = [precision(one_of("dtype", name, DTYPES)) for name in dtypes or DTYPES]

    checks: list[Check] = []
    runs: list[tuple[Case | PackedCase, Precision, list[str]]] = []
    every_case: list[Case | PackedCase] = [*all_cases(quick), *packed_cases(quick)]
    for op in ops:
        cases = [case for case in every_case if case.op == op]
        for p in precisions:
            if p.dtype is torch.float64 and op != "cmt":
                continue  # an operation's reference is its specification
            if p.autocast is not None and op in PACKED_OPS:
                continue
            able = []
            for backend in backends:
                if reasons := _reasons(backend, p, device):
                    checks.append(_not_run(op, backend, p, "all", "; ".join(reasons), passed=None))
                else:
                    able.append(backend)
            runs += [(case, p, able) for case in cases if able]
    if not checks and not runs:
        raise ValueError(
            f"nothing to verify: float64 compares whole models only, so it needs op 'cmt', and autocast no packed model; got {', '.join(ops)}"
        )
    for done, (case, p, able) in enumerate(runs):
        if progress is not None:
            progress(done, len(runs), f"{case.op} {p.name}: {case.name}")
        if isinstance(case, PackedCase):
            checks += verify_packed(case, p, able, device)
            continue
        for training in (True, False) if case.stateful else (True,):
            checks += verify_case(case, p, able, device, training)
    if progress is not None:
        progress(len(runs), len(runs), "done")
    return checks


def default_backends() -> list[str]:
    """All of them, and ``auto`` where it can mix a faster one with the reference."""
    fused = [backend for backend in BACKENDS[:-1] if not machine_reasons(backend)]
    return [*BACKENDS, *(["auto"] if fused else [])]


def _reasons(backend: str, p: Precision, device: torch.device) -> list[str]:
    """Why no case can run on ``backend`` in this precision."""
    reasons = [] if backend == "auto" else list(machine_reasons(backend))
    if (unsupported := p.unsupported(device)) is not None:
        reasons.append(unsupported)
    return reasons


def _not_run(op: str, backend: str, p: Precision, case: str, detail: str, passed: bool | None) -> Check:
    return Check(op, backend, p.name, case, "call", math.nan, math.nan, math.nan, passed, detail)


def verify_case(case: Case, p: Precision, backends: Sequence[str], device: torch.device, training: bool) -> list[Check]:
    """The checks of one case in one mode (training or evaluation) on several backends."""
    module, inputs = case.instance(p, device)
    module.train(training)
    name = f"{case.name}, {'train' if training else 'eval'}" if case.stateful else case.name

    def actual(backend: str) -> tuple[Results, bool]:
        try:
            return run(module, inputs, p, backend=backend), True
        except BackendError:  # kernels for inference have an output to compare
            return run(module, inputs, p, backend=backend, gradients=False), False

    return _verify(case.op, name, p, backends, lambda: _expected(module, inputs, p), actual)


def verify_packed(case: PackedCase, p: Precision, backends: Sequence[str], device: torch.device) -> list[Check]:
    """The checks of one case of a packed model on several backends."""
    subject = case.instance(p, device)
    with torch.no_grad():
        return _verify(
            case.op,
            case.name,
            p,
            backends,
            lambda: (subject.exact(), subject.plain()),
            lambda b: (subject.run(b), False),
        )


def _verify(
    op: str,
    name: str,
    p: Precision,
    backends: Sequence[str],
    expected: Callable[[], tuple[Results, Results]],
    actual: Callable[[str], tuple[Results, bool]],
) -> list[Check]:
    """The checks of what ``actual`` returns for a backend, and whether gradients are among it.

    Args:
        expected: the exact results, and those of plain PyTorch.
    """
    with _strict_float32():
        try:
            exact, plain = expected()
        except RuntimeError as error:
            reason = f"plain PyTorch cannot run it: {_first_line(error)}"
            return [_not_run(op, backend, p, name, reason, passed=None) for backend in backends]
        checks = []
        for backend in backends:
            try:
                with poisoned_empty():
                    results, gradients = actual(backend)
            except BackendError as error:
                reason = str(error).partition(". Use backend=")[0]
                checks.append(_not_run(op, backend, p, name, reason, passed=None))
            except Exception as error:
                detail = f"raised {error_line(error)}"
                checks.append(_not_run(op, backend, p, name, detail, passed=False))
            else:
                for quantity in exact:
                    if gradients or not quantity.startswith("grad "):
                        checks.append(_check(op, backend, p, name, quantity, results, exact, plain))
        return checks


def _expected(module: nn.Module, inputs: Mapping[str, Tensor], p: Precision) -> tuple[Results, Results]:
    """The exact results, and those of plain PyTorch."""
    double = in_double(module), {name: x.double() for name, x in inputs.items()}
    if p.dtype is torch.float64:
        exact = run(*double, p, wrap=OriginalOrder)
        return exact, exact
    exact = run(*double, p, autocast=False)
    plain = run(module, inputs, p)
    if isinstance(module, CMT):  # plain PyTorch sums in another order on NCHW maps; it is as good as it is on either
        other = run(module, inputs, p, wrap=OriginalOrder)
        plain = {name: _worse(x, other[name], exact[name]) for name, x in plain.items()}
    return exact, plain


def _worse(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    return a if (a - exact).abs().max() >= (b - exact).abs().max() else b


def run(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    p: Precision,
    *,
    backend: str = "reference",
    autocast: bool = True,
    gradients: bool = True,
    wrap: Callable[..., nn.Module] | None = None,
) -> Results:
    """Run ``module`` forward and backward on a copy of itself.

    The output's gradient is seeded (the same in every run), rounded to the low dtype of ``p``, and not contiguous.

    Args:
        module: called with the values of ``inputs``.
        inputs: by name.
        p: precision; module and inputs are in its dtype already, or in float64 for an exact run.
        backend: to use.
        autocast: False leaves the autocast mode of ``p`` off.
        gradients: False runs forward alone, under ``torch.no_grad()``.
        wrap: applied to the copy before it is called, such as :class:`OriginalOrder`.

    Returns:
        ``output``, ``grad <name>`` of every input and parameter that received one, ``buffer <name>``.
    """
    module = copy.deepcopy(module)
    call = module if wrap is None else wrap(module)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    device = next(iter(leaves.values())).device
    with use_backend(backend):
        with p.context(device) if autocast else contextlib.nullcontext(), torch.set_grad_enabled(gradients):
            output = call(*leaves.values())
        if gradients:
            grad = strided_randn(output.shape, torch.Generator().manual_seed(1))
            output.backward(grad.to(p.low).to(output))
    results = {"output": output.detach()}
    for name, leaf in (*leaves.items(), *module.named_parameters()):
        if leaf.grad is not None:
            results[f"grad {name}"] = leaf.grad
    return results | {f"buffer {name}": buffer for name, buffer in module.named_buffers()}


def _check(
    op: str,
    backend: str,
    p: Precision,
    case: str,
    quantity: str,
    actual: Results,
    exact: Results,
    plain: Results,
) -> Check:
    if quantity not in actual:
        return Check(op, backend, p.name, case, quantity, math.nan, math.nan, math.nan, False, "it was not computed")
    # A bias before BatchNorm or softmax has gradient 0, a sum of large terms; its weight's gradient has their size.
    beside = exact.get(quantity.removesuffix("bias") + "weight") if quantity.endswith("bias") else None
    result = compare(
        quantity,
        actual[quantity],
        exact[quantity],
        plain[quantity],
        backward=quantity.startswith("grad "),
        dtype=torch.float32 if p.low is torch.float64 else p.low,
        scale=None if beside is None else beside.abs().max().item(),
    )
    return Check(
        op, backend, p.name, case, quantity, result.error, result.own_error, result.bound, result.passed, result.detail
    )


@contextlib.contextmanager
def _strict_float32() -> Iterator[None]:
    """Float32 without TF32, for plain PyTorch too: else its own error would excuse anything."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
