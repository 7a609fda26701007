"""Heal a pruned checkpoint: train low-rank adapters on it, and merge them or keep them apart.

The published tables of SliceGPT use LoRA of rank 32, alpha 10 (arXiv:2401.15024, section 4); those of LLM-Pruner use
rank 8, alpha 16 (arXiv:2305.11627).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say, track
from secateur.core.words import exp, perplexity_words
from secateur.evaluate.evaluate import protocol_facts
from secateur.evaluate.perplexity import perplexity
from secateur.heal.data import Examples, answers_alone
from secateur.heal.lora import Adapters, add_adapters, find_targets, merged, need_peft, recompute
from secateur.heal.tune import SCHEDULES, Tuning, tune
from secateur.models import card, runtime
from secateur.models.load import BUNDLED, Checkpoint, load_model, open_checkpoint
from secateur.models.pruned_config import stock_problem
from secateur.models.save import (
    OWN_FOLDER,
    PLAN_PATH,
    PLAN_TENSORS,
    CheckpointWriter,
    differing,
    differing_from_plan,
    is_finished,
    plan_file,
    same_run,
)
from secateur.models.view import ModelView
from secateur.plan.plan import plan_json, read_plan_json
from secateur.plan.quantity import words_of
from secateur.prune.calibration import windows_of
from secateur.prune.settings import identity, refuse_out
from secateur.requests import HealRequest
from secateur.text.files import file_hash
from secateur.text.protocols import Protocol, evaluation_windows, find_protocol, window_length
from secateur.text.specs import NAMED, TASK, check_spec, holds_ids, same_text
from secateur.text.tokens import check_ids
from secateur.text.windows import calibration_facts

_TUNING, _BEFORE = "tuning", "before"  # parts of an interrupted run: adapters and optimiser; the loss before training


@dataclass(frozen=True)
class Prepared:
    """A request checked against its model."""

    request: HealRequest
    checkpoint: Checkpoint
    plan: dict[str, Any]
    targets: list[str]
    spec: str
    device: torch.device
    dtype: torch.dtype
    protocol: Protocol
    held_out: list[Tensor]
    examples: Examples

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, without the learning rate, which may change when a run is resumed."""
        request = self.request
        names = (
            "steps",
            "batch",
            "schedule",
            "weight_decay",
            "rank",
            "alpha",
            "completion_only",
            "keep_adapter",
            "save_every",
            "seed",
        )
        return {
            **{name: getattr(request, name) for name in names},
            "targets": ",".join(request.targets),
            "calibration": calibration_facts(self.spec, self.examples.ids_ST),
            "tokens": self.examples.tokens,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"before": self.plan["heal"]} if self.plan.get("heal") else {}),
        }


def heal(
    request: HealRequest, out: Path, *, resume: bool = False, overwrite: bool = False, records_file: Path | None = None
) -> records.Record:
    """Train adapters on a pruned checkpoint and write the result to `out`.

    Args:
        request: the request.
        out: the folder to write: a checkpoint of the same shapes, or an adapter in peft's form.
        resume: continue an interrupted run, or a diverged one (with a smaller learning rate).
        overwrite: replace the content of `out`.
        records_file: the file that the record is appended to; None is `records.jsonl` in the parent of `out`.

    Returns:
        The record.

    Raises:
        UsageError, SecateurError: the request is wrong, or the run failed; `out` then holds nothing that looks
            finished.
    """
    started = time.perf_counter()
    out = out.absolute()
    records_file = records_file or out.parent / "records.jsonl"
    finished = is_finished(out, resume=resume, overwrite=overwrite)
    check_request(request)
    need_peft()
    prepared = prepare(request, records_file)
    refuse_out(out, prepared.checkpoint, prepared.spec, records_file)
    settings = prepared.settings()
    if (
        finished
        and (record_before := _finished(prepared, out, {**settings, "lr": request.lr}, records_file, overwrite))
        is not None
    ):
        return record_before
    weights = {file for file, _ in prepared.checkpoint.index.values()}
    journal = {"heal": settings, "source": identity(prepared.checkpoint)}
    writer = CheckpointWriter(
        out, journal, resume=resume, overwrite=overwrite, needed=2 * sum(file.stat().st_size for file in weights)
    )
    try:
        facts = _run(prepared, settings, writer)
    except SecateurError:
        if not writer.part(_TUNING).is_file():
            writer.discard()
        raise
    record = {
        "command": "heal",
        "version": records.version(),
        **{key: value for key, value in prepared.plan.items() if key not in ("format", "blocks")},
        **facts,
        "healed": str(source.absolute()) if (source := Path(prepared.request.model)).is_dir() else str(source),
        "ppl_protocol": protocol_facts(prepared.protocol, prepared.held_out),
        "device": settings["device"],
        "dtype": settings["dtype"],
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_bytes": records.peak_rss_bytes(),
        "versions": records.versions(),
        "out": str(out),
    }
    records.append(records_file, record)
    if not request.keep_adapter:
        card.note_measurement(out, record)
    return record


