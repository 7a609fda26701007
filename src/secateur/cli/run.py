"""`secateur run`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from secateur.cli import options as opt
from secateur.cli.answer import NEXT, NOTE, answer
from secateur.cli.console import RESUME, command, emit, show
from secateur.core.errors import UsageError
from secateur.core.progress import say
from secateur.core.records import Record


def run(
    recipe: Annotated[
        Path, Argument(metavar="RECIPE", help="A recipe file, or the folder of a result, which holds its recipe.")
    ],
    out: Annotated[
        Path | None, Option(help="The folder for the results, records.jsonl and report.html of the steps.")
    ] = None,
    model: Annotated[
        str | None, Option(metavar="MODEL", help="Run the recipe on this model instead of its own.")
    ] = None,
    revision: Annotated[str | None, Option(help="The hub revision of --model.")] = None,
    device: Annotated[str | None, Option(help="auto, cpu, cuda or cuda:N, for every step.")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Write nothing; check every step, and estimate those that can be.")
    ] = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Run the steps of a recipe, each on the result of the step before it.

    The page on recipes has the format. Every result holds the recipe that made it, as secateur/recipe.yaml.
    """
    with command(debug, resume="nothing was written" if dry_run else RESUME):
        if out is None and not dry_run:
            raise UsageError("--out DIR is missing: the folder for the results (or --dry-run)")
        from secateur.cli.quiet_api import api

        steps = api.read_recipe(recipe, model=model, revision=revision)
        if dry_run:
            made: Iterable[Record] = api.estimate_recipe(steps, device=device)
        else:
            assert out is not None
            made = api.run_recipe(steps, out, device=device, resume=resume, overwrite=overwrite)
        records = []
        for record in made:
            records.append(record)
            if not json:
                _print(record, verbose=verbose)
        if json:
            emit({"records": records})


def _print(record: Record, *, verbose: bool) -> None:
    """Print the answer of a step; the next step of the recipe is the next command, so none is advised."""
    from secateur.cli.terminal import record_table
    from secateur.cli.texts import sample_parts

    if record["command"] == "report":
        say(f"report: {record['out']}")
        return
    if record.get("dry_run"):
        waits = (
            f": no estimate: {record['why']}"
            if record.get("why")
            else ": no estimate before its model is there; it says how long it takes when it starts"
        )
        at_most = ", on the model of the recipe, so at most:"
        echo(f"{record['step']}{waits if record.get('waits') else at_most if record.get('at_most') else ''}")
    if verbose:
        show(record_table(record))
    for line in answer(record):
        if not line.startswith((NEXT, NOTE)):
            echo(line)
    show(*sample_parts(record))
