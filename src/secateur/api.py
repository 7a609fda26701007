"""The functions for Python programs and for the command line: one per command; for models in memory `plan`, `cut` and
`perplexity`.

`secateur eval` is `evaluate`, `secateur report` is `write_report`, `secateur run` is `run_recipe`, and `secateur
import` is `import_gguf`. Every other function has the name of its command, with underscores. The functions
`estimate...` return what `--dry-run` prints. docs/python.md shows them all.

`__all__` is the whole interface: functions, requests, and the classes of what functions take, return and raise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.calibrate.stream import Stream, make_computed_tables
from secateur.core import records
from secateur.core.device import resolve_dtype
from secateur.core.errors import SecateurError, UsageError
from secateur.core.paths import to_path, to_paths
from secateur.core.progress import progress_to
from secateur.core.timing import Stopwatch
from secateur.cut import cut_block, cut_outer
from secateur.evaluate.estimate import estimate_evaluate
from secateur.evaluate.evaluate import evaluate
from secateur.evaluate.flow import Flow, inspect_flow
from secateur.evaluate.generate import generate
from secateur.evaluate.in_memory import perplexity
from secateur.evaluate.size import inspect
from secateur.evaluate.throughput import bench
from secateur.heal.estimate import estimate_heal
from secateur.heal.heal import heal
from secateur.methods import find_method, method_names
from secateur.models import pack as storage
from secateur.models.canonical import canonical_view
from secateur.models.family import PRUNED_PREFIX, find_family
from secateur.models.load import build_skeleton, in_dtype
from secateur.models.pruned_config import drop_blocks, pruned_config, stock_problem
from secateur.models.runtime import pruned_class
from secateur.models.view import BlockDims, ModelView
from secateur.plan.plan import Plan, read_plan
from secateur.predict import answer, spectrum
from secateur.predict import find as predict_find
from secateur.predict.read import read_points
from secateur.prune.allocation.allocate import allocate
from secateur.prune.calibration import draw_windows, read_windows
from secateur.prune.default import with_method
from secateur.prune.driver import pruned_blocks, whole_model_plan
from secateur.prune.job import make_job
from secateur.prune.prepare import options_given, prepare, subject_and_sparsity
from secateur.recipe.read import Recipe, read_recipe
from secateur.reconstruct.estimate import estimate, estimate_reconstruct
from secateur.reconstruct.prune import prune
from secateur.reconstruct.reconstruct import reconstruct
from secateur.report.modules import read_studies as read_module_studies
from secateur.report.modules import verdict
from secateur.requests import (
    BenchRequest,
    CompareRequest,
    EvalRequest,
    GenerateRequest,
    HealRequest,
    ModulesRequest,
    ReconstructRequest,
    Request,
)
from secateur.study.compare import Compared, compare
from secateur.study.disp_llm import estimate as estimate_study_disp_llm
from secateur.study.disp_llm import run as study_disp_llm
from secateur.study.disp_llm import summary as summarize_study_disp_llm
from secateur.study.estimate import estimate_compare, estimate_sweep
from secateur.study.modules import estimate as estimate_study_modules
from secateur.study.modules import run as study_modules
from secateur.study.recipe import estimate_recipe, run_recipe
from secateur.study.sweep import point_name, prune_and_measure, sweep

__all__ = [
    "BenchRequest",
    "CompareRequest",
    "Compared",
    "EvalRequest",
    "Flow",
    "GenerateRequest",
    "HealRequest",
    "ModelSource",
    "ModulesRequest",
    "Plan",
    "Recipe",
    "ReconstructRequest",
    "Request",
    "SecateurError",
    "UsageError",
    "bench",
    "compare",
    "cut",
    "demo",
    "describe_method",
    "draw_windows",
    "estimate",
    "estimate_compare",
    "estimate_evaluate",
    "estimate_heal",
    "estimate_recipe",
    "estimate_reconstruct",
    "estimate_study_disp_llm",
    "estimate_study_modules",
    "estimate_sweep",
    "evaluate",
    "find_method",
    "find_records",
    "generate",
    "heal",
    "import_gguf",
    "inspect",
    "inspect_flow",
    "methods",
    "pack",
    "perplexity",
    "plan",
    "plot_flow",
    "point_name",
    "predict",
    "predict_from_spectrum",
    "prepare",
    "progress_to",
    "prune",
    "prune_and_measure",
    "read_module_studies",
    "read_plan",
    "read_recipe",
    "read_windows",
    "reconstruct",
    "run_recipe",
    "study_disp_llm",
    "study_modules",
    "summarize_study_disp_llm",
    "sweep",
    "unpack",
    "verdict",
    "view_model",
    "with_method",
    "write_report",
]


def __dir__() -> list[str]:
    """Return `__all__`: completion in a shell or a notebook offers the interface alone, not what this file imports."""
    return __all__


@dataclass(frozen=True)
class ModelSource:
    """The tensors of a model in memory; a tied head is the embedding and is not listed again. A `TensorSource`."""

    tensors: Mapping[str, Tensor]

    def names(self) -> list[str]:
        """Return the names of the tensors, as in the model's state dict."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        """Return the tensor itself, not a copy."""
        return self.tensors[name]

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Return some rows of a matrix."""
        return self.tensors[name][which]


def view_model(model: PreTrainedModel) -> ModelView:
    """Return the view of a model in memory through its family."""
    name = model.config.name_or_path or type(model).__name__
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    tensors = {key: tensor.detach() for key, tensor in model.state_dict().items() if key not in tied}
    return ModelView(name, model.config, model.config.to_dict(), find_family(model.config, name), ModelSource(tensors))


def plan(
    model: PreTrainedModel,
    method: str,
    windows: Tensor | None = None,
    *,
    sparsity: float | None = None,
    params_removed: float | None = None,
    at_least: bool = False,
    modules: str | None = None,
    pattern: str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    **options: Any,
) -> Plan:
    """Make a plan for a model in memory. The model does not change.

    Args:
        model: a causal language model of a known family.
        method: the name of a method.
        windows: calibration token ids, int64 [samples, seqlen]; None if the method needs none.
        sparsity, params_removed, at_least, modules, pattern: as in `Request`.
        dtype: the dtype to compute in, or its name; None takes that of `prune`: the dtype of the model, and float32 on
            a CPU for a model of 16-bit floats, which is faster there. New weights have the dtype of the model.
        seed: the seed of every random choice.
        options: the options of the method.

    Raises:
        UsageError: a wrong option, or no windows although the method calibrates.
    """
    chosen = find_method(method)
    given = options_given(options, pattern)
    settings = chosen.options(given)
    view = view_model(model)
    _, sparsity = subject_and_sparsity(
        view,
        chosen,
        settings,
        given,
        sparsity=sparsity,
        params_removed=params_removed,
        at_least=at_least,
        modules=modules,
    )
    computed = resolve_dtype(dtype, model.dtype, model.device)
    job = make_job(view, model.dtype, chosen, settings, sparsity, modules, seed)
    job = replace(job, device=model.device, dtype=computed, at_least=at_least)
    stream = None
    if windows is None and job.calibrates:
        setting = f"modules={modules!r}" if job.allocation else f"method {method!r}"
        raise UsageError(f"{setting} calibrates: give windows, token ids [samples, seqlen]")
    if job.allocation:
        assert windows is not None
        allocated = allocate(job, partial(in_dtype, model, computed, own=True), windows)
        job = replace(job, rates=allocated.rates, notes={"allocation": allocated.facts})
    if job.streams:
        assert windows is not None
        stream = Stream(job.view, windows, device=model.device, dtype=computed)
    watch = Stopwatch()
    plans = whole_model_plan(job, windows, watch) if job.whole_model else None
    blocks = tuple(block_plan for _, block_plan in pruned_blocks(job, stream, watch, plans=plans))
    removed_by = chosen.pattern(settings)
    return Plan(
        {
            "method": method,
            "options": asdict(settings),
            "seed": seed,
            "sparsity": sparsity,
            "params_removed": params_removed,
            "modules": modules,
            "pattern": None if removed_by is None else str(removed_by),
            "dtype": str(computed).removeprefix("torch."),
            **job.notes,
        },
        blocks,
    )


def cut(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Apply a plan to a model in memory.

    Returns:
        A new model, of the stock class if that can express the widths, otherwise of a class of the runtime. It shares
        the tensors that the plan does not touch with the given model, which does not change.

    Raises:
        SecateurError: the plan is for another number of blocks.
    """
    view = view_model(model)
    if len(plan.blocks) != view.blocks:
        raise SecateurError(f"the plan is for {len(plan.blocks)} blocks, the model has {view.blocks}")
    if plan.rotates:
        view = canonical_view(view, model.dtype, tied=_keeps_tied(view, plan))
    state = {name: cut_outer(view, name, plan.blocks[0], plan.blocks[-1]) for name in view.outer_names()}
    dims: list[BlockDims] = []
    for block, block_plan in zip(view.iterate(), plan.blocks, strict=True):
        if block_plan.dropped:
            continue
        after = cut_block(block, block_plan)
        state |= {view.block_prefix(len(dims)) + name: tensor for name, tensor in after.tensors.items()}
        dims.append(after.dims)
    raw = drop_blocks(
        view.raw_config, view.config, [block_plan.index for block_plan in plan.blocks if not block_plan.dropped]
    )
    problem = stock_problem(raw, view.family, dims)
    content = pruned_config(raw, view.family, dims, stock=problem is None)
    config_class = (
        type(model.config)
        if problem is None
        else pruned_class(view.raw_config["model_type"].removeprefix(PRUNED_PREFIX)).config_class
    )
    return _assemble(config_class.from_dict(content), state, model)


