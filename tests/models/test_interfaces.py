"""CMT under PyTorch's own machinery: compile, export, autocast, memory formats, functional calls, checkpointing."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import cmt_fast
from cmt_fast.testing.cuda_autocast import CudaAutocast
from cmt_fast.testing.tolerance import assert_within

TINY = dict(
    img_size=64, num_classes=10, embed_dims=(8, 16, 32, 64), stem_channel=8, fc_dim=48, depths=(1, 1, 2, 1), dp=0.0
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cmt_fast.CMT(**TINY)


@pytest.fixture
def x():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def step(model, x):
    """One training step's output, gradients by name and buffers by name."""
    y = model(x)
    y.square().sum().backward()
    named = getattr(model, "_orig_mod", model)
    return y.detach(), {n: p.grad for n, p in named.named_parameters()}, dict(named.named_buffers())


def assert_same_step(first, second, **tolerance):
    torch.testing.assert_close(first[0], second[0], **tolerance)
    for ours, theirs in zip(first[1:], second[1:]):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def compiled():
    """torch.compile without graph breaks, counting graphs; Inductor's own code generation is not what is under test."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    yield lambda module, **kwargs: torch.compile(module, fullgraph=True, backend=backend, **kwargs), graphs
    torch._dynamo.reset()


def test_compile_inference(model, x, compiled):
    compile_, graphs = compiled
    model.eval()
    fast = compile_(model)
    with torch.inference_mode():
        for batch in (4, 3, 2):
            torch.testing.assert_close(fast(x[:batch]), model(x[:batch]))
    assert len(graphs) <= 2  # one for the first batch size, one for any other


def test_compile_dynamic_size():
    """One graph captured without breaks serves several sizes (run as captured: AOT takes minutes on symbolic sizes)."""
    torch._dynamo.reset()
    graphs = []
    model = cmt_fast.CMT(**{**TINY, "depths": (1, 1, 1, 1)}).eval()
    model.prune_intermediate_layers([0, 1])  # the other two are the same on symbolic sizes, and take half a minute
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for size in ((96, 64), (64, 128)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(fast(image), model(image))
    assert len(graphs) <= 3
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile_training(model, x, compiled, checkpointing):
    model.set_grad_checkpointing(checkpointing)
    expected = step(copy.deepcopy(model), x)
    assert_same_step(step(compiled[0](model), x), expected)


def test_compile_under_autocast(model, x, compiled):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled[0](model)(x), model(x))


def test_export(model, x):
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (1, 4):
        torch.testing.assert_close(program.module()(x[:batch]), model(x[:batch]))
    assert not [n for n in program.graph.nodes if "cmt_fast" in str(n.target)]  # runs wherever torch does


def test_export_any_size():
    model = cmt_fast.CMT(**{**TINY, "depths": (1, 1, 1, 1)}).eval()
    height, width = (32 * torch.export.Dim(side, min=2, max=40) for side in ("h", "w"))
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=({2: height, 3: width},))
    for size in ((64, 64), (96, 128), (160, 64)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(program.module()(image), model(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, x, dtype):
    model.eval()
    exact = copy.deepcopy(model).double()(x.double())
    from cmt_fast.testing.original_order import OriginalOrder

    with torch.autocast("cpu", dtype):
        ours, plain = model(x), OriginalOrder(model)(x)
    assert_within("logits under autocast", ours, exact, plain)


def test_residual_stream_under_autocast(model, x):
    """In autocast's dtype, or, where it is asked for, float32 as the original's, gradients included; without autocast there is no difference."""

    def dtypes(model):
        found = {m: [] for m in ("map", "gradient")}
        hooks = []
        for block in model.blocks_b:
            hooks.append(block.register_forward_hook(lambda module, args, out: found["map"].append(out.dtype)))
            hooks.append(
                block.register_full_backward_hook(lambda module, grads, out: found["gradient"].append(out[0].dtype))
            )
        with CudaAutocast(torch.bfloat16):  # on a CPU autocast's LayerNorm returns 16 bits
            logits = model(x)
        logits.float().square().sum().backward()
        for hook in hooks:
            hook.remove()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        return {name: set(of) for name, of in found.items()}

    plain = model(x)
    assert dtypes(model) == {"map": {torch.bfloat16}, "gradient": {torch.bfloat16}}
    model.set_low_residual(False)
    assert dtypes(model) == {"map": {torch.float32}, "gradient": {torch.float32}}
    assert torch.equal(model(x), plain)
    model.set_low_residual()
    assert dtypes(model)["map"] == {torch.bfloat16}


@pytest.mark.parametrize("low", [False, True])
def test_either_stream_is_within_the_policy_beside_the_original(model, x, low):
    """Logits, gradients and statistics under CUDA's autocast; the original's stream is float32."""
    from cmt_fast.testing.original_order import OriginalOrder

    def results(model, call, x, mode):
        with mode:
            logits = call(x)
        logits.double().square().sum().backward()
        named = {f"grad {name}": p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
        return {"logits": logits.detach()} | named

    exact_model, plain_model = copy.deepcopy(model).double(), OriginalOrder(copy.deepcopy(model))
    model.set_low_residual(low)
    exact = results(exact_model, exact_model, x.double(), contextlib.nullcontext())
    plain = results(plain_model.model, plain_model, x, CudaAutocast(torch.bfloat16))
    ours = results(model, model, x, CudaAutocast(torch.bfloat16))
    for name in exact:
        if exact[name].is_floating_point():
            backward = name.startswith("grad ")
            assert_within(name, ours[name], exact[name], plain[name], backward=backward, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_in_dtype(model, x, dtype):
    model.to(dtype)
    y, gradients, _ = step(model, x.to(dtype))
    assert y.dtype == dtype and all(g.dtype == dtype and g.isfinite().all() for g in gradients.values())


def test_channels_last(model, x):
    expected = step(copy.deepcopy(model), x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert_same_step(step(last, x.to(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)


def test_non_contiguous_input(model, x):
    model.eval()
    strided = torch.randn(4, 64, 128, 3).permute(0, 3, 1, 2)[..., ::2]
    torch.testing.assert_close(model(strided), model(strided.contiguous()))


def test_functional_call_and_grad(model, x):
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (x,)), model(x))
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_checkpointing_changes_nothing_but_memory(model, x):
    """Outputs, gradients and running statistics: torch.utils.checkpoint alone would update the statistics twice."""
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    assert_same_step(step(model, x), step(plain, x), atol=0, rtol=0)
    assert model.blocks_a[0].mlp.proj_bn.num_batches_tracked == 1


def test_checkpointing_saves_memory(model, x):
    def saved(module):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x)
        return total

    plain = saved(model)
    model.set_grad_checkpointing()
    assert saved(model) < 0.5 * plain


def test_frozen_batchnorm_and_stages(model, x):
    """Fine-tuning with frozen stages: no gradient, no update of their statistics."""
    model.train()
    model.blocks_a.eval().requires_grad_(False)
    before = {n: b.clone() for n, b in model.blocks_a.named_buffers()}
    _, gradients, _ = step(model, x)
    assert all((g is None) == n.startswith("blocks_a") for n, g in gradients.items())
    assert all(torch.equal(b, before[n]) for n, b in model.blocks_a.named_buffers())


def test_deep_copy_and_pickle(model, x, tmp_path):
    model.eval()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


def test_hooks_and_replaced_parts_are_honoured(model, x):
    """What users attach to a module must act: hooks (Grad-CAM) and replaced layers (adapters)."""
    model.eval()
    expected, seen = model(x), []
    handle = model.blocks_d[0].norm1.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert torch.equal(model(x), expected) and len(seen) == 1
    handle.remove()
    block = model.blocks_b[0]
    for name in (
        "attn.q",
        "attn.sr",
        "mlp.conv1",
        "mlp.conv1.0",
        "mlp.conv1.1",
        "mlp.proj_act",
        "mlp.conv2",
        "proj",
        "norm2",
    ):
        part, calls = block.get_submodule(name), []
        handle = part.register_forward_hook(lambda m, i, o, calls=calls: calls.append(m) or 1.5 * o)
        assert not torch.allclose(model(x), expected) and calls == [part], f"the hook of {name} is without effect"
        handle.remove()
        block.set_submodule(name, nn.Sequential(part, nn.Tanh()))
        assert not torch.allclose(model(x), expected), f"{name} was replaced without effect"
        block.set_submodule(name, part)
    assert torch.equal(model(x), expected)


def test_backend_setting():
    assert cmt_fast.get_backend() == "auto"
    with cmt_fast.use_backend("reference"):
        assert cmt_fast.get_backend() == "reference"
    assert cmt_fast.get_backend() == "auto"


def test_explain(model, x):
    with cmt_fast.use_backend("reference"):
        text = str(cmt_fast.explain(model, x))
    assert "lmhsa: reference (5 calls)" in text and "irffn: reference (5 calls)" in text and "lpu: reference" in text
    assert "not triton" in str(cmt_fast.explain(model, x))


def test_an_explicit_backend_never_falls_back(model, x):
    with cmt_fast.use_backend("triton"), pytest.raises(cmt_fast.BackendError, match="backend 'triton' cannot run"):
        model(x)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu(model, x, autocast):
    exact = copy.deepcopy(model).double()(x.double())
    from cmt_fast.testing.original_order import OriginalOrder

    model.cuda()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        plain, ours = OriginalOrder(copy.deepcopy(model))(x.cuda()), model(x.cuda())
    assert_within("logits", ours.cpu(), exact, plain.cpu())
    ours.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
