"""`secateur pack` and `secateur unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from secateur.cli import options as opt
from secateur.cli.console import command, print_record


def pack(
    model: Annotated[str, Argument(metavar="DIR", help="A checkpoint with zeros inside.")],
    out: opt.OutFolder,
    records: opt.Records = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Store a pruned checkpoint with packed zeros: a bit mask and the other values.

    'secateur unpack' restores it byte for byte.
    """
    with command(debug):
        from secateur.cli.quiet_api import api

        print_record(api.pack(model, out, overwrite=overwrite, records_file=records), as_json=json)


def unpack(
    folder: Annotated[Path, Argument(metavar="DIR", help="A folder that 'secateur pack' wrote.")],
    out: opt.OutFolder,
    records: opt.Records = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Restore the checkpoint that was packed."""
    with command(debug):
        from secateur.cli.quiet_api import api

        print_record(api.unpack(folder, out, overwrite=overwrite, records_file=records), as_json=json)
