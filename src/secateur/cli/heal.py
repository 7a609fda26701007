"""`secateur heal`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, print_record
from secateur.cli.given import given
from secateur.cli.parse import names
from secateur.requests import HealRequest

_TEXTS = "builtin, wikitext2, c4, alpaca, or a file"
_TARGETS = ",".join(HealRequest.targets)


def heal(
    model: Annotated[str, Argument(metavar="DIR", help="A checkpoint that 'secateur prune' wrote.")],
    out: opt.OutFolder,
    calibration: Annotated[
        str | None,
        Option(help=f"Text or instructions to heal on: {_TEXTS}. Default: what it was pruned with."),
    ] = HealRequest.calibration,
    steps: Annotated[int, Option(help="Steps of the optimiser.")] = HealRequest.steps,
    batch: Annotated[int, Option(help="Windows a step.")] = HealRequest.batch,
    lr: Annotated[float, Option(help="The learning rate at its highest.")] = HealRequest.lr,
    schedule: Annotated[str, Option(help="cosine or constant.")] = HealRequest.schedule,
    weight_decay: Annotated[float, Option(help="Of AdamW.")] = HealRequest.weight_decay,
    rank: Annotated[int, Option(help="The rank of the adapters.")] = HealRequest.rank,
    alpha: Annotated[float, Option(help="Updates are scaled by alpha / rank.")] = HealRequest.alpha,
    targets: Annotated[str, Option(metavar="NAME,...", help="What gets an adapter: names as in --modules.")] = _TARGETS,
    completion_only: Annotated[
        bool,
        Option("--completion-only", help="Of instructions, learn the answers alone."),
    ] = HealRequest.completion_only,
    keep_adapter: Annotated[
        bool,
        Option("--keep-adapter", help="Write the adapter (in peft's form) instead of merging it."),
    ] = HealRequest.keep_adapter,
    samples: Annotated[int, Option(help="Windows, or instructions, to draw from.")] = HealRequest.samples,
    seqlen: Annotated[
        int | None,
        Option(help="Tokens of a window. Default: min(1024, the model's maximum)."),
    ] = HealRequest.seqlen,
    save_every: Annotated[
        int,
        Option(help="Steps between two saves, from which --resume goes on."),
    ] = HealRequest.save_every,
    checkpointing: Annotated[
        bool,
        Option(help="Keep one activation a block: a third more time, much less memory."),
    ] = HealRequest.checkpointing,
    seed: opt.Seed = HealRequest.seed,
    text: opt.Text = HealRequest.text,
    protocol: opt.Protocol = HealRequest.protocol,
    limit: opt.Limit = HealRequest.limit,
    device: opt.Device = HealRequest.device,
    dtype: opt.Dtype = HealRequest.dtype,
    text_field: opt.TextField = HealRequest.text_field,
    include_path: opt.IncludePath = None,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Recover a pruned model with low-rank adapters: zeros stay zero, shapes stay as they are."""
    with command(debug, resume=RESUME):
        request = given(HealRequest, "heal", locals(), targets=names(targets))
        from secateur.cli.quiet_api import api

        record = api.heal(request, out, resume=resume, overwrite=overwrite, records_file=records)
        print_record(record, as_json=json)
