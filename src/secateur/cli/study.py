"""`secateur study modules` and `secateur study disp-llm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from secateur.cli import options as opt
from secateur.cli.console import RESUME, command, emit, print_record, show
from secateur.cli.given import given
from secateur.cli.parse import folder_for_calibration, folder_for_tasks, names, numbers, settings
from secateur.core.errors import UsageError
from secateur.core.progress import say
from secateur.core.words import perplexity_words
from secateur.requests import EvalRequest, ModulesRequest, Request


def study_modules(
    model: opt.Model,
    out: Annotated[
        Path | None,
        Option(help="The folder of the study: records.jsonl, and the text of the calibration tasks."),
    ] = None,
    method: Annotated[
        str, Option(metavar="NAME", help="A method that masks each matrix; `secateur methods NAME` shows its options.")
    ] = "wanda",
    kinds: Annotated[
        str,
        Option(
            metavar="NAME,...", help="Names as in --modules. Default: each projection, then attention, mlp and all."
        ),
    ] = "",
    sparsity: Annotated[
        str, Option(metavar="S,S,...", help="Sparsities in [0, 1]. Default: 0.1 to 0.9, 0.95, 1.")
    ] = "",
    weights: Annotated[
        str,
        Option(metavar="N,N,...", help="Also remove N weights from each kind, if it has that many."),
    ] = "",
    grid: Annotated[str, Option(metavar="S,S,...", help="Also combine these sparsities of attention and of MLP.")] = "",
    mode: Annotated[
        str,
        Option(help="shared: all runs use the statistics of the dense model; sequential: each run as in prune."),
    ] = ModulesRequest.mode,
    jobs: Annotated[int, Option(help="The number of processes that share the runs.")] = ModulesRequest.jobs,
    engine: Annotated[
        str,
        Option(help="Where the runs go: processes (this machine) or ray (a cluster; needs the package ray)."),
    ] = ModulesRequest.engine,
    pattern: opt.Pattern = Request.pattern,
    calibration: Annotated[
        str | None,
        Option(help="Calibration text, as in prune; task:NAME+NAME takes the text of several tasks."),
    ] = Request.calibration,
    samples: opt.Samples = 128,
    seqlen: opt.Seqlen = Request.seqlen,
    seed: opt.Seed = Request.seed,
    revision: opt.Revision = Request.revision,
    device: opt.Device = Request.device,
    dtype: opt.Dtype = Request.dtype,
    options: opt.SetOption = None,
    text: opt.Text = EvalRequest.text,
    protocol: opt.Protocol = EvalRequest.protocol,
    eval_seqlen: opt.EvalSeqlen = EvalRequest.seqlen,
    tasks: opt.Tasks = opt.NO_TASKS,
    text_field: opt.TextField = Request.text_field,
    prompt_form: opt.PromptForm = Request.prompt_form,
    include_path: opt.IncludePath = None,
    limit: opt.Limit = EvalRequest.limit,
    items: opt.Items = EvalRequest.items,
    ignore_unknown: opt.IgnoreUnknown = Request.ignore_unknown,
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Find which module matters: prune one kind of matrix at a time, at every sparsity, and measure each result."""
    with command(debug, resume=RESUME):
        request = given(
            Request,
            "study modules",
            locals(),
            options=settings(options),
            include_path=folder_for_calibration(include_path, calibration),
        )
        folder = folder_for_tasks(include_path, calibration, tasks)
        measure = given(EvalRequest, "study modules", locals(), tasks=names(tasks), include_path=folder)
        weight_counts = numbers(weights, "--weights", within="[0, inf)") if weights else ()
        variants = ModulesRequest(
            kinds=names(kinds),
            sparsities=numbers(sparsity, "--sparsity", within="[0, 1]") if sparsity else (),
            weights=[round(count) for count in weight_counts],
            grid=numbers(grid, "--grid", within="[0, 1]") if grid else (),
            mode=mode,
            jobs=jobs,
            engine=engine,
        )
        from secateur.cli.quiet_api import api

        if dry_run:
            finished = (records or (out and out / "records.jsonl")) if resume else None
            print_record(api.estimate_study_modules(request, variants, measure, records_file=finished), as_json=json)
            if measure.tasks:
                say("note: the estimate leaves out the time of the tasks")
            return
        if out is None:
            raise UsageError("--out DIR is missing: the folder of the study (or --dry-run)")
        writing = {"resume": resume, "overwrite": overwrite}
        cells = list(api.study_modules(request, variants, out, measure, records_file=records, **writing))
        study = api.read_module_studies(cells)[0]
        verdict = api.verdict(study)
        if json:
            emit({"records": cells, "verdict": verdict})
            return
        from secateur.cli.terminal import modules_table

        show(modules_table(study))
        for line in verdict:
            echo(line)


