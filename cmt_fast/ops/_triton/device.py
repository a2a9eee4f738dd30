"""What one program may use on a GPU: asked before a launch, so that a tile that does not fit is never tried."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

#: Of a thread, on every architecture.
MAX_REGISTERS = 255

#: Architectures whose tensor cores read operands from shared memory, not from registers: these have room for larger tiles.
OPERANDS_IN_SHARED_MEMORY = (90, 100)


@dataclass(frozen=True)
class DeviceLimits:
    """A GPU as launch configurations see it.

    Attributes:
        arch: compute capability, 90 for 9.0.
        shared_memory: bytes that one program may use.
        multiprocessors: how many programs run at once at least.
        name: of the GPU model, which measured configurations are looked up by; empty where there is no GPU.
    """

    arch: int
    shared_memory: int
    multiprocessors: int
    name: str = ""


#: The architectures that kernels are compiled for ahead of time, as the GPU named (CUDA C++ Programming Guide, "Technical
#: Specifications per Compute Capability"; multiprocessors from the vendor's data sheets).
ARCHITECTURES = {
    80: DeviceLimits(80, 163 << 10, 108),  # A100
    90: DeviceLimits(90, 227 << 10, 132),  # H100, H200
    100: DeviceLimits(100, 227 << 10, 148),  # B200
    120: DeviceLimits(120, 99 << 10, 170),  # RTX 5090
}


def device_limits(device: torch.device) -> DeviceLimits:
    """Of a CUDA device its own; elsewhere, in the interpreter and for tensors without memory, those of an H100."""
    if device.type != "cuda":
        return ARCHITECTURES[90]
    return _of_cuda(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _of_cuda(index: int) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return DeviceLimits(arch, shared_memory, properties.multi_processor_count, properties.name)
