"""`--method NAME --help`: the usual help of a command, then the options of that method."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from typer.core import TyperCommand

from secateur.cli.console import command, show

_METHOD = "--method"
_HELP = ("-h", "--help")


class MethodCommand(TyperCommand):
    """A command with the option `--method`, whose help also shows the options of the method that is named.

    torch is imported only where a method is named; `--help` alone does not wait for it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the name of the method for `format_help`, and parse."""
        ctx.meta[_METHOD] = _named(args)
        return super().parse_args(ctx, _with_help(args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the usual help, then the options of the method; refuse an unknown method first."""
        name = ctx.meta.get(_METHOD)
        if name is None:
            super().format_help(ctx, formatter)
            return
        with command(debug=False):
            from secateur.cli.method_tables import option_parts
            from secateur.cli.quiet_api import api

            parts = option_parts(api.describe_method(name))
        super().format_help(ctx, formatter)
        show(*parts)


def _named(args: list[str]) -> str | None:
    """Return the last value of `--method`; None without one."""
    values = [word.partition("=")[2] for word in args if word.startswith(f"{_METHOD}=")]
    values += [after for word, after in pairwise(args) if word == _METHOD and after not in _HELP]
    return values[-1] if values else None


def _with_help(args: list[str]) -> list[str]:
    """Return the arguments without a `--method` that `--help` follows: the name is missing, so it is asked for."""
    followed = {n for n, (word, after) in enumerate(pairwise(args)) if after in _HELP}
    return [word for n, word in enumerate(args) if not (word == _METHOD and n in followed)]
