"""`secateur inspect` and `secateur bench`: how large a checkpoint is, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as opt
from secateur.cli.console import command, emit, show
from secateur.cli.given import given
from secateur.cli.parse import counts
from secateur.core.errors import UsageError
from secateur.core.progress import say
from secateur.requests import BenchRequest

_BATCHES = ",".join(map(str, BenchRequest.batches))


def inspect(
    model: opt.Model,
    flow: Annotated[
        bool,
        Option(
            "--flow",
            help="List every linear map by the model's widths; parameters and FLOPs as functions of the sparsity s.",
        ),
    ] = False,
    context: Annotated[
        int | None, Option(help=f"With --flow: the number of positions in attention. {opt.LENGTH}")
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE.png", help="With --flow: draw a plot into this file.")] = None,
    revision: opt.Revision = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Show what was removed, block by block: parameters, bytes, FLOPs."""
    with command(debug):
        if not flow and (context is not None or plot is not None):
            raise UsageError(f"{'--plot' if plot else '--context'} belongs to --flow: add it")
        from secateur.cli.quiet_api import api
        from secateur.cli.terminal import flow_tables, inspect_table

        if flow:
            picture = api.inspect_flow(model, revision, context)
            record = picture.record()
            if plot is not None:
                api.plot_flow(picture, plot)
                say(str(plot))
                record["plot"] = str(plot)
        else:
            record = api.inspect(model, revision)
        if json:
            emit(record)
        else:
            show(*(flow_tables(record) if flow else [inspect_table(record)]))


def bench(
    model: opt.Checkpoint,
    dense: Annotated[
        str | None,
        Argument(metavar="DENSE", help="A model to compare with; the two are timed in turns."),
    ] = BenchRequest.dense,
    batch: Annotated[str, Option(metavar="B,B,...", help="Batch sizes; each is measured.")] = _BATCHES,
    prompt: Annotated[int, Option(help="Tokens in the prompt of each sequence.")] = BenchRequest.prompt,
    new: Annotated[int, Option(help="Tokens to generate after the prompt.")] = BenchRequest.new,
    repeats: Annotated[
        int, Option(help="The number of turns of each model; the best one counts.")
    ] = BenchRequest.repeats,
    seed: Annotated[int, Option(help="The seed of the prompts, which are random tokens.")] = BenchRequest.seed,
    semi_structured: Annotated[
        bool,
        Option("--semi-structured", help="Multiply by 2:4 matrices in torch's compressed form (accelerators)."),
    ] = BenchRequest.semi_structured,
    revision: opt.Revision = BenchRequest.revision,
    device: opt.Device = BenchRequest.device,
    dtype: opt.Dtype = BenchRequest.dtype,
    records: opt.Records = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure throughput, latency and memory, next to a dense model and to the limits of the machine."""
    with command(debug):
        request = given(BenchRequest, "bench", locals(), batches=counts(batch, "--batch"))
        from secateur.cli.quiet_api import api
        from secateur.cli.terminal import bench_tables

        record = api.bench(request, records_file=records)
        if json:
            emit(record)
        else:
            show(*bench_tables(record))
