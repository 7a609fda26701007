"""Every field of a request is an option of each command that takes it, or is left out for a stated reason."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import cli
from secateur.cli import quiet_api
from secateur.cli.given import LEFT_OUT, OPTION_OF, given
from secateur.core.errors import UsageError
from tests.cli.commands import COMMANDS

REQUESTS = [pytest.param(command, kind, id=f"{command}-{kind.__name__}") for command, kind in LEFT_OUT]
VALUES = {
    "tasks": "a,b",
    "calibration": "task:mine",
    "options": "method.option=1",
    "batch": "3",
    "schedule": "constant",
    "sparsity": "0.25",
    "params_removed": "0.25",
}
"""What is written behind options that not every word goes with; the others get a number."""
NEEDS = {
    "prune": ["--dry-run"],
    "heal": ["--dry-run"],
    "reconstruct": ["--dry-run"],
    "compare": ["--heal", "--bench", "--dry-run"],
    "sweep": ["--params-removed", "0.2", "--dry-run"],
    "study modules": ["--dry-run"],
    "study disp-llm": ["--dry-run"],
    "predict": ["--spectrum", "model"],
}
"""Without these a command makes no such request."""


@pytest.mark.parametrize(("command", "kind"), REQUESTS)
def test_every_field_is_an_option_or_left_out_for_a_reason(command: str, kind: type[Any]) -> None:
    names, left_out = {field.name for field in dataclasses.fields(kind)}, LEFT_OUT[command, kind]
    fields = {option: name for name, option in OPTION_OF.get(kind, {}).items()}
    options = {fields.get(parameter.name, parameter.name) for parameter in COMMANDS[command].params}
    forgotten = names - options - left_out.keys()
    where = f"secateur {command} has no option for {forgotten} of {kind.__name__}"
    assert not forgotten, f"{where}: add one, or a reason to LEFT_OUT in cli/given.py"
    assert left_out.keys() <= names, "what is left out is a field"
    assert all(len(reason.split()) > 2 for reason in left_out.values())


@pytest.mark.parametrize(("command", "kind"), REQUESTS)
def test_every_option_reaches_the_request(command: str, kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def noted(*args: Any, **more: Any) -> Any:
        made.append(given(*args, **more))
        return made[-1]

    monkeypatch.setattr(f"{COMMANDS[command].callback.__module__}.given", noted)
    monkeypatch.setattr(quiet_api, "api", Nothing())
    reaches = {field.name for field in dataclasses.fields(kind)} - LEFT_OUT[command, kind].keys()
    reaches = {OPTION_OF.get(kind, {}).get(name, name) for name in reaches}
    words = command.split() + NEEDS.get(command, [])
    for parameter in COMMANDS[command].params:
        if parameter.required or parameter.name in reaches:
            words += _written(parameter)
    result = CliRunner().invoke(cli.app, words)
    assert "no work is done here" in result.stderr, result.output
    (request,) = [request for request in made if type(request) is kind]
    for field in dataclasses.fields(kind):
        if OPTION_OF.get(kind, {}).get(field.name, field.name) in reaches:
            lost = f"{field.name} is lost on the way to {kind.__name__}"
            assert getattr(request, field.name) not in (field.default, {}), lost


@pytest.mark.parametrize("command", ["eval", "sweep", "compare", "heal", "study modules", "study disp-llm"])
def test_the_window_of_the_evaluation_has_one_name_and_seqlen_is_that_of_the_text_learned_from(command: str) -> None:
    """Only `eval`, which has no other window, takes `--seqlen` for it too."""
    options = {name: p.name for p in COMMANDS[command].params for name in p.opts}
    assert options["--eval-seqlen"] == "eval_seqlen"
    assert options["--seqlen"] == ("eval_seqlen" if command == "eval" else "seqlen")
    assert not any("seqlen" in left_out for (name, _), left_out in LEFT_OUT.items() if name == command)


class Nothing:
    """In the place of `secateur.api`: what is asked of it is refused."""

    def __getattr__(self, name: str) -> Any:
        raise UsageError("no work is done here")


def _written(parameter: Any) -> list[str]:
    """An argument or option as it is written, with a value that is not its default."""
    value = VALUES.get(parameter.name, "7")
    if parameter.param_type_name == "argument":
        return [value]
    if parameter.is_flag:
        return [parameter.secondary_opts[0] if parameter.default else parameter.opts[0]]
    return [parameter.opts[0], value]


def test_no_command_makes_a_request_by_hand() -> None:
    for file in Path(cli.__path__[0]).glob("*.py"):
        assert not re.search(r"\b(Eval|Heal|Bench)?Request\(", file.read_text()), f"{file.name}: use given(...)"