def check_request(request: HealRequest) -> None:
    """Refuse numbers out of range and unknown names, with UsageError."""
    for name in ("steps", "batch", "rank", "samples", "save_every"):
        if getattr(request, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(request, name)}: a count of at least 1 is needed")
    for name in ("lr", "alpha"):
        if not getattr(request, name) > 0:
            raise UsageError(f"--{name} {getattr(request, name):g}: it must be above 0")
    if request.schedule not in SCHEDULES:
        raise UsageError(f"unknown --schedule '{request.schedule}' (allowed: {', '.join(SCHEDULES)})")
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"--limit {request.limit}: at least 1 is needed; leave it out to use everything")
    if request.calibration is not None:
        check_spec(request.calibration)


def prepare(request: HealRequest, records_file: Path) -> Prepared:
    """Check a request against its model, and read its texts.

    Raises:
        UsageError, SecateurError: the request is wrong, or a text or the model cannot be read.
    """
    checkpoint = open_checkpoint(request.model)
    plan = read_plan_json(checkpoint.folder)
    if plan is None or not {"model", "calibration", "blocks"} <= plan.keys():
        raise UsageError(
            f"'{request.model}' has no plan of secateur's: heal mends what 'secateur prune' made; "
            "give the folder that it wrote"
        )
    targets = find_targets(checkpoint.view(), request.targets)
    if request.rank > (widest := checkpoint.config.hidden_size):
        raise UsageError(
            f"--rank {request.rank}: adapters would be larger than the matrices they change; give at most {widest}, "
            "the width of the model"
        )
    bundled = plan["model"] == BUNDLED
    spec = (
        request.calibration
        or _same_calibration(plan, Path(request.model), records_file)
        or ("builtin" if bundled else None)
    )
    if spec is None:
        raise UsageError("--calibration SPEC is missing: the text to heal on (the pruning itself needed none)")
    if request.include_path is not None and not spec.startswith(TASK):
        folder = f"--include-path {request.include_path} says where task files are"
        raise UsageError(f"{folder}: heal on a task too, --calibration task:NAME")
    longest = checkpoint.max_length()
    seqlen = min(1024, longest) if request.seqlen is None else request.seqlen
    if not 1 < seqlen <= longest:
        raise UsageError(f"--seqlen {seqlen} is outside [2, {longest}], the lengths this model knows")
    protocol = find_protocol(request.protocol, request.text, bundled=bundled)
    tokenizer = None if holds_ids(protocol.spec) else checkpoint.tokenizer()
    held_out = evaluation_windows(protocol, window_length(protocol, None, longest), tokenizer, request.text_field)[
        : request.limit
    ]
    if same_text(spec, protocol.spec):
        say(f"warning: '{spec}' is healed on and evaluated on; the perplexity will look too good")
    if request.completion_only:
        examples = answers_alone(
            spec, checkpoint.tokenizer(), samples=request.samples, seqlen=seqlen, seed=request.seed
        )
    else:
        much = {"samples": request.samples, "seqlen": seqlen, "seed": request.seed}
        ids_ST = windows_of(checkpoint, spec, text_field=request.text_field, include_path=request.include_path, **much)
        examples = Examples(ids_ST, ids_ST)
    # The ids must fit the vocabulary and the positions of this model, whatever tokenizer made them.
    for where, several in ((spec, [examples.ids_ST]), (protocol.spec, held_out)):
        tokens = None if holds_ids(where) else len(checkpoint.tokenizer())
        for ids in several:
            check_ids(ids, checkpoint.config.vocab_size, longest, where, tokens)
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, checkpoint.dtype, device)
    return Prepared(request, checkpoint, plan, targets, spec, device, dtype, protocol, held_out, examples)


