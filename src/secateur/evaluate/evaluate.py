"""Measure a checkpoint and write the record: perplexity, tasks, and the shift from a dense model."""

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

from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import SecateurError
from secateur.core.names import shown
from secateur.core.paths import to_path
from secateur.core.progress import say
from secateur.core.words import perplexity_words, plural
from secateur.evaluate.answers import Answers
from secateur.evaluate.kept import file_facts, keep, kept, key_of
from secateur.evaluate.perplexity import perplexity
from secateur.evaluate.shift import SHIFT_WINDOWS, functionality_shift
from secateur.evaluate.tasks import Tasks, find_tasks
from secateur.models import card
from secateur.models.load import BUNDLED, Checkpoint, load_model, open_checkpoint
from secateur.plan.plan import read_plan_json
from secateur.requests import EvalRequest
from secateur.text.protocols import Protocol, check_limit, checked_windows, find_protocol, window_length
from secateur.text.specs import holds_ids, same_text
from secateur.text.windows import ids_hash

# The fields that an evaluation copies from the folder's plan.json.
_FROM_PLAN = (
    "model", "model_revision", "method", "options", "seed", "sparsity", "sparsity_of", "sparsity_measured", "modules",
    "pattern", "pruning_ratio", "pruning_ratio_blocks", "params_removed", "params_before", "params_after",
    "nonzero_after", "zero_rows", "updated", "calibration", "reconstruct", "heal",
)  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """Text and tasks, read and ready to be asked of any version of one model.

    Attributes:
        protocol: the protocol of the perplexity.
        windows: its windows, token ids, int64 [T] each.
        tasks: the tasks with their data.
        tokenizer: the tokenizer of the model; None where neither text nor tasks need one.
        device, dtype: where and in which dtype the model computes.
    """

    protocol: Protocol
    windows: Sequence[Tensor]
    tasks: Tasks
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    dtype: torch.dtype

    @property
    def facts(self) -> dict[str, Any]:
        """The fields of the record that describe the questions."""
        return {
            "ppl_protocol": protocol_facts(self.protocol, self.windows),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def ask(self, model: PreTrainedModel) -> dict[str, Any]:
        """Measure a model in memory; returns `ppl`, `loss` and `tasks`."""
        results: dict[str, Any] = {}
        if self.tasks:
            assert self.tokenizer is not None
            results = self.tasks.run(model, self.tokenizer, Answers())
        return {**perplexity(model, self.windows).facts, "tasks": results}


def prepare_questions(request: EvalRequest, checkpoint: Checkpoint, *, bundled: bool) -> Questions:
    """Read text and tasks.

    Args:
        request: what to measure; `model` and `against` are not used.
        checkpoint: the model, or one with the same tokenizer and configuration.
        bundled: whether it is the model in the package, whose default text is the built-in one.

    Raises:
        UsageError: an option is wrong: a limit below 1, an unknown protocol or task.
        SecateurError: text, tasks or tokenizer cannot be read, or do not fit the model.
    """
    check_limit(request.limit)
    check_limit(request.items, "--items")
    protocol = find_protocol(request.protocol, request.text, bundled=bundled)
    seqlen = window_length(protocol, request.seqlen, checkpoint.max_length())
    tasks = find_tasks(request.tasks, request.include_path, request.items_a_task)
    tokenizer = _tokenizer(checkpoint, needed=bool(request.tasks) or not holds_ids(protocol.spec))
    windows = checked_windows(
        protocol,
        seqlen,
        tokenizer,
        vocabulary=checkpoint.config.vocab_size,
        longest=checkpoint.max_length(),
        text_field=request.text_field,
        limit=request.limit,
    )
    device = resolve_device(request.device)
    return Questions(
        protocol, windows, tasks, tokenizer, device, resolve_dtype(request.dtype, checkpoint.dtype, device)
    )


def announce(protocol: Protocol, windows: Sequence[Tensor], more: str = "") -> None:
    """Say, before the work, which text perplexity will be measured on, under which protocol, and how to change it."""
    facts = protocol_facts(protocol, windows)
    said = f"protocol {facts['name']}, {plural(facts['windows'], 'window')} of {facts['seqlen']:,} tokens"
    options = "--text, --protocol, --eval-seqlen and --limit change it"
    say(f"measuring perplexity on {shown(facts['spec'])} ({said}); {options}{more}")


def evaluate(
    request: EvalRequest,
    *,
    records_file: str | Path | None = None,
    resume: bool = False,
    known: bool = False,
    announced: bool = True,
) -> records.Record:
    """Measure a model; returns the record, which is also appended to `records_file`.

    Args:
        request: what to measure.
        records_file: where the record goes; None is `records.jsonl` in the folder's parent.
        resume: go on with an interrupted run; a run that is in the records already is not repeated, nor are parts of it
            that an evaluation with other tasks measured.
        known: take the numbers of an earlier evaluation of a dense model, if the cache has them (see `kept.py`).
        announced: whether the user knows already what is measured; False says it first.

    Raises:
        UsageError, SecateurError: the evaluation cannot be done; nothing is recorded.
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(request.model, request.revision)
    plan = read_plan_json(checkpoint.folder)
    questions = prepare_questions(
        request, checkpoint, bundled=request.model == BUNDLED or (plan or {}).get("model") == BUNDLED
    )
    protocol, windows, tasks, tokenizer = questions.protocol, questions.windows, questions.tasks, questions.tokenizer
    against = None if request.against is None else open_checkpoint(request.against, request.against_revision)
    if not announced:
        announce(protocol, windows)
    device, dtype = questions.device, questions.dtype
    facts = {**questions.facts, "out": _place(request.model)}
    key = _key({**facts, **({} if request.shift else {"shift": False})}, checkpoint, against, tasks)
    records_file = _writable(to_path(records_file) or _parent(request.model) / "records.jsonl")
    if resume and records_file.is_file():
        earlier = [r for r in records.read([records_file]) if r.get("key") == key]
        if earlier:
            return earlier[-1]
    versions = records.versions() | tasks.versions()
    kept_key = None if plan is not None else key_of(checkpoint, {**questions.facts, **tasks.facts()}, versions)
    if known and kept_key is not None and (found := kept(kept_key)) is not None:
        found = {**found, "out": facts["out"], "model": request.model, "key": key}
        say(f"{request.model}: measured before under this protocol, perplexity {perplexity_words(found['ppl'])}")
        records.append(records_file, found)
        return found
    _warn_of_overlap(plan, protocol)
    model = load_model(checkpoint, device=device, dtype=dtype)
    dense, measured_before = None, None if against is None else kept(_perplexity_key(against, questions))
    if against is not None and (request.shift or measured_before is None):
        dense = load_model(against, device=device, dtype=dtype)
    both = None if dense is None or against is None or not request.shift else (dense, against)
    task_results = _run_tasks(tasks, (model, checkpoint), both, tokenizer, records_file.parent, resume)
    progress = _progress_file(records_file, key, resume)
    perplexity_key = _perplexity_key(checkpoint, questions)
    before = kept(perplexity_key) if known else None
    if resume and before is None:
        before = _recorded(records_file, perplexity_key)
    measured = perplexity(model, windows, progress=progress).facts if before is None else _perplexity(before)
    identity = _identity(request, checkpoint, plan, model, records_file)
    record: records.Record = {
        "command": "eval",
        "version": records.version(),
        **identity,
        **measured,
        **facts,
        "key": key,
        "ppl_key": perplexity_key,
        "tasks": task_results,
        **(
            _against(request, questions, model, against, dense, measured_before)
            if against is not None
            else _known_dense(identity["model"], plan, questions)
        ),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_bytes": records.peak_rss_bytes(),
        "versions": versions,
    }
    records.append(records_file, record)
    if kept_key is not None and against is None:
        keep(kept_key, record)
        keep(perplexity_key, dict(measured))
    progress.unlink(missing_ok=True)
    if plan is not None and Path(request.model).is_dir():
        card.note_measurement(checkpoint.folder, record)
    return record


def _against(
    request: EvalRequest,
    questions: Questions,
    model: PreTrainedModel,
    against: Checkpoint,
    dense: PreTrainedModel | None,
    measured: records.Record | None,
) -> dict[str, Any]:
    """Return the fields of a record that compare with the dense model: its perplexity, and the shift if asked for.

    `measured` is its perplexity where that is kept; otherwise, and for the shift, `dense` is the model in memory.
    """
    if measured is None:
        assert dense is not None, "it is loaded where its perplexity is not kept"
        measured = dict(perplexity(dense, questions.windows).facts)
        keep(_perplexity_key(against, questions), measured)
    compared = {"ppl_dense": measured["ppl"], "loss_dense": measured["loss"]}
    if not request.shift:
        return compared
    assert dense is not None, "it is loaded for the shift"
    shift = functionality_shift(dense, model, questions.windows[:SHIFT_WINDOWS], questions.tokenizer)
    return {**compared, "shift": {"against": request.against, **shift}}


def _known_dense(model: str, plan: dict[str, Any] | None, questions: Questions) -> dict[str, Any]:
    """Return the perplexity of the model that a result was pruned from, if it is in the cache; nothing else."""
    if plan is None or not (model == BUNDLED or Path(model).is_dir()):
        return {}
    try:
        measured = kept(_perplexity_key(open_checkpoint(model), questions))
    except SecateurError:
        return {}
    return {} if measured is None else {"ppl_dense": measured["ppl"], "loss_dense": measured["loss"]}


def dense_is_kept(against: Checkpoint, questions: Questions) -> bool:
    """Return True if the perplexity of the dense model is in the cache, so that it is not measured again."""
    return kept(_perplexity_key(against, questions)) is not None


def _recorded(records_file: Path, perplexity_key: str) -> records.Record | None:
    """Return a record of the same perplexity beside other tasks; None if there is none."""
    if not records_file.is_file():
        return None
    earlier = [r for r in records.read([records_file]) if r.get("ppl_key") == perplexity_key]
    return earlier[-1] if earlier else None


def _perplexity(record: records.Record) -> dict[str, float]:
    return {name: record[name] for name in ("ppl", "loss")}


def _perplexity_key(checkpoint: Checkpoint, questions: Questions) -> str:
    """Return the key of a perplexity alone, whatever tasks were asked beside it."""
    return key_of(checkpoint, {**questions.facts, "only": "perplexity"}, records.versions())


def _place(model: str) -> str:
    """Return the absolute path of a folder, and a hub name as it is.

    `prune` records the same path, so the two can be joined.
    """
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _parent(model: str) -> Path:
    return Path(model).absolute().parent if Path(model).is_dir() else Path.cwd()


def _writable(file: Path) -> Path:
    """Return the records file, after a check that it can be written, before the work begins."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise SecateurError(
            f"records cannot be written to '{file}' ({error.strerror}); choose another file with --records"
        ) from error
    if not file.stat().st_size:
        file.unlink()
    return file


