"""`secateur sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from secateur.cli import options as opt
from secateur.cli.answer import how_much
from secateur.cli.console import RESUME, command, print_estimates, print_records
from secateur.cli.given import given
from secateur.cli.parse import folder_for_calibration, folder_for_tasks, names, numbers, settings
from secateur.core.errors import UsageError
from secateur.core.progress import say
from secateur.core.words import perplexity_words
from secateur.requests import EvalRequest, Request


def sweep(
    model: opt.Model,
    method: Annotated[str, Option(metavar="NAME", help=opt.METHOD)],
    out: Annotated[Path | None, Option(help="The folder for the checkpoints and records.jsonl.")] = None,
    params_removed: Annotated[
        str | None,
        Option(metavar="R,R,...", help="The shares of all parameters to remove, each to the nearest step."),
    ] = None,
    at_least: opt.AtLeast = Request.at_least,
    sparsity: Annotated[
        str | None,
        Option(metavar="S,S,...", help="The fractions to remove of what the method removes from, in [0, 1)."),
    ] = None,
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
    text: opt.Text = EvalRequest.text,
    protocol: opt.Protocol = EvalRequest.protocol,
    eval_seqlen: opt.EvalSeqlen = EvalRequest.seqlen,
    tasks: opt.Tasks = opt.NO_TASKS,
    text_field: opt.TextField = Request.text_field,
    prompt_form: opt.PromptForm = Request.prompt_form,
    include_path: opt.IncludePath = None,
    limit: opt.Limit = EvalRequest.limit,
    items: opt.Items = EvalRequest.items,
    reconstruct: opt.Reconstruct = Request.reconstruct,
    spill: opt.Spill = Request.spill,
    stock_only: opt.StockOnly = Request.stock_only,
    ignore_unknown: opt.IgnoreUnknown = Request.ignore_unknown,
    against: opt.AgainstDense = False,
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    verbose: opt.VerboseRuns = False,
    debug: opt.Debug = False,
) -> None:
    """Measure the dense model, then prune and measure at each sparsity."""
    with command(debug, resume=RESUME):
        request = given(
            Request,
            "sweep",
            locals(),
            options=settings(options),
            include_path=folder_for_calibration(include_path, calibration),
        )
        measure = given(
            EvalRequest,
            "sweep",
            locals(),
            tasks=names(tasks),
            against=model if against else None,
            against_revision=revision,
            include_path=folder_for_tasks(include_path, calibration, tasks),
        )
        if sparsity is None and params_removed is None:
            raise UsageError("give --sparsity S,S,... or --params-removed R,R,...")
        sparsities = [] if sparsity is None else numbers(sparsity, "--sparsity")
        ratios = [] if params_removed is None else numbers(params_removed, "--params-removed")
        from secateur.cli.quiet_api import api

        if dry_run:
            print_estimates(
                api.estimate_sweep(request, sparsities, measure, ratios=ratios), as_json=json, verbose=verbose
            )
            return
        if out is None:
            raise UsageError("--out DIR is missing: the folder for the checkpoints (or --dry-run)")
        measured = []
        writing = {"resume": resume, "overwrite": overwrite}
        for record in api.sweep(request, sparsities, out, measure, ratios=ratios, records_file=records, **writing):
            measured.append(record)
            about = f"{record['method']} {how_much(record)}" if record.get("method") else "dense"
            say(f"{about}: ppl {perplexity_words(record['ppl'])}")
        print_records(measured, as_json=json)
