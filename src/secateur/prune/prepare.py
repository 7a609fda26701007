"""Check a request against its model, and refuse what cannot work, before the work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import HopelessError, UsageError, unknown
from secateur.core.progress import say
from secateur.cut import dims_after
from secateur.methods import Method, find_method
from secateur.models.load import BUNDLED, Checkpoint, open_checkpoint
from secateur.models.pruned_config import drop_blocks, stock_problem
from secateur.models.view import ModelView
from secateur.plan.pattern import Pattern, parse_pattern
from secateur.plan.plan import BlockPlan, LaterPlans
from secateur.plan.quantity import Subject
from secateur.prune.job import Job, make_job
from secateur.requests import Request
from secateur.text.instructions import FORMS
from secateur.text.specs import TASK, check_spec, prompt_form

OFF = 0.01  # warn if the pruning ratio differs from the requested one by more than this


@dataclass(frozen=True)
class Prepared:
    """A request that was checked against its model; only the calibration text is not read yet."""

    request: Request
    checkpoint: Checkpoint
    job: Job
    subject: Subject
    pattern: Pattern | None
    sparsity: float | None
    device: torch.device
    dtype: torch.dtype
    samples: int
    seqlen: int

    @property
    def calibration(self) -> str | None:
        """The text SPEC; None if no calibration is needed."""
        own = self.job.method.says.CALIBRATION or ("c4" if self.job.allocation else None)
        if own is None or not (self.job.rotates or self.job.whole_model or any(self.job.rates)):
            return None
        default = "builtin" if self.request.model == BUNDLED else own
        return self.request.calibration or default

    @cached_property
    def form(self) -> str | None:
        """The form in which instructions become text, `chat` or `plain`; None for another text, or none."""
        spec = self.calibration
        if spec is None:
            return None
        return prompt_form(spec, self.request.prompt_form, self.checkpoint.tokenizer, self.request.text_field)


def prepare(request: Request) -> Prepared:
    """Check everything that can be checked without reading weights or text.

    Raises:
        UsageError: the request is wrong, or does not go with the model.
        SecateurError: the model cannot be pruned.
    """
    method = find_method(request.method)
    given = options_given(request.options, request.pattern)
    options = method.options(given)
    pattern = method.pattern(options)
    samples = method.says.SAMPLES if request.samples is None else request.samples
    if samples < 1:
        raise UsageError(f"--samples {samples}: at least one window is needed")
    if request.calibration is not None:
        check_spec(request.calibration)
    if request.include_path is not None and not (request.calibration or "").startswith(TASK):
        raise UsageError(
            f"--include-path {request.include_path} says where task files are: "
            "calibrate on a task too, --calibration task:NAME"
        )
    checkpoint = open_checkpoint(request.model, request.revision, ignore_unknown=request.ignore_unknown)
    view = checkpoint.view()
    subject, sparsity = subject_and_sparsity(
        view,
        method,
        options,
        given,
        sparsity=request.sparsity,
        params_removed=request.params_removed,
        at_least=request.at_least,
        modules=request.modules,
    )
    job = make_job(view, checkpoint.dtype, method, options, sparsity, request.modules, request.seed)
    device = resolve_device(request.device)
    seqlen = min(method.says.SEQLEN, checkpoint.max_length()) if request.seqlen is None else request.seqlen
    if not 1 < seqlen <= checkpoint.max_length():
        raise UsageError(f"--seqlen {seqlen} is outside [2, {checkpoint.max_length()}], the lengths this model knows")
    dtype = resolve_dtype(request.dtype, checkpoint.dtype, device)
    job = replace(job, device=device, dtype=dtype, at_least=request.at_least)
    prepared = Prepared(request, checkpoint, job, subject, pattern, sparsity, device, dtype, samples, seqlen)
    if request.stock_only:
        _check_stock(prepared)
    if request.prompt_form not in FORMS:
        raise unknown("--prompt-form", request.prompt_form, FORMS)
    if request.prompt_form != "auto":
        _ = prepared.form  # what is wrong with it shows before the work
    return prepared


def options_given(options: Mapping[str, Any], pattern: str | None) -> dict[str, Any]:
    """Return the given options of a method with the pattern among them, in its usual spelling; None leaves it out."""
    return {**options, **({} if pattern is None else {"pattern": str(parse_pattern(pattern))})}


def subject_and_sparsity(
    view: ModelView,
    method: Method,
    options: Any,
    given: Mapping[str, Any],
    *,
    sparsity: float | None,
    params_removed: float | None,
    at_least: bool,
    modules: str | None,
) -> tuple[Subject, float | None]:
    """Return what is pruned, and the sparsity to prune it at, for a model in a folder or in memory.

    Args:
        view: the model.
        method, options: the method and its options.
        given: the options that were given, for messages.
        sparsity, params_removed, at_least, modules: as on the command line.

    Raises:
        UsageError: the settings do not go together, or the ratio cannot be reached.
    """
    subject = _subject(view, method, options, given, modules)
    if params_removed is None:
        if at_least:
            raise UsageError("--at-least belongs to --params-removed R: add it")
        pattern = method.pattern(options)
        return subject, pattern.implied_sparsity if sparsity is None and pattern is not None else sparsity
    if sparsity is not None:
        raise UsageError("give --sparsity or --params-removed, not both")
    return subject, method.quantity(options).sparsity_for(subject, params_removed, at_least)


def _subject(view: ModelView, method: Method, options: Any, given: Mapping[str, Any], modules: str | None) -> Subject:
    """Return the model and how it is pruned, as `plan.quantity` needs them."""
    sizes_left = method.says.sizes_left
    return Subject(
        view,
        method.name,
        method.pattern(options) or parse_pattern("unstructured"),
        modules,
        options=", ".join(f"{name}={value}" for name, value in given.items()),
        ranked=method.whole_model(options),
        sizes_left=(lambda _: None) if sizes_left is None else partial(sizes_left, view, options),
        tied=method.keeps_tied(view, options),
    )


def parameters_expected(prepared: Prepared) -> int | None:
    """Return the number of parameters of the result, from shapes alone; None if the text or times decide it."""
    return prepared.job.quantity.parameters(prepared.subject, prepared.sparsity)


def say_expected(prepared: Prepared) -> bool:
    """Warn, before the work, if the size of the result will surprise; return whether there was a warning."""
    before, after = prepared.checkpoint.view().parameters(), parameters_expected(prepared)
    if after is None or not prepared.sparsity:
        return False
    removed, requested = 1 - after / before, prepared.request.params_removed
    if requested is not None and abs(removed - requested) > OFF:
        step = "the first step that reaches it" if prepared.request.at_least else "the nearest step"
        hint = "" if prepared.request.at_least or removed > requested else "; --at-least takes the next one"
        say(f"warning: --params-removed {requested:g}: only whole units can go, and {step} removes {removed:.1%}{hint}")
        return True
    if requested is None and prepared.job.rotates and (_gets_a_head(prepared) or removed <= 0):
        why = what_is_added(prepared)
        sizes = f"{before:,} parameters become {after:,} ({-removed:+.1%})"
        run = f"{prepared.job.method.name} at sparsity {prepared.sparsity:.4g}"
        say(f"warning: {run}: {sizes}, since {why}{_instead(prepared)}")
        return True
    return False


def what_is_added(prepared: Prepared) -> str | None:
    """Return what a result has that the model has not, so that less is removed than the sparsity says; or None."""
    if not (prepared.job.rotates and prepared.sparsity):
        return None
    if _gets_a_head(prepared):
        return "its tied head gets weights of its own, and adapters are added"
    if prepared.subject.tied:
        return "its head stays the embedding, a map before it and adapters are added"
    return "adapters are added"


def _gets_a_head(prepared: Prepared) -> bool:
    """Return whether a head that is the embedding gets a table of its own."""
    return bool(prepared.checkpoint.config.tie_word_embeddings) and not prepared.subject.tied


def _instead(prepared: Prepared) -> str:
    """Return advice: the sparsity of the residual width that removes the same share of the parameters."""
    ratio = round(prepared.sparsity or 0.0, 3)
    try:
        sparsity = prepared.job.quantity.sparsity_for(prepared.subject, ratio, False)
    except UsageError:
        return ""
    return f"; --params-removed {ratio:g} would take sparsity {sparsity:.3g}"


def _check_stock(prepared: Prepared) -> None:
    """Raise UsageError, before the work, if the result cannot be a stock model.

    If the sizes are not known before the plans, `check_stock_plans` checks again later.
    """
    job, view = prepared.job, prepared.checkpoint.view()
    never = job.method.says.never_stock
    if never is not None and prepared.sparsity and (reason := never(job.options)):
        raise UsageError(
            f"--stock-only: {job.method.name}: {reason}, which no stock architecture has; use another method"
        )
    sizes = job.quantity.sizes(prepared.subject, prepared.sparsity)
    if job.rotates:
        sizes = [job.view.dims(index) for index in range(view.blocks)]
    if sizes is not None and (problem := stock_problem(view.raw_config, view.family, sizes)):
        raise UsageError(f"--stock-only: {problem}; nothing was written")


def check_stock_plans(prepared: Prepared, plans: Sequence[BlockPlan]) -> None:
    """Raise HopelessError, before any cut, if plans of the whole model do not give a stock model."""
    view, outlines = prepared.job.view, plans.outlines if isinstance(plans, LaterPlans) else plans
    sizes = {plan.index: dims_after(view.dims(plan.index), plan) for plan in outlines if not plan.dropped}
    raw = drop_blocks(view.raw_config, view.config, list(sizes))
    if problem := stock_problem(raw, view.family, list(sizes.values())):
        raise HopelessError(f"--stock-only: {problem}; no result was written")
