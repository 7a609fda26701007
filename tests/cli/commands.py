"""The commands of the command line, found from the parser."""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from secateur.cli import app


def _commands(parent: Any, path: str = "") -> dict[str, Any]:
    """Name -> command; the name of a sub-command begins with its group."""
    names: dict[str, Any] = {}
    for name, command in parent.commands.items():
        names |= _commands(command, f"{path}{name} ") if hasattr(command, "commands") else {path + name: command}
    return names


COMMANDS = _commands(get_command(app))
