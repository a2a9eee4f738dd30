"""Result files are whole, readable JSON and name their machine."""

import json
import math

import pytest
import torch

from cmt_fast import __version__
from cmt_fast.testing import results


def test_the_machine_is_described():
    facts = results.machine()
    assert facts["device"] == "cpu" and facts["cpu"] and facts["threads"] >= 1
    assert facts["torch"] == torch.__version__ and facts["cmt_fast"] == __version__
    assert results.device_name(facts) == facts["cpu"]
    assert results.device_name({**facts, "gpu": "NVIDIA H100"}) == "NVIDIA H100"
    json.dumps(facts)


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "file.json"
    results.write_json(path, {"a": [1.5, math.nan, math.inf], "b": None})
    assert json.loads(path.read_text()) == {"a": [1.5, None, None], "b": None}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist: create it first"):
        results.write_json(tmp_path / "nowhere" / "file.json", {})
    assert not (tmp_path / "nowhere").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    results.write_json(path, {"old": 1})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(results.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