def _keeps_tied(view: ModelView, plan: Plan) -> bool:
    """Whether a plan was made for a model whose tied head stays tied."""
    name, options = plan.settings.get("method"), plan.settings.get("options") or {}
    return name is not None and find_method(name).keeps_tied(view, find_method(name).options(options))


def _assemble(config: Any, state: dict[str, Tensor], like: PreTrainedModel) -> PreTrainedModel:
    pruned = build_skeleton(config)
    pruned.load_state_dict(state, assign=True, strict=False)
    pruned.tie_weights()
    make_computed_tables(pruned, like.device)
    if empty := [name for name, tensor in pruned.state_dict().items() if tensor.is_meta]:
        raise AssertionError(f"no weights for {empty}")
    pruned.generation_config = like.generation_config
    pruned.train(like.training)
    return pruned


def pack(
    model: str | Path, out: str | Path, *, overwrite: bool = False, records_file: str | Path | None = None
) -> records.Record:
    """Write a checkpoint in which a zero takes a bit or less, and return the record. See `secateur.models.pack`.

    Raises:
        UsageError: `out` exists, or holds the model.
        SecateurError: `model` is no checkpoint, or the disk is full.
    """
    model, place = str(model), to_path(out).absolute()
    return _stored("pack", model, place, to_path(records_file), lambda: storage.pack(model, place, overwrite=overwrite))


