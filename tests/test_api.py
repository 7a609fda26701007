"""The Python functions: every command has one."""

from __future__ import annotations

import inspect

import pytest

from secateur import api
from tests.cli.commands import COMMANDS

NAMES = {"eval": "evaluate", "report": "write_report"}  # `eval` is Python's own, `report` a package


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_function_and_calls_it(command: str) -> None:
    name = NAMES.get(command, command.replace(" ", "_").replace("-", "_"))
    assert name in api.__all__
    assert (inspect.getdoc(getattr(api, name)) or "").endswith((".", "`"))
    assert f"api.{name}(" in inspect.getsource(COMMANDS[command].callback)


def test_every_name_in_all_exists() -> None:
    assert [name for name in api.__all__ if not hasattr(api, name)] == []


def test_methods_have_summaries() -> None:
    assert api.methods()["wanda"] == api.find_method("wanda").summary
