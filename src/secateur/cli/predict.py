"""`secateur predict` and `secateur report`: results from records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from secateur.cli import options as opt
from secateur.cli.answer import answer
from secateur.cli.console import command, emit, show
from secateur.cli.given import given
from secateur.cli.parse import numbers, settings
from secateur.core.errors import UsageError
from secateur.core.progress import say
from secateur.requests import Request


def predict(
    points: Annotated[
        list[Path] | None,
        Argument(
            metavar="POINTS...",
            help="Records of a sweep (files, folders, checkpoints), or one CSV: sparsity,ppl or sparsity,acc.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        Option(metavar="ppl|TASK", help="What to predict; TASK:acc_norm for the normalised accuracy."),
    ] = None,
    law: Annotated[
        str | None,
        Option(
            help="The law; an unknown name lists all, 'best' takes the smallest held-out error. Default: the paper's.",
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        Option(metavar="S,S,...", help="Sparsities to predict. Default: the measured ones."),
    ] = None,
    params_removed: Annotated[
        list[str] | None,
        Option(metavar="R,R,...", help="Shares of all parameters to remove: what would that cost?"),
    ] = None,
    target_ppl: Annotated[float | None, Option(help="Find the largest sparsity with this perplexity or less.")] = None,
    target_acc: Annotated[float | None, Option(help="Find the largest sparsity with this accuracy or more.")] = None,
    chance: Annotated[float | None, Option(help="The accuracy of guessing on the task; known for cloze.")] = None,
    where: Annotated[
        list[str] | None,
        Option(metavar="NAME=VALUE", help="Keep only records with this value, such as method=wanda; may be repeated."),
    ] = None,
    dense_in_fit: Annotated[
        bool,
        Option("--dense-in-fit", help="Count the dense model as a point of the fit."),
    ] = False,
    plot: Annotated[Path | None, Option(metavar="FILE.png", help="Draw the points, the law and its rivals.")] = None,
    spectrum: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="Predict SliceGPT's perplexity from a calibration pass of this dense model; POINTS may be left out.",
        ),
    ] = None,
    dense_ppl: Annotated[
        float | None,
        Option(help="With --spectrum and no POINTS: the perplexity of the dense model."),
    ] = None,
    calibration: opt.Calibration = Request.calibration,
    samples: opt.Samples = Request.samples,
    seqlen: opt.Seqlen = Request.seqlen,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Fit the laws to measured points; predict other sparsities, or find the largest one that keeps a target value."""
    with command(debug):
        sparsities = [s for part in at or [] for s in numbers(part, "--at")]
        filters = settings(where, "--where")
        if spectrum is not None:
            unused = {
                "--params-removed": params_removed,
                "--law": law,
                "--metric": metric,
                "--target-acc": target_acc,
                "--plot": plot,
            }
            _refuse(unused, "does not go with --spectrum, which has one law, for perplexity; leave it out")
            request = given(Request, "predict", locals(), model=spectrum, method="slicegpt")
            from secateur.cli.quiet_api import api
            from secateur.cli.terminal import spectrum_tables

            record = api.predict_from_spectrum(
                request,
                points or [],
                dense_ppl=dense_ppl,
                at=sparsities,
                target_ppl=target_ppl,
                where=filters,
            )
            tables = spectrum_tables
        else:
            spectrum_options = {"--dense-ppl": dense_ppl, "--calibration": calibration, "--seqlen": seqlen}
            _refuse(spectrum_options, "belongs to --spectrum MODEL: add it")
            if not points:
                raise UsageError(
                    "POINTS are missing: records of a sweep, or a CSV with columns sparsity,ppl (or --spectrum MODEL)",
                )
            from secateur.cli.quiet_api import api
            from secateur.cli.terminal import law_tables

            record = api.predict(
                points,
                metric=metric,
                law=law,
                at=sparsities,
                params_removed=[r for part in params_removed or [] for r in numbers(part, "--params-removed")],
                target_ppl=target_ppl,
                target_acc=target_acc,
                chance=chance,
                where=filters,
                dense_in_fit=dense_in_fit,
                plot=plot,
            )
            tables = law_tables
        if json:
            emit(record)
            return
        for line in answer(record):
            echo(line)
        show(*tables(record))
        for warning in record["warnings"]:
            say(f"warning: {warning}")


def _refuse(values: Mapping[str, object], why: str) -> None:
    """Raise UsageError for the first option that was given."""
    for option, value in values.items():
        if value is not None:
            raise UsageError(f"{option} {why}")


def report(
    runs: Annotated[
        list[Path],
        Argument(
            metavar="RUNS",
            help="The folder of a sweep or comparison, of one checkpoint, or of several sweeps; or a records file.",
        ),
    ],
    out: Annotated[Path, Option(help="The HTML page to write; the plots go beside it.")] = Path("report.html"),
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write one HTML page, and plots, from records.

    A folder stands for its own records.jsonl. A checkpoint without one stands for the records in its parent that are
    about it, with the dense model; any other folder for every records.jsonl one level below.
    """
    with command(debug):
        from secateur.cli.quiet_api import api

        written = api.write_report(api.find_records(runs), out)
        for path in written:
            say(str(path))
        if json:
            emit({"command": "report", "out": str(out), "files": [str(path) for path in written]})
