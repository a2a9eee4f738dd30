"""Several processes, as torchrun starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: number ``rank`` of ``count``."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one prints and saves."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, the same in each."""
        if self.count > 1:
            dist.all_reduce(values)
        return values


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Join the process group if torchrun's variables are set.

    Returns:
        The processes and the device of this one: ``cuda`` becomes the GPU of its local rank.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), count), device


def leave_processes(processes: Processes) -> None:
    """Close the process group, if there is one."""
    if processes.count > 1:
        dist.destroy_process_group()
