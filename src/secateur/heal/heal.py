"""Heal a pruned checkpoint: train low-rank adapters on it, and merge them or keep them apart.

The published tables of SliceGPT use LoRA of rank 32, alpha 10 (arXiv:2401.15024, section 4); those of LLM-Pruner use
rank 8, alpha 16 (arXiv:2305.11627).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import SecateurError, UsageError
from secateur.core.memory import give_back
from secateur.core.paths import to_path
from secateur.core.progress import say, track
from secateur.core.timing import Clock
from secateur.core.words import exp, perplexity_words
from secateur.evaluate.evaluate import announce, protocol_facts
from secateur.evaluate.perplexity import perplexity
from secateur.heal.data import Examples, answers_alone, shown_row
from secateur.heal.lora import Adapters, add_adapters, find_targets, need_peft, recompute, zeroed_modules
from secateur.heal.tune import SCHEDULES, Tuning, loss_after, tune
from secateur.models import card
from secateur.models.load import BUNDLED, Checkpoint, load_model, open_checkpoint
from secateur.models.save import (
    RECIPE_PATH,
    CheckpointWriter,
    Spent,
    differing,
    is_finished,
    plan_file,
)
from secateur.plan.plan import damaged, read_plan_json
from secateur.prune.calibration import windows_of
from secateur.prune.rewrite import (
    check_seqlen,
    checked_plan,
    finish,
    finished_record,
    texts,
    training_form,
    training_text,
    weight_parts,
)
from secateur.prune.settings import identity, refuse_out
from secateur.prune.write import count
from secateur.recipe.read import written_recipe
from secateur.recipe.write import recipe_text
from secateur.requests import HealRequest
from secateur.text.files import file_hash
from secateur.text.protocols import Protocol, check_limit, checked_windows, find_protocol, window_length
from secateur.text.specs import check_spec, holds_ids, same_text
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
    protocol: Protocol | None
    held_out: list[Tensor]
    examples: Examples
    form: str | None

    @property
    def measured(self) -> dict[str, Any]:
        """The field `ppl_protocol` of the record; nothing if perplexity is not measured."""
        if self.protocol is None:
            return {}
        return {"ppl_protocol": protocol_facts(self.protocol, self.held_out)}

    @property
    def measured_with(self) -> dict[str, Any]:
        """The field `measured_with` of the record: the options of the evaluation that were given, for the next one."""
        request = self.request
        given = {
            "text": request.text,
            "protocol": request.protocol,
            "eval-seqlen": request.eval_seqlen,
            "limit": request.limit,
            "text-field": None if request.text_field == HealRequest.text_field else request.text_field,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return {"measured_with": given} if given and self.protocol is not None else {}

    @property
    def zeroed(self) -> set[str]:
        """The linear modules of which pruning zeroed weights, by path."""
        folder = self.checkpoint.folder
        try:
            return zeroed_modules(self.checkpoint.view(), self.plan, written_recipe(folder))
        except (AttributeError, KeyError, TypeError) as error:
            raise damaged(plan_file(folder), error) from None

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
            "calibration": calibration_facts(self.spec, self.examples.ids_ST, self.form),
            "tokens": self.examples.tokens,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"before": self.plan["heal"]} if self.plan.get("heal") else {}),
        }


def heal(
    request: HealRequest,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
    clock: Clock = time.perf_counter,
) -> records.Record:
    """Train adapters on a pruned checkpoint and write the result to `out`.

    Args:
        request: the request.
        out: the folder to write: a checkpoint of the same shapes, or an adapter in peft's form.
        resume: continue an interrupted run, or a diverged one (with a smaller learning rate).
        overwrite: replace the content of `out`.
        records_file: the file that the record is appended to; None is `records.jsonl` in the parent of `out`.
        clock: returns seconds. Those of the record are of all parts of a run that was interrupted and resumed.

    Returns:
        The record.

    Raises:
        UsageError, SecateurError: the request is wrong, or the run failed; `out` then holds nothing that looks
            finished.
    """
    started = clock()
    out = to_path(out).absolute()
    records_file = to_path(records_file) or out.parent / "records.jsonl"
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

    def spent() -> Spent:
        return replace(writer.before, seconds=writer.before.seconds + clock() - started)

    try:
        with writer.counting(spent):
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
        "model": records.original(prepared.plan["model"], Path(request.model), [records_file]),
        "healed": str(source.absolute()) if (source := Path(prepared.request.model)).is_dir() else str(source),
        **prepared.measured,
        **prepared.measured_with,
        "device": settings["device"],
        "dtype": settings["dtype"],
        "seconds": round(spent().seconds, 3),
        **writer.before.facts,
        "peak_rss_bytes": records.peak_rss_bytes(),
        "versions": records.versions(),
        "out": str(out),
    }
    records.append(records_file, record)
    if prepared.measured and not request.keep_adapter:
        card.note_measurement(out, record)
    return record


def check_request(request: HealRequest) -> None:
    """Raise UsageError for what is wrong with a request on any model."""
    for name in ("steps", "batch", "rank", "samples", "save_every"):
        if getattr(request, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(request, name)}: a count of at least 1 is needed")
    for name in ("lr", "alpha"):
        if not getattr(request, name) > 0:
            raise UsageError(f"--{name} {getattr(request, name):g}: it must be above 0")
    if request.schedule not in SCHEDULES:
        raise UsageError(f"unknown --schedule '{request.schedule}' (allowed: {', '.join(SCHEDULES)})")
    check_limit(request.limit)
    if request.calibration is not None:
        check_spec(request.calibration)
    asked = {name: getattr(request, name) for name in ("text", "protocol", "eval_seqlen", "limit")}
    if not request.evaluate and (given := [name for name, value in asked.items() if value is not None]):
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} {asked[given[0]]} says what to measure, and --no-eval measures nothing: drop one")


def prepare(request: HealRequest, records_file: Path, before: Mapping[str, Any] | None = None) -> Prepared:
    """Check a request against its model, and read its texts.

    Args:
        request: the request.
        records_file: the records that may tell the calibration text.
        before: what the plan would say, for an estimate on a model that is not pruned yet.

    Raises:
        UsageError, SecateurError: the request is wrong, or a text or the model cannot be read.
    """
    checkpoint = open_checkpoint(request.model)
    plan = checked_plan(read_plan_json(checkpoint.folder) if before is None else before, request.model, "heal mends")
    targets = find_targets(checkpoint.view(), request.targets)
    if request.rank > (widest := checkpoint.config.hidden_size):
        raise UsageError(
            f"--rank {request.rank}: adapters would be larger than the matrices they change; give at most {widest}, "
            "the width of the model"
        )
    bundled = plan["model"] == BUNDLED
    spec = training_text(request, plan, records_file, "heal on")
    longest = checkpoint.max_length()
    seqlen = _seqlen(request, longest)
    check_seqlen(seqlen, longest)
    protocol, held_out = _held_out(request, checkpoint, bundled=bundled) if request.evaluate else (None, [])
    if protocol is not None and same_text(spec, protocol.spec):
        say(f"warning: '{spec}' is healed on and evaluated on; the perplexity will look too good")
    text_field = None if request.completion_only else request.text_field  # answers are in fields of their own
    form = training_form(request, checkpoint, spec, plan, text_field)
    if form is not None:
        for line in shown_row(spec, checkpoint.tokenizer(), form, answers=request.completion_only):
            say(line)
    much: dict[str, Any] = {"samples": request.samples, "seqlen": seqlen, "seed": request.seed, "form": form}
    if request.completion_only:
        examples = answers_alone(spec, checkpoint.tokenizer(), **much)
    else:
        ids_ST = windows_of(checkpoint, spec, text_field=request.text_field, include_path=request.include_path, **much)
        examples = Examples(ids_ST, ids_ST)
    # The ids must fit the vocabulary and the positions of this model, whatever tokenizer made them.
    tokens = None if holds_ids(spec) else len(checkpoint.tokenizer())
    check_ids(examples.ids_ST, checkpoint.config.vocab_size, longest, spec, tokens)
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, checkpoint.dtype, device)
    return Prepared(request, checkpoint, plan, targets, spec, device, dtype, protocol, held_out, examples, form)


def _held_out(request: HealRequest, checkpoint: Checkpoint, *, bundled: bool) -> tuple[Protocol, list[Tensor]]:
    """The protocol of the perplexity before and after, and its windows."""
    protocol, longest = find_protocol(request.protocol, request.text, bundled=bundled), checkpoint.max_length()
    windows = checked_windows(
        protocol,
        window_length(protocol, request.eval_seqlen, longest),
        None if holds_ids(protocol.spec) else checkpoint.tokenizer(),
        vocabulary=checkpoint.config.vocab_size,
        longest=longest,
        text_field=request.text_field,
        limit=request.limit,
    )
    return protocol, windows


def _seqlen(request: HealRequest, longest: int) -> int:
    return min(1024, longest) if request.seqlen is None else request.seqlen


def _finished(
    prepared: Prepared, out: Path, settings: dict[str, Any], records_file: Path, overwrite: bool
) -> records.Record | None:
    """The record of a run that is already complete; None if it must run again."""
    new = ("heal", "nonzero_after")
    record = finished_record("heal", prepared.plan, settings, out, records_file, overwrite=overwrite, new=new)
    if record is None:
        return None
    if prepared.measured and "ppl_protocol" not in record:
        say(f"warning: its record has no perplexity; 'secateur eval {out}' measures it")
    elif prepared.measured and (difference := differing(record["ppl_protocol"], prepared.measured["ppl_protocol"])):
        say(f"warning: the perplexity in its record {difference}; 'secateur eval {out}' measures it again")
    return record


def _run(prepared: Prepared, settings: dict[str, Any], writer: CheckpointWriter) -> dict[str, Any]:
    """Train, write the result, and measure perplexity before and after if asked; returns the facts for the record."""
    request, checkpoint = prepared.request, prepared.checkpoint
    if prepared.protocol is not None:
        announce(prepared.protocol, prepared.held_out, "; --no-eval skips it")
    model = load_model(checkpoint, device=prepared.device, dtype=prepared.dtype)
    before = None if prepared.protocol is None else _loss_before(prepared, model, writer)
    adapters = add_adapters(
        model,
        prepared.targets,
        rank=request.rank,
        alpha=request.alpha,
        seed=request.seed,
        masked=not request.keep_adapter,
        zeroed=prepared.zeroed,
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
        + ("perplexity is not measured" if before is None else f"perplexity before {perplexity_words(exp(before))}")
    )
    readings = tune(model, trainable, prepared.examples, how, writer.part(_TUNING))
    after_training = loss_after(model, prepared.examples, how)
    done = {
        **settings,
        "lr": request.lr,
        "trainable": sum(p.numel() for p in trainable),
        "losses": [reading["loss"] for reading in _thinned(readings)],
        "training_loss": [readings[0]["loss"], after_training],
    }
    rates = sorted({reading["lr"] for reading in readings}, reverse=True)
    heal_facts = done | ({"lrs": rates} if len(rates) > 1 else {})
    if request.keep_adapter:
        after = None if before is None else perplexity(model, prepared.held_out)
        facts: dict[str, Any] = {"heal": heal_facts}
        _write_adapter(prepared, adapters, facts, writer)
    else:
        facts = {"heal": heal_facts, "nonzero_after": _write_merged(prepared, adapters, writer)}
        finish(checkpoint, prepared.plan, facts, writer, partial(_recipe, prepared))
        del model, adapters, trainable
        gc.collect()  # the forward of a module that was replaced refers to its module
        give_back()
        after = None if before is None else perplexity(_reload(prepared, writer.out), prepared.held_out)
    if before is None or after is None:
        return facts
    if after.loss > before:
        worse = f"perplexity {perplexity_words(after.ppl)}, before {perplexity_words(exp(before))}"
        say(
            f"warning: healing made it worse: {worse}; use a smaller --lr, or a --calibration nearer to what is "
            "measured"
        )
    return {**facts, "ppl_before": exp(before), "loss_before": before, **after.facts}


def _loss_before(prepared: Prepared, model: PreTrainedModel, writer: CheckpointWriter) -> float:
    """The loss of the model before training, in nats a token; that of an interrupted run if it measured the same."""
    protocol = prepared.measured["ppl_protocol"]
    if not writer.has(_BEFORE) or writer.read_note(_BEFORE).get("protocol") != protocol:
        writer.write(_BEFORE, {}, {"loss": perplexity(model, prepared.held_out).loss, "protocol": protocol})
    return float(writer.read_note(_BEFORE)["loss"])


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
    for part, names in track(list(weight_parts(view).items()), "heal: merging"):
        tensors = {}
        for name in names:
            tensor, path = view.source.read(name), name.removesuffix(".weight")
            tensors[name] = (
                adapters.merged(path, tensor) if path in adapters.layers and name.endswith(".weight") else tensor
            )
        nonzero += count(tensors)["nonzero"]
        writer.write(part, tensors)
    return nonzero


def _recipe(prepared: Prepared, weights: Mapping[str, str]) -> str:
    """The recipe of the result: that of the checkpoint that was healed, and this healing."""
    request, drawn = prepared.request, not holds_ids(prepared.spec)
    resolved = {
        "calibration": prepared.spec,
        "samples": request.samples if drawn else None,
        "seqlen": _seqlen(request, prepared.checkpoint.max_length()) if drawn else None,
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }
    return recipe_text("heal", request, resolved, prepared.checkpoint, str(prepared.device), weights)


def _write_adapter(prepared: Prepared, adapters: Adapters, facts: dict[str, Any], writer: CheckpointWriter) -> None:
    """Write the adapter in peft's own form; `PeftModel.from_pretrained(model, OUT)` adds it to its checkpoint."""
    adapters.peft.peft_config["default"].base_model_name_or_path = str(prepared.checkpoint.folder.absolute())
    with writer.disk():
        adapters.peft.save_pretrained(writer.partial, safe_serialization=True)
    weights = {file.name: str(file_hash(str(file))) for file in sorted(writer.partial.glob("adapter*.safetensors"))}
    writer.publish({**texts(prepared.checkpoint, prepared.plan, facts, None), RECIPE_PATH: _recipe(prepared, weights)})
