"""`secateur eval`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, print_record
from secateur.cli.given import given
from secateur.cli.parse import names
from secateur.requests import EvalRequest


def evaluate(
    model: opt.Checkpoint,
    text: opt.Text = EvalRequest.text,
    protocol: opt.Protocol = EvalRequest.protocol,
    eval_seqlen: opt.EvalOrSeqlen = EvalRequest.seqlen,
    tasks: opt.Tasks = opt.NO_TASKS,
    include_path: opt.IncludePath = None,
    limit: opt.Limit = EvalRequest.limit,
    items: opt.Items = EvalRequest.items,
    against: Annotated[
        str | None,
        Option(metavar="DENSE", help="Also measure the dense model, and how the behaviour shifted from it."),
    ] = EvalRequest.against,
    against_revision: Annotated[
        str | None,
        Option(metavar="REVISION", help="The hub revision of the model of --against."),
    ] = EvalRequest.against_revision,
    shift: Annotated[
        bool,
        Option("--shift/--no-shift", help="With --against: --no-shift compares perplexities alone, in half the time."),
    ] = EvalRequest.shift,
    revision: opt.Revision = EvalRequest.revision,
    device: opt.Device = EvalRequest.device,
    dtype: opt.Dtype = EvalRequest.dtype,
    text_field: opt.TextField = EvalRequest.text_field,
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure perplexity, tasks, and the shift from a dense model."""
    with command(debug, resume=RESUME):
        request = given(EvalRequest, "eval", locals(), tasks=names(tasks))
        from secateur.cli.quiet_api import api

        if dry_run:
            record = api.estimate_evaluate(request)
        else:
            record = api.evaluate(request, records_file=records, resume=resume)
        print_record(record, as_json=json, verbose=verbose)
