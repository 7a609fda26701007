"""The plots of a report: a method looks the same in each, no points are drawn twice, and dropped blocks are visible."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from secateur.methods import built_in_methods
from secateur.plan.plan import BlockPlan, Place, Plan
from secateur.report import block_plots, html, law_plots, plots, spectra
from secateur.report.html import write_report
from secateur.report.layers import read_layers
from secateur.report.looks import look, looks
from secateur.report.plots import Picture
from secateur.report.rows import Row, collect
from secateur.report.series import series
from tests.report.test_report import eval_record, masked, prune_record, write_plan

Records = list[dict[str, Any]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in order."""
    drawn: list[Figure] = []
    real = plots.png

    def png(figure: Figure) -> bytes:
        drawn.append(figure)
        return real(figure)

    for module in (plots, law_plots, block_plots, spectra, html.compare_plots, html.learned_plots):
        monkeypatch.setattr(module, "png", png)
    return drawn


def removed(method: str, ratio: float, ppl: float, **more: Any) -> Records:
    out = f"/runs/{method}-{ratio}{'-healed' if 'heal' in more else ''}"
    left = round(4_194_304 * (1 - ratio))
    run = prune_record(method, 1.2 * ratio, out, pattern=None, pruning_ratio=ratio, params_removed=ratio) | {
        "options": {}, "params_after": left, "nonzero_after": left, "sparsity_of": "the width", **more,
    }  # fmt: skip
    return [run, eval_record(ppl, out, run, **more)]


def zeroed(method: str, sparsity: float, ppl: float, pattern: str = "unstructured") -> Records:
    run = prune_record(method, sparsity, f"/runs/{method}-{sparsity}-{pattern}", pattern=pattern)
    run |= {"options": {"pattern": pattern}, "sparsity_of": "the weights of the targeted matrices"}
    return [run, eval_record(ppl, run["out"], run)]


def written(records: Records, tmp_path: Path) -> set[str]:
    return {path.stem for path in write_report([eval_record(9.9, "tiny"), *records], tmp_path / "report.html")[1:]}


def styles(figure: Figure) -> dict[str, tuple[str, str]]:
    """The label of each curve in a figure: its colour and its marker."""
    return {
        str(line.get_label()): (to_hex(str(line.get_color())).upper(), str(line.get_marker()))
        for axes in figure.axes
        for line in axes.get_lines()
        if not str(line.get_label()).startswith(("_", "dense", "after", "removed ="))
    }


def test_every_built_in_method_has_a_colour_and_a_marker_of_its_own() -> None:
    found = [look(name) for name in built_in_methods()]
    assert len({(drawn.colour, drawn.marker) for drawn in found}) == len(found)
    assert len({drawn.colour for drawn in found}) == len(found), "a new method needs one more colour in looks.py"
    assert len({drawn.marker for drawn in found}) == len(found), "a new method needs one more marker in looks.py"


def test_the_look_of_a_method_depends_on_its_name_alone() -> None:
    assert looks(["wanda", "slicegpt"])[1] == looks(["slicegpt"])[0] == look("slicegpt")
    healed = look("slicegpt + LoRA")
    assert (healed.colour, healed.marker) == (look("slicegpt").colour, look("slicegpt").marker)
    assert (healed.fill, healed.dash) == ("none", "--")
    own, known = look("mine"), {(look(name).colour, look(name).marker) for name in built_in_methods()}
    assert (own.colour, own.marker) not in known, "a method of another package is not taken for a built-in one"
    variants = looks(["wanda"] * 20)
    assert len({(v.fill, v.dash) for v in variants}) == 20
    assert len({(v.colour, v.marker) for v in variants}) == 1


def test_a_method_has_one_colour_and_one_marker_in_all_plots(figures: list[Figure], tmp_path: Path) -> None:
    # The best of the comparison is last in the order of names, and one more run makes the plots differ in their points.
    records = [
        *removed("llm_pruner", 0.2, 14.0), *removed("llm_pruner", 0.4, 30.0),
        *removed("slicegpt", 0.2, 12.0), *removed("slicegpt", 0.4, 19.0),
        *removed("slicegpt", 0.4, 15.0, heal={"steps": 3}),
        *zeroed("wanda", 0.5, 12.0),
    ]  # fmt: skip
    names = written(records, tmp_path)
    assert {"perplexity", "compare-removed", "compression"} <= names
    seen: dict[str, set[tuple[str, str]]] = {}
    for figure in figures:
        for label, style in styles(figure).items():
            seen.setdefault(label.partition(" + ")[0].split()[0], set()).add(style)
    for method in ("llm_pruner", "slicegpt"):
        assert seen[method] == {(look(method).colour, look(method).marker)}, method
    assert sum("slicegpt" in styles(figure) for figure in figures) >= 3


