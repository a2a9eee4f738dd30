"""What watches or transforms a call and must see PyTorch's own operations: reasons against every kernel."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def tracing_reasons() -> list[str]:
    """Reasons why no kernel may run now; an empty list if one may."""
    # The flag behind torch.compiler.is_exporting(), which torch.compile takes for always true before torch 2.13.
    exporting = torch.compiler._is_exporting_flag
    eager = not torch.compiler.is_compiling()  # torch.compile has a dispatch mode of its own while it traces
    reasons = []
    if exporting or torch.jit.is_tracing():
        reasons.append("the model is being exported, and must depend on no kernel of cmt_fast")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        reasons.append("a torch.func transform or forward-mode differentiation is active, which needs plain PyTorch")
    if eager and torch._C._len_torch_dispatch_stack() > 0:
        reasons.append("a torch dispatch mode is active (a FLOP counter, fake tensors), which must see plain PyTorch")
    return reasons
