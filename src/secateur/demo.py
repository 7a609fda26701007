"""`secateur demo`: the whole flow on the model in the package, with every method.

Each method lists in `DEMO` the options and sparsities that the demo shows.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.progress import say
from secateur.evaluate.evaluate import evaluate
from secateur.heal.heal import heal
from secateur.methods import find_method, method_names
from secateur.models.load import BUNDLED
from secateur.predict import answer
from secateur.predict.read import read_points
from secateur.report.html import write_report
from secateur.report.modules import read_studies, verdict
from secateur.requests import EvalRequest, HealRequest, ModulesRequest, Request
from secateur.study import modules
from secateur.study.sweep import point_name, sweep


@dataclass(frozen=True)
class Effort:
    """The amount of work: the full demo, or a quick check that everything works.

    Attributes:
        samples, seqlen: the number of calibration windows, and their length in tokens.
        limit: the number of evaluation windows (of 128) and of task items (of 300).
        tasks: the tasks to evaluate.
        points: the number of sparsities per sweep; None takes all of them.
        steps: the number of optimiser steps of healing.
    """

    samples: int
    seqlen: int
    limit: int
    tasks: tuple[str, ...]
    points: int | None
    steps: int


FULL = Effort(samples=64, seqlen=256, limit=64, tasks=("cloze",), points=None, steps=60)
QUICK = Effort(samples=8, seqlen=128, limit=8, tasks=(), points=2, steps=2)


def demo(out: Path, *, quick: bool = False) -> list[records.Record]:
    """Prune, evaluate and report; keep finished points of an earlier run.

    Returns:
        The evaluation records, the dense model first.
    """
    effort = QUICK if quick else FULL
    measure = EvalRequest(BUNDLED, tasks=effort.tasks, limit=effort.limit)
    evaluations: list[records.Record] = []
    for request, sparsities, to_heal in demo_requests(effort):
        for record in sweep(request, sparsities, out, measure, resume=True, overwrite=True):
            if record["method"] or not evaluations:
                evaluations.append(record)
                name = f"{record['method'] or 'dense':10} {record.get('pattern') or '':13}"
                say(f"{name} {record['sparsity_measured']:.3f}  ppl {record['ppl']:.2f}")
        if to_heal and importlib.util.find_spec("peft") is None:
            say("note: healing is skipped, because peft is not installed (pip install 'secateur[heal]')")
        elif to_heal:
            evaluations.append(_heal(out / point_name(request, sparsities[-1]), effort, measure))
    if effort.points is None:
        _say_laws(out)
    _study_modules(out / "modules", effort)
    page = out / "report.html"
    write_report(records.read([out, out / "modules"]), page, title="secateur demo: the bundled model")
    say(f"report: {page}")
    return evaluations


def _heal(folder: Path, effort: Effort, measure: EvalRequest) -> records.Record:
    """Heal a result for a few steps, and measure it."""
    target = folder.with_name(f"{folder.name}-healed")
    request = HealRequest(
        str(folder),
        steps=effort.steps,
        lr=2e-3,
        samples=4 * effort.steps,
        seqlen=effort.seqlen,
        limit=8,
        checkpointing=False,
    )
    heal(request, target, resume=True, overwrite=True)
    record = evaluate(replace(measure, model=str(target)), resume=True)
    say(f"{record['method']} + LoRA {record['sparsity_measured']:.3f}  ppl {record['ppl']:.2f}")
    return record


def _study_modules(out: Path, effort: Effort) -> None:
    """Study which module matters, on a small part of the text; keep finished cells of an earlier run."""
    request = Request(BUNDLED, "wanda", samples=effort.samples, seqlen=effort.seqlen)
    variants = (
        ModulesRequest(sparsities=(0.5, 0.9)) if effort.points is None else ModulesRequest(("attention", "mlp"), (0.5,))
    )
    cells = list(modules.run(request, variants, out, EvalRequest(BUNDLED, limit=8), resume=True))
    for line in verdict(read_studies(cells)[0])[:2]:
        say(line)


def _say_laws(out: Path) -> None:
    """Print the law of the representation dimension, for the methods that narrow it."""
    for name in method_names():
        if find_method(name).says.plan_place is not None:
            law = answer.predict(read_points([out], "ppl", where={"method": name}))[1]
            missed = f"misses points held out by {law['heldout_rmse']:.1%}; best: {law['best']}"
            say(f"law of {name}: ln PPL0 / ln PPL = {law['a']:.2f} s + {law['b']:.2f}, {missed}")


def demo_requests(effort: Effort) -> list[tuple[Request, list[float], bool]]:
    """Return one sweep per entry of each method's `DEMO`: request, sparsities, and whether to heal the last one.

    An entry is {"options": {...}, "sparsities": [...], "heal": True or False}.
    """
    requests = []
    for name in method_names():
        for entry in find_method(name).says.DEMO:
            options: dict[str, Any] = dict(entry.get("options", {}))
            pattern = options.pop("pattern", None)
            if effort.points is not None:
                options |= find_method(name).says.QUICK
            request = Request(
                BUNDLED, name, pattern=pattern, options=options, samples=effort.samples, seqlen=effort.seqlen
            )
            requests.append((request, entry["sparsities"][: effort.points], bool(entry.get("heal"))))
    return requests
