"""`secateur prune`, and `secateur methods`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, emit, print_record, show
from secateur.cli.given import given
from secateur.cli.parse import settings
from secateur.core.errors import UsageError
from secateur.core.progress import say
from secateur.requests import Request

_SHORT = ("result", "results", "needs")  # the facts of every method in the list of them


def prune(
    model: opt.Model,
    out: Annotated[Path | None, Option(help="The folder to write.")] = None,
    method: Annotated[str, Option(metavar="NAME", help=f"{opt.METHOD} Default: {opt.NO_METHOD}")] = Request.method,
    sparsity: Annotated[float | None, Option(help="The fraction to remove, in [0, 1).")] = Request.sparsity,
    params_removed: Annotated[
        float | None,
        Option(help="Instead of --sparsity: the share of all parameters to remove, to the nearest step."),
    ] = Request.params_removed,
    at_least: opt.AtLeast = Request.at_least,
    modules: opt.Modules = Request.modules,
    pattern: opt.Pattern = Request.pattern,
    calibration: opt.Calibration = Request.calibration,
    samples: opt.Samples = Request.samples,
    seqlen: opt.Seqlen = Request.seqlen,
    seed: opt.Seed = Request.seed,
    revision: opt.Revision = Request.revision,
    device: opt.Device = Request.device,
    dtype: opt.Dtype = Request.dtype,
    options: opt.SetOption = None,
    text_field: opt.TextField = Request.text_field,
    prompt_form: opt.PromptForm = Request.prompt_form,
    include_path: opt.IncludePath = None,
    reconstruct: opt.Reconstruct = Request.reconstruct,
    spill: opt.Spill = Request.spill,
    stock_only: opt.StockOnly = Request.stock_only,
    ignore_unknown: opt.IgnoreUnknown = Request.ignore_unknown,
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Prune a model and write the result."""
    with command(debug, resume=RESUME, several=not dry_run):
        request = given(Request, "prune", locals(), options=settings(options))
        from secateur.cli.quiet_api import api

        request = api.with_method(request)
        if dry_run:
            record = api.estimate(api.prepare(request))
        elif out is None:
            raise UsageError("--out DIR is missing: the folder to write (or --dry-run)")
        else:
            record = api.prune(request, out, resume=resume, overwrite=overwrite, records_file=records)
        print_record(record, as_json=json, verbose=verbose)


def methods(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="Show this method alone: paper, sparsity, calibration, options.")
    ] = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """List the pruning methods, or show one with its options."""
    with command(debug):
        from secateur.cli.quiet_api import api

        if name is not None:
            record = api.describe_method(name)
            if json:
                emit({"command": "methods", **record})
                return
            from secateur.cli.method_tables import method_parts

            show(*method_parts(record))
            return
        summaries, facts = api.methods(), {}
        for known in summaries:
            with suppress(UsageError):  # a file that breaks the contract: its summary says so
                facts[known] = api.describe_method(known)
        if json:
            short = {known: {key: found[key] for key in _SHORT} for known, found in facts.items()}
            emit({"command": "methods", "methods": summaries, "facts": short})
            return
        from secateur.cli.method_tables import methods_table

        show(methods_table(summaries, facts))
        say("smaller: parameters are removed. zeros: the same size, weights are set to zero. Both: --pattern decides")
        say("`secateur methods NAME` shows the options of one; which method first: docs/which-method.md")