def _tokenizer(checkpoint: Checkpoint, *, needed: bool) -> PreTrainedTokenizerBase | None:
    try:
        return checkpoint.tokenizer()
    except SecateurError:
        if needed:
            raise
        return None


def _run_tasks(
    tasks: Tasks,
    model: tuple[PreTrainedModel, Checkpoint],
    dense: tuple[PreTrainedModel, Checkpoint] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    resume: bool,
) -> dict[str, Any]:
    """Return the results by task.

    Answers are saved per model, so that a resumed evaluation, of the same or of other tasks, does not repeat requests.
    """
    if not tasks:
        return {}
    assert tokenizer is not None

    def answers(loaded: tuple[PreTrainedModel, Checkpoint]) -> Answers:
        about = [_fingerprint(loaded[1]), str(loaded[0].device), str(loaded[0].dtype)]
        return Answers(
            folder / f".answers-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.jsonl", resume=resume
        )

    return tasks.run(model[0], tokenizer, answers(model), dense and (dense[0], answers(dense)))


def _identity(
    request: EvalRequest,
    checkpoint: Checkpoint,
    plan: dict[str, Any] | None,
    model: PreTrainedModel,
    records_file: Path,
) -> dict[str, Any]:
    if plan is not None:
        facts = {key: plan.get(key) for key in _FROM_PLAN}
        if facts["model"] is not None and Path(request.model).is_dir():
            facts["model"] = records.original(facts["model"], Path(request.model), [records_file])
        return facts
    parameters = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    zeros = dict.fromkeys(("sparsity", "sparsity_measured", "pruning_ratio", "pruning_ratio_blocks"), 0.0)
    counts = {"params_before": parameters, "params_after": parameters, "nonzero_after": nonzero}
    return {
        **dict.fromkeys(_FROM_PLAN),
        "model": request.model,
        "model_revision": checkpoint.revision,
        **zeros,
        **counts,
    }


