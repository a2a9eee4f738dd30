"""Which configuration a launch gets: a table's or the rule's; and what becomes of tables that do not hold."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
import warnings
from dataclasses import dataclass, replace

import pytest

from cmt_fast.ops._triton import tuned_tables
from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import around, neighbours
from cmt_fast.ops._triton.tunable import read_tables_again, trial, tunable
from cmt_fast.ops._triton.tuned_tables import empty_table, file_name, find_tables, read_table
from cmt_fast.testing.results import write_json

LIMITS = DeviceLimits(90, 232448, 132, "Test GPU [80GB] / PCIe")
KERNEL = "toy_kernels:kernel"
SOURCE = """
class jit:
    def __init__(self, fn):
        self.fn = fn

@jit
def helper(x):
    return x

@jit
def kernel(x):
    return helper(x)

@jit
def other(x):
    return x
"""


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int = 4


@tunable(KERNEL, lambda rule, size, limits: neighbours(rule, rows=around(rule.rows, 1, size), warps=(4, 8)))
def tile(size: int, limits: DeviceLimits) -> Tile | None:
    """The rule."""
    return Tile(size // 4) if size >= 4 else None


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Where tables are, and a kernel that belongs to nobody; every test starts without any table read."""
    for name in ("user", "shipped", "code"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CMT_FAST_TUNING", str(tmp_path / "user"))
    monkeypatch.setattr(tuned_tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write_kernel(tmp_path, SOURCE)
    read_tables_again()
    yield tmp_path
    read_tables_again()
    tuned_tables.source_hash.cache_clear()


def write_kernel(folder, source: str) -> None:
    """As if another version of it had been installed, and Python started."""
    (folder / "code" / "toy_kernels.py").write_text(source)
    sys.modules.pop("toy_kernels", None)
    importlib.invalidate_caches()
    tuned_tables.source_hash.cache_clear()
    read_tables_again()


def write(folder, size: int = 64, config: dict | None = None, **changes: object):
    """A table with one entry."""
    table = empty_table(folder / file_name(LIMITS.name), LIMITS)
    table.add(KERNEL, f"size={size}", {"config": config, "rule_us": 2.0})
    table.data |= changes
    write_json(table.path, table.data)
    read_tables_again()
    return table.path


def test_a_table_goes_before_the_rule(folders):
    path = write(folders / "user", config=dict(rows=32, warps=8))
    assert path.name == "Test_GPU_80GB_PCIe.json"
    assert tile(64, LIMITS) == Tile(32, 8) == tile(size=64, limits=LIMITS)
    assert tile(128, LIMITS) == Tile(32), "another shape follows the rule"
    assert tile(64, replace(LIMITS, name="")) == Tile(16), "no GPU, no table"
    assert tile(3, LIMITS) is None
    assert str(read_table(path, LIMITS)) == f"{path}: 1 launches in use"


def test_where_the_rule_was_best_it_is_asked(folders):
    write(folders / "user", config=None)
    write(folders / "shipped", config=dict(rows=8, warps=4))
    assert tile(64, LIMITS) == Tile(16), "the user's measurement goes before the shipped one"


def test_a_table_may_say_what_the_rule_says(folders):
    write(folders / "user", config=dict(rows=16, warps=4))
    assert tile(64, LIMITS) == Tile(16)


@pytest.mark.filterwarnings("error")
def test_the_user_before_what_is_shipped(folders, monkeypatch):
    write(folders / "shipped", config=dict(rows=8, warps=4))
    monkeypatch.setattr(tuned_tables, "user_folder", lambda: folders / "user")
    monkeypatch.delenv("CMT_FAST_TUNING")
    assert tile(64, LIMITS) == Tile(8)
    write(folders / "user", size=128, config=dict(rows=64, warps=4))
    assert (tile(64, LIMITS), tile(128, LIMITS)) == (Tile(8), Tile(64))
    write(folders / "user", config=dict(rows=32, warps=4))
    assert tile(64, LIMITS) == Tile(32)
    assert [table.path.parent.name for table in find_tables(LIMITS)] == ["user", "shipped"]


def test_off(folders, monkeypatch):
    write(folders / "user", config=dict(rows=8, warps=4))
    write(folders / "shipped", config=dict(rows=8, warps=4))
    monkeypatch.setenv("CMT_FAST_TUNING", "off")
    assert tile(64, LIMITS) == Tile(16) and find_tables(LIMITS) == []


@pytest.mark.parametrize("setting", [None, ""])
def test_the_default_folder(folders, monkeypatch, setting):
    monkeypatch.delenv("CMT_FAST_TUNING") if setting is None else monkeypatch.setenv("CMT_FAST_TUNING", setting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tile(64, LIMITS) == Tile(16), "nothing measured is no mistake"
    folder = folders / "cache" / "cmt_fast" / "tuning"
    folder.mkdir(parents=True)
    write(folder, config=dict(rows=8, warps=4))
    assert tile(64, LIMITS) == Tile(8)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(folders))
    assert tuned_tables.user_folder() == folders / ".cache" / "cmt_fast" / "tuning"


def warned_once(message: str) -> None:
    """The rule, with one warning in two calls."""
    with pytest.warns(UserWarning, match=message) as caught:
        assert tile(64, LIMITS) == tile(68, LIMITS).__class__(16)
        assert tile(64, LIMITS) == Tile(16)
    assert len(caught) == 1, [str(w.message) for w in caught]


def test_a_named_folder_without_a_table_is_said(folders):
    warned_once(r"CMT_FAST_TUNING is .*user, which has no table Test_GPU_80GB_PCIe.json: `cmt-fast tune` writes it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("triton", "2.1.0"),
        ("device", "Other GPU"),
        ("arch", 80),
        ("multiprocessors", 114),
        ("shared_memory", 1000),
        ("format", 0),
    ],
)
def test_a_table_of_something_else_is_not_used(folders, name, value):
    path = write(folders / "user", config=dict(rows=8, warps=4), **{name: value})
    warned_once(rf"is not used, it was measured with {name} {value}, and this is {name} .*tune --check")
    assert "not used" in str(read_table(path, LIMITS)) and read_table(path, LIMITS).launches() == 0


@pytest.mark.parametrize("name", ["kernel", "helper"])
def test_what_was_measured_before_a_kernel_changed_is_not_used(folders, name):
    path = write(folders / "user", config=dict(rows=8, warps=4))
    assert tile(64, LIMITS) == Tile(8)
    write_kernel(folders, SOURCE.replace(f"def {name}(x):", f"def {name}(x, y=1):"))
    warned_once(r"was measured before toy_kernels:kernel changed, so its rule is used")
    table = read_table(path, LIMITS)
    assert (table.stale_kernels(), table.launches()) == ([KERNEL], 0)
    assert str(table).endswith("0 launches in use; measured before these changed, so not used: kernel")
    table.add(KERNEL, "size=8", {"config": None})
    assert table.launches() == 1, "and what is measured now takes its place"


def test_other_changes_do_not_matter(folders):
    write(folders / "user", config=dict(rows=8, warps=4))
    write_kernel(folders, SOURCE.replace("def other(x):", "# a comment\n\n@jit\ndef other(x, y=1):"))
    assert tile(64, LIMITS) == Tile(8)


def test_a_kernel_that_is_no_more(folders):
    path = write(folders / "user", config=dict(rows=8, warps=4))
    data = json.loads(path.read_text())
    data["kernels"] = {"no_such_module:kernel": data["kernels"][KERNEL], "toy_kernels:gone": data["kernels"][KERNEL]}
    write_json(path, data)
    table = read_table(path, LIMITS)
    assert table.stale_kernels() == ["no_such_module:kernel", "toy_kernels:gone"] and table.launches() == 0


@pytest.mark.parametrize("config", [dict(rows=24, warps=4), dict(rows=32), dict(rows="32", warps=8), dict(columns=1)])
def test_what_is_no_candidate_is_never_launched(folders, config):
    write(folders / "user", config=config)
    warned_once("a configuration of toy_kernels:kernel that is none of this version's")


BROKEN = {
    "empty": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "too deep": b"[" * 100_000,
    "no object": b"[]",
    "nothing of what is needed": b"{}",
    "no kernels": b'{"format": 1, "device": "", "arch": 1, "multiprocessors": 1, "shared_memory": 1, "triton": ""}',
}


def broken_kernels(kernels: object) -> bytes:
    return json.dumps({**empty_table(None, LIMITS).data, "kernels": kernels}).encode()


@pytest.mark.parametrize(
    "content",
    [
        *BROKEN.values(),
        *map(
            broken_kernels,
            [
                [],
                {KERNEL: None},
                {KERNEL: {"source": "x"}},
                {KERNEL: {"source": "x", "launches": []}},
                {KERNEL: {"source": "x", "launches": {"size=64": 3}}},
                {KERNEL: {"source": "x", "launches": {"size=64": {}}}},
                {KERNEL: {"source": "x", "launches": {"size=64": {"config": [1]}}}},
            ],
        ),
    ],
)
def test_a_broken_file_is_a_warning(folders, content):
    (folders / "user" / file_name(LIMITS.name)).write_bytes(content)
    warned_once(r"is not used, it cannot be read: .*tune --check")


def test_a_folder_in_the_place_of_a_file(folders):
    (folders / "user" / file_name(LIMITS.name)).mkdir()
    warned_once("is not used, it cannot be read: .*Is a directory")


def test_a_broken_file_leaves_the_shipped_table(folders):
    (folders / "user" / file_name(LIMITS.name)).write_text("{")
    write(folders / "shipped", config=dict(rows=8, warps=4))
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tile(64, LIMITS) == Tile(8)


def test_files_are_read_once_whatever_threads_there_are(folders, monkeypatch):
    write(folders / "user", config=dict(rows=8, warps=4))
    reads, read = [], tuned_tables.read_table

    def slow(*arguments):
        reads.append(arguments)
        time.sleep(0.05)
        return read(*arguments)

    monkeypatch.setattr(tuned_tables, "read_table", slow)
    barrier, found = threading.Barrier(8), []

    def call(size: int) -> None:
        barrier.wait()
        found.append((size, tile(size, LIMITS)))

    threads = [threading.Thread(target=call, args=(64 if i % 2 else 32,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert sorted(set(found), key=str) == [(32, Tile(8)), (64, Tile(8))] and len(found) == 8


def test_a_trial_follows_the_rules_and_what_it_is_given(folders):
    write(folders / "user", config=dict(rows=8, warps=4))
    query = tile.query(64, LIMITS)
    assert query.key == "size=64"
    assert query.candidates() == [Tile(8), Tile(32), Tile(16, 8), Tile(8, 8), Tile(32, 8)]
    with trial({query: Tile(32)}) as asked:
        assert (tile(64, LIMITS), tile(128, LIMITS), tile(2, LIMITS)) == (Tile(32), Tile(32), None)
        with pytest.raises(RuntimeError, match="one at a time"), trial():
            pass
    assert asked == {query: Tile(32), tile.query(128, LIMITS): Tile(32), tile.query(2, LIMITS): None}
    assert tile(64, LIMITS) == Tile(8), "and afterwards the table counts again"


def test_nothing_is_read_for_a_device_without_a_name(monkeypatch):
    monkeypatch.setattr(tuned_tables, "read_table", lambda *_: pytest.fail("a file was read"))
    assert tile(64, replace(LIMITS, name="")) == Tile(16)
    assert tile.__doc__ == "The rule."
