"""`secateur sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, print_records
from secateur.cli.given import given
from secateur.cli.parse import folder_for_calibration, folder_for_tasks, names, numbers, settings
from secateur.core.progress import say
from secateur.core.words import perplexity_words
from secateur.requests import EvalRequest, Request


def sweep(
    model: opt.Model,
    out: Annotated[Path, Option(help="The folder for the checkpoints and records.jsonl.")],
    method: Annotated[str, Option(metavar="NAME", help=opt.METHOD)],
    sparsity: Annotated[str, Option(metavar="S,S,...", help="The fractions to remove, in [0, 1).")],
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
    tasks: opt.Tasks = opt.NO_TASKS,
    text_field: opt.TextField = Request.text_field,
    include_path: opt.IncludePath = None,
    limit: opt.Limit = EvalRequest.limit,
    spill: opt.Spill = Request.spill,
    stock_only: opt.StockOnly = Request.stock_only,
    ignore_unknown: opt.IgnoreUnknown = Request.ignore_unknown,
    against: opt.AgainstDense = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
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
        sparsities = numbers(sparsity, "--sparsity")
        from secateur.cli.quiet_api import api

        measured = []
        writing = {"resume": resume, "overwrite": overwrite}
        for record in api.sweep(request, sparsities, out, measure, records_file=records, **writing):
            measured.append(record)
            say(f"{record.get('method') or 'dense'} {record.get('sparsity')}: ppl {perplexity_words(record['ppl'])}")
        print_records(measured, as_json=json)
