"""What a module with BatchNorms is expected to compute in training: exact results, plain PyTorch's, and the policy between them."""

import copy

import torch
from torch import Tensor, nn

from cmt_fast.testing.inputs import Case, in_double
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.precision import precision
from cmt_fast.testing.tolerance import Comparison, compare
from cmt_fast.testing.verification import run


class Float32Sums(nn.BatchNorm2d):
    """BatchNorm that adds in float32, as PyTorch does on a GPU; on a CPU it adds in float64, which no kernel keeps up with."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        centred = x.float() - x.float().mean((0, 2, 3), keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean((0, 2, 3), keepdim=True) + self.eps)
        return (normal * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def expected_of(case: Case, dtype: str, training: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Exact results, and those of plain PyTorch: gradients with BatchNorm's sums in float64 or float32, what is worse."""
    p = precision(dtype)
    module, inputs = case.instance(p)
    module.train(training)
    exact = run(in_double(module), {name: x.double() for name, x in inputs.items()}, p, autocast=False)
    plain, other = run(module, inputs, p), copy.deepcopy(module)
    for norm in other.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__ = Float32Sums
    for name, gradient in run(other, inputs, p).items():
        if name.startswith("grad ") and error(gradient, exact[name]) > error(plain[name], exact[name]):
            plain[name] = gradient
    return exact, plain


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual - exact).abs().max().item()


def compared(
    case: Case, dtype: str, training: bool, expected: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> list[Comparison]:
    """Every output, gradient and buffer of the Triton kernels, by the policy."""
    p = precision(dtype)
    module, inputs = case.instance(p)
    with poisoned_empty():
        actual = run(module.train(training), inputs, p, backend="triton")
    exact, plain = expected
    assert actual.keys() == exact.keys()
    found = []
    for name, tensor in actual.items():
        # A bias before BatchNorm has gradient 0, a sum of large terms; its weight's gradient has their size.
        beside = exact.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
        scale = None if beside is None else beside.abs().max().item()
        backward = name.startswith("grad ")
        found.append(compare(name, tensor, exact[name], plain[name], backward=backward, dtype=p.low, scale=scale))
    return found
