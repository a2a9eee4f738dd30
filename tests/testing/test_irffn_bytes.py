"""What a training step of the IRFFN moves and keeps, counted from its launches and from autograd. Nothing here needs a GPU."""

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.testing.inputs import IRFFNSubLayer
from cmt_fast.testing.shapes import StageShape, stage_shapes

ROOT = Path(__file__).parents[2]

#: Of the performance plan (6.3 and 6.4, both products of a weight read their operands separately): maps of C channels, and hidden maps, that
#: expansion, convolution and projection read and write; then backward the projection's two products, the convolution, the expansion's two.
PLANNED_MAPS, PLANNED_HIDDEN = 1 + 0 + 1 + (2 + 2 + 0 + 3 + 1), 1 + 2 + 1 + (2 + 1 + 4 + 2 + 2)


def planned(shape: StageShape) -> int:
    """Bytes of a block in 16 bits."""
    return 2 * shape.batch * shape.queries * (PLANNED_MAPS * shape.dim + PLANNED_HIDDEN * shape.hidden)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, not installed here")
def test_a_step_of_cmt_s_moves_what_the_plan_says(monkeypatch):
    """All that moves: partial sums, the weights, and the shortcut's addition and BN3's sums, which the plan has in other kernels."""
    monkeypatch.syspath_prepend(ROOT)
    launches = importlib.import_module("benchmarks.irffn_launches").irffn_train
    moved = plan = 0
    for shape, depth in zip(stage_shapes("cmt_s", 256), VARIANTS["cmt_s"].config["depths"]):
        made = launches(shape, torch.bfloat16, ARCHITECTURES[90])
        moved += depth * sum(launch.reads + launch.writes for launch in made)
        plan += depth * planned(shape)
    assert moved <= 1.1 * plan, (moved, plan)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, not installed here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_of_layer_norm_passes_over_no_map_of_its_own(variant, monkeypatch):
    """Where a tile has whole rows the kernel of the expansion's gradient reads two hidden maps, x and what passes by, and writes one map."""
    monkeypatch.syspath_prepend(ROOT)
    launches = importlib.import_module("benchmarks.irffn_launches").irffn_train
    for shape in stage_shapes(variant, 256):
        made = {launch.kernel.__name__: launch for launch in launches(shape, torch.bfloat16, ARCHITECTURES[90])}
        apart = {"normal_gradient_kernel", "layer_norm_gradient_kernel"}
        if shape.dim > 256:
            assert apart < made.keys() and "expand_input_kernel" not in made
            continue
        assert not apart & made.keys()
        launch = made["expand_input_kernel"]
        maps = 2 * shape.batch * shape.queries * (2 * shape.hidden + 3 * shape.dim)
        assert maps < launch.reads + launch.writes < 1.02 * maps


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, not installed here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_of_batch_norm_is_written_and_not_read(variant, monkeypatch):
    """Where one tile is the projection's weight its kernel reads two maps of C channels and the hidden one, and writes one map of C channels."""
    monkeypatch.syspath_prepend(ROOT)
    launches = importlib.import_module("benchmarks.irffn_launches").irffn_train
    for shape in stage_shapes(variant, 256):
        made = {launch.kernel.__name__: launch for launch in launches(shape, torch.bfloat16, ARCHITECTURES[90])}
        together = shape.dim <= 64 and shape.hidden <= 256
        assert ("output_gradient_kernel" in made) != together
        if together:
            launch = made["project_weight_kernel"]
            maps = 2 * shape.batch * shape.queries * (shape.hidden + 3 * shape.dim)
            assert maps < launch.reads + launch.writes < 1.04 * maps


def test_kept_beside_what_plain_pytorch_keeps():
    """In maps of C channels: plain PyTorch keeps 27 under autocast on a 16-bit stream, the kernels 10 (x, h, u and y), or 6 without h:
    ``test_kept_for_the_backward_pass`` of ``tests/interpret/test_irffn_train.py``."""
    shape = StageShape("", 2, 8, 8, 16, 1, 64, 1)
    x = torch.randn(2, 8, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() >= x.numel():  # no weight, and no vector
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = IRFFNSubLayer(shape)(x)
    assert out.requires_grad and sum(kept.values()) == 27 * x.nbytes
