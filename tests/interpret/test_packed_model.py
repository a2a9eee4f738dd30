"""Whole packed models on the Triton kernels, in the interpreter: cmt_fast.optimize with backend "triton"."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

import cmt_fast
from cmt_fast.inference import pack
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.testing.inputs import in_double, randomise
from cmt_fast.testing.shapes import SMALL_MODELS
from cmt_fast.testing.tolerance import assert_within

TINY = {**SMALL_MODELS["aligned"], "img_size": 32, "depths": (1, 1, 1, 1)}


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """As for a GPU of one multiprocessor: the interpreter takes programs one by one."""
    monkeypatch.setitem(ARCHITECTURES, 90, dataclasses.replace(ARCHITECTURES[90], multiprocessors=1))


def random_model(dtype: torch.dtype = torch.float32, **config) -> cmt_fast.CMT:
    """In eval mode, with no norm, bias or statistic at its trivial start."""
    return randomise(cmt_fast.CMT(**TINY | config), torch.Generator().manual_seed(3)).eval().to(dtype)


def images(model: cmt_fast.CMT, batch: int = 1, *size: int) -> Tensor:
    x = torch.randn(batch, 3, *(size or model.img_size), generator=torch.Generator().manual_seed(5))
    return x.to(model.stem_conv1.weight.dtype)


@torch.no_grad()
def check(fast: cmt_fast.OptimizedModel, model: torch.nn.Module, x: Tensor) -> None:
    """Class scores, or the maps of a backbone."""
    with cmt_fast.use_backend("reference"):
        results = fast(x), in_double(model)(x.double()), model(x)
    if isinstance(results[0], Tensor):
        results = tuple([result] for result in results)
    for i, outputs in enumerate(zip(*results)):
        assert_within(f"output {i}", *outputs)


# ---- against float64 -----------------------------------------------------------------------------------------------------
# Many classes: the largest error of a few numbers would be luck.


@pytest.mark.parametrize("name, dtype, batch", [("aligned", torch.float32, 2), ("odd", torch.float16, 1)])
def test_golden_configurations(name, dtype, batch):
    model = random_model(dtype, **SMALL_MODELS[name] | dict(num_classes=300))
    fast = cmt_fast.optimize(model)
    assert (fast.backend, fast.graph) == ("triton", False)
    check(fast, model, images(model, batch))


@pytest.mark.parametrize("name", VARIANTS)
def test_widths_of_the_variants(name):
    """With one block a stage, and one key; in 16 bits, whose tiles are larger."""
    small = dict(img_size=32, depths=(1, 1, 1, 1), num_classes=300, fc_dim=64)
    model = random_model(torch.float16, **VARIANTS[name].config | small)
    check(cmt_fast.optimize(model), model, images(model))


def test_feature_maps_of_another_size_packed_for_another_backend():
    """In base e, and nothing absorbed; the position bias is resized."""
    model = cmt_fast.CMTFeatures(random_model(torch.float16), (1, 3))
    fast = cmt_fast.optimize(pack(model, dtype=torch.float16, absorb=()))
    x = images(model.model, 2, 32, 64)
    check(fast, model, x)


def test_tables_stay_aligned():
    """Nobody copies a table whose rows lie whole vectors apart, and a resized one gets such rows too."""
    model = random_model(img_size=(32, 96))
    fast, rows = cmt_fast.optimize(model), []

    def look(step, kv_step, y, keys_values, table):
        rows.append((table.shape[-1], table.stride(-2)))
        return TORCH.attention(step, kv_step, y, keys_values, table)

    fast._functions = dataclasses.replace(TORCH, attention=look)
    fast(images(model))
    fast(images(model, 1, 64, 32))
    assert rows == 4 * [(3, 16)] + 4 * [(2, 16)]


# ---- the choice ----------------------------------------------------------------------------------------------------------


def test_kernels_run_whatever_the_setting_is_at_the_call():
    """In copies as well, under autocast, and on any strides and dtype."""
    model = random_model()
    fast, x = cmt_fast.optimize(model, backend="triton"), images(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    results = []
    calls = cmt_fast.explain(lambda: results.append(fast(x))).calls
    assert calls["packed CMT, float32 on cpu", "triton"] == 1
    attention = calls["packed attention, absorbed", "triton"] + calls["packed attention", "triton"]
    assert calls["packed lpu", "triton"] == attention == 4
    with cmt_fast.use_backend("native"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        same = x.double().contiguous(memory_format=torch.channels_last)
        assert cmt_fast.explain(lambda: results.append(copied(same))).calls == calls
    assert torch.equal(*results)
    with cmt_fast.use_backend("reference"):
        assert cmt_fast.optimize(model).backend == "reference"
    assert fast(x[:0]).shape == (0, 10)


def test_what_kernels_cannot_run():
    model = random_model()
    with pytest.raises(cmt_fast.BackendError, match=r"dtype must be bfloat16.* got torch.float64"):
        cmt_fast.optimize(model, dtype=torch.float64, backend="triton")
    fast = cmt_fast.optimize(model, dtype=torch.float64)
    assert fast.backend == "reference"
    assert "not triton: dtype must be bfloat16, float16 or float32, got torch.float64" in str(fast.explain())


def test_compiles_into_one_graph():
    """Whose nodes are the operators of the steps."""
    model = random_model()
    fast, x = cmt_fast.optimize(model), images(model)
    operators = []

    def look(module, _):
        operators.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(fast, backend=look, fullgraph=True)(x)
    assert sum("cmt_fast_triton.lpu_reduce" in operator for operator in operators) == 4
    with torch.no_grad():
        assert_within(
            "compiled", compiled, in_double(model)(x.double()), cmt_fast.optimize(model, backend="reference")(x)
        )
