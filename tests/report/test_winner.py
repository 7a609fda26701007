"""The report names the winner among what was asked for, draws what was measured, and finds the records of a folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from secateur.core.errors import SecateurError
from secateur.predict.find import find_records
from secateur.report import words
from secateur.report.html import write_report
from secateur.report.plots import Percent
from secateur.report.rows import Group, collect, group
from secateur.report.series import Comparison, comparisons, series
from secateur.report.tables import notes
from tests.report.test_report import PROTOCOL, eval_record, prune_record

ALONE = Group("tiny", None, ())  # no dense model, no protocol


def removed(method: str, ratio: float, ppl: float | None, asked: float | None = None) -> list[dict[str, Any]]:
    out = f"/runs/{method}-{ratio}"
    more = {"pattern": None, "options": {}, "pruning_ratio": ratio, "params_removed": asked}
    record = prune_record(method, ratio, out, **more)
    return [record, eval_record(ppl, out, record)]


def compared(*records: list[dict[str, Any]]) -> list[Comparison]:
    rows = collect([eval_record(24.3, "tiny"), *(r for several in records for r in several)])
    return comparisons(series(rows), lambda row: row.cost, lambda row: None, lowest=True)


THREE = (
    removed("llm_pruner", 0.25, 129.9, 0.25),
    removed("shortgpt", 0.263, 343.5, 0.25),
    removed("slicegpt", 0.266, 456.9, 0.25),
)


def test_the_winner_is_named_among_those_asked_for_the_same() -> None:
    found = compared(*THREE)[0]
    assert [entry.label for entry in found.entries] == ["llm_pruner", "shortgpt", "slicegpt"]
    said = words.finding(found, ALONE)
    assert said.startswith(
        "At 25% of all parameters asked for (reached: 25.0% to 26.6%), llm_pruner has the lowest perplexity of the 3 "
        "compared: 129.90 (25.0%); shortgpt has 343.50 (26.3%); slicegpt has 456.90 (26.6%)."
    )
    assert "removed the least" in said


def test_the_finding_says_what_it_was_measured_on() -> None:
    rows = collect([eval_record(24.3, "tiny"), *(r for several in THREE for r in several)])
    found = compared(*THREE)[0]
    (known,) = group(rows)
    few = Group(known.model, (("spec", "/data/a.txt"), ("windows", 2), ("seqlen", 2048), ("tokens", 4094)), known.rows)
    assert "Measured on a.txt, 2 windows of 2,048 tokens: too few to tell small differences." in words.finding(
        found, few
    )
    many = Group(known.model, (("spec", "wikitext2"), ("windows", 166), ("seqlen", 2048), ("tokens", 339802)), ())
    assert "Measured on wikitext2, 166 windows of 2,048 tokens." in words.finding(found, many)


def test_what_was_asked_apart_is_compared_within_two_points() -> None:
    near, far = compared(removed("a", 0.25, 30.0), removed("b", 0.268, 20.0, 0.27), removed("c", 0.291, 9.0, 0.3))
    assert [entry.label for entry in near.entries] == ["b", "a"]
    assert "No ratio was asked for in common" in words.finding(near, ALONE)
    assert [entry.label for entry in far.entries] == ["c"]


def test_a_run_that_went_astray_is_named_and_one_that_lies_near_joins() -> None:
    found = compared(*THREE, removed("coarse", 0.125, 25.0, 0.25), removed("other", 0.255, 99.0))[0]
    assert found.entries[0].label == "other"
    said = words.finding(found, ALONE)
    assert "not compared since more than two points away: coarse (12.5%)" in said
    assert "Not asked for 25%, and compared since within two points: other." in said


def test_one_that_landed_far_from_the_level_does_not_win_it() -> None:
    said = words.finding(compared(removed("a", 0.25, 20.0, 0.25), removed("b", 0.15, 10.0, 0.25))[0], ALONE)
    assert said.startswith("At 25% of all parameters")
    assert "a has perplexity 20.00" in said
    assert "not compared since more than two points away: b (15.0%)" in said


def test_several_that_landed_far_away_are_no_level_of_their_own() -> None:
    far = (removed("magnitude", 0.29, 9e6, 0.25), removed("wanda", 0.291, 8e5, 0.25))
    found = compared(*THREE, *far)
    assert [entry.label for entry in found[0].entries] == ["llm_pruner", "shortgpt", "slicegpt"]
    assert [label for label, _ in found[0].astray] == ["magnitude", "wanda"]
    assert len(found) == 1


def test_an_infinite_perplexity_was_measured_and_comes_last() -> None:
    found = compared(removed("a", 0.25, 20.0, 0.25), removed("b", 0.25, None, 0.25))[0]
    assert [entry.label for entry in found.entries] == ["a", "b"]
    said = words.finding(found, ALONE)
    assert "a has the lowest perplexity of the 2 compared: 20.00; b has infinite." in said


def test_two_that_both_went_astray_are_still_compared() -> None:
    found = compared(removed("a", 0.22, 30.0, 0.25), removed("b", 0.28, 20.0, 0.25))[0]
    assert found.where == "25% of all parameters asked for (reached: 22.0% to 28.0%)"
    assert [entry.label for entry in found.entries] == ["b", "a"]


def healing(source: str, out: str, record: dict[str, Any], before: float, after: float) -> dict[str, Any]:
    facts = {"ppl_before": before, "loss_before": 1.0, "ppl": after, "loss": 1.0, "ppl_protocol": PROTOCOL}
    return {**record, "command": "heal", "heal": {"steps": 3}, "healed": source, "out": out, **facts}


def test_healing_makes_two_rows_without_another_eval() -> None:
    (pruned, measured), out = removed("a", 0.25, 40.0), "/runs/a-healed"
    for source in (pruned["out"], "runs/a-0.25"):  # also a path relative to an unknown folder
        heal = healing(source, out, pruned, 39.0, 31.0)
        rows = collect([pruned, heal])
        assert [(row.get("method"), row.ppl) for row in rows] == [("a", 39.0), ("a + LoRA", 31.0)]
        assert [row.get("nonzero_after") for row in rows] == [pruned["nonzero_after"]] * 2
    assert [row.ppl for row in collect([pruned, measured, heal])] == [40.0, 31.0], "an evaluation comes first"
    other = measured | {"ppl_protocol": {**PROTOCOL, "windows": 8}}
    assert len(group(collect([pruned, other, heal]))[0].rows) == 2, "before and after stand in one group"
    again = measured | {"out": out, "ppl": 30.0, "heal": {"steps": 3}}
    assert [row.ppl for row in collect([pruned, measured, heal, again])] == [40.0, 30.0]
    stale = again | {"heal": {"steps": 2}}
    assert [row.ppl for row in collect([pruned, measured, stale, heal])] == [40.0, 31.0]


def test_what_is_off_the_scale_is_marked(tmp_path: Path) -> None:
    records = [
        r for several in (*THREE, removed("bad", 0.25, 9e7, 0.25), removed("worse", 0.25, None, 0.25)) for r in several
    ]
    page = write_report([eval_record(24.3, "tiny"), *records], tmp_path / "r.html")[0].read_text("utf-8")
    assert page.count("Arrows at the upper edge stand for results off the scale") == 1
    page = write_report([r for several in THREE for r in several], tmp_path / "r.html")[0].read_text("utf-8")
    assert "off the scale" not in page


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.2, 0.4], ["20%", "40%"]),
        ([0.25, 0.255, 0.26], ["25.0%", "25.5%", "26.0%"]),
        ([-0.0001, 0.0, 0.1], ["-0.01%", "0.00%", "10.00%"]),
        ([0.1, 0.125], ["10.0%", "12.5%"]),
    ],
)
def test_ticks_differ(ticks: list[float], labels: list[str]) -> None:
    assert Percent().format_ticks(ticks) == labels


def test_many_curves_with_long_names_leave_room(tmp_path: Path) -> None:
    records = [eval_record(20.0, "tiny")]
    for n in range(30):
        run = prune_record("magnitude", 0.5, f"/r/{n}", options={"a_long_option": f"{n}-" + "value-" * 12})
        records += [run, eval_record(30.0 + n, run["out"], run)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(records, tmp_path / "r.html")


def write(folder: Path, *found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


def test_a_folder_gives_its_own_records(tmp_path: Path) -> None:
    def run(name: str, model: str = "tiny") -> list[dict[str, Any]]:
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "config.json").write_text("{}")
        record = prune_record("wanda", 0.5, tmp_path / "a" / name, model=model)
        return [record, eval_record(9.0, record["out"], record, model=model)]

    one, two, other = run("one"), run("two"), run("other", "large")
    dense, strange = eval_record(5.0, "tiny"), eval_record(4.0, "large", model="large")
    healed = healing("one", str(tmp_path / "a" / "healed"), one[0], 9.0, 8.0)
    (tmp_path / "a" / "healed").mkdir()
    (tmp_path / "a" / "healed" / "adapter_config.json").write_text("{}")
    whole = [dense, strange, *one, *two, *other, healed]
    write(tmp_path / "a", *whole)
    write(tmp_path / "b", dense)
    assert find_records([tmp_path / "a"]) == whole
    assert find_records([tmp_path / "a" / "two"]) == [dense, *two]
    assert find_records([tmp_path / "a" / "one"]) == find_records([tmp_path / "a" / "healed"]) == [dense, *one, healed]
    assert find_records([tmp_path]) == [*whole, dense]
    assert find_records([tmp_path / "a" / "two", tmp_path / "a", tmp_path / "a" / "records.jsonl"]).count(dense) == 1
    (tmp_path / "a").rename(tmp_path / "moved")
    assert find_records([tmp_path / "moved" / "two"]) == [dense, *two]


def test_a_folder_without_records_says_what_to_give(tmp_path: Path) -> None:
    for name in ("empty", "x.partial", "alone", "late/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "alone" / "config.json").write_text("{}")
    (tmp_path / "late" / "model" / "config.json").write_text("{}")
    write(tmp_path / "late", eval_record(9.0, "/runs/former"))
    for name, said in {
        "empty": "no records.jsonl, none of its folders has one, and it is no checkpoint",
        "missing": "does not exist; give a records.jsonl",
        "x": "its run is not finished: go on with --resume",
        "alone": "run 'secateur eval",
        "late/model": r"about 'model' \(folders named there: former\)",
    }.items():
        with pytest.raises(SecateurError, match=said) as raised:
            find_records([tmp_path / name])
        assert "\n" not in str(raised.value)


def test_the_dense_model_is_found_by_another_spelling_and_its_command_measures_alike(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pruned = prune_record("magnitude", 0.5, str(tmp_path / "p"), model="./m/")
    dense = {**eval_record(9.0, "m"), "model": "m"}
    lines = [pruned, eval_record(12.0, str(tmp_path / "p"), pruned), dense]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "p" / "config.json").write_text("{}")
    assert dense["out"] in [record.get("out") for record in find_records([tmp_path / "p"])]
    groups = group(collect(lines[:2]))
    (said,) = [line for line in notes(groups[0].rows, groups, "") if "dense model was not measured" in line]
    how = f"--protocol {PROTOCOL['name']} --text {PROTOCOL['spec']} --eval-seqlen {PROTOCOL['seqlen']}"
    assert f"run 'secateur eval m {how} --limit {PROTOCOL['windows']}'" in said