def _same_calibration(plan: dict[str, Any], folder: Path, records_file: Path) -> str | None:
    """The text that a checkpoint was pruned with; None if pruning needed none.

    The plan holds the name of a file alone; the record holds its path.

    Raises:
        UsageError: the file is missing, or its content has changed.
    """
    calibration = plan["calibration"] or {}
    spec = calibration.get("spec")
    if spec is None or spec.startswith(TASK) or spec.partition("@")[0] in NAMED:
        return None if spec is None else str(spec)
    places = [records_file, folder.absolute().parent / "records.jsonl"]
    pruned = next(filter(None, (records.last(place, "prune", folder.absolute()) for place in places)), {})
    known = calibration.get("file_sha256")
    for place in (spec, str((pruned.get("calibration") or {}).get("spec"))):
        if Path(place).expanduser().is_file() and known in (None, file_hash(place)):
            return place
    raise UsageError(
        f"--calibration SPEC is missing: it was pruned with '{spec}', which is not here (any more); name that file, "
        "or another text"
    )


def _finished(
    prepared: Prepared, out: Path, settings: dict[str, Any], records_file: Path, overwrite: bool
) -> records.Record | None:
    """The record of a run that is already complete; None if it must run again."""
    written_plan = read_plan_json(out)
    assert written_plan is not None
    pruned = {key: value for key, value in prepared.plan.items() if key not in ("heal", "nonzero_after")}
    if not same_run(
        out,
        differing_from_plan(written_plan.get("heal") or {}, settings) or differing_from_plan(written_plan, pruned),
        overwrite,
    ):
        return None
    record = records.last(records_file, "heal", out)
    if record is None:
        raise SecateurError(
            f"'{out}' is finished, but {records_file} has no record of it; measure it with 'secateur eval {out}', "
            "or start again with --overwrite"
        )
    say(f"{out}: already there")
    if difference := differing(record["ppl_protocol"], protocol_facts(prepared.protocol, prepared.held_out)):
        say(f"warning: the perplexity in its record {difference}; 'secateur eval {out}' measures it again")
    return record


def _run(prepared: Prepared, settings: dict[str, Any], writer: CheckpointWriter) -> dict[str, Any]:
    """Train, write the result, and measure perplexity before and after; returns the facts for the record."""
    request, checkpoint = prepared.request, prepared.checkpoint
    model = load_model(checkpoint, device=prepared.device, dtype=prepared.dtype)
    protocol = protocol_facts(prepared.protocol, prepared.held_out)
    if not writer.has(_BEFORE) or writer.read_note(_BEFORE).get("protocol") != protocol:
        writer.write(_BEFORE, {}, {"loss": perplexity(model, prepared.held_out).loss, "protocol": protocol})
    before = writer.read_note(_BEFORE)["loss"]
    adapters = add_adapters(
        model,
        prepared.targets,
        rank=request.rank,
        alpha=request.alpha,
        seed=request.seed,
        masked=not request.keep_adapter,
    )
    if request.checkpointing:
        recompute(model.get_submodule(checkpoint.view().family.blocks).children())
    how = Tuning(
        request.steps,
        request.batch,
        request.lr,
        request.schedule,
        request.weight_decay,
        request.save_every,
        request.seed,
    )
    trainable = adapters.trainable
    say(
        f"heal: {sum(p.numel() for p in trainable):,} parameters in {len(prepared.targets)} adapters; "
        f"perplexity before {perplexity_words(exp(before))}"
    )
    readings = tune(model, trainable, prepared.examples, how, writer.part(_TUNING))
    done = {
        **settings,
        "lr": request.lr,
        "trainable": sum(p.numel() for p in trainable),
        "losses": [reading["loss"] for reading in _thinned(readings)],
    }
    rates = sorted({reading["lr"] for reading in readings}, reverse=True)
    heal_facts = done | ({"lrs": rates} if len(rates) > 1 else {})
    if request.keep_adapter:
        after = perplexity(model, prepared.held_out)
        facts: dict[str, Any] = {"heal": heal_facts}
        _write_adapter(prepared, adapters, facts, writer)
    else:
        facts = {"heal": heal_facts, "nonzero_after": _write_merged(prepared, adapters, writer)}
        _finish(prepared, facts, writer)
        del model, adapters, trainable
        after = perplexity(_reload(prepared, writer.out), prepared.held_out)
    if after.loss > before:
        worse = f"perplexity {perplexity_words(after.ppl)}, before {perplexity_words(exp(before))}"
        say(
            f"warning: healing made it worse: {worse}; use a smaller --lr, or a --calibration nearer to what is "
            "measured"
        )
    return {**facts, "ppl_before": exp(before), "loss_before": before, **after.facts}


