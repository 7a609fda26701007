"""`secateur demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from secateur.cli import options as opt
from secateur.cli.console import command, print_records


def demo(
    out: Annotated[Path, Option(help="The folder for checkpoints, records and report.html.")] = Path("runs/demo"),
    quick: Annotated[
        bool, Option("--quick", help="Fewer sparsities and less text: only a check that everything works.")
    ] = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Prune the bundled model with every method, measure each result, and write a report."""
    with command(debug, resume="the same command continues from here"):
        from secateur.cli.quiet_api import api

        print_records(api.demo(out, quick=quick), as_json=json)