def import_gguf(
    file: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    records_file: str | Path | None = None,
) -> records.Record:
    """Write a GGUF file as a folder that transformers loads; return the record. See `secateur.models.gguf.importer`.

    Raises:
        UsageError: no such file, a wrong dtype, `out` exists, or the package gguf is missing.
        SecateurError: the file cannot be imported; the message says why.
    """
    from secateur.models.gguf import importer  # imported here: it needs the extra gguf

    path, place = to_path(file), to_path(out).absolute()
    run = partial(importer.import_gguf, path, place, dtype=dtype, overwrite=overwrite)
    return _stored("import", str(path), place, to_path(records_file), run)


def unpack(
    folder: str | Path, out: str | Path, *, overwrite: bool = False, records_file: str | Path | None = None
) -> records.Record:
    """Restore the checkpoint that was packed, byte for byte, and return the record.

    Raises:
        UsageError: `out` exists, or holds the packed checkpoint.
        SecateurError: the folder is not packed or is damaged, or the disk is full.
    """
    packed, place = to_path(folder), to_path(out).absolute()
    return _stored(
        "unpack",
        str(packed),
        place,
        to_path(records_file),
        lambda: storage.unpack(packed, place, overwrite=overwrite),
    )


def _stored(
    command: str, model: str, out: Path, records_file: Path | None, run: Callable[[], dict[str, Any]]
) -> records.Record:
    started = time.perf_counter()
    facts = run()
    record = {
        "command": command,
        "version": records.version(),
        "model": model,
        **facts,
        "seconds": round(time.perf_counter() - started, 3),
        "out": str(out),
    }
    records.append(records_file or out.parent / "records.jsonl", record)
    return record


def find_records(paths: str | Path | Sequence[str | Path]) -> list[records.Record]:
    """The records of files and folders, as `secateur report` finds them: see `predict.find`."""
    return predict_find.find_records(to_paths(paths))


def write_report(found: Sequence[records.Record], out: str | Path, *, title: str = "Pruning report") -> list[Path]:
    """Write one self-contained HTML page from records, and its plots beside it; return the paths."""
    from secateur.report import html  # imported here: matplotlib takes a second to load

    return html.write_report(found, to_path(out), title=title)


def plot_flow(flow: Flow, out: str | Path) -> None:
    """Draw the parameters and FLOPs of each linear map, and how many a narrower residual stream leaves, as a PNG."""
    from secateur.report import flow_plot

    flow_plot.write_flow(flow, to_path(out))


