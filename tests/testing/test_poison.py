"""Poisoned memory reaches cmt_fast's code and nobody else's."""

import types

import pytest
import torch

from cmt_fast.testing.poison import fill, poisoned_empty

SOURCE = """
import torch
def allocate(like):
    return [torch.empty(3), torch.empty_like(like), torch.empty_strided((3,), (1,)),
            like.new_empty(3), like.new_empty_strided((3,), (1,))]
def integers(): return torch.empty(2, dtype=torch.int32)
"""


def module_named(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(SOURCE, module.__dict__)
    return module


def test_inside_cmt_fast_fresh_memory_is_nan():
    inside = module_named("cmt_fast.ops.made_up")
    for tensor in inside.allocate(torch.zeros(3)):
        assert tensor.isnan().all()
    assert (inside.integers() == torch.iinfo(torch.int32).min).all()


def test_other_packages_are_left_alone(monkeypatch):
    written = []
    monkeypatch.setattr("cmt_fast.testing.poison.fill", lambda tensor: written.append(tensor) or tensor)
    module_named("other.package").allocate(torch.zeros(3))
    module_named("cmt_fastish").allocate(torch.zeros(3))
    assert not written
    module_named("cmt_fast.x").allocate(torch.zeros(3))
    assert len(written) == 5


def test_it_ends_with_the_context(monkeypatch):
    patched = torch.empty
    with poisoned_empty():
        assert torch.empty is not patched
    assert torch.empty is patched


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.uint8, torch.bool])
def test_every_dtype_can_be_filled(dtype):
    tensor = fill(torch.zeros(2, dtype=dtype))
    if dtype.is_floating_point or dtype.is_complex:
        assert tensor.isnan().all()
    else:
        assert (tensor == (1 if dtype is torch.bool else 0)).all()


def test_an_unwritten_output_is_found_by_the_policy():
    from cmt_fast.testing.tolerance import compare

    y = module_named("cmt_fast.ops.made_up").allocate(torch.zeros(3))[0]
    y[:2] = 0  # a kernel that forgets the last element
    zeros = torch.zeros(3)
    assert not compare("y", y, zeros.double(), zeros).passed
