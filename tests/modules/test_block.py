"""The blocks of a stage: where one's IRFFN runs with the next one's LPU, and where somebody could see the map between them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cmt_fast
from cmt_fast import functional
from cmt_fast.modules import IRFFN, Block
from cmt_fast.modules.block import run_blocks

H, W, BIAS = 4, 6, torch.zeros(2, 24, 6)


def stage(count: int = 3) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(8, num_heads=2, mlp_ratio=2.0, sr_ratio=2) for _ in range(count))


@pytest.fixture
def joined(monkeypatch) -> list[nn.Module]:
    """The convolutions of the LPUs that ran with the IRFFN before them."""
    convolutions: list[nn.Module] = []
    irffn_lpu = functional.irffn_lpu

    def recorded(x: Tensor, conv: nn.Module, **parts) -> Tensor:
        convolutions.append(conv)
        return irffn_lpu(x, conv, **parts)

    monkeypatch.setattr(functional, "irffn_lpu", recorded)
    return convolutions


def in_turn(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, H, W, BIAS)
    return x


def test_every_map_between_two_blocks_is_joined(joined):
    blocks, x = stage(), torch.randn(2, 24, 8)
    other = copy.deepcopy(blocks)
    found = run_blocks(blocks, x, H, W, BIAS)
    assert joined == [blocks[1].proj, blocks[2].proj]
    assert torch.equal(found, in_turn(other, x))
    found.sum().backward()
    in_turn(other, x).sum().backward()
    for (name, parameter), wanted in zip(blocks.named_parameters(), other.parameters()):
        assert torch.equal(parameter.grad, wanted.grad), name


class OtherBlock(Block):
    """As somebody wrote it before blocks had keywords."""

    def forward(self, x: Tensor, H: int, W: int, relative_pos: Tensor) -> Tensor:
        return super().forward(x, H, W, relative_pos)


class OtherIRFFN(IRFFN):
    """May compute anything."""


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


#: What is done to the second of three blocks, and whose LPUs still run with the IRFFN before them.
SEEN: dict[str, tuple[Callable[[Block], object], list[int]]] = {
    "hook of a block": (lambda block: block.register_forward_hook(lambda *_: None), []),
    "hook before a block": (lambda block: block.register_forward_pre_hook(lambda *_: None), []),
    "gradient hook of a block": (lambda block: block.register_full_backward_hook(lambda *_: None), []),
    "hook of an IRFFN": (lambda block: block.mlp.register_forward_hook(lambda *_: None), [1]),
    "class of a block": (lambda block: setattr(block, "__class__", OtherBlock), []),
    "class of an IRFFN": (lambda block: setattr(block.mlp, "__class__", OtherIRFFN), [1]),
    "forward of a block": (replace_forward, []),
    "forward of an IRFFN": (lambda block: replace_forward(block.mlp), [1]),
    "hook of an attention": (lambda block: block.attn.register_forward_hook(lambda *_: None), [1, 2]),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_map_that_can_be_seen_is_made(name, joined):
    change, left = SEEN[name]
    blocks, x = stage(), torch.randn(2, 24, 8)
    expected = in_turn(copy.deepcopy(blocks), x)
    change(blocks[1])
    assert torch.equal(run_blocks(blocks, x, H, W, BIAS), expected)
    assert joined == [blocks[i].proj for i in left]


def test_hooks_see_what_they_always_saw():
    """Of blocks, of their IRFFNs and of parts that the kernels read; also of an LPU's convolution, which runs in the block before its own."""
    watched = ("", "mlp", "mlp.conv2", "norm2", "proj")

    def seen(run: Callable[[nn.ModuleList, Tensor], Tensor]) -> dict[str, list[Tensor]]:
        blocks, found = stage(), {}
        for i, block in enumerate(blocks):
            for name in watched:
                found[f"{i}.{name}"] = []
                keep = found[f"{i}.{name}"].append
                block.get_submodule(name).register_forward_hook(lambda _module, _args, out, keep=keep: keep(out))
        run(blocks, torch.ones(2, 24, 8))
        return found

    expected = seen(in_turn)
    for name, (tensor,) in seen(lambda blocks, x: run_blocks(blocks, x, H, W, BIAS)).items():
        assert torch.equal(tensor, expected[name][0]), name


def test_hooks_of_parts_inside_a_joined_pair_run():
    blocks, ran = stage(2), []
    for name in ("0.norm2", "0.mlp.proj", "0.mlp.drop", "1.proj"):
        blocks.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    run_blocks(blocks, torch.randn(2, 24, 8), H, W, BIAS)
    assert ran == ["0.norm2", "0.mlp.drop", "0.mlp.proj", "0.mlp.drop", "1.proj"]


TINY = dict(img_size=32, num_classes=3, embed_dims=(8,) * 4, num_heads=(1,) * 4, stem_channel=4, fc_dim=8, dp=0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_joins_unless_it_recomputes_its_blocks(checkpointing, joined):
    model, x = cmt_fast.CMT(**TINY, depths=(2, 1, 3, 1)), torch.randn(2, 3, 32, 32)
    model.set_grad_checkpointing(checkpointing)
    model(x)
    expected = [model.blocks_a[1].proj, model.blocks_c[1].proj, model.blocks_c[2].proj]
    assert joined == ([] if checkpointing else expected)
    with torch.no_grad():
        model(x)
    assert joined[len(joined) - 3 :] == expected


def test_compiles_into_one_graph():
    """As a whole, or block by block."""
    blocks, x = stage(2).eval(), torch.randn(2, 24, 8)
    expected = run_blocks(blocks, x, H, W, BIAS)
    compiled = torch.compile(run_blocks, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(blocks, x, H, W, BIAS), expected)
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run_blocks(blocks, x, H, W, BIAS), expected)
