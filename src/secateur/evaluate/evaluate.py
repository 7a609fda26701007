"""From a checkpoint to a record of what it can do."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.calibrate.data import check_ids, holds_ids, ids_hash
from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import SecateurError, unknown
from secateur.core.progress import say
from secateur.evaluate.cloze import cloze_items, evaluate_cloze
from secateur.evaluate.perplexity import perplexity
from secateur.evaluate.protocols import Protocol, evaluation_windows, find_protocol, window_length
from secateur.evaluate.shift import functionality_shift
from secateur.models import card
from secateur.models.load import BUNDLED, Checkpoint, load_model, open_checkpoint
from secateur.plan.plan import read_plan_json

TASKS = ("cloze",)
# What an evaluation repeats from the folder's plan.json.
_FROM_PLAN = (
    "model", "model_revision", "method", "options", "seed", "sparsity", "sparsity_measured", "modules", "pattern", "pruning_ratio",
    "pruning_ratio_blocks", "params_before", "params_after", "nonzero_after", "calibration",
)  # fmt: skip


@dataclass(frozen=True)
class EvalRequest:
    """What the user asks of `eval`; the defaults of the command line are these.

    Attributes:
        model: a folder (pruned or not), a hub name, or `bundled`.
        text: a text SPEC; None takes that of the protocol.
        protocol: a name from `PROTOCOLS`; None takes the one that goes with the text.
        seqlen: None takes that of the protocol.
        tasks: names of tasks; `cloze` is built in.
        limit: use the first so many windows, and items of a task.
        against: the dense model to compare with.
    """

    model: str
    text: str | None = None
    protocol: str | None = None
    seqlen: int | None = None
    tasks: Sequence[str] = ()
    limit: int | None = None
    against: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    text_field: str = "text"


def evaluate(request: EvalRequest, *, records_file: Path | None = None, resume: bool = False, append: bool = True) -> records.Record:
    """Measure a model; returns (and appends) the record.

    Args:
        request: what to measure.
        records_file: where the record goes; None is `records.jsonl` in the folder's parent.
        resume: a run that was interrupted goes on, and one that is in the records already is not repeated.
        append: whether to append the record at all.

    Raises:
        UsageError, SecateurError: nothing is recorded.
    """
    started = time.perf_counter()
    for task in request.tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    checkpoint = open_checkpoint(request.model, request.revision)
    plan = read_plan_json(checkpoint.folder)
    bundled = request.model == BUNDLED or (plan or {}).get("model") == BUNDLED
    protocol = find_protocol(request.protocol, request.text, bundled=bundled)
    seqlen = window_length(protocol, request.seqlen, checkpoint.max_length())
    tokenizer = _tokenizer(checkpoint, needed=bool(request.tasks) or not holds_ids(protocol.spec))
    windows = evaluation_windows(protocol, seqlen, tokenizer, request.text_field)[: request.limit]
    check_ids(torch.cat(list(windows)), checkpoint.config.vocab_size, protocol.spec)
    _warn_of_overlap(plan, protocol)
    records_file = records_file or (Path(request.model).resolve().parent if Path(request.model).is_dir() else Path.cwd()) / "records.jsonl"
    facts = {
        "ppl_protocol": _protocol_facts(protocol, windows),
        "weights": _fingerprint(checkpoint),
        "against": request.against,
        "tasks_asked": list(request.tasks),
    }
    if resume and (found := _in_records(records_file, facts, request)):
        say(f"{request.model}: already in {records_file}")
        return found
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, checkpoint.dtype, device)
    model = load_model(checkpoint, device=device, dtype=dtype)
    progress = _progress_file(records_file, facts, resume) if append else None
    measured = perplexity(model, windows, progress=progress)
    dense = load_model(open_checkpoint(request.against), device=device, dtype=dtype) if request.against else None
    record: records.Record = {
        "command": "eval",
        "version": records.version(),
        **_identity(request, checkpoint, plan, model),
        "ppl": measured.ppl,
        **facts,
        "tasks": _tasks(request, model, tokenizer, dense),
        **({"shift": {"against": request.against, **functionality_shift(dense, model, windows[:32], tokenizer)}} if dense is not None else {}),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_bytes": records.peak_rss_bytes(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": records.versions(),
        "out": request.model,
    }
    if append:
        records.append(records_file, record)
        if plan is not None:
            card.note_measurement(checkpoint.folder, record)
    return record


def _tokenizer(checkpoint: Checkpoint, *, needed: bool) -> PreTrainedTokenizerBase | None:
    try:
        return checkpoint.tokenizer()
    except SecateurError:
        if needed:
            raise
        return None


def _tasks(request: EvalRequest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dense: PreTrainedModel | None) -> dict[str, Any]:
    if "cloze" not in request.tasks:
        return {}
    assert tokenizer is not None
    items = cloze_items()[: request.limit]
    result, answers = evaluate_cloze(model, tokenizer, items)
    if dense is not None:
        others = evaluate_cloze(dense, tokenizer, items)[1]
        result["flipped"] = sum(a != b for a, b in zip(answers, others, strict=True)) / len(items)
    return {"cloze": result}


def _identity(request: EvalRequest, checkpoint: Checkpoint, plan: dict[str, Any] | None, model: PreTrainedModel) -> dict[str, Any]:
    if plan is not None:
        return {key: plan.get(key) for key in _FROM_PLAN}
    parameters = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    dense = {"method": None, "sparsity": 0.0, "sparsity_measured": 0.0, "pruning_ratio": 0.0, "pruning_ratio_blocks": 0.0}
    return {
        "model": request.model,
        "model_revision": checkpoint.revision,
        **dense,
        "params_before": parameters,
        "params_after": parameters,
        "nonzero_after": nonzero,
    }


def _protocol_facts(protocol: Protocol, windows: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "name": protocol.name,
        "spec": protocol.spec,
        "seqlen": len(windows[0]),
        "windows": len(windows),
        "tokens": sum(len(w) - 1 for w in windows),
        "join": protocol.join,
        "bos": protocol.bos,
        "tail": protocol.tail,
        "sha256": ids_hash(torch.cat(list(windows))),
    }


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one set of weights from another without reading them."""
    files = sorted({file for file, _ in checkpoint.index.values()})
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _in_records(file: Path, facts: dict[str, Any], request: EvalRequest) -> records.Record | None:
    """An earlier record of the same weights, protocol, tasks and comparison."""
    if not file.is_file():
        return None
    asked = json.loads(records.to_json({**facts, "out": request.model}))
    return next((r for r in records.read([file]) if all(r.get(key) == value for key, value in asked.items())), None)


def _progress_file(records_file: Path, facts: dict[str, Any], resume: bool) -> Path:
    key = hashlib.sha256(records.to_json(facts).encode()).hexdigest()[:12]
    file = records_file.parent / f".eval-{key}.json"
    records_file.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        file.unlink(missing_ok=True)
    return file


def _warn_of_overlap(plan: dict[str, Any] | None, protocol: Protocol) -> None:
    calibration = (plan or {}).get("calibration") or {}
    if calibration.get("spec") == protocol.spec and Path(protocol.spec).is_file():
        say(f"warning: the model was calibrated on '{protocol.spec}', which it is now evaluated on; the perplexity will look too good")
