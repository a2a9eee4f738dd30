"""Modules on their own: drop path, the 1x1 convolution, BatchNorm over processes."""

import copy

import pytest
import torch
from processes import in_two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cmt_fast
from cmt_fast.modules import LMHSA, DropPath, PointwiseConv, SyncBatchNorm, convert_sync_batchnorm

TINY = dict(
    img_size=32, num_classes=5, embed_dims=(8, 16, 24, 32), stem_channel=4, fc_dim=16, depths=(1, 1, 1, 1), dp=0.0
)


def test_drop_path():
    x = torch.ones(4000, 3, 2)
    y = DropPath(0.25).train()(x)
    per_sample = y.flatten(1)
    assert bool((per_sample == per_sample[:, :1]).all())  # a sample's branch lives or dies as a whole
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert DropPath(0.25).eval()(x) is x
    with pytest.raises(ValueError, match=r"drop_prob must be in \[0, 1\), got 1.5"):
        DropPath(1.5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_conv_is_a_1x1_convolution(memory_format):
    conv = PointwiseConv(6, 10).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    expected = nn.functional.conv2d(x, conv.weight, conv.bias)
    torch.testing.assert_close(conv(x), expected)
    assert torch.autograd.gradcheck(conv, (x,))


def test_qk_dim_may_differ_from_v_dim():
    attention = LMHSA(12, num_heads=2, qk_ratio=2, sr_ratio=2)
    assert attention.q.out_features == 6 and attention.v.out_features == 12 and attention.scale == 6**-0.5
    assert attention(torch.randn(3, 24, 12), 4, 6, torch.zeros(2, 24, 6)).shape == (3, 24, 12)


# ---- two processes ---------------------------------------------------------------------------------------------------


def _model(momentum):
    torch.manual_seed(0)
    model = cmt_fast.CMT(**TINY).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    return model


def _batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 32, 32, generator=g, dtype=torch.float64), torch.randn(
        6, 5, generator=g, dtype=torch.float64
    )


def _worker(rank, momentum, checkpointing):
    model = convert_sync_batchnorm(_model(momentum))
    assert any(isinstance(m, SyncBatchNorm) for m in model.modules())
    assert not any(type(m) in (nn.BatchNorm2d, nn.SyncBatchNorm) for m in model.modules())
    model.set_grad_checkpointing(checkpointing)
    ddp = DistributedDataParallel(model)
    x, target = _batch()
    share = slice(0, 2) if rank == 0 else slice(2, 6)  # unequal shares: counts must be summed too
    loss = (ddp(x[share]) - target[share]).square().sum()
    loss.backward()
    return {"grads": {n: p.grad for n, p in model.named_parameters()}, "buffers": dict(model.named_buffers())}


@pytest.mark.parametrize("momentum, checkpointing", [(0.1, False), (None, True)])
def test_two_processes_equal_one(momentum, checkpointing, tmp_path):
    """DDP with SyncBatchNorm on gloo: gradients (averaged by DDP) and statistics equal one process on the whole batch."""
    results, _ = in_two_processes(_worker, tmp_path, momentum, checkpointing)
    model = _model(momentum)
    x, target = _batch()
    (model(x) - target).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            2 * results["grads"][name], parameter.grad, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(
            results["buffers"][name], buffer, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_sync_batchnorm_alone_is_batchnorm():
    """Without a process group, and in eval mode, it is plain BatchNorm."""
    model = cmt_fast.CMT(**TINY)
    synced = convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(synced(x), model(x))
    torch.testing.assert_close(synced.eval()(x), model.eval()(x))
    assert list(synced.state_dict()) == list(model.state_dict())