def predict(
    points: str | Path | Sequence[str | Path],
    *,
    metric: str | None = None,
    law: str | None = None,
    at: Sequence[float] = (),
    params_removed: Sequence[float] = (),
    target_ppl: float | None = None,
    target_acc: float | None = None,
    chance: float | None = None,
    where: Mapping[str, str] | None = None,
    dense_in_fit: bool = False,
    plot: str | Path | None = None,
) -> records.Record:
    """Predict the cost of more pruning from measured points.

    Args:
        points: records files, folders (see `find_records`), or one CSV with columns sparsity,ppl or sparsity,acc.
        metric: "ppl", the name of a task, or "TASK:acc_norm"; None takes perplexity if the points have it.
        law: a name from `secateur.predict.laws`, "best", or None for the paper's.
        at: sparsities in [0, 1); empty takes the measured ones.
        params_removed: shares of all parameters to remove, in [0, 1), beside or instead of `at`.
        target_ppl: the perplexity not to exceed.
        target_acc: the accuracy not to fall below.
        chance: the accuracy of guessing on the task, if secateur does not know it.
        where: keep only records with these values, such as {"method": "wanda"}.
        dense_in_fit: count the dense model as a point of the fit.
        plot: a PNG file to draw the points, the law and its rivals in.

    Returns:
        The record: `law`, `a`, `b`, `rmse` (in the law's y), `heldout_rmse` (in ln of the value), `points`,
        `predictions`, `target`, `warnings` and more.

    Raises:
        UsageError: an unknown law or metric, a sparsity or target out of range, or a file without points.
        SecateurError: the points do not belong together, or are too few.
    """
    if target_ppl is not None and target_acc is not None:
        raise UsageError("give --target-ppl or --target-acc, not both")
    points, plot = to_paths(points), to_path(plot)
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: the name of a .png file is needed")
    measured = read_points(
        points, metric or ("ppl" if target_ppl is not None else None), chance=chance, where=dict(where or {})
    )
    if (target_ppl if measured.kind == "acc" else target_acc) is not None:
        option, missing = (
            ("--target-acc", "--metric TASK") if measured.kind == "ppl" else ("--target-ppl", "--metric ppl")
        )
        raise UsageError(
            f"{option} does not go with the metric {measured.metric}: add {missing}, or leave {option} out"
        )
    target = target_ppl if measured.kind == "ppl" else target_acc
    fit, record = answer.predict(measured, law, at=at, removed=params_removed, target=target, dense_in_fit=dense_in_fit)
    if plot is not None:
        from secateur.report import law_plots  # imported here: matplotlib takes a second to load

        law_plots.write(fit, plot, law_plots.answers_of(record))
        record["plot"] = str(plot)
    return record


def predict_from_spectrum(
    request: Request,
    points: str | Path | Sequence[str | Path] = (),
    *,
    dense_ppl: float | None = None,
    at: Sequence[float] = (),
    target_ppl: float | None = None,
    where: Mapping[str, str] | None = None,
) -> records.Record:
    """Predict the cost of slicing from one calibration pass of the dense model; evaluate no pruned model.

    Args:
        request: the model and its calibration; method, sparsity and options are replaced.
        points: records or a CSV that fix the scale; one measured sparsity is enough, and empty is allowed.
        dense_ppl: the perplexity of the dense model, if `points` is empty.
        at, target_ppl, where: as for `predict`.

    Raises:
        UsageError, SecateurError: as for `prune` and `predict`.
    """
    points = to_paths(points)
    measured = read_points(points, "ppl", where=dict(where or {})) if points else None
    prepared = prepare(
        replace(
            request,
            method="slicegpt",
            sparsity=0.5,
            params_removed=None,
            modules=None,
            pattern=None,
            options={"round": 1},
        )
    )
    return spectrum.predict_from_spectrum(prepared, dense_ppl, measured, at=at, target=target_ppl)[1]


def methods() -> dict[str, str]:
    """Return the pruning methods, each with its summary; for a file that breaks the contract, with what is wrong."""
    found = {}
    for name in method_names():
        try:
            found[name] = find_method(name).summary
        except UsageError as error:
            found[name] = f"cannot be used: {error}"
    return found


def describe_method(name: str) -> dict[str, Any]:
    """Return what `secateur methods NAME` prints: paper, sparsity, calibration, patterns and options of one method.

    Returns:
        JSON values; see `secateur.methods.Method.describe`.

    Raises:
        UsageError: no method has that name, or its file breaks the contract.
    """
    return find_method(name).describe()


def demo(out: str | Path, *, quick: bool = False) -> list[records.Record]:
    """Prune the bundled model with every method, measure each result, and write `out`/report.html.

    Args:
        out: the folder for checkpoints, records and the report; finished points of an earlier run are kept.
        quick: take fewer sparsities and less text.

    Returns:
        The evaluation records, the dense model first.
    """
    from secateur import demo as work  # imported here: matplotlib takes a second to load

    return work.demo(to_path(out), quick=quick)