def test_bars_have_the_colour_of_the_method(figures: list[Figure], tmp_path: Path) -> None:
    written([*zeroed("wanda", 0.5, 12.0), *zeroed("sparsegpt", 0.5, 11.0)], tmp_path)
    (axes,) = next(figure.axes for figure in figures if figure.axes[0].patches)
    colours = {
        str(bars.get_label()): to_hex(bars.patches[0].get_facecolor()).upper()
        for bars in axes.containers  # type: ignore[attr-defined]
    }
    assert colours == {name: look(name).colour for name in ("wanda", "sparsegpt")}


@pytest.mark.parametrize(
    ("records", "drawn"),
    [
        pytest.param([*removed("a", 0.25, 12.0), *removed("b", 0.25, 14.0)], {"perplexity"}, id="one ratio"),
        pytest.param(
            [r for name in "ab" for at in (0.2, 0.4) for r in removed(name, at, 20 * (1 + at))],
            {"perplexity"},
            id="two ratios",
        ),
        pytest.param(
            [*zeroed("wanda", 0.5, 12.0), *zeroed("sparsegpt", 0.5, 11.0), *zeroed("wanda", 0.5, 15.0, "2:4")],
            {"compare-zeroed"},
            id="bars instead of points above one another",
        ),
        pytest.param(
            [r for name in ("ria", "wanda") for at in (0.3, 0.5) for r in zeroed(name, at, 20 * (1 + at))],
            {"perplexity"},
            id="curves instead of bars",
        ),
        pytest.param(
            [
                *removed("a", 0.25, 12.0),
                *removed("b", 0.25, 14.0),
                *zeroed("wanda", 0.5, 12.0),
                *zeroed("ria", 0.5, 13.0),
            ],
            {"compare-removed", "compare-zeroed"},
            id="removed and zeroed, apart",
        ),
        pytest.param(
            [*removed("a", 0.25, 12.0), *removed("b", 0.25, 14.0), *zeroed("wanda", 0.5, 12.0)],
            {"perplexity", "compare-removed"},
            id="one more point",
        ),
        pytest.param(removed("a", 0.25, 12.0), {"perplexity"}, id="one run"),
        pytest.param(
            [
                *zeroed("wanda", 0.5, 12.0),
                *zeroed("ria", 0.5, 13.0),
                *(record | {"seed": 1, "out": "/runs/seed-1"} for record in zeroed("ria", 0.5, 14.0)),
            ],
            {"perplexity"},
            id="seeds, which bars would hide",
        ),
    ],
)
def test_no_two_plots_show_the_same_points(records: Records, drawn: set[str], tmp_path: Path) -> None:
    names = written(records, tmp_path)
    assert names & {"perplexity", "compare-removed", "compare-zeroed", "ratios"} == drawn


def test_compression_says_how_far_the_share_is_from_the_sparsity(figures: list[Figure], tmp_path: Path) -> None:
    curves = series(collect([r for at in (0.2, 0.4) for r in removed("slicegpt", at, 20.0)]))
    assert law_plots.compression(series(collect(removed("slicegpt", 0.2, 12.0)))) is None, "the table has one point"
    assert law_plots.compression(curves) is not None
    (axes,) = figures[-1].axes
    title = " ".join(axes.get_title(loc="left").split())
    assert title == (
        "The file shrinks less than the sparsity says: slicegpt at 48.0% sparsity removes 40.0% of all parameters"
    )
    assert "%" in axes.get_xlabel()
    assert "% of all parameters" in axes.get_ylabel()
    assert {text.get_text() for text in axes.texts} == {"slicegpt", "removed = sparsity"}
    assert axes.get_legend() is None


def test_names_at_the_ends_of_curves_do_not_overlap() -> None:
    figure = Figure(figsize=(7, 4.6))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1])
    plots.name_ends(axes, [plots.Name(1.0, 1.0 - n / 1000, f"curve {n}", "#000000") for n in range(9)])
    heights = sorted(float(text.xyann[1]) for text in axes.texts)  # type: ignore[attr-defined]
    assert min(np.diff(heights)) > 0.04
    assert heights[0] >= 0.0
    assert heights[-1] <= 1.0