def protocol_facts(protocol: Protocol, windows: Sequence[Tensor]) -> dict[str, Any]:
    """Return the field `ppl_protocol` of a record."""
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
    """Return a hash of the sizes and times of the weight files, which tells one set of weights from another."""
    files = sorted({file for file, _ in checkpoint.index.values()})
    return hashlib.sha256(json.dumps(file_facts(files)).encode()).hexdigest()[:16]


def _key(facts: dict[str, Any], checkpoint: Checkpoint, against: Checkpoint | None, tasks: Tasks) -> str:
    """Return a hash of weights, protocol, tasks, comparison, device and dtype: equal for equal evaluations."""
    everything = {
        **facts,
        "weights": _fingerprint(checkpoint),
        "against": against and _fingerprint(against),
        **tasks.facts(),
    }
    return hashlib.sha256(records.to_json(everything).encode()).hexdigest()[:16]


def _progress_file(records_file: Path, key: str, resume: bool) -> Path:
    file = records_file.parent / f".eval-{key}.json"
    if not resume:
        file.unlink(missing_ok=True)
    return file


def _warn_of_overlap(plan: dict[str, Any] | None, protocol: Protocol) -> None:
    calibration = (plan or {}).get("calibration") or {}
    if calibration and same_text(calibration["spec"], protocol.spec, calibration.get("file_sha256")):
        say(
            f"warning: the model was calibrated on '{protocol.spec}', the text of this evaluation; the perplexity will "
            "look too good; choose another --text"
        )
