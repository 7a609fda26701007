"""The help of a command with switches: `--x` and `--no-x` stand in one column, as `--[no-]x`.

Typer gives the negative names a column of their own, and the meanings of all options lose its width.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class SwitchCommand(TyperCommand):
    """A command whose help names both forms of a switch at once."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the usual help, with each switch under one name."""
        names = [(option, option.opts, option.secondary_opts) for option in self.params if _is_switch(option)]
        try:
            for option, opts, _ in names:
                option.opts, option.secondary_opts = [f"--[no-]{opts[0].removeprefix('--')}"], []
            super().format_help(ctx, formatter)
        finally:
            for option, opts, secondary in names:
                option.opts, option.secondary_opts = opts, secondary


def _is_switch(option: Any) -> bool:
    """Return True for an option that is `--x` or `--no-x`."""
    switch: bool = option.secondary_opts == [f"--no-{name.removeprefix('--')}" for name in option.opts]
    return switch