def dropping(out: Path, method: str = "shortgpt", blocks: int = 6, dropped: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    record = prune_record(method, len(dropped) / blocks, out, pattern=None, pruning_ratio=0.25, sparsity_of="blocks")
    write_plan(
        out,
        record,
        [{"index": n, "masks": {}, "keep": {}} | ({"dropped": True} if n in dropped else {}) for n in range(blocks)],
    )
    return record


def test_dropped_blocks_are_drawn(figures: list[Figure], tmp_path: Path) -> None:
    record = dropping(tmp_path / "short")
    (plan,) = read_layers(collect([record]))
    assert (plan.parts, plan.dropped, plan.uniform) == (("block",), (1, 2), False)
    assert plan.removed["block"] == (0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert "blocks" in written([record], tmp_path)
    (axes,) = next(figure.axes for figure in figures if "drops" in figure.get_suptitle())
    assert "shortgpt, 25.0% removed, drops blocks 1, 2 of 0 to 5" in next(
        f.get_suptitle() for f in figures if f.get_suptitle()
    )
    hatched = [round(patch.get_x() + patch.get_width() / 2) for patch in axes.patches if patch.get_hatch()]  # type: ignore[attr-defined]
    full = [round(patch.get_x() + patch.get_width() / 2) for patch in axes.patches if not patch.get_hatch()]  # type: ignore[attr-defined]
    assert (hatched, full) == ([1, 2], [0, 3, 4, 5])
    legend = axes.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"2 dropped", "4 stay"}
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "A hatched block is dropped whole." in page
    assert "shortgpt, 25.0% removed, dropped: blocks 1, 2 of 0 to 5" in page


def test_a_block_dropped_from_a_masked_model_is_hatched(figures: list[Figure], tmp_path: Path) -> None:
    record = prune_record("wanda", 0.5, tmp_path / "both")
    write_plan(tmp_path / "both", record, [*masked([0.5, 0.5]), {"index": 2, "masks": {}, "keep": {}, "dropped": True}])
    (plan,) = read_layers(collect([record]))
    assert plan.removed["q"] == (0.5, 0.5, 1.0)
    picture = block_plots.block_removal([plan], ["wanda"])
    assert picture is not None
    assert picture.alt.startswith("wanda, dropped: block 2 of 0 to 2, removed by block: q 50.0% to 100.0%")
    assert [patch.get_hatch() for patch in figures[-1].axes[0].patches] == ["////"]
    assert [text.get_text() for text in figures[-1].axes[0].texts] == ["50", "50"] * 7, "no number in a dropped block"


def test_dropped_blocks_leave_room_for_other_methods(tmp_path: Path) -> None:
    records = [dropping(tmp_path / f"short{n}", dropped=(n,)) for n in range(block_plots.MAXIMUM)]
    other = prune_record("wanda", 0.5, tmp_path / "wanda")
    write_plan(tmp_path / "wanda", other, masked([0.4, 0.6]))
    plans = read_layers(collect([*records, other]))
    assert [plan.row.get("method") for plan in plans[: block_plots.MAXIMUM]] == ["shortgpt", "wanda", *["shortgpt"] * 4]


def sliced(width: int, blocks: int) -> tuple[Plan, Picture]:
    """A plan with one spectrum at all places, and its plot."""
    spectrum = torch.tensor([2.0**-n for n in range(10)], dtype=torch.float64)
    place = Place(None, spectrum, width, 10)
    plan = Plan(
        settings={},
        blocks=tuple(
            BlockPlan(n, places={**({"enter": place} if n == 0 else {}), "attention": place, "mlp": place})
            for n in range(blocks)
        ),
    )
    return plan, spectra._picture(plan, "slicegpt", 1 - width / 10, "15.0% removed")


@pytest.mark.parametrize(("blocks", "ticks"), [(2, ["emb.", "0", "1"]), (32, [str(n) for n in range(0, 32, 3)])])
def test_spectra_say_what_the_run_gives_up(blocks: int, ticks: list[str], figures: list[Figure]) -> None:
    _, picture = sliced(7, blocks)
    given_up = 100 * (2**-7 + 2**-8 + 2**-9) / (2 - 2**-9)
    assert f"embeddings {given_up:.2g}%; block 0, attention {given_up:.2g}%" in picture.alt
    figure = figures[-1]
    assert f"slicegpt at 15.0% removed gives up at most {given_up:.2g}%" in figure.get_suptitle()
    left, right, _ = figure.axes
    assert [label.get_text() for label in right.get_xticklabels()] == ticks
    figure.canvas.draw()
    for axes in (left, right):
        assert axes.get_title(loc="left")
        shown = [label.get_text() for label in axes.get_yticklabels()]
        assert all(re.fullmatch(r"[\d.]+%", text) for text in shown), shown
        assert not any(re.search(r"\.\d*0%$", text) for text in shown), "no zeros at the end, such as 1.000%"
    assert "30% sliced" in {text.get_text() for text in right.texts}
    assert "7 of 10 kept " in {text.get_text() for text in left.texts}


def test_rows_alone_are_the_points_of_a_plot() -> None:
    rows = collect([*removed("a", 0.2, 12.0), *removed("b", 0.3, 14.0)])
    picture = plots.perplexity(series(rows), None, None)
    assert picture is not None
    assert picture.shows == frozenset(rows)
    assert all(isinstance(row, Row) for row in picture.shows)
