"""The report: every number is on the page, the page needs nothing else, and it does not compare what cannot be
compared.
"""

from __future__ import annotations

import base64
import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from secateur.core.errors import SecateurError
from secateur.core.records import to_json
from secateur.report.compare import comparison
from secateur.report.html import write_report
from secateur.report.laws import fit_curves
from secateur.report.layers import read_layers
from secateur.report.plots import legend
from secateur.report.rows import collect, group
from secateur.report.series import compare, series

PROTOCOL = {
    "name": "windows", "spec": "wikitext2", "seqlen": 512, "windows": 40, "tokens": 20480,
    "bos": False, "tail": "drop", "join": "\n\n", "sha256": "ab" * 32,
}  # fmt: skip
TIMES, MISSING = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
PPL = {
    ("magnitude", 0.3): 24.61,
    ("magnitude", 0.5): 61.83,
    ("magnitude", 0.6): 412.7,
    ("wanda", 0.3): 22.94,
    ("wanda", 0.5): 29.18,
    ("wanda", 0.6): 48.37,
}
ACC = {
    ("magnitude", 0.3): 0.487,
    ("magnitude", 0.5): 0.391,
    ("magnitude", 0.6): 0.273,
    ("wanda", 0.3): 0.502,
    ("wanda", 0.5): 0.463,
    ("wanda", 0.6): 0.402,
}


def prune_record(method: str, sparsity: float, out: Path | str, **more: Any) -> dict[str, Any]:
    calibrated = method != "magnitude"
    return {
        "command": "prune", "version": "0.1.0", "model": "tiny", "method": method,
        "options": {"pattern": "unstructured"}, "seed": 0, "sparsity": sparsity, "sparsity_measured": sparsity,
        "modules": None, "pattern": "unstructured",
        "pruning_ratio": 0.0, "pruning_ratio_blocks": 0.0, "params_before": 4_194_304, "params_after": 4_194_304,
        "nonzero_after": round(4_194_304 * (1 - 0.8 * sparsity)),
        "calibration": {"spec": "c4", "samples": 128, "seqlen": 512, "sha256": "cd" * 32} if calibrated else None,
        "seconds": 12.34, "seconds_by": {"forward": 9.1}, "peak_rss_bytes": 812_000_000,
        "device": "cpu", "dtype": "float32", "stock": True, "out": str(out),
        "versions": {"python": "3.12.1", "torch": "2.10.0"},
    } | more  # fmt: skip


