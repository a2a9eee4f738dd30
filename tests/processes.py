"""Two processes on a CPU that talk by gloo, for tests of what is taken over all of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[..., dict[str, Any]], folder: Path, *args: Any) -> list[dict[str, Any]]:
    """What ``work(rank, *args)``, a function of a module, returns in each of two processes, joined while it runs; ``folder`` is empty."""
    mp.spawn(_process, (folder, work, args), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _process(rank: int, folder: Path, work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()
    # A thread of gloo that still frees a tensor while Python shuts down aborts the process (pytorch/pytorch#190489): leave without.
    os._exit(0)
