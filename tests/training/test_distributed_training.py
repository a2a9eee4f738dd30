"""Two processes on a CPU, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("timm", "torchvision")

SCRIPT = """
import json, os, sys
import torch
from cmt_fast.training.config import TrainConfig
from cmt_fast.training.run import Observer, fit

torch.set_num_threads(1)

class Kinds(Observer):
    def started(self, config, data, model, steps, first_epoch):
        print(sorted({type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__}))

outcome = fit(TrainConfig(**json.loads(sys.argv[1])), Kinds())
print(json.dumps([outcome.history[-1]["train_loss"], outcome.history[-1]["val_loss"]]), flush=True)
os._exit(0)  # as in processes.py
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes(tiny):
    config = tiny(batch_size=4, epochs=1)
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(config.as_dict())],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "['SyncBatchNorm']" in outputs[0] and "BatchNorm" not in outputs[1]  # only the first process tells
    losses = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert losses[0] == losses[1]  # sums over both processes
    record = json.loads((Path(config.output) / "history.jsonl").read_text())  # one epoch, written by one process
    assert [record["train_loss"], record["val_loss"]] == losses[0]
