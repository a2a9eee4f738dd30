"""Verification passes what is right and finds what is broken."""

from __future__ import annotations

import pytest
import torch

import cmt_fast.ops.depthwise.api as depthwise_api
from cmt_fast.backend import machine_reasons
from cmt_fast.inference.optimize import optimize
from cmt_fast.testing import packed_cases, verification
from cmt_fast.testing.verification import OPS, verify


def test_the_reference_passes_everywhere():
    labels = []
    dtypes = ["float64", "float32", "bfloat16", "autocast-float16"]
    checks = verify(
        ["reference"], None, dtypes, progress=lambda done, total, _: labels.append((done, total)), quick=True
    )
    assert {check.passed for check in checks} == {True}
    assert {check.op for check in checks} == set(OPS)
    assert {check.dtype for check in checks} == set(dtypes)
    assert max(check.ratio for check in checks) <= 1
    assert labels[0][0] == 0 and labels[-1] == (labels[0][1], labels[0][1])


def test_packed_models_are_compared_with_the_model_that_was_packed(monkeypatch):
    def wrong(*args, **options):
        fast = optimize(*args, **options)
        return (lambda x: 1.01 * fast(x)) if options["backend"] == "auto" else fast

    monkeypatch.setattr(packed_cases, "optimize", wrong)
    checks = verify(["reference", "auto"], ["packed_cmt"], ["float32"], quick=True)
    assert [(check.backend, check.quantity, check.passed) for check in checks] == [
        ("reference", "output", True),
        ("auto", "output", False),
    ]
    with pytest.raises(ValueError, match=r"and autocast no packed model; got packed_lpu"):
        verify(["reference"], ["packed_lpu"], ["autocast-bfloat16"])


def test_outputs_gradients_and_statistics_are_all_compared():
    checks = verify(["reference"], ["irffn", "reduced_kv_attention"], ["float32"], quick=True)
    quantities = {op: {check.quantity for check in checks if check.op == op} for op in OPS}
    assert quantities["reduced_kv_attention"] == {"output", "grad q", "grad k", "grad v", "grad bias"}
    assert {
        "output",
        "grad x",
        "grad norm.weight",
        "grad mlp.proj.bias",
        "buffer mlp.proj_bn.running_var",
    } <= quantities["irffn"]
    assert {check.case.rsplit(", ")[-1] for check in checks if check.op == "irffn"} == {"train", "eval"}


@pytest.fixture
def candidate(monkeypatch):
    """Replace the reference of the 3x3 convolution, except in the runs that say what is right."""
    right = depthwise_api.depthwise_conv3x3_reference

    def install(broken):
        def run(*args, backend="reference", **kwargs):
            function = broken if backend == "auto" else right
            monkeypatch.setattr(depthwise_api, "depthwise_conv3x3_reference", function)
            # the candidate is what the automatic choice runs; it must not be a compiled one here
            return original_run(*args, backend="reference", **kwargs)

        original_run = verification.run
        monkeypatch.setattr(verification, "run", run)
        return verify(["auto"], ["depthwise_conv3x3"], ["float32", "bfloat16"], quick=True)

    return install, right


def test_a_right_candidate_passes(candidate):
    install, right = candidate
    assert all(check.passed for check in install(right))


@pytest.mark.parametrize(
    "name, broken",
    [
        ("forgets the bias", lambda right: lambda x, w, b, s: right(x, w, None, s)),
        ("rounds too early", lambda right: lambda x, w, b, s: right(x.to(torch.float8_e4m3fn).to(x), w, b, s)),
        ("no shortcut", lambda right: lambda x, w, b, s: right(x, w, b, False)),
        ("wrong gradient", lambda right: lambda x, w, b, s: right(x, w.detach(), b, s) + 0 * w.sum()),
        ("wrong dtype", lambda right: lambda x, w, b, s: right(x, w, b, s).double()),
        ("wrong shape", lambda right: lambda x, w, b, s: right(x, w, b, s)[:, 1:]),
        ("raises", lambda right: lambda x, w, b, s: 1 / 0),
        ("leaves an element unwritten", lambda right: lambda x, w, b, s: _unwritten(right(x, w, b, s))),
    ],
)
def test_a_broken_candidate_is_found(candidate, name, broken):
    install, right = candidate
    failures = [check for check in install(broken(right)) if check.passed is False]
    assert failures, name
    assert all(check.detail for check in failures)


def _unwritten(y):
    mask = torch.ones_like(y)
    mask.view(-1)[-1] = float("nan")
    return y * mask


def test_a_model_that_departs_from_the_original_is_found(monkeypatch):
    """The reference is itself checked: by whole models in float64 against the original's order of operations."""
    from cmt_fast.ops.irffn import api, reference

    assert all(check.passed for check in verify(["reference"], ["cmt"], ["float64"], quick=True))
    sigmoid_gelu = dict(act2=lambda x: x * torch.sigmoid(1.702 * x))
    monkeypatch.setattr(api, "irffn_reference", lambda x, **parts: reference.irffn_reference(x, **parts | sigmoid_gelu))
    checks = verify(["reference"], ["cmt"], ["float64"], quick=True)
    assert any(check.passed is False and check.quantity == "output" for check in checks)


def test_a_backend_that_cannot_run_is_neither_pass_nor_failure():
    if not machine_reasons("triton"):
        pytest.skip("triton runs here, so nothing is unavailable")
    checks = verify(["triton"], ["lpu"], ["float32"])
    assert [check.passed for check in checks] == [None]
    assert checks[0].detail == "; ".join(machine_reasons("triton"))


def test_one_call_that_a_backend_refuses_is_recorded_with_its_reason(monkeypatch):
    monkeypatch.setattr(verification, "machine_reasons", lambda backend: [])
    checks = verify(["triton"], ["lmhsa"], ["float32"], quick=True)
    assert {check.passed for check in checks} == {None}
    assert "cannot run lmhsa" in checks[0].detail


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(backends=["cuda"]), "unknown backend 'cuda'; expected one of auto, triton, native, reference"),
        (dict(ops=["attention"]), "unknown op 'attention'; expected one of depthwise_conv3x3"),
        (dict(dtypes=["half"]), "unknown dtype 'half'; expected one of float64, float32"),
        (dict(ops=["lpu"], dtypes=["float64"]), "nothing to verify: float64 compares whole models only"),
    ],
)
def test_wrong_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(**arguments)
