"""The declarations of a method's file, and how the rest of the package reads them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from secateur import api, methods
from secateur.core.errors import UsageError
from secateur.methods import find_method, method_names
from secateur.methods.contract import Says
from secateur.plan.quantity import QUANTITIES

GOOD = '''
from dataclasses import dataclass
from secateur.plan.plan import BlockPlan

CALIBRATION = None

@dataclass(frozen=True)
class Mine:
    """Options."""

def plan_block(block, statistics, options):
    return BlockPlan(block.index)
'''
BAD = [
    ("CALIBRATION = None\n", "", r"mine\.py\) lacks CALIBRATION: the text that it calibrates with, or None"),
    ("CALIBRATION = None", "CALIBRATION = 5", r"mine\.py\): CALIBRATION is 5; it must be: str, None"),
    ("CALIBRATION = None", "CALIBRATION = None\nSAMPLES = 'many'", "SAMPLES is 'many'; it must be: int"),
    (
        "CALIBRATION = None",
        "CALIBRATION = None\nSTATISTIC = None",
        r"STATISTIC is no name .* did you mean STATISTICS\?",
    ),
    ("CALIBRATION = None", "CALIBRATION = None\nREMOVES = 'blocks'", "REMOVES is 'blocks'; it must be: Quantity, None"),
    (
        "def plan_block(block, statistics, options)",
        "def plan_block(block, options)",
        r"plan_block takes \(block, options\)",
    ),
    ("def plan_block(", "def plan(", "lacks a plan: define plan_block, plan_place or plan_model"),
    ("def plan_block(block, statistics, options)", "def plan_model(view, data, options, run)", "lacks REMOVES"),
    ("@dataclass(frozen=True)\n", "", "must define one dataclass, its options; it defines 0"),
]


def _added(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package adds a method `mine` whose file has this text."""
    (folder / "mine.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    monkeypatch.setattr(methods, "_added", lambda: {"mine": EntryPoint("mine", "mine", "secateur.methods")})


def test_a_file_that_keeps_to_the_contract_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _added(GOOD, tmp_path, monkeypatch)
    assert find_method("mine").says.SAMPLES == 128


@pytest.mark.parametrize(("old", "new", "words"), BAD)
def test_a_file_that_does_not_is_refused_by_name(
    old: str, new: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in GOOD
    _added(GOOD.replace(old, new), tmp_path, monkeypatch)
    with pytest.raises(UsageError, match=words) as caught:
        find_method("mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", method_names())
def test_every_method_says_what_its_sparsity_counts(name: str) -> None:
    method = find_method(name)
    assert isinstance(method.says, Says)
    assert method.quantity(method.options({})).name in QUANTITIES


@pytest.mark.parametrize("name", [name for name in method_names() if not find_method(name).says.SHARDS])
def test_what_works_in_one_process_is_refused_under_torchrun_before_any_work(
    name: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved("llama")
    before = sorted(tmp_path.iterdir())
    for variable, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: pytest.fail("it began to work"))
    monkeypatch.setattr("secateur.prune.prepare.open_checkpoint", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(
        UsageError, match=f"torchrun: {name} works in one process .*disp_llm.*; start it without torchrun"
    ):
        api.prune(api.Request(str(dense), name, sparsity=0.3, calibration=ids_file), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", method_names())
def test_the_first_line_of_a_method_is_a_whole_sentence(name: str) -> None:
    assert find_method(name).summary.endswith("."), "`secateur methods` and the documentation print it alone"
