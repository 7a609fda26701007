"""The command line: parses, calls `secateur.api`, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import launched, speaks
from secateur.core.words import perplexity_words

if TYPE_CHECKING:
    from secateur.core.records import Record

RESUME = "the same command with --resume goes on from here"
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    help="Prune Hugging Face causal language models, measure what it cost, and ship the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

study = typer.Typer(help="Studies: many runs that answer one question, each run a record.", no_args_is_help=True)
app.add_typer(study, name="study")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a hub name, or 'bundled' for the model in the package.")]
Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object, the record; all else goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Revision = Annotated[str | None, typer.Option(help="The hub revision.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, ...: the dtype to compute in.")]
Calibration = Annotated[
    str | None, typer.Option(help="Calibration text: builtin, wikitext2, c4, alpaca, a file, or task:NAME. Default: that of the method's paper.")
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows. Default: those of the method's paper, or 128.")]
Seqlen = Annotated[
    int | None, typer.Option(help="Tokens of a window. Default: that of the method's paper or of the protocol, or 2048; at most the model's maximum.")
]
Seed = Annotated[int, typer.Option(help="The seed of every random choice.")]
Modules = Annotated[str | None, typer.Option(help="Per-module sparsity, NAME=S,...: q k v o gate up down, attention, mlp, own names, globs; or auto, owl.")]
PatternOption = Annotated[str | None, typer.Option("--pattern", help="unstructured, N:M, rows, columns.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="An option of the method; may be repeated.")]
Records = Annotated[Path | None, typer.Option(help="Where the record is appended. Default: records.jsonl beside the output.")]
TextField = Annotated[str, typer.Option(help="The field of .jsonl and .parquet rows that holds the text.")]
Text = Annotated[str | None, typer.Option(help="Evaluation text: builtin, wikitext2, c4, or a file.")]
ProtocolOption = Annotated[str | None, typer.Option("--protocol", help="A named perplexity protocol; an unknown name lists them.")]
Tasks = Annotated[str, typer.Option(metavar="TASK,...", help="cloze, any task of lm-eval, or the presets disp-llm and modules.")]
IncludePath = Annotated[Path | None, typer.Option(metavar="DIR", help="A folder of task files for lm-eval.")]
Limit = Annotated[int | None, typer.Option(help="Use the first so many windows and items.")]
AtLeast = Annotated[bool, typer.Option("--at-least", help="With --params-removed: the first step that removes as much, not the nearest one.")]
IgnoreUnknown = Annotated[bool, typer.Option("--ignore-unknown", help="Leave out tensors of the files that the model does not have, instead of refusing.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and what it would take.")]
Against = Annotated[str | None, typer.Option(metavar="DENSE", help="Also say how behaviour shifted from this model.")]


@app.command()
def prune(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    method: Annotated[str, typer.Option(help="A method; `secateur methods` lists them.")] = "",
    sparsity: Annotated[float | None, typer.Option(help="The fraction to remove, in [0, 1).")] = None,
    params_removed: Annotated[
        float | None, typer.Option(help="Instead of --sparsity: the share of all parameters to remove; the nearest step is taken.")
    ] = None,
    at_least: AtLeast = False,
    modules: Modules = None,
    pattern: PatternOption = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    options: Set = None,
    text_field: TextField = "text",
    include_path: IncludePath = None,
    spill: Annotated[bool, typer.Option("--spill", help="Keep calibration activations on disk instead of in memory.")] = False,
    stock_only: Annotated[bool, typer.Option("--stock-only", help="Refuse results that are not a stock architecture.")] = False,
    ignore_unknown: IgnoreUnknown = False,
    dry_run: DryRun = False,
    records: Records = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune a model and write the result."""

    def run() -> None:
        _need(method, "--method M (`secateur methods` lists them)")
        api = _api()
        request = api.Request(
            model, method, sparsity, params_removed, modules, pattern, calibration, samples, seqlen, seed, revision, device, dtype,
            _options(options), text_field, spill, stock_only, include_path, at_least, ignore_unknown,
        )  # fmt: skip
        if dry_run:
            _print(api.estimate(api.prepare(request)), json)
            return
        if out is None:
            raise UsageError("--out DIR is missing: the folder to write (or --dry-run)")
        _print(api.prune(request, out, resume=resume, overwrite=overwrite, records_file=records), json)

    _guard(run, debug, resume=RESUME, together=True)


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, pruned or not.")],
    text: Text = None,
    protocol: ProtocolOption = None,
    seqlen: Seqlen = None,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    against: Against = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    text_field: TextField = "text",
    records: Records = None,
    resume: Resume = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, tasks, and the shift from a dense model."""

    def run() -> None:
        api = _api()
        request = api.EvalRequest(model, text, protocol, seqlen, _names(tasks), limit, against, None, revision, device, dtype, text_field, include_path)
        _print(api.evaluate(request, records_file=records, resume=resume), json)

    _guard(run, debug, resume=RESUME)


@app.command()
def sweep(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for the checkpoints and records.jsonl.")],
    method: Annotated[str, typer.Option(help="A method.")],
    sparsity: Annotated[str, typer.Option(metavar="S,S,...", help="The fractions to remove.")],
    modules: Modules = None,
    pattern: PatternOption = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    options: Set = None,
    text: Text = None,
    protocol: ProtocolOption = None,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    ignore_unknown: IgnoreUnknown = False,
    against: Annotated[bool, typer.Option("--against-dense", help="Also measure the shift from the dense model.")] = False,
    records: Records = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the dense model, then prune and measure at each sparsity."""

    def run() -> None:
        api = _api()
        request = api.Request(
            model, method, None, None, modules, pattern, calibration, samples, seqlen, seed, revision, device, dtype, _options(options),
            include_path=_of_calibration(include_path, calibration), ignore_unknown=ignore_unknown,
        )  # fmt: skip
        measure = api.EvalRequest(
            model, text, protocol, None, _names(tasks), limit, model if against else None, revision, None, device, dtype, include_path=_of_tasks(include_path, calibration, tasks)
        )  # fmt: skip
        points = api.sweep(request, _numbers(sparsity, "--sparsity"), out, measure, resume=resume, overwrite=overwrite, records_file=records)
        found = []
        for record in points:
            found.append(record)
            _tell(f"{record.get('method') or 'dense'} {record.get('sparsity')}: ppl {perplexity_words(record['ppl'])}")
        _print_all(found, json)

    _guard(run, debug, resume=RESUME)


