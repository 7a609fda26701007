"""`secateur demo`: the whole flow on the model in the package, with every method there is.

A method takes part because its file is there: it says with `DEMO`, a list of options and sparsities, what to show of it.
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
from secateur.predict.points import read_points
from secateur.report.html import write_report
from secateur.report.modules import read_studies, verdict
from secateur.requests import EvalRequest, HealRequest, ModulesRequest, Request
from secateur.study import modules
from secateur.study.sweep import point_name, sweep


@dataclass(frozen=True)
class Effort:
    """How much of everything: the demo, or a quick look that it works.

    `limit` is of windows (there are 128) and of items (300), `steps` of healing, and in a quick look of learning too.
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
    """Prune, evaluate, report; finished points of an earlier run are kept. Returns the evaluation records, the dense model's first."""
    effort = QUICK if quick else FULL
    measure = EvalRequest(BUNDLED, tasks=effort.tasks, limit=effort.limit)
    found: list[records.Record] = []
    for request, sparsities, healed in demo_requests(effort):
        for record in sweep(request, sparsities, out, measure, resume=True, overwrite=True):
            if record["method"] or not found:
                found.append(record)
                say(
                    f"{record['method'] or 'dense':10} {record.get('pattern') or '':13} {record['sparsity_measured']:.3f}  ppl {record['ppl']:.2f}"
                )
        if healed and importlib.util.find_spec("peft") is None:
            say("heal: left out, peft is not installed (pip install 'secateur[heal]')")
        elif healed:
            found.append(_healed(out / point_name(request, sparsities[-1]), effort, measure))
    if effort.points is None:
        _say_laws(out)
    _study_modules(out / "modules", effort)
    page = out / "report.html"
    write_report(records.read([out, out / "modules"]), page, title="secateur demo: the bundled model")
    say(f"report: {page}")
    return found


def _healed(folder: Path, effort: Effort, measure: EvalRequest) -> records.Record:
    """A short recovery of a result, measured."""
    target = folder.with_name(f"{folder.name}-healed")
    asked = HealRequest(
        str(folder),
        steps=effort.steps,
        lr=2e-3,
        samples=4 * effort.steps,
        seqlen=effort.seqlen,
        limit=8,
        checkpointing=False,
    )
    heal(asked, target, resume=True, overwrite=True)
    record = evaluate(replace(measure, model=str(target)), resume=True)
    say(f"{record['method']} + LoRA {record['sparsity_measured']:.3f}  ppl {record['ppl']:.2f}")
    return record


def _study_modules(out: Path, effort: Effort) -> None:
    """Which module matters, on a little of the text; finished cells of an earlier run are kept."""
    request = Request(BUNDLED, "wanda", samples=effort.samples, seqlen=effort.seqlen)
    asked = (
        ModulesRequest(sparsities=(0.5, 0.9)) if effort.points is None else ModulesRequest(("attention", "mlp"), (0.5,))
    )
    found = list(modules.run(request, asked, out, EvalRequest(BUNDLED, limit=8), resume=True))
    for line in verdict(read_studies(found)[0])[:2]:
        say(line)


def _say_laws(out: Path) -> None:
    """The law of the representation dimension, for the methods that narrow it."""
    for name in method_names():
        if find_method(name).says.plan_place is not None:
            law = answer.predict(read_points([out], "ppl", where={"method": name}))[1]
            missed = f"misses points held out by {law['heldout_rmse']:.1%}; best: {law['best']}"
            say(f"law of {name}: ln PPL0 / ln PPL = {law['a']:.2f} s + {law['b']:.2f}, {missed}")


def demo_requests(effort: Effort) -> list[tuple[Request, list[float], bool]]:
    """One sweep for each entry of each method's `DEMO`: {"options": {...}, "sparsities": [...], "heal": whether the last of them is healed}."""
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
