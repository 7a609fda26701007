"""The command line: parses, calls `secateur.api`, prints. Results go to stdout, everything else to stderr.

One file a group of commands; this one lists them all.

Typer reads the options of a command from its signature, so commands repeat the lines of the options they share. What an
option is stands once in `options.py`, its default once in `requests.py`; tests/cli/test_given.py holds every signature
against the requests.
"""

from __future__ import annotations

import typer

from secateur.cli import (
    compare,
    convert,
    demo,
    evaluate,
    generate,
    heal,
    inspect,
    pack,
    predict,
    prune,
    reconstruct,
    run,
    study,
    sweep,
)
from secateur.cli.method_help import MethodCommand
from secateur.cli.switch_help import SwitchCommand

app = typer.Typer(
    help="Prune Hugging Face causal language models, measure what it cost, and ship the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
studies = typer.Typer(help="Studies: many runs that answer one question, each run a record.", no_args_is_help=True)

app.command(cls=MethodCommand)(prune.prune)
app.command(name="eval", cls=SwitchCommand)(evaluate.evaluate)
app.command(cls=SwitchCommand)(generate.generate)
app.command(cls=MethodCommand)(sweep.sweep)
app.command()(compare.compare)
app.command(cls=SwitchCommand)(reconstruct.reconstruct)
app.command(cls=SwitchCommand)(heal.heal)
app.command()(run.run)
app.command()(predict.predict)
app.command()(inspect.inspect)
app.command()(inspect.bench)
app.command(name="import")(convert.import_)
app.command()(pack.pack)
app.command()(pack.unpack)
app.command()(predict.report)
app.command()(prune.methods)
app.command()(demo.demo)
app.add_typer(studies, name="study")
studies.command(name="modules", cls=MethodCommand)(study.study_modules)
studies.command(name="disp-llm")(study.study_disp_llm)


def main() -> None:
    """The `secateur` command."""
    app()
