"""The comparison of methods: its table with published numbers, its plots and its notes."""

from __future__ import annotations

from typing import Any

from secateur.report import compare_plots
from secateur.report.compare import comparison, markdown
from secateur.report.rows import collect


def record(method: str | None, ratio: float, ppl: float, **more: Any) -> list[dict[str, Any]]:
    place = f"/runs/{method}-{ratio}{more.get('pattern') or ''}{'-healed' if 'heal' in more else ''}"
    protocol = {"name": "wikitext2", "spec": "wikitext2", "seqlen": 4096, "sha256": "ab"}
    both = {
        "model": "meta-llama/Llama-2-7b-hf",
        "method": method,
        "pruning_ratio": ratio,
        "sparsity": ratio,
        "params_before": 100,
        "out": place,
        **more,
    }
    both |= {"params_after": 100 * (1 - ratio), "nonzero_after": 100 * (1 - ratio)}
    tasks = {"piqa": {"acc": 0.6, "acc_norm": 0.62, "n": 9}, "winogrande": {"acc": 0.5, "acc_norm": None, "n": 9}}
    measured = {"command": "eval", **both, "ppl": ppl, "ppl_protocol": protocol, "tasks": tasks}
    taken = {"command": "heal" if "heal" in more else "prune", **both, "seconds": 10.0, "peak_rss_bytes": 2e9}
    return [measured] if method is None else [taken, measured]


def test_the_table_has_the_published_numbers_beside_it() -> None:
    found = [
        *record(None, 0.0, 5.2),
        *record("disp_llm", 0.49, 10.4),
        *record("slicegpt", 0.21, 6.9, updated=True),
        *record("slicegpt", 0.21, 6.5, updated=True, heal={"steps": 3}, healed="/runs/slicegpt-0.21"),
        *record("wanda", 0.0, 12.0, pattern="2:4"),
        *record("other", 0.4, 50.0),
    ]
    result = comparison(collect(found), found)
    assert result is not None
    printed = [
        line.replace("\N{NO-BREAK SPACE}", " ").split("|")
        for line in markdown(result).splitlines()
        if line.startswith("|")
    ]
    lines = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in printed}
    heads = lines.pop("Method")
    assert heads == [
        "W update",
        "Removed",
        "PPL",
        "piqa",
        "winogrande",
        "Mean",
        "Wall time",
        "Peak memory",
        "Parameters",
        "Published",
    ]
    published = {name: cells[-1] for name, cells in lines.items()}
    assert published["dense"].startswith("PPL 5.12")
    assert published["disp_llm"].startswith("PPL 9.84 at 50%")
    assert published["slicegpt"].startswith("PPL 6.64 at 20%")
    assert published["wanda 2:4"] == "PPL 11.02"
    assert published["slicegpt + LoRA"] == published["other"] == "\N{EN DASH}"
    assert lines["slicegpt + LoRA"][6] == "20.0 s", "pruning and healing"
    assert lines["slicegpt + LoRA"][:1] == lines["slicegpt"][:1] == ["yes"]
    assert lines["disp_llm"][3:6] == ["62.0", "50.0", "56.0"]
    assert any("arXiv:2410.11988, table 1" in note and "4096" in note for note in result.notes)
    assert comparison(collect(found[:3]), found[:3]) is None, "one method alone is no comparison"


def test_the_plots_show_what_is_removed_and_what_is_zeroed_before_and_after_recovery() -> None:
    found = [
        *record(None, 0.0, 5.2),
        *record("disp_llm", 0.5, 10.4),
        *record("magnitude", 0.2, 90.25, pattern="rows"),
        *record("magnitude", 0.2, 50.5, pattern="rows", heal={"steps": 3}),
        *record("wanda", 0.0, 12.0, pattern="2:4", sparsity=0.5),
        *record("sparsegpt", 0.0, 9.5, pattern="2:4", sparsity=0.5),
    ]
    removed, zeroed = compare_plots.pictures(collect(found))
    assert removed.alt.endswith(
        "disp_llm: 10.40 at 50%; magnitude rows: 90.25 at 20%; magnitude rows + LoRA: 50.50 at 20%"
    )
    assert "hollow" in removed.caption
    assert "Arrows" not in removed.caption, "90 is drawn, however far above the dense 5.2"
    assert zeroed.alt.endswith("sparsegpt: 9.50 at 2:4, 50% of the weights; wanda: 12.00 at 2:4, 50% of the weights")
    assert "recovery" not in zeroed.caption
    assert removed.png.startswith(b"\x89PNG")
    assert [picture.name for picture in compare_plots.pictures(collect(found[:-2]))] == ["compare-removed"], (
        "of one method there is nothing to compare"
    )


def test_a_result_that_two_ratios_lead_to_stands_there_once() -> None:
    found = [*record("a", 0.2, 7.0), *record("b", 0.25, 8.0)]
    again = [{**r, "out": "/runs/again"} for r in record("b", 0.25, 8.0)]
    assert comparison(collect([*found, *again]), [*found, *again]) == comparison(collect(found), found)


def test_a_ratio_that_was_not_reached_is_marked_and_not_compared() -> None:
    found = [
        *record("a", 0.2, 7.0, params_removed=0.2),
        *record("b", 0.418, 8.0, params_removed=0.2),
        *record("c", 0.195, 9.0, params_removed=0.2),
    ]
    result = comparison(collect(found), found)
    assert result is not None
    removed = {
        line.split("|")[1].strip(): line.split("|")[3].strip()
        for line in markdown(result).splitlines()
        if line.startswith("|")
    }
    assert {name: removed[name] for name in "abc"} == {"a": "20.0%", "b": "41.8% (asked 20%)", "c": "19.5%"}
    assert result.notes[0].startswith("A ratio with 'asked' beside it is more than a point away from it")
    assert not any(note.startswith("About") for note in result.notes)


def test_ratios_that_differ_are_reported() -> None:
    found = [*record("a", 0.19, 7.0), *record("b", 0.22, 8.0)]
    result = comparison(collect(found), found)
    assert result is not None
    assert result.notes[0].startswith("About 20%: the measured ratios lie between 19.0% (a) and 22.0% (b)")