def _reload(prepared: Prepared, out: Path) -> PreTrainedModel:
    return load_model(open_checkpoint(str(out)), device=prepared.device, dtype=prepared.dtype)


def _thinned(readings: list[dict[str, float]], most: int = 50) -> list[dict[str, float]]:
    """At most `most` of the readings, evenly spaced, with the last one."""
    step = -(-len(readings) // most)
    return readings[::-1][::step][::-1]


def _write_merged(prepared: Prepared, adapters: Adapters, writer: CheckpointWriter) -> int:
    """Write every tensor, with its update if it has one, block by block; returns the number of nonzero weights."""
    view = prepared.checkpoint.view()
    nonzero = 0
    for part, names in track(list(_parts(view).items()), "heal: merging"):
        tensors = {}
        for name in names:
            tensor, path = view.source.read(name), name.removesuffix(".weight")
            tensors[name] = (
                merged(tensor, adapters.delta(path).to(tensor.device))
                if path in adapters.layers and name.endswith(".weight")
                else tensor
            )
        nonzero += sum(
            int(tensor.count_nonzero()) for name, tensor in tensors.items() if not runtime.is_index_map(name)
        )
        writer.write(part, tensors)
    return nonzero


def _parts(view: ModelView) -> dict[str, list[str]]:
    """Part of the checkpoint -> names of its tensors; the same parts, in the same order, as in `prune`."""
    names, prefixes = view.source.names(), [view.block_prefix(index) for index in range(view.blocks)]
    blocks = {
        f"block-{index:05}": [name for name in names if name.startswith(prefix)]
        for index, prefix in enumerate(prefixes)
    }
    return {f"outer-{name}": [name] for name in view.outer_names()} | blocks


def _finish(prepared: Prepared, facts: dict[str, Any], writer: CheckpointWriter) -> None:
    checkpoint, view = prepared.checkpoint, prepared.checkpoint.view()
    problem = stock_problem(view.raw_config, view.family, [view.dims(index) for index in range(view.blocks)])
    files = _words(prepared, facts, problem)
    if problem:
        files[f"{runtime.MODULE}.py"] = Path(runtime.__file__).read_text("utf-8")
    if (plan_tensors := plan_file(checkpoint.folder, PLAN_TENSORS)) is not None:
        with writer.disk():
            (writer.partial / OWN_FOLDER).mkdir(exist_ok=True)
            (writer.partial / OWN_FOLDER / PLAN_TENSORS).write_bytes(plan_tensors.read_bytes())
    writer.finish(list(_parts(view)), [], view.raw_config, checkpoint.folder, files)


def _words(prepared: Prepared, facts: dict[str, Any], problem: str | None) -> dict[str, str]:
    """The texts of the plan and the card: the facts of the pruning, and those of the healing."""
    plan = {**prepared.plan, **facts}
    content = {key: value for key, value in plan.items() if key not in ("format", "blocks")}
    return {
        "README.md": card.model_card(prepared.checkpoint, plan, plan, problem, words_of(plan.get("sparsity_of"))),
        PLAN_PATH: plan_json(content, plan["blocks"]),
    }


def _write_adapter(prepared: Prepared, adapters: Adapters, facts: dict[str, Any], writer: CheckpointWriter) -> None:
    """Write the adapter in peft's own form; `PeftModel.from_pretrained(model, OUT)` adds it to its checkpoint."""
    adapters.peft.peft_config["default"].base_model_name_or_path = str(prepared.checkpoint.folder.absolute())
    with writer.disk():
        adapters.peft.save_pretrained(writer.partial, safe_serialization=True)
    writer.publish(_words(prepared, facts, None))
