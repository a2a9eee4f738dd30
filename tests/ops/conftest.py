"""What the GPU tests of several operations share."""

import pytest
import torch


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request):
    """float32 products without TF32 and with it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