def study_disp_llm(
    model: opt.Model,
    out: Annotated[Path | None, Option(help="The folder for the checkpoints and records.jsonl.")] = None,
    sparsity: Annotated[
        str,
        Option("--params-removed", "--sparsity", metavar="R,R,...", help="The shares of all parameters to remove."),
    ] = "0.3,0.5",
    parts: Annotated[
        str,
        Option(help="Parts of the study, separated by commas; an unknown name lists all of them. Default: all."),
    ] = "",
    calibration: opt.Calibration = Request.calibration,
    samples: opt.Samples = Request.samples,
    seqlen: opt.Seqlen = Request.seqlen,
    seed: opt.Seed = Request.seed,
    revision: opt.Revision = Request.revision,
    device: opt.Device = Request.device,
    dtype: opt.Dtype = Request.dtype,
    options: opt.SetOption = None,
    text: opt.Text = EvalRequest.text,
    protocol: opt.Protocol = EvalRequest.protocol,
    eval_seqlen: opt.EvalSeqlen = EvalRequest.seqlen,
    tasks: opt.Tasks = opt.NO_TASKS,
    text_field: opt.TextField = Request.text_field,
    prompt_form: opt.PromptForm = Request.prompt_form,
    include_path: opt.IncludePath = None,
    limit: opt.Limit = EvalRequest.limit,
    items: opt.Items = EvalRequest.items,
    spill: opt.Spill = Request.spill,
    ignore_unknown: opt.IgnoreUnknown = Request.ignore_unknown,
    against: opt.AgainstDense = False,
    dry_run: opt.DryRun = False,
    records: opt.Records = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Run the ablations of DISP-LLM: hypernetwork, constraint, estimator, norm, lambda, seeds; one record per run."""
    with command(debug, resume=RESUME):
        request = given(
            Request,
            "study disp-llm",
            locals(),
            method="disp_llm",
            options=settings(options),
            include_path=folder_for_calibration(include_path, calibration),
        )
        measure = given(
            EvalRequest,
            "study disp-llm",
            locals(),
            tasks=names(tasks),
            against=model if against else None,
            against_revision=revision,
            include_path=folder_for_tasks(include_path, calibration, tasks),
        )
        sparsities, chosen = numbers(sparsity, "--sparsity"), names(parts)
        from secateur.cli.quiet_api import api

        if dry_run:
            print_record(api.estimate_study_disp_llm(request, sparsities, parts=chosen), as_json=json)
            return
        if out is None:
            raise UsageError("--out DIR is missing: the folder of the study (or --dry-run)")
        measured = []
        writing = {"resume": resume, "overwrite": overwrite}
        for record in api.study_disp_llm(
            request, sparsities, out, measure, parts=chosen, records_file=records, **writing
        ):
            measured.append(record)
            say(f"{Path(record['out']).name}: ppl {perplexity_words(record['ppl'])}")
        table = api.summarize_study_disp_llm(request, sparsities, measured, parts=chosen)
        if json:
            emit({"records": measured, "study": table})
            return
        from secateur.cli.terminal import study_table

        show(study_table(table, measured[0]["ppl"]))