def eval_record(
    ppl: float | None, out: Path | str, pruned: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    copied = (
        {
            name: pruned[name]
            for name in ("method", "options", "seed", "sparsity", "sparsity_measured", "pattern", "modules")
        }
        if pruned
        else {}
    )
    return {
        "command": "eval", "version": "0.1.0", "model": "tiny", "method": None, "sparsity": 0, **copied,
        "ppl": ppl, "ppl_protocol": PROTOCOL, "seconds": 3.21, "device": "cpu", "dtype": "float32",
        "out": str(out), "versions": {"torch": "2.10.0"},
    } | more  # fmt: skip


def cloze(acc: float) -> dict[str, Any]:
    return {"cloze": {"acc": acc, "acc_norm": None, "stderr": 0.021, "n": 500}}


def write_plan(out: Path, record: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True)
    (out / "plan.json").write_text(json.dumps({"format": 1, **record, "blocks": blocks}))


def masked(shares: list[float], skip: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    masks = [
        {name: {"shape": [100, 100], "removed": round(share * 10_000)} for name in MATRICES if name not in skip}
        for share in shares
    ]
    return [{"index": index, "masks": mask, "keep": {}} for index, mask in enumerate(masks)]


@pytest.fixture
def study(tmp_path: Path) -> list[dict[str, Any]]:
    """Dense, two methods at three sparsities, wanda 2:4, and a structured run with unequal widths."""
    records = [eval_record(20.17, "tiny", tasks=cloze(0.521))]
    for (method, sparsity), ppl in PPL.items():
        out = tmp_path / f"{method}-{sparsity}"
        record = prune_record(method, sparsity, out)
        write_plan(out, record, masked([sparsity] * 4))
        records += [record, eval_record(ppl, out, record, tasks=cloze(ACC[method, sparsity]))]
    semi = prune_record("wanda", 0.5, tmp_path / "gone", pattern="2:4", options={"pattern": "2:4"})
    shift = {
        "against": "tiny",
        "kl": 0.4321,
        "top1_agreement": 0.678,
        "repetition": 0.345,
        "repetition_dense": 0.012,
        "sample": "the cat & the the the",
        "sample_dense": "the cat sat <quietly>",
        "prompt": "Once upon",
    }
    records += [semi, eval_record(35.29, tmp_path / "gone", semi, shift=shift, bits_per_byte=1.2345)]
    structured = prune_record(
        "magnitude",
        0.3,
        tmp_path / "narrow",
        pattern="rows",
        options={"pattern": "rows", "scope": "model"},
        stock=False,
        pruning_ratio=0.231,
        params_after=3_225_420,
        nonzero_after=3_225_000,
        seconds=125.0,
    )
    widths = [(8, 1024), (6, 700), (4, 512), (7, 900)]
    blocks = [
        {"index": i, "masks": {}, "keep": {"groups": {"kept": g, "of": 8}, "ffn": {"kept": f, "of": 1024}}}
        for i, (g, f) in enumerate(widths)
    ]
    write_plan(tmp_path / "narrow", structured, blocks)
    return [*records, structured, eval_record(83.46, tmp_path / "narrow", structured)]


def text_of(page: Path) -> str:
    """What a reader sees, one space between words."""
    body = re.sub(r"<style>.*?</style>", "", page.read_text("utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", body)).replace("\N{NO-BREAK SPACE}", " "))


def table_rows(page: Path) -> list[list[str]]:
    """The cells of the table of runs."""
    section = page.read_text("utf-8").split("<h2>Runs</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", section, re.DOTALL)
    return [
        [unescape(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in rows
    ]


def test_page_holds_each_number(study: list[dict[str, Any]], tmp_path: Path) -> None:
    written = write_report(study, tmp_path / "site" / "report.html")
    seen = text_of(written[0])
    for number in [
        *(f"{ppl:.2f}" for ppl in PPL.values()),
        "35.29",
        "83.46",
        "20.17",
        "23.1%",
        "3.23 M",
        "4.19 M",
        "12.3 s",
        "2 min 05 s",
        "812 MB",
        "0.4321",
        "67.8%",
        "1.2345",
    ]:
        assert f" {number} " in seen, number
    for acc in ACC.values():
        assert f" {acc:.3f} ± 0.021 " in seen
    for fact in (
        "wikitext2",
        "ab" * 32,
        "cd" * 32,
        f"c4, 128 {TIMES} 512 tokens",
        "torch 2.10.0",
        "python 3.12.1",
        "cpu, float32",
    ):
        assert fact in seen, fact


def test_ratios_are_to_the_dense_model_and_rows_are_sorted(study: list[dict[str, Any]], tmp_path: Path) -> None:
    page = write_report(study[::-1], tmp_path / "report.html")[0]
    head, dense, *rows = table_rows(page)
    method, sparsity, ratio = head.index("Method"), head.index("Sparsity"), head.index("PPL / dense")
    assert (dense[method], dense[ratio], dense[head.index("Pruning time")]) == ("dense", MISSING, MISSING)
    assert dense[head.index("Parameters")] == "4.19 M"  # known from the runs that started from it
    assert [row[method] for row in rows] == ["magnitude"] * 4 + ["wanda"] * 4
    assert [row[sparsity] for row in rows] == ["30.0%", "30.0%", "50.0%", "60.0%", "30.0%", "50.0%", "50.0%", "60.0%"]
    assert rows[-1][ratio] == f"{48.37 / 20.17:.2f} {TIMES}"
    assert [row[head.index("Loads as")] for row in rows] == [
        "stock" if row[head.index("Pattern")] != "rows" else "runtime" for row in rows
    ]


def test_headline_compares_methods_at_the_highest_common_sparsity(study: list[dict[str, Any]], tmp_path: Path) -> None:
    seen = text_of(write_report(study, tmp_path / "report.html")[0])
    assert (
        f"At 48.0% zeroed (60% sparsity), wanda has the lowest perplexity of the 2 compared: 48.37, 2.40 {TIMES} the dense model's "
        "20.17; magnitude has 412.70." in seen
    )
    lonely = prune_record(
        "wanda", 0.7, tmp_path / "w7"
    )  # nothing to compare with at 70%: the headline stays where two were measured
    seen = text_of(
        write_report([*study, lonely, eval_record(99.0, tmp_path / "w7", lonely)], tmp_path / "report.html")[0]
    )
    assert "At 48.0% zeroed (60% sparsity), wanda" in seen


def test_zeroed_is_of_all_parameters_that_there_were_in_every_table(tmp_path: Path) -> None:
    both = {"params_before": 1000, "params_after": 800, "nonzero_after": 600, "pruning_ratio": 0.2}
    records = [eval_record(20.0, "tiny")]
    for method in ("magnitude", "wanda"):
        pruned = prune_record(method, 0.5, tmp_path / method, **both)
        records += [pruned, eval_record(30.0, tmp_path / method, pruned)]
    row = collect(records)[-1]
    assert (row.removed, row.zeroed, row.gone) == (0.2, 0.2, pytest.approx(0.4))
    head, _, *rows = table_rows(write_report(records, tmp_path / "report.html")[0])
    assert {cells[head.index("Zeroed")] for cells in rows} == {"20.0%"}
    compared = comparison(collect(records), records)
    assert compared is not None
    column = [name for name, _, _ in compared.table.heads].index("Zeroed")
    assert [cells[column].text for cells in compared.table.rows[1:]] == ["20.0%", "20.0%"]


def test_page_is_self_contained(study: list[dict[str, Any]], tmp_path: Path) -> None:
    page, *pngs = write_report(study, tmp_path / "report.html")
    html = page.read_text("utf-8")
    sources = re.findall(r"\b(?:src|href)\s*=\s*[\"']([^\"']*)", html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", html)
    assert [path.relative_to(tmp_path).as_posix() for path in pngs] == [
        f"report-plots/{name}.png" for name in ("perplexity", "accuracy-cloze", "law-1", "law-2", "blocks")
    ]
    assert [base64.b64decode(source.split(",")[1]) for source in sources] == [path.read_bytes() for path in pngs]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs)


def test_html_is_escaped(study: list[dict[str, Any]], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$x_{$"
    html = write_report(
        [{**record, "model": evil, "method": record["method"] and evil} for record in study],
        tmp_path / "r.html",
        title=evil,
    )[0].read_text("utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "the cat sat &lt;quietly&gt;" in html


def test_same_records_same_bytes(study: list[dict[str, Any]], tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_report(study, tmp_path / "a" / "report.html")]
    assert len(first) == 6
    assert first == [path.read_bytes() for path in write_report(study, tmp_path / "b" / "report.html")]
    reread = [json.loads(to_json(record)) for record in study]
    assert first == [path.read_bytes() for path in write_report(reread, tmp_path / "c" / "report.html")]


def test_mixed_protocols_warn_and_only_the_largest_group_is_plotted(
    study: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = write_report(study, tmp_path / "plain.html")
    assert "cannot be compared" not in text_of(plain[0])
    other = prune_record("wanda", 0.6, tmp_path / "other", seed=1)
    strange = eval_record(3.14, tmp_path / "other", other, ppl_protocol={**PROTOCOL, "sha256": "ef" * 32})
    mixed = write_report([*study, other, strange], tmp_path / "mixed.html")
    seen = text_of(mixed[0])
    assert "These records mix perplexity protocols." in seen
    assert "cannot be compared" in seen
    assert "wanda has the lowest perplexity of the 2 compared: 48.37" in seen
    assert mixed[1].read_bytes() == plain[1].read_bytes()
    head, *rows = table_rows(mixed[0])
    stranger = next(row for row in rows if "3.14" in row)
    assert stranger[head.index("Group")] == "B"
    assert stranger[head.index("PPL / dense")] == MISSING  # its dense model was not measured under its protocol


@pytest.mark.parametrize("field", ["sha256", "seqlen", "spec"])
def test_a_protocol_is_its_fields(field: str) -> None:
    changed = eval_record(21.0, "b", ppl_protocol={**PROTOCOL, field: "another"})
    assert len(group(collect([eval_record(20.0, "a"), changed]))) == 2
    assert len(group(collect([eval_record(20.0, "a"), eval_record(21.0, "b")]))) == 1


def test_mixed_models_warn(study: list[dict[str, Any]], tmp_path: Path) -> None:
    seen = text_of(write_report([*study, eval_record(9.0, "large", model="large")], tmp_path / "report.html")[0])
    assert "These records mix models." in seen
    assert "B: large," in seen


@pytest.mark.parametrize(
    ("records", "said"),
    [([], "records.jsonl"), ([{"command": "bench"}, {}], "found: bench, unnamed.*secateur eval DIR")],
)
def test_nothing_to_show_is_an_error(records: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=said) as raised:
        write_report(records, tmp_path / "report.html")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten(study: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"report\.html"):
        write_report(study, tmp_path)


def test_records_with_hardly_any_field(tmp_path: Path) -> None:
    pages = write_report(
        [{"command": "prune"}, {"command": "eval"}, {"command": "eval", "ppl": 3.0}, {"command": "bench"}],
        tmp_path / "report.html",
    )
    assert len(pages) == 1  # nothing to plot
    seen = text_of(pages[0])
    assert "3.00" in seen
    assert "Records of other commands are not shown: bench." in seen


def test_unmeasured_and_diverged_runs_are_named(study: list[dict[str, Any]], tmp_path: Path) -> None:
    alone, broken = prune_record("wanda", 0.8, "runs/alone"), prune_record("magnitude", 0.9, "runs/broken")
    page = write_report(
        [*study, alone, broken, eval_record(float("inf"), "runs/broken", broken)], tmp_path / "report.html"
    )[0]
    seen = text_of(page)
    assert "1 checkpoint without a perplexity (runs/alone): run 'secateur eval DIR'." in seen
    assert "1 checkpoint with an infinite perplexity" in seen
    assert "infinite" in next(row for row in table_rows(page) if "90.0%" in row)


def test_later_records_win_and_a_stale_evaluation_stays_apart() -> None:
    first, second = prune_record("wanda", 0.3, "x"), prune_record("wanda", 0.5, "x")
    (row,) = collect([first, second, eval_record(9.0, "x", second), eval_record(8.0, "x", second)])
    assert (row.sparsity, row.ppl) == (0.5, 8.0)
    rows = collect([first, eval_record(7.0, "x", first), second])  # pruned anew, not yet measured
    assert [(row.sparsity, row.ppl) for row in rows] == [(0.3, 7.0), (0.5, None)]


def test_a_second_text_does_not_hide_the_first(tmp_path: Path) -> None:
    other = {**PROTOCOL, "spec": "alpaca", "sha256": "ef" * 32}
    one, two = prune_record("wanda", 0.5, "one"), prune_record("magnitude", 0.5, "two")
    first = [eval_record(20.0, "tiny"), one, eval_record(30.0, "one", one), two, eval_record(40.0, "two", two)]
    later = [eval_record(9.0, "one", one, ppl_protocol=other), eval_record(10.0, "two", two, ppl_protocol=other)]
    head, *rows = table_rows(write_report([*first, *later], tmp_path / "report.html")[0])
    found = [(row[0], row[head.index("Group")], row[head.index("PPL")]) for row in rows if row]
    assert found == [
        ("dense", "A", "20.00"),
        ("magnitude", "A", "40.00"),
        ("wanda", "A", "30.00"),
        ("magnitude", "B", "10.00"),
        ("wanda", "B", "9.00"),
    ]
    seen = text_of(tmp_path / "report.html")
    assert "wanda has the lowest perplexity of the 2 compared: 30.00" in seen
    assert "Measured on wikitext2," in seen
    assert "2 pruned checkpoints (magnitude, wanda), all measured" in seen
    assert "(1 run)" in seen  # one calibration of one run, though it was measured twice


def test_a_folder_that_was_pruned_again_and_measured_on_another_text_is_what_it_holds_now() -> None:
    first, second = prune_record("wanda", 0.3, "x"), prune_record("wanda", 0.5, "x")
    other = {**PROTOCOL, "sha256": "ef" * 32}
    (row,) = collect([first, eval_record(7.0, "x", first), second, eval_record(9.0, "x", second, ppl_protocol=other)])
    assert (row.sparsity, row.ppl) == (0.5, 9.0)


def test_the_dense_perplexity_that_records_keep_is_the_dense_models(tmp_path: Path) -> None:
    one, two = prune_record("wanda", 0.5, "one"), prune_record("magnitude", 0.5, "two")
    told = [one, eval_record(30.0, "one", one, ppl_dense=20.0), two, eval_record(40.0, "two", two)]
    page = write_report(told, tmp_path / "report.html")[0]
    head, dense, *rows = (row for row in table_rows(page) if row)
    assert (dense[0], dense[head.index("PPL")]) == ("dense", "20.00")
    assert sorted(row[head.index("PPL / dense")] for row in rows) == [f"1.50 {TIMES}", f"2.00 {TIMES}"]
    seen = text_of(page)
    assert f"1.50 {TIMES} the dense model's 20.00" in seen
    assert "was not measured under this protocol" not in seen
    assert "(ppl_dense)" in seen
    own = [*told, eval_record(25.0, "tiny")]  # measured itself: counts first
    assert [row.ppl for row in collect(own) if row.dense] == [25.0]
    elsewhere = [*told, eval_record(25.0, "tiny", ppl_protocol={**PROTOCOL, "sha256": "ef" * 32})]
    assert [g.dense.ppl for g in group(collect(elsewhere)) if g.dense] == [20.0, 25.0]


def test_what_was_asked_and_what_is_gone_are_named(tmp_path: Path) -> None:
    """Titles have the share of all parameters; the settings what was asked, and the method's own measure beside it."""
    said = "slicegpt: 2,048 calibration tokens are few"
    more = {"params_removed": 0.25, "pruning_ratio": 0.237, "pattern": None, "options": {}}
    records = [
        prune_record("shortgpt", 0.3, tmp_path / "a", sparsity_of="blocks", **more),
        prune_record("slicegpt", 0.5, tmp_path / "b", sparsity_of="width", warnings=[said], **more),
        prune_record("wanda", 0.5, tmp_path / "c", sparsity_of="weights"),
    ]
    heads = [{"index": n, "masks": {}, "keep": {"groups": {"kept": 3 - n, "of": 3}}} for n in range(2)]
    write_plan(tmp_path / "a", records[0], heads)
    seen = text_of(write_report(records, tmp_path / "report.html")[0])
    assert "shortgpt 25.0% of all parameters blocks 30.0%" in seen
    assert "slicegpt 25.0% of all parameters width 50.0%" in seen
    assert "wanda 50.0% of the weights" in seen
    assert "Warning, slicegpt, 23.7% removed: 2,048 calibration tokens are few." in seen
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "shortgpt, 23.7% removed, removed by block" in page
    assert "groups: key-value heads, each with the query heads that share it." in page
    compared = comparison(collect([*records, *(eval_record(9.0, r["out"], r) for r in records)]), [])
    assert compared is not None
    assert compared.notes[0] == "Warning, slicegpt, 23.7% removed: 2,048 calibration tokens are few."


def test_one_folder_under_two_spellings_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pruned = prune_record("wanda", 0.5, "runs/x", model="./tiny/")
    rows = collect([pruned, eval_record(9.0, tmp_path / "runs" / "x", pruned), eval_record(8.0, "./tiny/")])
    assert [(row.dense, row.ppl) for row in rows] == [(True, 8.0), (False, 9.0)]
    assert len(group(rows)) == 1


def test_tasks_on_different_items_are_noted(study: list[dict[str, Any]], tmp_path: Path) -> None:
    note = "cloze was not measured on the same items in every run"
    assert note not in text_of(write_report(study, tmp_path / "report.html")[0])
    study[2]["tasks"]["cloze"] |= {"n": 50, "flipped": 0.123}
    seen = text_of(write_report(study, tmp_path / "report.html")[0])
    assert note in seen
    assert " 12.3% " in seen


def test_blocks_uniform_in_words_unequal_drawn(study: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = collect(study)
    plans = read_layers(rows)
    assert len(plans) == 7  # the folder of wanda 2:4 is gone
    assert [plan.uniform for plan in plans] == [False] + [True] * 6
    assert plans[0].kept == {
        "groups": ((8, 8), (6, 8), (4, 8), (7, 8)),
        "ffn": ((1024, 1024), (700, 1024), (512, 1024), (900, 1024)),
    }
    assert plans[0].spread == pytest.approx(0.5)
    seen = text_of(write_report(study, tmp_path / "report.html")[0])
    assert "wanda, 48.0% zeroed: the same in all 4 blocks: 60.0% of q, k, v, o, gate, up, down" in seen


def test_plans_that_are_damaged_or_of_another_run_are_left_out(tmp_path: Path) -> None:
    kept, stale, damaged = (prune_record("wanda", 0.5, tmp_path / name) for name in ("kept", "stale", "damaged"))
    write_plan(tmp_path / "kept", kept, masked([0.4, 0.6], skip=("o",)))
    write_plan(tmp_path / "stale", {**stale, "sparsity_measured": 0.3}, masked([0.3, 0.3]))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "plan.json").write_text('{"format": 1, "blo')
    (plan,) = read_layers(collect([kept, stale, damaged]))
    assert plan.parts == ("q", "k", "v", "gate", "up", "down")
    assert plan.removed["q"] == (0.4, 0.6)


def test_six_panels_at_most(tmp_path: Path) -> None:
    records = []
    for n in range(8):
        record = prune_record("wanda", 0.5, tmp_path / str(n), modules=f"q=0.{n}")
        write_plan(tmp_path / str(n), record, masked([0.5 - n / 100 - 0.01, 0.5]))
        records.append(record)
    assert "2 more with unequal blocks are not drawn" in text_of(write_report(records, tmp_path / "report.html")[0])


def test_seeds_share_a_point_and_options_make_curves() -> None:
    seeds = [prune_record("wanda", 0.5, f"s{seed}", seed=seed) for seed in (0, 1)]
    other = prune_record("wanda", 0.5, "m", options={"pattern": "unstructured", "scope": "matrix"})
    measured = [
        eval_record(ppl, record["out"], record) for record, ppl in zip([*seeds, other], (10.0, 12.0, 10.5), strict=True)
    ]
    curves = series(collect([*seeds, other, *measured]))
    assert sorted(curve.label for curve in curves) == ["wanda", "wanda, scope=matrix"]
    found = compare(curves, lambda row: row.ppl, lambda row: None, lowest=True)
    assert found is not None
    assert [(entry.label, entry.value, entry.runs) for entry in found.entries] == [
        ("wanda, scope=matrix", 10.5, 1),
        ("wanda", 11.0, 2),
    ]


def test_a_lead_within_two_standard_errors_is_not_claimed() -> None:
    def lead(gap: float) -> bool:
        records = [prune_record(method, 0.5, method) for method in ("magnitude", "wanda")]
        measured = [eval_record(9.0, r["out"], r, tasks=cloze(0.4 + gap * (r["method"] == "wanda"))) for r in records]
        found = compare(
            series(collect([*records, *measured])),
            lambda row: row.accuracy("cloze"),
            lambda row: row.task("cloze", "stderr"),
            lowest=False,
        )
        assert found is not None
        return found.clear

    assert lead(0.07)
    assert not lead(0.05)  # 2 * sqrt(2) * 0.021 = 0.059


def test_removed_parameters_are_not_compared_with_zeroed_ones() -> None:
    zeroed, removed = (
        prune_record("wanda", 0.5, "z"),
        prune_record("magnitude", 0.5, "r", pattern="rows", pruning_ratio=0.5),
    )
    found = compare(
        series(collect([zeroed, removed, *(eval_record(9.0, r["out"], r) for r in (zeroed, removed))])),
        lambda row: row.ppl,
        lambda row: None,
        lowest=True,
    )
    assert found is not None
    assert len(found.entries) == 1


def test_laws_of_every_curve_with_three_sparsities(study: list[dict[str, Any]], tmp_path: Path) -> None:
    seen = text_of(write_report(study, tmp_path / "report.html")[0])
    section = seen.split("Laws: what other sparsities would cost")[1].split("What was removed, block by block")[0]
    for method in ("magnitude", "wanda"):
        s = [0.3, 0.5, 0.6]
        y = [math.log(20.17) / math.log(PPL[method, at]) for at in s]
        mean = sum(s) / 3
        a = sum((at - mean) * v for at, v in zip(s, y, strict=True)) / sum((at - mean) ** 2 for at in s)
        assert f" {method} 3 {a:.3f} (" in section
        assert f" {sum(y) / 3 - a * mean:.3f} (" in section
    assert (
        "Llama-3-8B-Instruct, a -1.08, b 0.96, RMSE 0.03; Phi-3-mini-4k-Instruct, a -0.90, b 1.02, RMSE 0.01."
        in section
    )
    assert "wanda 2:4" not in section  # one sparsity
    assert "magnitude: law" in section  # the verdict on a law that misses


@pytest.mark.parametrize("without", ["the dense model", "a third sparsity"])
def test_no_laws_without_enough(without: str, study: list[dict[str, Any]], tmp_path: Path) -> None:
    kept = [r for r in study if (r["method"] if without == "the dense model" else r.get("sparsity") != 0.6)]
    pages = write_report(kept, tmp_path / "report.html")
    assert "Laws: what other" not in text_of(pages[0])
    assert not [page for page in pages if page.name.startswith("law-")]


def test_seeds_share_a_point_of_the_law(tmp_path: Path) -> None:
    ppls = {(0.1, 0): 24.0, (0.1, 1): 25.0, (0.2, 0): 30.0, (0.3, 0): 40.0}
    runs = [prune_record("wanda", s, tmp_path / f"{s}-{seed}", seed=seed) for s, seed in ppls]
    records = [
        eval_record(20.0, "tiny"),
        *(eval_record(ppl, run["out"], run) for ppl, run in zip(ppls.values(), runs, strict=True)),
        *runs,
    ]
    groups = group(collect(records))
    (law,) = fit_curves(groups[0], series(groups[0].rows))
    assert law.found.points.s.tolist() == [0.1, 0.2, 0.3]
    assert law.found.points.values.tolist() == pytest.approx([math.sqrt(24.0 * 25.0), 30.0, 40.0])


def test_compression_is_drawn_where_parameters_go(study: list[dict[str, Any]], tmp_path: Path) -> None:
    assert not (
        write_report(study, tmp_path / "one.html")[0].parent / "one-plots" / "compression.png"
    ).exists()  # one such run is no curve
    wider = prune_record(
        "magnitude",
        0.1,
        tmp_path / "wide",
        pattern="rows",
        options={"pattern": "rows", "scope": "model"},
        pruning_ratio=-0.029,
    )
    page = write_report([*study, wider, eval_record(40.0, tmp_path / "wide", wider)], tmp_path / "two.html")[0]
    assert (tmp_path / "two-plots" / "compression.png").exists()
    assert (
        'alt="Share of all parameters removed, by sparsity: magnitude rows: -2.9% at 10.0%, 23.1% at 30.0%"'
        in page.read_text("utf-8")
    )


def test_a_legend_of_many_curves_gets_room_beside_the_plot() -> None:
    def drawn(entries: int) -> Figure:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for number in range(entries):
            axes.plot([0, 1], [0, number], label=f"curve {number}")
        legend(axes, figure)
        figure.canvas.draw()
        return figure

    for entries in (3, 10, 40):
        figure = drawn(entries)
        plot, (width, height) = figure.axes[0].get_position(), figure.get_size_inches()
        assert plot.height * height > 2.5, entries
        assert plot.width * width > 3, entries
