"""`secateur import`: models that come in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as opt
from secateur.cli.console import command, print_record


def import_(
    file: Annotated[Path, Argument(metavar="FILE.gguf", help="A GGUF file; join one that is split first.")],
    out: opt.OutFolder,
    dtype: Annotated[
        str,
        Option(
            help="The dtype of the weights: auto (that of the matrices in the file; bfloat16 if they are quantised), "
            "bfloat16, float16, or float32."
        ),
    ] = "auto",
    records: opt.Records = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write a GGUF file as a Hugging Face folder, so that its model can be pruned. Quantised weights become numbers.

    It needs the package gguf, which the extra of that name brings.
    """
    with command(debug):
        from secateur.cli.quiet_api import api

        record = api.import_gguf(file, out, dtype=dtype, overwrite=overwrite, records_file=records)
        print_record(record, as_json=json)
