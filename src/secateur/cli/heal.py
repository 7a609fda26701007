"""`secateur heal`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, print_record
from secateur.cli.given import given
from secateur.cli.parse import names
from secateur.core.errors import UsageError
from secateur.requests import HealRequest

_TEXTS = "builtin, wikitext2, c4, alpaca, or a file"
_TARGETS = ",".join(HealRequest.targets)


def heal(
    model: Annotated[str, Argument(metavar="DIR", help="A checkpoint that 'secateur prune' wrote.")],
    out: Annotated[Path | None, Option(help="The folder to write.")] = None,
    calibration: Annotated[
        str | None,
        Option(help=f"Text or instructions to train on: {_TEXTS}. Default: the calibration text of the pruning."),
    ] = HealRequest.calibration,
    steps: Annotated[int, Option(help="The number of optimiser steps.")] = HealRequest.steps,
    batch: Annotated[int, Option(help="Windows (or instructions) per step.")] = HealRequest.batch,
    lr: Annotated[float, Option(help="The highest learning rate.")] = HealRequest.lr,
    schedule: Annotated[str, Option(help="The learning rate schedule: cosine or constant.")] = HealRequest.schedule,
    weight_decay: Annotated[float, Option(help="The weight decay of AdamW.")] = HealRequest.weight_decay,
    rank: Annotated[int, Option(help="The rank of the adapters.")] = HealRequest.rank,
    alpha: Annotated[
        float, Option(help="The scale of the adapters: updates are multiplied by alpha / rank.")
    ] = HealRequest.alpha,
    targets: Annotated[
        str, Option(metavar="NAME,...", help="The matrices that get an adapter: names as in --modules.")
    ] = _TARGETS,
    completion_only: Annotated[
        bool,
        Option("--completion-only", help="Learn only the answers of instruction data."),
    ] = HealRequest.completion_only,
    keep_adapter: Annotated[
        bool,
        Option("--keep-adapter", help="Write the adapter (in peft's form) instead of merging it."),
    ] = HealRequest.keep_adapter,
    samples: Annotated[int, Option(help="The number of windows (or instructions) to draw from.")] = HealRequest.samples,
    seqlen: Annotated[
        int | None,
        Option(help="Tokens in a training window. Default: min(1024, the model's maximum)."),
    ] = HealRequest.seqlen,
    save_every: Annotated[
        int,
        Option(help="Steps between two saves; --resume continues from the last one."),
    ] = HealRequest.save_every,
    checkpointing: Annotated[
        bool,
        Option(help="Keep one activation per block: a third more time, much less memory."),
    ] = HealRequest.checkpointing,
    seed: opt.Seed = HealRequest.seed,
    text: opt.Text = HealRequest.text,
    protocol: opt.Protocol = HealRequest.protocol,
    eval_seqlen: opt.EvalSeqlen = HealRequest.eval_seqlen,
    evaluate: Annotated[
        bool,
        Option(
            "--eval/--no-eval",
            help="Measure perplexity on --text before and after; --no-eval leaves that to `secateur eval`.",
        ),
    ] = HealRequest.evaluate,
    limit: opt.Limit = HealRequest.limit,
    device: opt.Device = HealRequest.device,
    dtype: opt.Dtype = HealRequest.dtype,
    text_field: opt.TextField = HealRequest.text_field,
    prompt_form: opt.PromptForm = HealRequest.prompt_form,
    include_path: opt.IncludePath = None,
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Recover a pruned model with low-rank adapters: zeros stay zero, shapes stay as they are."""
    with command(debug, resume=RESUME):
        request = given(HealRequest, "heal", locals(), targets=names(targets))
        from secateur.cli.quiet_api import api

        if dry_run:
            record = api.estimate_heal(request, records or (out and out.absolute().parent / "records.jsonl"))
        elif out is None:
            raise UsageError("--out DIR is missing: the folder to write (or --dry-run)")
        else:
            record = api.heal(request, out, resume=resume, overwrite=overwrite, records_file=records)
        print_record(record, as_json=json, verbose=verbose)
