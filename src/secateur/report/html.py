"""The report: records in, one HTML page out that needs nothing else, plus its plots as files.

The page holds no time and no machine's name, so equal records give equal bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from secateur.core.errors import SecateurError
from secateur.core.names import named
from secateur.core.records import Record
from secateur.predict.published import TABLE_3
from secateur.report import (
    block_plots,
    compare_plots,
    law_plots,
    laws,
    learned,
    learned_plots,
    module_plots,
    modules,
    plots,
    tables,
    words,
)
from secateur.report.compare import Comparison, cautions, comparison
from secateur.report.layers import Layers, read_layers
from secateur.report.plots import Picture
from secateur.report.rows import CHANGES, Group, Row, checkpoints, collect, group, task_names
from secateur.report.series import Comparison as Levelled
from secateur.report.series import base, by_perplexity, compare, series
from secateur.report.spectra import spectra


@dataclass(frozen=True)
class Findings:
    """The content of the report, before it is put into words.

    Attributes:
        rows: one row per checkpoint and protocol.
        groups: rows that can be compared with one another; plots and the headline show the first group.
        layers: the removed shares block by block, for runs whose folder still exists.
        laws: fits to the curves of the first group.
        learned: the runs of the first group with learned selections.
        comparison: the methods of the first group side by side; None for a single method.
    """

    rows: list[Row]
    groups: list[Group]
    layers: list[Layers]
    laws: list[laws.Law]
    learned: list[learned.Run]
    comparison: Comparison | None
    compared: list[Levelled]

    @property
    def best(self) -> Levelled | None:
        """The comparison of perplexities that the page is headed by."""
        return next(iter(self.compared), None)

    @property
    def main(self) -> Group:
        """The group that is plotted."""
        return self.groups[0]


def write_report(records: Sequence[Record], out: Path, *, title: str = "Pruning report") -> list[Path]:
    """Write the page to `out`, and its plots beside it in the folder `<stem of out>-plots`.

    Returns:
        The paths written, the page first.

    Raises:
        SecateurError: no record is of `prune`, `eval` or `heal`, or the page cannot be written.
    """
    records = named(records)
    studies = modules.read_studies(records)
    alone = not any(record.get("command") in ("prune", "eval", *CHANGES) for record in records)
    rows = collect([{**r, "command": "eval"} for r in records if modules.is_dense(r)] if alone and studies else records)
    groups = group(rows)
    place = {row: nth for nth, g in enumerate(groups) for row in g.rows}
    rows = sorted(rows, key=lambda row: (not row.dense, place[row]))
    main = groups[0].rows
    findings = Findings(
        rows,
        groups,
        read_layers(checkpoints(rows)),
        laws.fit_curves(groups[0], series(main)),
        learned.learned(main),
        comparison(main, records),
        by_perplexity(main),
    )
    drawn = {
        "curves": _curves(findings),
        "comparison": compare_plots.pictures(main) if findings.comparison else [],
        "laws": _laws(findings),
        "blocks": _blocks(findings),
        "modules": module_plots.pictures(studies[0]) if studies else [],
        "learned": learned_plots.pictures(findings.learned, groups[0]),
    }
    if (speed := learned_plots.throughput(records)) is not None:
        drawn["curves"].append(speed)
    drawn = _once(drawn, findings)
    pictures = [picture for several in drawn.values() for picture in several]
    others = _others([record for record in records if speed is None or record.get("command") != "bench"])
    page = _render(findings, drawn, title, others=others, studies=studies)
    folder = out.parent / f"{out.stem}-plots"
    contents = {out: page.encode(), **{folder / f"{picture.name}.png": picture.png for picture in pictures}}
    if out.is_dir():
        raise SecateurError(f"'{out}' is a folder: give the name of a file, such as {out / 'report.html'}")
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise SecateurError(
            f"cannot write the report to '{out}' ({error.strerror}): give a path in a folder that you can write to"
        ) from None
    return list(contents)


def _curves(findings: Findings) -> list[Picture]:
    """The plots of perplexity and of each task against sparsity, for the first group."""
    main = findings.main
    curves, dense = series(main.rows), main.dense
    drawn = [plots.perplexity(curves, dense, findings.best)]
    for task in task_names(main.rows):
        compared = compare(
            curves,
            lambda row, t=task: row.accuracy(t),  # type: ignore[misc]
            lambda row, t=task: row.task(t, "stderr"),  # type: ignore[misc]
            lowest=False,
        )
        drawn.append(plots.accuracy(task, curves, dense, compared))
    drawn.append(law_plots.compression(curves))
    return [picture for picture in drawn if picture is not None]


def _once(drawn: dict[str, list[Picture]], findings: Findings) -> dict[str, list[Picture]]:
    """The pictures without those that show the points of others again.

    The plot of all perplexities goes where those of the comparison show the same: both together, or bars with values
    where no line joins the points. They then stand in its place. Else, and where a method has variants or seeds, which
    only that plot tells apart, those of the comparison go.
    """
    curves, compared = drawn["curves"], drawn["comparison"]
    whole = next((picture for picture in curves if picture.name == "perplexity"), None)
    if whole is not None and whole.shows and whole.shows == frozenset().union(*(each.shows for each in compared)):
        several = series(findings.main.rows)
        levels = [[round(row.gone or row.sparsity or 0.0, 3) for row in curve.rows] for curve in several]
        joined = any(len(set(own)) > 1 for own in levels)
        alike = all(curve.label == base(curve.rows[0]) for curve in several) and all(
            len(set(own)) == len(own) for own in levels
        )
        if alike and (len(compared) > 1 or (compared[0].name == "compare-zeroed" and not joined)):
            curves = [*compared, *(picture for picture in curves if picture is not whole)]
        compared = []
    return {**drawn, "curves": curves, "comparison": compared}


def _laws(findings: Findings) -> list[Picture]:
    return [
        law_plots.laws(law.found, f"law-{number}", laws.title(law))
        for number, law in enumerate(findings.laws[: laws.MAXIMUM], start=1)
    ]


def _blocks(findings: Findings) -> list[Picture]:
    unequal = [plan for plan in findings.layers if not plan.uniform]
    drawn = [
        block_plots.block_removal(unequal, [words.name(plan.row) for plan in unequal]),
        spectra(findings.main.rows),
    ]
    return [picture for picture in drawn if picture is not None]


def _others(records: Sequence[Record]) -> str:
    """The commands whose records the page does not show."""
    commands = sorted(
        {str(record.get("command") or "unnamed") for record in records} - {"prune", "eval", "study", *CHANGES}
    )
    return ", ".join(commands)


def _render(
    findings: Findings, drawn: dict[str, list[Picture]], title: str, *, others: str, studies: list[modules.Study]
) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("secateur.report").joinpath("template.html.j2").read_text("utf-8"))
    main = findings.main
    compared, levels = findings.best, words.levels(findings.compared)
    uniform = [(words.name(plan.row), plan.sentence()) for plan in findings.layers if plan.uniform]
    told = findings.comparison.notes if findings.comparison else ()
    return template.render(
        title=title,
        measured=_measured(findings),
        finding=modules.verdict(studies[0])[0] if studies and compared is None else words.finding(compared, main),
        levels=levels if len(levels) > 1 else [],
        warnings=tables.warnings(findings.groups),
        notes=tables.notes(findings.rows, findings.groups, others),
        cautions=[line for line in cautions(findings.rows) if line not in told],
        pictures={place: [_embedded(picture) for picture in several] for place, several in drawn.items()},
        runs=tables.runs(findings.rows, findings.groups),
        studies=[
            {
                "about": s.about,
                "calibration": s.calibration,
                "dense": words.perplexity(s.dense),
                "rows": modules.rows(s),
                "verdict": modules.verdict(s),
            }
            for s in studies
        ],
        laws={"table": laws.table(findings.laws), "verdicts": laws.verdicts(findings.laws)} if findings.laws else None,
        undrawn_laws=max(0, len(findings.laws) - laws.MAXIMUM),
        published=[row for row in TABLE_3 if row.kind == "ppl"],
        learned=_learned(findings),
        comparison=findings.comparison,
        uniform=uniform,
        undrawn=max(0, len(findings.layers) - len(uniform) - block_plots.MAXIMUM),
        samples=[
            _sample(row) for row in checkpoints(r for r in findings.rows if r.part("shift").get("sample") is not None)
        ],
        protocols=tables.protocols(findings.groups),
        calibrations=tables.calibrations(findings.rows),
        settings=tables.settings(findings.rows),
        versions=tables.versions(findings.rows),
    )


def _learned(findings: Findings) -> dict[str, Any] | None:
    """The tables of the learned runs, and those of the paper; None without such runs."""
    runs = findings.learned
    if not runs:
        return None
    return {
        "tables": [
            (name, table)
            for name, table in (
                ("Perplexity by variant", learned.table(runs)),
                ("The weight of the budget term", learned.strength_table(runs)),
                ("What learning took", learned.cost_table(runs)),
            )
            if table is not None
        ],
        "printed": learned.printed(runs),
    }


def _measured(findings: Findings) -> dict[str, Any]:
    """The facts of the headline."""
    pruned = checkpoints(row for row in findings.rows if not row.dense)
    return {
        "models": list(dict.fromkeys(row.model for row in findings.rows)),
        "runs": words.plural(len(pruned), "pruned checkpoint"),
        "share": _share(sum(bool(row.measuring) for row in pruned), len(pruned)),
        "methods": sorted({str(row.get("method") or "unknown method") for row in pruned}),
        "dense": any(row.dense for row in findings.rows),
    }


def _share(part: int, whole: int) -> str:
    return "all measured" if part == whole else f"{part} of them measured" if part else "none measured"


def _embedded(picture: Picture) -> dict[str, str]:
    data = base64.b64encode(picture.png).decode("ascii")
    return {"src": f"data:image/png;base64,{data}", "alt": picture.alt, "caption": picture.caption}


def _sample(row: Row) -> dict[str, Any]:
    """Text of the pruned model beside the dense one's."""
    shift = row.part("shift")
    return {
        "name": words.name(row),
        "prompt": shift.get("prompt"),
        "dense": shift.get("sample_dense"),
        "pruned": shift.get("sample"),
        "against": shift.get("against"),
        "repetition": {
            "dense": words.percent(tables.inner(row, "shift", "repetition_dense")),
            "pruned": words.percent(tables.inner(row, "shift", "repetition")),
        },
    }
