"""The ablations of DISP-LLM (arXiv:2410.11988, tables 4, 10, 12 and figures 5a to 5f), on any model.

What is varied is data: `VARIANTS`. A cell is one variant at one sparsity with one seed, pruned and measured like any
other run, so its record goes into every report; cells that several parts share are made once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from secateur.core.errors import UsageError, unknown
from secateur.core.paths import to_path
from secateur.core.records import Record
from secateur.methods import find_method
from secateur.prune.prepare import prepare
from secateur.prune.rehearse import rehearse
from secateur.requests import EvalRequest, Request
from secateur.study.sweep import point_name, prune_and_measure

METHOD = "disp_llm"
_ALWAYS = {"unmet": "cut"}  # a variant that misses its budget is a finding
SEEDS = 5


@dataclass(frozen=True)
class Variant:
    """What one row of a table varies.

    Attributes:
        name: in words.
        options: of the method, beside those of all cells.
        seeds: how many.
        highest: only at the highest of the sparsities.
    """

    name: str
    options: Mapping[str, Any]
    seeds: int = 1
    highest: bool = False


FULL = Variant("full", {})
VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    "ratios": (FULL,),
    "hypernetwork": (
        FULL,
        Variant("without hypernetwork", {"hypernetwork": "none"}),
        Variant("without Bi-GRU", {"hypernetwork": "linear"}),
    ),
    "constrained": (FULL, Variant("constrained", {"constrained": True})),
    "estimator": (FULL, *(Variant(gate, {"gate": gate}) for gate in ("reinmax-printed", "straight-through", "gumbel"))),
    "norm": (FULL, Variant("select, then norm", {"norm": "selected"})),
    "separate": (FULL, Variant("q, k and v apart", {"separate": True})),
    "beyond": (
        FULL,
        Variant("warm start", {"warm": 32}),
        Variant("scales", {"scale": True}),
        Variant("both", {"warm": 32, "scale": True}),
    ),
    "lambda": tuple(
        Variant(f"lambda {strength:g}", {"strength": strength}, highest=True)
        for strength in (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
    ),
    "seeds": (Variant(f"{SEEDS} seeds", {}, seeds=SEEDS),),
}
"""Part -> what it varies. `hypernetwork` is table 4; with `constrained` it is figures 5a to 5d; `ratios` figures 5e, 5f
and tables 13, 14; `lambda` table 12; `seeds` table 10; `separate` its section 4.1; `beyond` is not in the paper.
"""


@dataclass(frozen=True)
class Cell:
    """One run of a variant."""

    part: str
    variant: Variant
    request: Request


def cells(base: Request, sparsities: Sequence[float], parts: Sequence[str] = ()) -> list[Cell]:
    """The runs of the study.

    Args:
        base: the model, its calibration, and the options of all cells; the method is replaced.
        sparsities: of the parameters of the whole model.
        parts: names from `VARIANTS`; none takes all.

    Raises:
        UsageError: a part that there is not, an option that a part varies, or no sparsity.
    """
    found = []
    if not [s for s in sparsities if s]:
        raise UsageError("--sparsity needs at least one value above 0: the study prunes at each of them")
    for part in parts or VARIANTS:
        if part not in VARIANTS:
            raise unknown("part of the study", part, VARIANTS)
        for variant in VARIANTS[part]:
            if both := sorted(set(variant.options) & set(base.options)):
                raise UsageError(
                    f"--set {both[0]} is what part '{part}' varies; leave it out, or choose other --parts "
                    f"({', '.join(VARIANTS)})"
                )
            for sparsity in [max(sparsities)] if variant.highest else [s for s in sparsities if s]:
                for seed in range(base.seed, base.seed + variant.seeds):
                    options = {**_ALWAYS, **base.options, **variant.options}
                    found.append(
                        Cell(
                            part,
                            variant,
                            replace(
                                base, method=METHOD, sparsity=sparsity, params_removed=None, seed=seed, options=options
                            ),
                        )
                    )
    return found


def run(
    base: Request,
    sparsities: Sequence[float],
    out: str | Path,
    measure: EvalRequest,
    *,
    parts: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
) -> Iterator[Record]:
    """Make and measure every cell, the dense model first; yields the evaluation records as they come.

    Args:
        base, sparsities, parts: see `cells`.
        out: the folder that receives one checkpoint a cell, and `records.jsonl`.
        measure, resume, overwrite, records_file: as for `study.sweep`.
    """
    out, records_file = to_path(out), to_path(records_file)
    yield from prune_and_measure(
        runs(base, sparsities, parts), out, measure, resume=resume, overwrite=overwrite, records_file=records_file
    )


def runs(base: Request, sparsities: Sequence[float], parts: Sequence[str] = ()) -> dict[str, Request]:
    """What is made, each once, by the names of their folders; arguments and errors are those of `cells`."""
    distinct: dict[str, Request] = {}
    for cell in cells(base, sparsities, parts):
        request = replace(cell.request, options=_without_defaults(cell.request.options))
        distinct.setdefault(_name(request), request)
    return distinct


def estimate(base: Request, sparsities: Sequence[float], *, parts: Sequence[str] = ()) -> Record:
    """`--dry-run`: `runs`, the names of what would be made beside the dense model, all `steps` of learning, and
    `seconds_estimated` of the prunes, from the steps of the first one; evaluations come on top.

    Raises:
        UsageError, SecateurError: as `run` does before the work.
    """
    found = runs(base, sparsities, parts)
    every = [prepare(request) for request in found.values()]
    steps = sum(prepared.job.options.steps for prepared in every)
    first = every[0]
    seconds = rehearse(first, (first.samples, first.seqlen)).seconds * steps / first.job.options.steps
    return {
        "command": "study",
        "study": "disp-llm",
        "dry_run": True,
        "model": base.model,
        "runs": list(found),
        "steps": steps,
        "seconds_estimated": round(seconds, 1),
    }


def _name(request: Request) -> str:
    assert request.sparsity is not None
    seed = {"seed": request.seed} if request.seed else {}
    options = {name: value for name, value in request.options.items() if name not in _ALWAYS}
    return point_name(replace(request, options={**options, **seed}), request.sparsity)


def _without_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """So that equal runs have one name: lambda 6 is the full method."""
    defaults = vars(find_method(METHOD).options({}))
    return {name: value for name, value in options.items() if str(value) != str(defaults.get(name))}


def summary(
    base: Request, sparsities: Sequence[float], records: Sequence[Record], *, parts: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The table of the study.

    Returns:
        One entry a part, variant and sparsity: `part`, `variant`, `sparsity`, `ppl` (the mean over seeds), `sd` (None
        for one run), `runs`.
    """
    method = find_method(METHOD)
    measured = {
        _key(record["options"], record["sparsity"], record["seed"]): record["ppl"]
        for record in records
        if record.get("method") == METHOD
    }
    values: dict[tuple[str, str, float], list[float]] = {}
    for cell in cells(base, sparsities, parts):
        request = cell.request
        key = _key(vars(method.options(request.options)), request.sparsity, request.seed)
        if key in measured:
            assert request.sparsity is not None
            values.setdefault((cell.part, cell.variant.name, request.sparsity), []).append(measured[key])
    return [
        {
            "part": part,
            "variant": name,
            "sparsity": s,
            "ppl": fmean(several),
            "sd": _deviation(several),
            "runs": len(several),
        }
        for (part, name, s), several in values.items()
    ]


def _deviation(several: Sequence[float]) -> float | None:
    """The standard deviation; None of one value, and where one is infinite."""
    return stdev(several) if len(several) > 1 and all(map(math.isfinite, several)) else None


def _key(options: Mapping[str, Any], sparsity: float | None, seed: int) -> tuple[Any, ...]:
    return (*sorted((name, str(value)) for name, value in options.items()), sparsity, seed)
