"""`secateur generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as opt
from secateur.cli.console import command, emit, show
from secateur.cli.given import given
from secateur.requests import GenerateRequest


def generate(
    model: opt.Checkpoint,
    dense: Annotated[
        str | None, Argument(metavar="DENSE", help="A model whose text is put beside.")
    ] = GenerateRequest.dense,
    prompt: Annotated[list[str] | None, Option(metavar="TEXT", help="The text to go on from; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="A file with prompts, one a line; empty lines are skipped.")
    ] = None,
    chat: Annotated[
        bool,
        Option("--chat/--no-chat", help="Put each prompt into the chat template of the tokenizer, if it has one."),
    ] = GenerateRequest.chat,
    new: Annotated[int, Option(help="The largest number of tokens to write after each prompt.")] = GenerateRequest.new,
    temperature: Annotated[
        float, Option(help="0 takes the likeliest token each time; above, tokens are drawn.")
    ] = GenerateRequest.temperature,
    top_p: Annotated[
        float,
        Option(help="Draw from the likeliest tokens that have this share of the probability together."),
    ] = GenerateRequest.top_p,
    seed: Annotated[int, Option(help="The seed of the draws, the same for every prompt.")] = GenerateRequest.seed,
    revision: opt.Revision = GenerateRequest.revision,
    dense_revision: Annotated[
        str | None, Option(metavar="REVISION", help="The hub revision of DENSE.")
    ] = GenerateRequest.dense_revision,
    device: opt.Device = GenerateRequest.device,
    dtype: opt.Dtype = GenerateRequest.dtype,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write text with a model, beside the text of the dense model.

    No record is kept: nothing is measured.
    """
    with command(debug):
        request = given(GenerateRequest, "generate", locals(), prompt=tuple(prompt or ()))
        from secateur.cli.quiet_api import api
        from secateur.cli.texts import generated_parts

        record = api.generate(request)
        if json:
            emit(record)
        else:
            show(*generated_parts(record))
