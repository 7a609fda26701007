"""`secateur reconstruct`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, print_record
from secateur.cli.given import given
from secateur.core.errors import UsageError
from secateur.requests import ReconstructRequest

_TEXTS = "builtin, wikitext2, c4, alpaca, a file, or task:NAME"


def reconstruct(
    model: Annotated[str, Argument(metavar="DIR", help="A checkpoint that 'secateur prune' wrote.")],
    out: Annotated[Path | None, Option(help="The folder to write.")] = None,
    dense: Annotated[
        str | None, Option(metavar="MODEL", help="The model it was pruned from. Default: the one that its plan names.")
    ] = ReconstructRequest.dense,
    dense_revision: Annotated[
        str | None, Option(metavar="REVISION", help="The hub revision of the model of --dense.")
    ] = ReconstructRequest.dense_revision,
    calibration: Annotated[
        str | None, Option(help=f"Text to learn from: {_TEXTS}. Default: the calibration text of the pruning.")
    ] = ReconstructRequest.calibration,
    samples: Annotated[int, Option(help="The number of windows.")] = ReconstructRequest.samples,
    seqlen: Annotated[
        int | None, Option(help="Tokens in a window. Default: min(512, the model's maximum).")
    ] = ReconstructRequest.seqlen,
    steps: Annotated[int, Option(help="The number of optimiser steps for each block.")] = ReconstructRequest.steps,
    batch: Annotated[int, Option(help="Tokens per step.")] = ReconstructRequest.batch,
    lr: Annotated[
        float, Option(help="The highest learning rate, in units of the root mean square of each tensor.")
    ] = ReconstructRequest.lr,
    held_out: Annotated[
        float, Option(help="The share of the windows that nothing is learned from: they tell which state is best.")
    ] = ReconstructRequest.held_out,
    seed: opt.Seed = ReconstructRequest.seed,
    spill: opt.Spill = ReconstructRequest.spill,
    device: opt.Device = ReconstructRequest.device,
    text_field: opt.TextField = ReconstructRequest.text_field,
    prompt_form: opt.PromptForm = ReconstructRequest.prompt_form,
    include_path: opt.IncludePath = None,
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Mend a pruned model block by block, towards what the dense model's blocks give: zeros and shapes stay."""
    with command(debug, resume=RESUME):
        request = given(ReconstructRequest, "reconstruct", locals())
        from secateur.cli.quiet_api import api

        if dry_run:
            record = api.estimate_reconstruct(request, records or (out and out.absolute().parent / "records.jsonl"))
        elif out is None:
            raise UsageError("--out DIR is missing: the folder to write (or --dry-run)")
        else:
            record = api.reconstruct(request, out, resume=resume, overwrite=overwrite, records_file=records)
        print_record(record, as_json=json, verbose=verbose)