@study.command(name="modules")
def study_modules(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The folder of the study: records.jsonl, and the text of tasks it calibrates on.")] = None,
    method: Annotated[str, typer.Option(help="A method with a mask for each matrix.")] = "wanda",
    kinds: Annotated[str, typer.Option(metavar="NAME,...", help="Names as in --modules. Default: each projection, attention, mlp, all.")] = "",
    sparsity: Annotated[str, typer.Option(metavar="S,S,...", help="In [0, 1]. Default: 0.1 to 0.9, 0.95, 1.")] = "",
    weights: Annotated[str, typer.Option(metavar="N,N,...", help="Also remove so many weights of each kind that has them.")] = "",
    grid: Annotated[str, typer.Option(metavar="S,S,...", help="Also combine these sparsities of attention and of MLP.")] = "",
    mode: Annotated[str, typer.Option(help="shared: statistics of the dense model for all cells; sequential: each cell as prune makes it.")] = "shared",
    jobs: Annotated[int, typer.Option(help="Processes that share the cells.")] = 1,
    engine: Annotated[str, typer.Option(help="Where they run: processes (of this machine), or ray (a cluster; pip install 'secateur[ray]').")] = "processes",
    pattern: PatternOption = None,
    calibration: Annotated[str | None, typer.Option(help="As for prune, or task:NAME (task:NAME+NAME): the text of tasks.")] = None,
    samples: Samples = 128,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    options: Set = None,
    text: Text = None,
    protocol: ProtocolOption = None,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    ignore_unknown: IgnoreUnknown = False,
    dry_run: DryRun = False,
    records: Records = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Which module matters: prune one kind of matrix at a time, at every sparsity, and measure each."""

    def run() -> None:
        api = _api()
        from secateur.report import modules as told
        from secateur.study import modules

        request = api.Request(
            model, method, None, None, None, pattern, calibration, samples, seqlen, seed, revision, device, dtype, _options(options),
            include_path=_of_calibration(include_path, calibration), ignore_unknown=ignore_unknown,
        )  # fmt: skip
        measure = api.EvalRequest(model, text, protocol, None, _names(tasks), limit, None, None, revision, device, dtype, include_path=_of_tasks(include_path, calibration, tasks))
        asked = modules.Asked(
            _names(kinds),
            _numbers(sparsity, "--sparsity", highest=1.0) if sparsity else (),
            [round(count) for count in _numbers(weights, "--weights", highest=None)] if weights else (),
            _numbers(grid, "--grid", highest=1.0) if grid else (),
            mode,
        )
        if dry_run:
            held = (records or (out and out / "records.jsonl")) if resume else None
            _print(modules.estimate(request, asked, measure, records_file=held), json)
            if measure.tasks:
                _tell("what the tasks take is not in the estimate")
            return
        if out is None:
            raise UsageError("--out DIR is missing: the folder of the study (or --dry-run)")
        found = list(modules.run(request, asked, out, measure, jobs=jobs, engine=engine, resume=resume, overwrite=overwrite, records_file=records))
        study = told.read_studies(found)[0]
        verdict = told.verdict(study)
        if json:
            _emit({"records": found, "verdict": verdict})
            return
        from secateur.terminal import modules_table

        _show(modules_table(study))
        for line in verdict:
            typer.echo(line)

    _guard(run, debug, resume=RESUME)


@study.command(name="disp-llm")
def study_disp_llm(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The folder for the checkpoints and records.jsonl.")] = None,
    sparsity: Annotated[str, typer.Option(metavar="S,S,...", help="The fractions of all parameters to remove.")] = "0.3,0.5",
    parts: Annotated[str, typer.Option(help="Parts of the study, comma-separated; an unknown one lists them. Default: all.")] = "",
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    options: Set = None,
    text: Text = None,
    protocol: ProtocolOption = None,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    ignore_unknown: IgnoreUnknown = False,
    against: Annotated[bool, typer.Option("--against-dense", help="Also measure the shift from the dense model.")] = False,
    dry_run: DryRun = False,
    records: Records = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The ablations of DISP-LLM: hypernetwork, constraint, estimator, norm, lambda and seeds, each run a record."""

    def run() -> None:
        api = _api()
        from secateur.study import disp_llm

        request = api.Request(
            model, disp_llm.METHOD, None, None, None, None, calibration, samples, seqlen, seed, revision, device, dtype, _options(options),
            include_path=_of_calibration(include_path, calibration), ignore_unknown=ignore_unknown,
        )  # fmt: skip
        measure = api.EvalRequest(
            model, text, protocol, None, _names(tasks), limit, model if against else None, revision, None, device, dtype, include_path=_of_tasks(include_path, calibration, tasks)
        )  # fmt: skip
        wanted, chosen = _numbers(sparsity, "--sparsity"), _names(parts)
        if dry_run:
            _print(disp_llm.estimate(request, wanted, parts=chosen), json)
            return
        if out is None:
            raise UsageError("--out DIR is missing: the folder of the study (or --dry-run)")
        found = []
        for record in disp_llm.run(request, wanted, out, measure, parts=chosen, resume=resume, overwrite=overwrite, records_file=records):
            found.append(record)
            _tell(f"{Path(record['out']).name}: ppl {perplexity_words(record['ppl'])}")
        table = disp_llm.summary(request, wanted, found, parts=chosen)
        if json:
            _emit({"records": found, "study": table})
            return
        from secateur.terminal import study_table

        _show(study_table(table, found[0]["ppl"]))

    _guard(run, debug, resume=RESUME)


@app.command()
def compare(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for the checkpoints, records.jsonl, compare.md and report.html.")],
    methods: Annotated[str, typer.Option(metavar="M,M,...", help="The methods; `secateur methods` lists them.")] = "",
    params_removed: Annotated[str, typer.Option(metavar="R,R,...", help="Pruning ratios over all parameters, for what removes them.")] = "",
    sparsity: Annotated[str, typer.Option(metavar="S,S,...", help="Sparsities, for unstructured pruning.")] = "",
    at_least: AtLeast = False,
    patterns: Annotated[str, typer.Option(metavar="P,P,...", help="unstructured, N:M, rows, columns. Default: the method's own, and rows.")] = "",
    with_heal: Annotated[bool, typer.Option("--heal", help="Measure each result with low-rank recovery too.")] = False,
    heal_steps: Annotated[int | None, typer.Option(help="Steps of healing.")] = None,
    with_bench: Annotated[bool, typer.Option("--bench", help="Time each result in turns with the dense model.")] = False,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    options: Annotated[list[str] | None, typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="An option of one method; may be repeated.")] = None,
    text: Text = None,
    protocol: ProtocolOption = None,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    ignore_unknown: IgnoreUnknown = False,
    records: Records = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run methods side by side at the same measured pruning ratio, and write the table that papers print."""

    def run() -> None:
        api = _api()
        from secateur.study import compare as study

        if heal_steps is not None and not with_heal:
            raise UsageError("--heal-steps belongs to --heal: add it")
        steps = {} if heal_steps is None else {"steps": heal_steps}
        heal = api.HealRequest(model, calibration, seqlen=seqlen, text=text, protocol=protocol, limit=limit, device=device, dtype=dtype, seed=seed, **steps)
        asked = study.Asked(
            api.Request(
                model,
                "",
                calibration=calibration,
                samples=samples,
                seqlen=seqlen,
                seed=seed,
                revision=revision,
                device=device,
                dtype=dtype,
                include_path=_of_calibration(include_path, calibration),
                at_least=at_least,
                ignore_unknown=ignore_unknown,
            ),
            _names(methods),
            _numbers(params_removed, "--params-removed") if params_removed else [],
            _numbers(sparsity, "--sparsity") if sparsity else [],
            _names(patterns),
            _method_options(options, _names(methods)),
            heal if with_heal else None,
            api.BenchRequest(model, device=device, dtype=dtype) if with_bench else None,
        )
        todo = study.cells(asked)
        for note in todo.notes():
            _tell(note)
        measure = api.EvalRequest(model, text, protocol, None, _names(tasks), limit, None, None, revision, device, dtype, include_path=_of_tasks(include_path, calibration, tasks))
        found = []
        for record in study.run(asked, todo, out, measure, resume=resume, overwrite=overwrite, records_file=records):
            found.append(record)
            _tell(f"{Path(record['out']).name if record.get('method') else 'dense'}: ppl {perplexity_words(record['ppl'])}")
        result = study.summary(asked, todo, out.absolute(), found, records_file=records)
        if json:
            _emit({"records": found, "refused": todo.refused, "failed": todo.failed, "untimed": todo.untimed, "unhealed": todo.unhealed})
        elif result is not None:
            from secateur.terminal import cells_table

            _show(cells_table(result.table))
            for note in result.notes:
                _tell(note)
        _tell(f"{out / 'compare.md'}, {out / 'report.html'}" if result is not None else str(out / "report.html"))
        if failed := todo.incomplete():
            first = failed[0]
            raise SecateurError(f"{len(failed)} of {len(todo.runs)} runs failed, first {first}; the same command with --resume tries them again")

    _guard(run, debug, resume=RESUME)


@app.command()
def heal(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint that 'secateur prune' wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    calibration: Annotated[
        str | None, typer.Option(help="Text or instructions to heal on: builtin, wikitext2, c4, alpaca, or a file. Default: what it was pruned with.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 1000,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 4,
    lr: Annotated[float, typer.Option(help="The learning rate at its highest.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help="cosine or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    rank: Annotated[int, typer.Option(help="The rank of the adapters.")] = 32,
    alpha: Annotated[float, typer.Option(help="Updates are scaled by alpha / rank.")] = 10.0,
    targets: Annotated[str, typer.Option(metavar="NAME,...", help="What gets an adapter: names as in --modules.")] = "all",
    completion_only: Annotated[bool, typer.Option("--completion-only", help="Of instructions, learn the answers alone.")] = False,
    keep_adapter: Annotated[bool, typer.Option("--keep-adapter", help="Write the adapter (in peft's form) instead of merging it.")] = False,
    samples: Annotated[int, typer.Option(help="Windows, or instructions, to draw from.")] = 1024,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a window. Default: min(1024, the model's maximum).")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between two saves, from which --resume goes on.")] = 100,
    checkpointing: Annotated[bool, typer.Option(help="Keep one activation a block: a third more time, much less memory.")] = True,
    seed: Seed = 0,
    text: Text = None,
    protocol: ProtocolOption = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    text_field: TextField = "text",
    records: Records = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Recover a pruned model with low-rank adapters: zeros stay zero, shapes stay as they are."""

    def run() -> None:
        api = _api()
        request = api.HealRequest(
            model, calibration, steps, batch, lr, schedule, weight_decay, rank, alpha, _names(targets), completion_only, keep_adapter, samples, seqlen,
            save_every, checkpointing, seed, text, protocol, limit, device, dtype, text_field,
        )  # fmt: skip
        _print(api.heal(request, out, resume=resume, overwrite=overwrite, records_file=records), json)

    _guard(run, debug, resume=RESUME)


@app.command()
def predict(
    points: Annotated[
        list[Path] | None, typer.Argument(metavar="POINTS...", help="Records of a sweep (files or folders), or one CSV: sparsity,ppl or sparsity,acc.")
    ] = None,
    metric: Annotated[str | None, typer.Option(metavar="ppl|TASK", help="What to predict; TASK:acc_norm for the normalised accuracy.")] = None,
    law: Annotated[str | None, typer.Option(help="The law; an unknown name lists them, 'best' takes the least held-out error. Default: the paper's.")] = None,
    at: Annotated[list[str] | None, typer.Option(metavar="S,S,...", help="Sparsities to predict. Default: those measured.")] = None,
    target_ppl: Annotated[float | None, typer.Option(help="Find the largest sparsity with this perplexity or less.")] = None,
    target_acc: Annotated[float | None, typer.Option(help="Find the largest sparsity with this accuracy or more.")] = None,
    chance: Annotated[float | None, typer.Option(help="What guessing scores on the task; known for cloze.")] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Keep records with this value, as method=wanda; may be repeated.")] = None,
    dense_in_fit: Annotated[bool, typer.Option("--dense-in-fit", help="Count the dense model as a point of the fit.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the points, the law and its rivals.")] = None,
    spectrum: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Predict SliceGPT's perplexity from a calibration pass of this dense model; POINTS may be left out.")
    ] = None,
    dense_ppl: Annotated[float | None, typer.Option(help="With --spectrum and no POINTS: the perplexity of the dense model.")] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit the laws to measured points; predict other sparsities, or find the largest that keeps a wanted value."""

    def run() -> None:
        asked = [s for part in at or [] for s in _numbers(part, "--at")]
        if spectrum is not None:
            _spectrum(asked)
            return
        if given := [name for name, value in (("--dense-ppl", dense_ppl), ("--calibration", calibration), ("--seqlen", seqlen)) if value is not None]:
            raise UsageError(f"{given[0]} belongs to --spectrum MODEL: add it")
        if not points:
            raise UsageError("POINTS are missing: records of a sweep, or a CSV with columns sparsity,ppl (or --spectrum MODEL)")
        record = _api().predict(
            points, metric=metric, law=law, at=asked, target_ppl=target_ppl, target_acc=target_acc, chance=chance,
            where=_options(where, "--where"), dense_in_fit=dense_in_fit, plot=plot,
        )  # fmt: skip
        if json:
            _emit(record)
            return
        from secateur.terminal import law_tables

        for table in law_tables(record):
            _show(table)
        for warning in record["warnings"]:
            _tell(f"warning: {warning}")

    def _spectrum(asked: list[float]) -> None:
        if given := [name for name, value in (("--law", law), ("--metric", metric), ("--target-acc", target_acc), ("--plot", plot)) if value is not None]:
            raise UsageError(f"{given[0]} does not go with --spectrum, which has one law, of perplexity")
        assert spectrum is not None
        api = _api()
        request = api.Request(spectrum, "slicegpt", calibration=calibration, samples=samples, seqlen=seqlen)
        record = api.predict_from_spectrum(request, points or [], dense_ppl=dense_ppl, at=asked, target_ppl=target_ppl, where=_options(where, "--where"))
        if json:
            _emit(record)
            return
        from secateur.terminal import spectrum_tables

        for table in spectrum_tables(record):
            _show(table)
        for warning in record["warnings"]:
            _tell(f"warning: {warning}")

    _guard(run, debug)


@app.command()
def inspect(
    model: Model,
    flow: Annotated[bool, typer.Option("--flow", help="Every linear map in terms of the model's widths; parameters and FLOPs as functions of s.")] = False,
    context: Annotated[
        int | None,
        typer.Option(
            help="With --flow: the positions attention looks at. Default: that of the method's paper or of the protocol, or 2048; at most the model's maximum."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="With --flow: draw it.")] = None,
    revision: Revision = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what was removed, block by block; parameters, bytes, FLOPs."""

    def run() -> None:
        if flow:
            _flow(model, revision, context, plot, json)
            return
        if context is not None or plot is not None:
            raise UsageError(f"{'--plot' if plot else '--context'} belongs to --flow: add it")
        record = _api().inspect(model, revision)
        if json:
            _print(record, json)
        else:
            from secateur.terminal import inspect_table

            _show(inspect_table(record))

    _guard(run, debug)


def _flow(model: str, revision: str | None, context: int | None, plot: Path | None, json: bool) -> None:
    found = _api().inspect_flow(model, revision, context)
    record = found.record()
    if plot is not None:
        _api().plot_flow(found, plot)
        _tell(str(plot))
        record["plot"] = str(plot)
    if json:
        _print(record, json)
        return
    from secateur.terminal import flow_tables

    for part in flow_tables(record):
        _show(part)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, pruned or not.")],
    dense: Annotated[str | None, typer.Argument(metavar="DENSE", help="A model to put beside it; the two take turns.")] = None,
    batch: Annotated[str, typer.Option(metavar="B,B,...", help="Sequences at once.")] = "1,16",
    prompt: Annotated[int, typer.Option(help="Tokens of a sequence before the first new one.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to generate after them.")] = 32,
    repeats: Annotated[int, typer.Option(help="Turns; the best of each counts.")] = 3,
    seed: Annotated[int, typer.Option(help="The seed of the prompts, which are random tokens.")] = 0,
    semi_structured: Annotated[bool, typer.Option("--semi-structured", help="Multiply by 2:4 matrices in torch's compressed form (accelerators).")] = False,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    records: Records = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure throughput, latency and memory, beside a dense model and beside what the machine allows."""

    def run() -> None:
        api = _api()
        request = api.BenchRequest(model, dense, _counts(batch, "--batch"), prompt, new, repeats, revision, device, dtype, seed, semi_structured)
        record = api.bench(request, records_file=records)
        if json:
            _emit(record)
            return
        from secateur.terminal import bench_tables

        for part in bench_tables(record):
            _show(part)

    _guard(run, debug)


@app.command()
def pack(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint with zeros inside.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    records: Records = None,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Store a pruned checkpoint with its zeros packed: a bit mask and the values. 'secateur unpack' gives it back, byte for byte."""
    _guard(lambda: _print(_api().pack(model, out, overwrite=overwrite, records_file=records), json), debug)


@app.command()
def unpack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that 'secateur pack' wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    records: Records = None,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the checkpoint that was packed."""
    _guard(lambda: _print(_api().unpack(folder, out, overwrite=overwrite, records_file=records), json), debug)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS", help="Records files, or folders that hold records.jsonl.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write; the plots go beside it.")] = Path("report.html"),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page, and plots, from records."""

    def run() -> None:
        from secateur.core import records

        written = _api().write_report(records.read(runs), out)
        for path in written:
            _tell(str(path))
        if json:
            _emit({"command": "report", "out": str(out), "files": [str(path) for path in written]})

    _guard(run, debug)


@app.command()
def methods(json: Json = False) -> None:
    """List the pruning methods."""
    from secateur.methods import find_method, method_names

    found = {name: find_method(name).summary for name in method_names()}
    if json:
        _emit({"command": "methods", "methods": found})
        return
    for name, summary in found.items():
        typer.echo(f"{name:12} {summary}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where checkpoints, records and report.html go.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sparsities and less text: to see that it works.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune the bundled model with every method, measure each result, and write a report."""

    def run() -> None:
        _api()
        from secateur.demo import run_demo

        _print_all(run_demo(out, quick=quick), json)

    _guard(run, debug, resume="the same command goes on from here")


def _api() -> Any:
    """Imported late: torch and transformers take seconds, which `--help` need not wait for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    from secateur import api

    logging.disable_progress_bar()
    return api


def _guard(run: Callable[[], None], debug: bool, *, resume: str = "nothing was written", together: bool = False) -> None:
    """Run a command and turn failures into one line and an exit status. `together`: it may run in several processes."""
    if launched() and not together:
        _stop("error: torchrun: `secateur prune` alone can use several processes; start this command without it", USAGE)
    try:
        run()
    except KeyboardInterrupt:
        _stop(f"interrupted; {resume}", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not speaks() and not isinstance(error, SecateurError):  # the failure of one process; those that all share the first one tells
            typer.echo(f"process {os.environ['RANK']}: {_words(error)}", err=True)
        _stop(_words(error), USAGE if isinstance(error, UsageError) else FAILED)


def _words(error: Exception) -> str:
    if isinstance(error, SecateurError):
        return f"error: {error}"
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "error: out of memory on the accelerator; use shorter windows (--seqlen), fewer --samples or --spill where a model is pruned, or --device cpu"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "error: out of memory; use shorter windows (--seqlen), and fewer --samples or --spill where a model is pruned"
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"error: {type(error).__name__}: {first} (unexpected: --debug shows where; please report it)"


def _stop(line: str, status: int) -> NoReturn:
    _tell(line)
    raise typer.Exit(status)


def _tell(line: str) -> None:
    if speaks():
        typer.echo(line, err=True)


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def _print(record: Record, as_json: bool) -> None:
    if not speaks():
        return
    if as_json:
        _emit(record)
        return
    from secateur.terminal import record_table

    _show(record_table(record))


def _print_all(found: list[Record], as_json: bool) -> None:
    if as_json:
        _emit({"records": found})
        return
    from secateur.terminal import runs_table

    _show(runs_table(found))


def _emit(record: Record) -> None:
    from secateur.core.records import to_json

    sys.stdout.write(to_json(record) + "\n")
    sys.stdout.flush()


def _need(value: str, what: str) -> None:
    if not value:
        raise UsageError(f"missing {what}")


def _of_calibration(include_path: Path | None, calibration: str | None) -> Path | None:
    """The folder of task files, where the calibration is on a task."""
    return include_path if (calibration or "").startswith("task:") else None


def _of_tasks(include_path: Path | None, calibration: str | None, tasks: str) -> Path | None:
    """The folder of task files, unless the calibration alone needs it."""
    return include_path if tasks or _of_calibration(include_path, calibration) is None else None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, option: str, *, highest: float | None = 0.0) -> list[float]:
    """Numbers from 0 to `highest` (0.0: below 1; None: any)."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{option} {text}: numbers separated by commas are expected, as in 0.1,0.2,0.3") from None
    if not found:
        raise UsageError(f"{option} is empty: numbers separated by commas are expected, as in 0.1,0.2,0.3")
    for value in found:
        if value < 0 or (value >= 1 if highest == 0.0 else highest is not None and value > highest):
            raise UsageError(f"{option}: {value:g} is outside {'[0, 1)' if highest == 0.0 else '[0, 1]' if highest else 'the numbers above 0'}")
    return found


def _counts(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{option} {text}: whole numbers separated by commas are expected, as in 1,16") from None


def _method_options(given: list[str] | None, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Method -> its options, from METHOD.OPTION=VALUE."""
    found: dict[str, dict[str, str]] = {}
    for part in given or []:
        name, equals, value = part.partition("=")
        method, dot, option = (word.strip() for word in name.partition("."))
        if not (equals and dot and method and option):
            raise UsageError(f"--set {part}: METHOD.OPTION=VALUE is expected, as in {_example(methods, option or method, value)}")
        found.setdefault(method, {})[option] = value.strip()
    return found


def _example(methods: Sequence[str], option: str, value: str) -> str:
    """An option of one of the methods, by preference the one that was meant."""
    from secateur.methods import find_method

    defaults = {(method, name): default for method in methods for name, default in vars(find_method(method).options({})).items() if name != "pattern"}
    meant = next((found for found in defaults if found[1] == option), None)
    if meant is not None:
        return f"--set {meant[0]}.{option}={value.strip() or defaults[meant]}"
    method, name = min(defaults, key=lambda found: not defaults[found], default=("slicegpt", "round"))
    return f"--set {method}.{name}={defaults.get((method, name), 8)}"


def _options(given: list[str] | None, option: str = "--set") -> dict[str, str]:
    options = {}
    for part in given or []:
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {part}: write {'OPTION' if option == '--set' else 'NAME'}=VALUE")
        options[name.strip()] = value.strip()
    return options


def main() -> None:
    """The `secateur` command."""
    app()


if __name__ == "__main__":  # torchrun -m secateur.cli prune ...
    main()
