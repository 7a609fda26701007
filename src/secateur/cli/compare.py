"""`secateur compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, emit, print_estimates, show
from secateur.cli.given import given
from secateur.cli.parse import folder_for_calibration, folder_for_tasks, method_settings, names, numbers
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.requests import BenchRequest, CompareRequest, EvalRequest, HealRequest, Request


def compare(
    model: opt.Model,
    out: Annotated[
        Path | None, Option(help="The folder for the checkpoints, records.jsonl, compare.md and report.html.")
    ] = None,
    methods: Annotated[str, Option(metavar="M,M,...", help="The methods; `secateur methods` lists them.")] = "",
    params_removed: Annotated[
        str,
        Option(metavar="R,R,...", help="Pruning ratios over all parameters, for runs that remove parameters."),
    ] = "",
    sparsity: Annotated[str, Option(metavar="S,S,...", help="Sparsities, for unstructured pruning.")] = "",
    at_least: opt.AtLeast = Request.at_least,
    patterns: Annotated[
        str,
        Option(metavar="P,P,...", help="unstructured, N:M, rows, columns. Default: the method's own, and rows."),
    ] = "",
    with_heal: Annotated[
        bool, Option("--heal", help="Also heal each result with low-rank adapters, and measure that.")
    ] = False,
    heal_steps: Annotated[int | None, Option(help="With --heal: the number of optimiser steps.")] = None,
    with_bench: Annotated[
        bool, Option("--bench", help="Also time each result, in turns with the dense model.")
    ] = False,
    calibration: opt.Calibration = Request.calibration,
    samples: opt.Samples = Request.samples,
    seqlen: opt.Seqlen = Request.seqlen,
    seed: opt.Seed = Request.seed,
    revision: opt.Revision = Request.revision,
    device: opt.Device = Request.device,
    dtype: opt.Dtype = Request.dtype,
    options: Annotated[
        list[str] | None,
        Option("--set", metavar="METHOD.OPTION=VALUE", help="Set an option of one method; may be repeated."),
    ] = None,
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
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    verbose: opt.VerboseRuns = False,
    debug: opt.Debug = False,
) -> None:
    """Run methods side by side at the same measured pruning ratio, and write the table that papers print."""
    with command(debug, resume=RESUME):
        if heal_steps is not None and not with_heal:
            raise UsageError("--heal-steps belongs to --heal: add it")
        calibration_folder = folder_for_calibration(include_path, calibration)
        values = locals() | {"include_path": calibration_folder}
        steps = HealRequest.steps if heal_steps is None else heal_steps
        variants = CompareRequest(
            given(Request, "compare", values, method=""),
            names(methods),
            ratios=numbers(params_removed, "--params-removed") if params_removed else (),
            sparsities=numbers(sparsity, "--sparsity") if sparsity else (),
            patterns=names(patterns),
            options=method_settings(options, names(methods)),
            heal=given(HealRequest, "compare", values, steps=steps) if with_heal else None,
            bench=given(BenchRequest, "compare", values) if with_bench else None,
        )
        folder = folder_for_tasks(include_path, calibration, tasks)
        measure = given(EvalRequest, "compare", values, tasks=names(tasks), include_path=folder)
        from secateur.cli.quiet_api import api

        if dry_run:
            print_estimates(api.estimate_compare(variants, measure), as_json=json, verbose=verbose)
            if with_heal or with_bench:
                say("healing and timing have no estimate before there is a result: `secateur heal DIR --dry-run`")
            return
        if out is None:
            raise UsageError("--out DIR is missing: the folder for the checkpoints and the report (or --dry-run)")
        result = api.compare(variants, out, measure, resume=resume, overwrite=overwrite, records_file=records)
        runs = result.cells
        if json:
            incomplete = {
                "refused": runs.refused,
                "failed": runs.failed,
                "untimed": runs.untimed,
                "unhealed": runs.unhealed,
            }
            emit({"records": result.records, **incomplete})
        elif result.table is not None:
            from secateur.cli.terminal import cells_table

            echo(result.finding)
            show(cells_table(result.table.table))
            for note in result.table.notes:
                say(note)
        say(str(out / "report.html") if result.table is None else f"{out / 'compare.md'}, {out / 'report.html'}")
        if failed := runs.incomplete():
            share = f"{len(failed)} of {len(runs.runs)} runs"
            raise SecateurError(f"{share} failed, first {failed[0]}; the same command with --resume tries them again")
