"""The declarations of a method's file, and how the rest of the package reads them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from secateur import api, methods
from secateur.cli import app
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
    ("CALIBRATION = None", "CALIBRATION = None\nSAMPLES = True", "SAMPLES is True; it must be: int"),
    ("CALIBRATION = None", "CALIBRATION = None\nSHARDS = True", "SHARDS is for the work of plan_model"),
    ("CALIBRATION = None", "CALIBRATION = None\nMAY_CHANGE = ('nosuch',)", "MAY_CHANGE names nosuch"),
    (
        "CALIBRATION = None",
        "from secateur.plan.quantity import BLOCKS as REMOVES\nCALIBRATION = None",
        "a sparsity of blocks is for the model as a whole, which plan_block does not plan",
    ),
    ("def plan_block(", "def by_row(options): ...\ndef plan_block(", r"by_row is no name .* did you mean by_rows\?"),
    ("def plan_block(", "def chek(view, s, options): ...\ndef plan_block(", r"chek is no name .* did you mean check\?"),
    (
        "def plan_block(",
        "def plan_model(view, data, options, run): ...\ndef plan_block(",
        "its options need a property whole_model",
    ),
    ('    """Options."""', "    share: float", "its option share has no default; write share: TYPE = VALUE"),
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


def test_a_broken_file_of_another_package_does_not_hide_the_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _added(GOOD.replace("CALIBRATION = None\n", ""), tmp_path, monkeypatch)
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    assert "wanda " in result.stdout
    assert "lacks CALIBRATION" in result.stdout
    assert methods.sharing_methods() == ["disp_llm"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nosuch_module", "nosuch_module cannot be imported .ModuleNotFoundError: .*; repair or uninstall"),
        ("json:dumps", "json:dumps is of type function; it must name a module"),
    ],
)
def test_a_method_that_cannot_be_imported_does_not_hide_the_others(
    target: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "_added", lambda: {"mine": EntryPoint("mine", target, "secateur.methods")})
    with pytest.raises(UsageError, match=words):
        find_method("mine")
    assert api.methods()["mine"].startswith("cannot be used: ")
    assert api.methods()["wanda"] == find_method("wanda").summary


@pytest.mark.parametrize("asked", [{"sparsity": 0.0}, {"params_removed": 0.0}])
def test_nothing_to_remove_is_nothing_to_share(
    asked: dict[str, float], saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved("llama")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="torchrun: at sparsity 0 there is nothing to share"):
        api.prune(api.Request(str(dense), "disp_llm", calibration=ids_file, **asked), tmp_path / "out")


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
