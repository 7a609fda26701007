"""The Python functions: every command has one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import api, requests
from tests.cli.commands import COMMANDS
from tests.tiny import tiny_model

NAMES = {
    "eval": "evaluate",
    "report": "write_report",
    "run": "run_recipe",
}  # `eval` is Python's own, `report` a package


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_function_and_calls_it(command: str) -> None:
    name = NAMES.get(command, command.replace(" ", "_").replace("-", "_"))
    assert name in api.__all__
    assert (inspect.getdoc(getattr(api, name)) or "").endswith((".", "`"))
    assert f"api.{name}(" in inspect.getsource(COMMANDS[command].callback)


def test_all_is_the_whole_interface() -> None:
    own = {
        name
        for name, value in vars(api).items()
        if getattr(value, "__module__", "") == api.__name__ and not name.startswith("_")
    }
    asked = {name for name, value in vars(requests).items() if inspect.isclass(value) and name.endswith("Request")}
    assert own | asked <= set(api.__all__), "what this file and requests.py define for users"
    assert sorted(set(api.__all__)) == sorted(api.__all__), "no name twice"
    values = [getattr(api, name) for name in api.__all__]
    assert all(inspect.isclass(value) or inspect.isfunction(value) for value in values), "no constant, no module"
    assert all(value.__module__.startswith("secateur.") and inspect.getdoc(value) for value in values)


def test_nothing_else_leaks() -> None:
    names: dict[str, Any] = {}
    exec("from secateur.api import *", names)
    assert names.keys() - {"__builtins__"} == set(api.__all__) == set(dir(api))


def test_windows_for_a_model_in_memory_are_those_of_a_prune(tmp_path: Path) -> None:
    request = api.Request("bundled", "wanda", sparsity=0.5, samples=4, seqlen=32, seed=5)
    api.prune(request, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    drawn = api.draw_windows(model, tokenizer, "builtin", samples=4, seqlen=32, seed=5)
    expected = api.read_windows(api.prepare(request))
    assert expected is not None
    assert drawn.equal(expected)
    assert api.draw_windows(model, tokenizer, "builtin", samples=2).shape == (2, 512), "the model's maximum"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "wikitext"}, "no text 'wikitext': give one of builtin"),
        ({"samples": 0}, "samples 0: at least one window"),
        ({"seqlen": 65}, r"seqlen 65 is outside \[2, 64\]"),
        ({}, "the text 'builtin' needs a tokenizer: give AutoTokenizer"),
    ],
)
def test_wrong_windows_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(api.UsageError, match=words):
        api.draw_windows(tiny_model("llama"), None, **{"text": "builtin", **given})


def test_token_ids_need_no_tokenizer(ids_file: str, windows: torch.Tensor) -> None:
    assert api.draw_windows(tiny_model("llama"), None, ids_file).equal(windows)


def test_methods_have_summaries() -> None:
    assert api.methods()["wanda"] == api.find_method("wanda").summary
