"""The arguments and options that several commands share, each declared once.

The options of one command alone are in the signature of that command. Defaults come from `secateur.requests`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.requests import EvalRequest

_PAPER = "Default: as in the method's paper"
LENGTH = f"{_PAPER} or in the protocol, or 2048; at most the model's maximum."
METHOD = "A method: `secateur methods` lists them, `secateur methods NAME` shows one with its options."
NO_METHOD = "with --params-removed `search`, with a --pattern of zeros `sparsegpt` (refine=2), and --reconstruct."

Model = Annotated[
    str,
    Argument(metavar="MODEL", help="A local folder, a hub name, or 'bundled' for the model in the package."),
]
Checkpoint = Annotated[str, Argument(metavar="DIR", help="A checkpoint, pruned or not.")]
OutFolder = Annotated[Path, Option(help="The folder to write.")]

# What is removed, and how much of it.
SetOption = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="OPTION=VALUE",
        help="Set an option of the method (`secateur methods NAME` shows them); may be repeated.",
    ),
]
Modules = Annotated[
    str | None,
    Option(
        help="Sparsity by module, NAME=S,...: q k v o gate up down, attention, mlp, own names, globs; or auto, owl.",
    ),
]
Pattern = Annotated[str | None, Option(help="unstructured, N:M, rows or columns. Default: the method's own.")]
AtLeast = Annotated[
    bool,
    Option(
        "--at-least",
        help="With --params-removed R: take the smallest step that removes R or more, not the nearest step.",
    ),
]
StockOnly = Annotated[
    bool, Option("--stock-only", help="Refuse a result that stock Hugging Face model classes cannot load.")
]
IgnoreUnknown = Annotated[
    bool,
    Option(
        "--ignore-unknown",
        help="Skip tensors in the files that the model does not have, instead of stopping.",
    ),
]
Revision = Annotated[str | None, Option(help="The hub revision.")]

# Calibration.
Calibration = Annotated[
    str | None,
    Option(help=f"Calibration text: builtin, wikitext2, c4, alpaca, a file, or task:NAME. {_PAPER}."),
]
Samples = Annotated[
    int | None, Option(help="The number of calibration windows. Default: as in the method's paper, or 128.")
]
Seqlen = Annotated[
    int | None,
    Option(help=f"Tokens in a calibration window. {_PAPER}, or 2048; at most the model's maximum."),
]
Seed = Annotated[int, Option(help="The seed of every random choice.")]
TextField = Annotated[str, Option(help="The field of .jsonl and .parquet rows that holds the text.")]
IncludePath = Annotated[Path | None, Option(metavar="DIR", help="A folder of task files for lm-eval.")]
PromptForm = Annotated[
    str,
    Option(
        metavar="FORM",
        help="How instructions become text: chat (the model's chat template), plain, or auto: chat if there is a "
        "template, but plain for the text alpaca.",
    ),
]
Reconstruct = Annotated[
    bool,
    Option(
        "--reconstruct", help="Then mend the result block by block, towards the dense model (`secateur reconstruct`)."
    ),
]
Spill = Annotated[bool, Option("--spill", help="Keep calibration activations on disk instead of in memory.")]

# What is measured.
Text = Annotated[
    str | None,
    Option(
        help="Evaluation text: builtin, wikitext2, c4, or a file. Default: that of --protocol, or wikitext2 "
        "('builtin' for the model in the package)."
    ),
]
Protocol = Annotated[str | None, Option(help="The name of a perplexity protocol; an unknown name lists all of them.")]
Tasks = Annotated[
    str,
    Option(metavar="TASK,...", help="cloze, any task of lm-eval, or the presets disp-llm and modules."),
]
NO_TASKS = ",".join(EvalRequest.tasks)
_EVAL_SEQLEN = "Tokens in a window of the evaluation text. Default: that of the protocol; at most the model's maximum."
EvalSeqlen = Annotated[int | None, Option("--eval-seqlen", help=_EVAL_SEQLEN)]
EvalOrSeqlen = Annotated[int | None, Option("--eval-seqlen", "--seqlen", help=_EVAL_SEQLEN)]
Limit = Annotated[int | None, Option(help="Only the first N windows and items.")]
Items = Annotated[int | None, Option(help="Only the first N items of each task. Default: --limit.")]
AgainstDense = Annotated[bool, Option("--against-dense", help="Also measure the shift from the dense model.")]

# The run.
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, Option(help="auto, float32, bfloat16, ...: the dtype to compute in.")]
DryRun = Annotated[
    bool,
    Option("--dry-run", help="Write nothing; print what would be done and the memory, disk and time it would take."),
]
Records = Annotated[
    Path | None, Option(help="The file to append the record to. Default: records.jsonl beside the output.")
]
Resume = Annotated[bool, Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the output if it exists.")]
Json = Annotated[
    bool,
    Option("--json", help="Print the record as one JSON object, the last line of stdout; the rest goes to stderr."),
]
Verbose = Annotated[bool, Option("--verbose", help="Print the whole record as a table too.")]
VerboseRuns = Annotated[bool, Option("--verbose", help="With --dry-run: print what is expected of each run too.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of a failure.")]
