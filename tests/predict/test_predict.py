"""`secateur predict` through the command line: the shape of its answer, its warnings, and every input it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core import records
from secateur.core.errors import UsageError
from secateur.report import law_plots

DENSE = 5.0
PROTOCOL = {
    "spec": "wikitext2",
    "seqlen": 512,
    "windows": 40,
    "tokens": 20480,
    "bos": False,
    "tail": "drop",
    "join": "\n\n",
    "sha256": "ab" * 32,
}
Predict = Callable[..., dict[str, Any]]


def paper(s: float, a: float = -1.08, b: float = 0.96) -> float:
    return math.exp(math.log(DENSE) / (a * s + b))


def record(s: float, ppl: float | None, **more: Any) -> dict[str, Any]:
    pruned = {
        "method": "slicegpt", "options": {"orientation": "pca"}, "pattern": None, "seed": 0,
        "sparsity": round(s, 1), "sparsity_measured": s,
        "calibration": {"spec": "alpaca", "samples": 128, "seqlen": 512, "sha256": "cd" * 32},
    }  # fmt: skip
    dense = {
        "method": None,
        "options": None,
        "pattern": None,
        "seed": None,
        "sparsity": 0.0,
        "sparsity_measured": 0.0,
        "calibration": None,
    }
    return {
        "command": "eval", "model": "tiny", "model_revision": None, "ppl": ppl, "ppl_protocol": PROTOCOL,
        "dtype": "float32", "tasks": {}, "modules": None, "out": f"runs/{s}", **(pruned if s else dense),
    } | more  # fmt: skip


def cloze(acc: float, stderr: float = 0.02, n: int = 500) -> dict[str, Any]:
    return {"tasks": {"cloze": {"acc": acc, "acc_norm": acc + 0.05, "stderr": stderr, "n": n, "sha256": "ef" * 32}}}


def write_records(folder: Path, found: list[dict[str, Any]], name: str = "records.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    return file


def write_csv(folder: Path, text: str, name: str = "points.csv") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def csv_of(points: dict[float, float], column: str = "ppl") -> str:
    return f"sparsity,{column}\n" + "".join(f"{s},{value!r}\n" for s, value in points.items())


SWEEP = [0.104, 0.196, 0.302, 0.398]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_records(tmp_path, [record(0.0, DENSE), *(record(s, paper(s)) for s in SWEEP)])


def ask(*args: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["predict", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def refused(*args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, args)])
    assert "Traceback" not in result.output
    assert not result.stdout.strip()
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    return result.exit_code, lines[0]


# The answer


def test_the_contract_of_the_json(sweep: Path) -> None:
    answer = ask(sweep, "--at", "0.15,0.25", "--at", "0.6", "--target-ppl", "9")
    assert (answer["law"], answer["points"]) == ("ratio", 4)
    assert (answer["a"], answer["b"]) == pytest.approx((-1.08, 0.96), abs=1e-12)
    assert answer["rmse"] == pytest.approx(0, abs=1e-12)
    assert answer["heldout_rmse"] == pytest.approx(0, abs=1e-12)
    assert [entry["sparsity"] for entry in answer["predictions"]] == [0.15, 0.25, 0.6]
    for entry in answer["predictions"]:
        assert set(entry) == {"sparsity", "params_removed", "ppl", "low", "high", "other_laws", "extrapolated"}
        assert entry["ppl"] == pytest.approx(paper(entry["sparsity"]))
        assert entry["low"] <= entry["ppl"] * (1 + 1e-9)
        assert entry["high"] >= entry["ppl"] * (1 - 1e-9)
        assert entry["extrapolated"] is (entry["sparsity"] == 0.6)
    target = answer["target"]
    assert target["sparsity"] == pytest.approx((0.96 - math.log(DENSE) / math.log(9)) / 1.08, abs=1e-9)
    assert (target["ppl"], target["extrapolated"]) == (9.0, False)
    assert any("sparsity 0.6 is outside the fitted range 0.104 to 0.398" in line for line in answer["warnings"])


def test_the_fit_is_on_the_measured_sparsity(sweep: Path) -> None:
    """The records ask for 0.1, 0.2, ...: a fit on those would not find the constants."""
    assert ask(sweep)["a"] == pytest.approx(-1.08, abs=1e-12)
    assert [entry["sparsity"] for entry in ask(sweep)["predictions"]] == SWEEP


def test_records_and_csv_and_api_agree(sweep: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path, csv_of({0.0: DENSE} | {s: paper(s) for s in reversed(SWEEP)}))
    from_records, from_csv = ask(sweep, "--at", "0.2"), ask(table, "--at", "0.2")
    for key in ("law", "a", "b", "rmse", "heldout_rmse", "points", "predictions", "rivals", "published"):
        assert from_records[key] == from_csv[key], key
    called = api.predict([tmp_path], at=[0.2])  # a folder stands for its records
    assert called["predictions"] == from_csv["predictions"]
    assert (called["model"], called["method"]) == ("tiny", "slicegpt")


def test_every_rival_is_there_with_its_held_out_error(sweep: Path) -> None:
    answer = ask(sweep)
    names = [rival["law"] for rival in answer["rivals"]]
    assert set(names) == {"ratio", "theory", "log-linear", "log-slope", "power", "quadratic", "exponential", "phase"}
    assert names[0] == answer["best"] == "ratio"
    phase = next(rival for rival in answer["rivals"] if rival["law"] == "phase")
    assert (phase["fitted"], phase["heldout_rmse"], phase["heldout_points"]) == (
        True,
        None,
        0,
    )  # four constants: four points leave none to hold out
    assert set(phase["constants"]) == {"a", "b", "c", "t"}
    held = [rival["heldout_rmse"] for rival in answer["rivals"] if rival["heldout_rmse"] is not None]
    assert held == sorted(held)


def test_fewer_points_than_constants_is_said(tmp_path: Path) -> None:
    answer = ask(write_csv(tmp_path, csv_of({0.0: DENSE, 0.1: 6.0, 0.2: 8.0, 0.3: 11.0})))
    phase = next(rival for rival in answer["rivals"] if rival["law"] == "phase")
    assert (phase["fitted"], phase["a"], phase["constants"]) == (False, None, None)
    assert "only 3 pruned points: intervals and held-out errors say little" in answer["warnings"]
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "points.csv")])
    assert "not fitted: too few" in result.stdout


def test_a_checkpoint_stands_for_its_records(tmp_path: Path) -> None:
    """As for a report: those about it in its parent, and the dense model, which `ppl_dense` tells of if need be."""
    out = tmp_path / "pruned"
    out.mkdir()
    (out / "config.json").write_text("{}")
    told = record(0.25, 9.0, out=str(out), pruning_ratio=0.2, ppl_dense=DENSE, method="slicegpt", options={"round": 4})
    other = record(0.4, 12.0, out=str(tmp_path / "other"))
    write_records(tmp_path, [told, other])
    answer = ask(out, "--law", "theory", "--at", "0.3")
    assert (answer["dense"], answer["points"]) == (DENSE, 1)
    shown = CliRunner().invoke(app, ["predict", str(out), "--law", "theory", "--at", "0.3"]).stdout
    assert "ppl, 1 pruned point, dense" in shown
    status, said = refused(out)
    assert status == 1
    assert "secateur sweep tiny --method slicegpt --params-removed 0.1,0.3 --set round=4 --out DIR'" in said


def test_published_fits_are_of_slicegpt_alone(tmp_path: Path) -> None:
    file = write_records(
        tmp_path, [record(0.0, DENSE), *(record(s, paper(s), method="shortgpt", options={}) for s in SWEEP)]
    )
    assert "published fits" not in CliRunner().invoke(app, ["predict", str(file)]).stdout


def test_the_plot_reaches_what_was_asked(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []

    def png(figure: Figure) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(law_plots, "png", png)
    answer = ask(sweep, "--at", "0.7", "--plot", tmp_path / "law.png")
    left, right = figures[-1].axes
    value = answer["predictions"][0]["ppl"]
    for axes, y in ((left, math.log(DENSE) / math.log(value)), (right, value)):
        (star,) = [line for line in axes.lines if line.get_marker() == "*"]
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.7, pytest.approx(y))  # type: ignore[index]
        low, high = axes.get_ylim()
        assert axes.get_xlim()[1] > 0.7
        assert low < y < high
        dashed = [line for line in axes.lines if line.get_linestyle() == "--" and line.get_color() == star.get_color()]
        assert max(max(line.get_xdata()) for line in dashed) > 0.7  # type: ignore[arg-type]
        (solid,) = [line for line in axes.lines if line.get_linestyle() == "-" and line.get_color() == star.get_color()]
        assert SWEEP[0] <= min(solid.get_xdata()) <= max(solid.get_xdata()) <= SWEEP[-1]  # type: ignore[arg-type]
    assert f"asked, 70.0% sparsity: {value:.4g}" in {text.get_text() for text in right.get_legend().get_texts()}  # type: ignore[union-attr]


def test_published_fits_stand_beside(sweep: Path) -> None:
    llama, phi = ask(sweep, "--at", "0.2")["published"]
    assert (llama["a"], llama["b"], llama["rmse"]) == (-1.08, 0.96, 0.03)
    assert llama["predictions"] == [{"sparsity": 0.2, "ppl": pytest.approx(paper(0.2))}]
    assert phi["predictions"] == [{"sparsity": 0.2, "ppl": pytest.approx(paper(0.2, -0.90, 1.02))}]
    shown = CliRunner().invoke(app, ["predict", str(sweep)]).stdout
    for figure in ("Llama-3-8B", "-1.08", "0.96", "Phi-3-mini", "-0.90", "1.02"):
        assert figure in shown


def test_text_answer(sweep: Path) -> None:
    result = CliRunner().invoke(app, ["predict", str(sweep), "--at", "0.25", "--target-ppl", "9"])
    assert result.exit_code == 0
    assert f"{paper(0.25):.4g}" in result.stdout
    assert "-1.080" in result.stdout
    assert "largest sparsity that keeps ppl 9" in result.stdout


def test_the_first_line_has_the_spread_over_laws_and_the_range_that_was_measured(sweep: Path) -> None:
    inside, outside = ask(sweep, "--at", "0.25,0.8")["predictions"]
    rivals = {"exponential", "power", "log-linear", "log-slope", "quadratic"}  # fitted, and judged on held-out points
    for entry in (inside, outside):
        laws = [ask(sweep, "--law", law, "--at", entry["sparsity"])["predictions"][0]["ppl"] for law in rivals]
        assert entry["other_laws"] == [min(laws), max(laws)]
        assert entry["low"] <= entry["ppl"] <= entry["high"]
    assert outside["other_laws"][1] > 2 * outside["other_laws"][0], "far outside, laws disagree"
    assert inside["other_laws"][1] < 1.2 * inside["other_laws"][0]
    near, far = CliRunner().invoke(app, ["predict", str(sweep), "--at", "0.25,0.8"]).stdout.splitlines()[:2]
    assert re.search(r"\(95%: \S+ to \S+; other laws: \S+ to \S+\)$", near), near
    assert far.endswith("); outside what was measured, sparsity 0.104 to 0.398"), far
    wanted = CliRunner().invoke(app, ["predict", str(sweep), "--target-ppl", "1000"]).stdout.splitlines()[0]
    assert re.search(r"at most; other laws: sparsity \S+ to \S+; outside what was measured", wanted), wanted


def test_theory_needs_no_points(tmp_path: Path) -> None:
    answer = ask(write_csv(tmp_path, "sparsity,ppl\n0,5\n"), "--at", "0.25", "--target-ppl", "25")
    assert (answer["law"], answer["points"], answer["rmse"], answer["heldout_rmse"]) == ("theory", 0, None, None)
    (entry,) = answer["predictions"]
    assert entry["ppl"] == pytest.approx(5 ** (4 / 3))
    assert (entry["low"], entry["high"], entry["extrapolated"]) == (None, None, True)
    assert answer["target"]["sparsity"] == pytest.approx(0.5)  # 5 ** 2 = 25
    assert any("is a hypothesis here" in line for line in answer["warnings"])


def test_two_points_have_no_interval(tmp_path: Path) -> None:
    answer = ask(write_csv(tmp_path, csv_of({0.0: DENSE, 0.1: paper(0.1), 0.3: paper(0.3)})), "--at", "0.2")
    assert (answer["a"], answer["b"]) == pytest.approx((-1.08, 0.96))
    (entry,) = answer["predictions"]
    assert entry["ppl"] == pytest.approx(paper(0.2))
    assert (entry["low"], entry["high"]) == (None, None)
    assert any("passes through all of them, so there is no interval" in line for line in answer["warnings"])
    assert any("held-out error of law 'ratio' is unknown" in line for line in answer["warnings"])


def test_one_point_suffices_for_the_parameter_free_law(tmp_path: Path) -> None:
    file = write_csv(tmp_path, csv_of({0.0: DENSE, 0.2: 7.0}))
    answer = ask(file, "--law", "theory", "--at", "0.1")
    y = math.log(5) / math.log(7)
    assert answer["rmse"] == pytest.approx(abs(y - 0.8))
    assert answer["predictions"][0]["low"] < answer["predictions"][0]["high"]


def test_best_takes_the_least_held_out_error(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path, csv_of({s: DENSE * math.exp(0.2 * math.expm1(6 * s)) for s in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)})
    )
    default, best = ask(file), ask(file, "--law", "best")
    assert (default["law"], best["law"], best["b"]) == ("ratio", "exponential", pytest.approx(6.0, abs=1e-5))
    assert any(
        "law 'exponential' predicts the 5 held-out points better" in line and "--law exponential" in line
        for line in default["warnings"]
    )
    assert not any("better" in line for line in best["warnings"])


def test_a_law_that_does_not_hold_is_said(tmp_path: Path) -> None:
    """SliceGPT on one small model, as the methods notes report it: a straight line with quite another intercept."""
    measured = dict(zip((0.083, 0.125, 0.208, 0.250, 0.333), (0.589, 0.520, 0.439, 0.409, 0.375), strict=True))
    file = write_csv(tmp_path, csv_of({0.0: 4.34} | {s: math.exp(math.log(4.34) / y) for s, y in measured.items()}))
    said = ask(file)["warnings"]
    assert any(line.startswith("the paper's b = 1 does not hold: fitted 0.636") for line in said)
    assert any(line.startswith("law 'ratio' does not hold: it misses held-out points by 46.3%") for line in said)
    assert not any("a = -1 does not hold" in line for line in said)  # its interval, -1.236 to -0.463, includes -1
    held = ask(write_csv(tmp_path, csv_of({0.0: DENSE} | {s: paper(s, -1.0, 1.0) for s in SWEEP})))["warnings"]
    assert not any("does not hold" in line for line in held)


def test_outside_the_domain(sweep: Path) -> None:
    answer = ask(sweep, "--at", "0.95")  # 0.96 - 1.08 * 0.95 < 0
    assert answer["predictions"][0]["ppl"] is None
    assert any("law 'ratio' has no perplexity at sparsity 0.95" in line for line in answer["warnings"])


def test_unreachable_and_far_targets(sweep: Path) -> None:
    low = ask(sweep, "--target-ppl", "5.1")
    assert low["target"]["sparsity"] is None
    assert any(
        "perplexity 5.1 is not reachable: at sparsity 0 law 'ratio' gives 5.347, and the dense model has 5" in line
        for line in low["warnings"]
    )
    far = ask(sweep, "--target-ppl", "1000")
    assert far["target"]["extrapolated"] is True
    assert any("measure there before relying on it" in line for line in far["warnings"])


def test_points_that_are_not_monotone(tmp_path: Path) -> None:
    said = ask(write_csv(tmp_path, csv_of({0.0: DENSE, 0.1: 6.0, 0.2: 5.9, 0.3: 8.0})))["warnings"]
    assert (
        "not monotone: perplexity is better at sparsity 0.2 (5.9) than at 0.1 (6); every law here says the opposite"
        in said
    )


def test_the_dense_model_in_the_fit(tmp_path: Path) -> None:
    file = write_csv(tmp_path, csv_of({0.0: DENSE} | {s: paper(s, -0.8, 0.6) for s in SWEEP}))
    assert (ask(file)["b"], ask(file)["dense_in_fit"]) == (pytest.approx(0.6), False)
    pulled = ask(file, "--dense-in-fit", "--at", "0.05")
    assert pulled["b"] > 0.7
    assert pulled["points"] == 4
    assert pulled["predictions"][0]["extrapolated"] is False


def test_the_cautious_target_is_where_the_worse_end_keeps_it(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path, csv_of({0.0: DENSE} | {s: paper(s) * (1 + 0.02 * (-1) ** n) for n, s in enumerate(SWEEP)})
    )
    target = ask(file, "--target-ppl", "9")["target"]
    assert target["cautious"] < target["sparsity"] - 0.01
    mean, worse = (ask(file, "--at", repr(target[name]))["predictions"][0] for name in ("sparsity", "cautious"))
    assert mean["ppl"] == pytest.approx(9.0)
    assert worse["high"] == pytest.approx(9.0)


def test_a_held_out_point_outside_the_domain(tmp_path: Path) -> None:
    """Without the last point the line is so steep that it has no perplexity there."""
    ys = {0.1: 0.9, 0.2: 0.5, 0.6: 0.05}
    answer = ask(write_csv(tmp_path, csv_of({0.0: 1.5} | {s: math.exp(math.log(1.5) / y) for s, y in ys.items()})))
    ratio = next(rival for rival in answer["rivals"] if rival["law"] == "ratio")
    assert (ratio["heldout_rmse"], ratio["heldout_outside_domain"], ratio["last_error"]) == (None, 1, None)
    assert (
        "law 'ratio' does not hold: fitted to the others, it has no value at 1 of 3 held-out points"
        in answer["warnings"]
    )


def test_a_slope_that_says_pruning_helps(tmp_path: Path) -> None:
    said = ask(write_csv(tmp_path, csv_of({0.0: DENSE, 0.1: 8.0, 0.2: 7.0, 0.3: 6.5})))["warnings"]
    assert any(
        line.startswith("law 'ratio' does not hold: its fitted slope a = ") and line.endswith("says that pruning helps")
        for line in said
    )
    accuracies = write_csv(tmp_path, csv_of({0.0: 0.9, 0.1: 0.92, 0.2: 0.95, 0.3: 0.99}, "acc"))
    said = ask(accuracies, "--chance", "0.5", "--at", "0.6")["warnings"]
    assert any(line.startswith("law 'log-ratio' does not hold: its fitted slope") for line in said)
    assert any("at sparsity 0.6, which is above 1" in line for line in said)


# Accuracy


def test_accuracy_of_a_task(tmp_path: Path) -> None:
    accs = {s: 0.7 * math.exp(-0.9 * s + 0.01) for s in SWEEP}
    file = write_records(
        tmp_path, [record(0.0, DENSE, **cloze(0.7)), *(record(s, paper(s), **cloze(acc)) for s, acc in accs.items())]
    )
    answer = ask(file, "--metric", "cloze", "--at", "0.25", "--target-acc", "0.6")
    assert (answer["law"], answer["metric"], answer["chance"]) == ("log-ratio", "cloze", 0.25)
    assert (answer["a"], answer["b"]) == pytest.approx((-0.9, 0.01))
    assert answer["predictions"][0]["acc"] == pytest.approx(0.7 * math.exp(-0.9 * 0.25 + 0.01))
    fields = {"sparsity", "params_removed", "acc", "low", "high", "other_laws", "extrapolated"}
    assert set(answer["predictions"][0]) == fields
    assert answer["target"]["sparsity"] == pytest.approx((0.01 - math.log(0.6 / 0.7)) / 0.9)
    assert len(answer["published"]) == 8
    assert ask(file, "--metric", "cloze", "--law", "proportional")["b"] == 0.0
    assert ask(file, "--metric", "cloze:acc_norm")["dense"] == pytest.approx(0.75)


def test_accuracy_at_chance_is_left_out(tmp_path: Path) -> None:
    accs = {0.1: 0.6, 0.2: 0.5, 0.3: 0.42, 0.4: 0.265, 0.5: 0.24}
    file = write_records(
        tmp_path, [record(0.0, DENSE, **cloze(0.7)), *(record(s, paper(s), **cloze(acc)) for s, acc in accs.items())]
    )
    answer = ask(file, "--metric", "cloze", "--at", "0.9")
    assert [point["sparsity"] for point in answer["measured"]] == [0.1, 0.2, 0.3]
    said = "\n".join(answer["warnings"])
    assert "accuracy 0.265 at sparsity 0.4 is at chance (0.25) within its standard error 0.02 and is left out" in said
    assert "accuracy 0.24 at sparsity 0.5 is at chance (0.25) and is left out" in said
    assert "below chance (0.25): expect chance" in said
    assert (
        "accuracy 0.2 is not above chance (0.25)"
        in ask(file, "--metric", "cloze", "--target-acc", "0.2")["warnings"][-1]
    )


def test_accuracy_of_an_unknown_task_and_of_zero(tmp_path: Path) -> None:
    file = write_csv(tmp_path, csv_of({0.0: 0.8, 0.1: 0.7, 0.2: 0.6, 0.3: 0.5, 0.6: 0.0}, "acc"))
    answer = ask(file)
    assert (answer["metric"], answer["points"], answer["chance"]) == ("acc", 3, None)
    assert any("accuracy 0 at sparsity 0.6 has no logarithm and is left out" in line for line in answer["warnings"])
    assert any("give --chance" in line for line in answer["warnings"])
    known = ask(file, "--chance", "0.5")
    assert known["points"] == 2
    assert not any("give --chance" in line for line in known["warnings"])


def test_a_column_named_after_the_task(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "sparsity, ppl, piqa, stderr\n0, 5, 0.8, 0.01\n0.1, 6, 0.7, 0.01\n0.2, 8, 0.6, 0.01\n\n")
    assert ask(file)["metric"] == "ppl"
    assert [point["acc"] for point in ask(file, "--metric", "piqa", "--chance", "0.5")["measured"]] == [0.7, 0.6]


# Records


@pytest.mark.parametrize(
    ("ppls", "zeroed", "best"),
    [
        ({"llm_pruner": 30.0, "shortgpt": 40.0, "slicegpt": 20.0}, (), "slicegpt --params-removed R,R"),
        ({"llm_pruner": 30.0, "shortgpt": 10.0, "slicegpt": 20.0}, (), "shortgpt --params-removed R,R"),
        ({"llm_pruner": 30.0, "slicegpt": 40.0, "wanda": 20.0}, ("wanda",), "llm_pruner --params-removed R,R"),
        ({"sparsegpt": 30.0, "wanda": 20.0}, ("sparsegpt", "wanda"), "wanda --sparsity S,S"),
    ],
)
def test_the_sweep_that_is_advised_is_of_the_best_method(
    ppls: dict[str, float], zeroed: tuple[str, ...], best: str, tmp_path: Path
) -> None:
    one_each = [
        record(0.25, ppl, method=name, out=f"runs/{name}", pruning_ratio=0.0 if name in zeroed else 0.25)
        for name, ppl in ppls.items()
    ]
    _, said = refused(write_records(tmp_path, [record(0.0, DENSE), *one_each]))
    assert f"'secateur sweep tiny --method {best} --out DIR'" in said


def test_where_keeps_one_method(tmp_path: Path) -> None:
    others = [record(s, paper(s) + 3, method="wanda", out=f"runs/w{s}") for s in SWEEP]
    file = write_records(tmp_path, [record(0.0, DENSE), *(record(s, paper(s)) for s in SWEEP), *others])
    status, said = refused(file)
    assert status == 1
    assert (
        "the records differ in method: slicegpt, wanda; one law is for one of them: --where NAME=VALUE keeps one of "
        "them" in said
    )
    assert ask(file, "--where", "method=slicegpt")["a"] == pytest.approx(-1.08)
    assert ask(file, "--where", "method=wanda", "--where", "options.orientation=pca")["measured"][0][
        "ppl"
    ] == pytest.approx(paper(SWEEP[0]) + 3)


def test_later_records_replace_and_prune_records_do_not_count(tmp_path: Path) -> None:
    stale = record(SWEEP[0], 99.0)
    pruned = {"command": "prune", "method": "wanda", "out": "runs/x", "sparsity": 0.5}
    file = write_records(tmp_path, [stale, pruned, record(0.0, DENSE), *(record(s, paper(s)) for s in SWEEP)])
    assert ask(file)["a"] == pytest.approx(-1.08)


def test_two_files_of_one_sweep(tmp_path: Path) -> None:
    first = write_records(tmp_path, [record(0.0, DENSE), *(record(s, paper(s)) for s in SWEEP[:2])], "a.jsonl")
    second = write_records(tmp_path, [record(s, paper(s)) for s in SWEEP[2:]], "b.jsonl")
    assert ask(first, second)["points"] == 4


def test_diverged_points_are_left_out_and_named(tmp_path: Path) -> None:
    file = write_records(tmp_path, [record(0.0, DENSE), *(record(s, paper(s)) for s in SWEEP), record(0.7, None)])
    answer = ask(file)
    assert answer["points"] == 4
    assert "runs/0.7: ppl was not measured, or is infinite; left out" in answer["warnings"]


def test_equal_points_count_once(tmp_path: Path) -> None:
    twins = [
        record(0.0, DENSE),
        *(record(s, paper(s)) for s in SWEEP),
        record(SWEEP[0], paper(SWEEP[0]), out="runs/again"),
    ]
    answer = ask(write_records(tmp_path, twins))
    assert answer["points"] == 4
    assert any("occurs more than once and is counted once" in line for line in answer["warnings"])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model", "other", "model: other, tiny"),
        ("model_revision", "abc", "model_revision: abc, null"),
        ("method", "wanda", "method: slicegpt, wanda"),
        ("pattern", "2:4", "pattern: 2:4, null"),
        ("seed", 1, "seed: 0, 1"),
        ("dtype", "bfloat16", "dtype: bfloat16, float32"),
        ("modules", "mlp=0.3", "modules: mlp=0.3, null"),
        ("options", {"orientation": "random"}, 'options: {"orientation": "pca"}, {"orientation": "random"}'),
        (
            "calibration",
            {"spec": "c4", "samples": 128, "seqlen": 512, "sha256": "cd" * 32},
            "calibration.spec: alpaca, c4",
        ),
        (
            "calibration",
            {"spec": "alpaca", "samples": 128, "seqlen": 512, "sha256": "00" * 32},
            "calibration.sha256: 0000",
        ),
        ("ppl_protocol", {**PROTOCOL, "seqlen": 1024}, "ppl_protocol.seqlen: 1024, 512"),
        ("ppl_protocol", {**PROTOCOL, "sha256": "00" * 32}, "ppl_protocol.sha256: 0000"),
        ("ppl_protocol", {**PROTOCOL, "tail": "keep"}, "ppl_protocol.tail: drop, keep"),
    ],
)
def test_records_that_do_not_belong_together(field: str, value: Any, said: str, tmp_path: Path) -> None:
    file = write_records(
        tmp_path,
        [record(0.0, DENSE), *(record(s, paper(s)) for s in SWEEP[:3]), record(0.398, paper(0.398), **{field: value})],
    )
    status, line = refused(file)
    assert status == 1
    assert f"the records differ in {said}" in line


@pytest.mark.parametrize(
    ("field", "value"), [("ppl_protocol", {**PROTOCOL, "seqlen": 1024}), ("model_revision", "abc")]
)
def test_a_dense_model_measured_otherwise(field: str, value: Any, tmp_path: Path) -> None:
    file = write_records(tmp_path, [record(0.0, DENSE, **{field: value}), *(record(s, paper(s)) for s in SWEEP)])
    assert "the records differ in" in refused(file)[1]


def test_a_dense_model_measured_in_several_ways(tmp_path: Path) -> None:
    other = {**PROTOCOL, "seqlen": 1024}
    several = [record(0.0, DENSE), record(0.0, 4.0, ppl_protocol=other), *(record(s, paper(s)) for s in SWEEP)]
    assert ask(write_records(tmp_path, several))["dense"] == DENSE
    assert ask(write_records(tmp_path, several[::-1]))["dense"] == DENSE
    alone = refused(write_records(tmp_path, several[:2]))[1]
    assert "the records differ in ppl_protocol.seqlen: 1024, 512" in alone


def test_a_task_measured_on_other_items(tmp_path: Path) -> None:
    found = [record(0.0, DENSE, **cloze(0.7)), record(0.1, 6.0, **cloze(0.6)), record(0.2, 7.0, **cloze(0.5, n=50))]
    file = write_records(tmp_path, found)
    assert refused(file, "--metric", "cloze")[1].startswith("error: the records differ in cloze's items (n): 50, 500")
    assert ask(file)["points"] == 2  # which does not matter for perplexity


# Bad input


@pytest.mark.parametrize(
    ("text", "more", "status", "said"),
    [
        ("sparsity,ppl\n0.1,6\n0.2,7\n", (), 1, "has no row with sparsity 0: add the dense model's ppl"),
        ("sparsity,ppl\n0,5\n0.2,7\n", (), 1,
         "one pruned point cannot fit law 'ratio' (2 constants: a, b): measure more sparsities"),
        ("sparsity,acc\n0,0.5\n", ("--chance", "0.25"), 1, "no pruned point cannot fit law 'log-ratio'"),
        ("sparsity,ppl\n0,5\n0.1,1.0\n0.2,7\n", (), 1, "line 3: perplexity 1 is not a finite number above 1"),
        ("sparsity,ppl\n0,0.9\n0.1,6\n0.2,7\n", (), 1, "line 2: perplexity 0.9 is not a finite number above 1"),
        ("sparsity,ppl\n0,5\n0.1,inf\n0.2,7\n", (), 1, "line 3: perplexity inf is not a finite number above 1"),
        ("sparsity,ppl\n0,5\n0.1,nan\n0.2,7\n", (), 1, "line 3: ppl is NaN: remove the row, or measure it anew"),
        ("sparsity,ppl\n0,5\nnan,6\n0.2,7\n", (), 1, "line 3: sparsity is NaN"),
        ("sparsity,ppl\n0,5\n0.1,six\n0.2,7\n", (), 1, "line 3: ppl 'six' is no number"),
        ("sparsity,ppl\n0,5\n0.1\n0.2,7\n", (), 1, "line 3: ppl '' is no number"),
        ("sparsity,ppl\n0,5\n10,6\n20,7\n", (), 1,
         "line 3: sparsity 10 is outside [0, 1): give the fraction removed, not a percentage"),
        ("sparsity,ppl\n0,5\n-0.1,6\n0.2,7\n", (), 1, "sparsity -0.1 is outside [0, 1)"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.1,6.5\n", (), 1, "two values at sparsity 0.1: 6 ("),
        ("sparsity,ppl\n0,5\n0,5.5\n0.1,6\n", (), 1, "two values at sparsity 0: 5 ("),
        ("sparsity,acc\n0,72\n0.1,65\n0.2,50\n", (), 1,
         "accuracy 72 is outside [0, 1]: give a fraction, not a percentage"),
        ("sparsity,acc\n0,0.25\n0.1,0.3\n0.2,0.2\n", ("--chance", "0.25"), 1,
         "the dense model's accuracy on acc is 0.25, not above chance (0.25)"),
        ("sparsity,acc\n0,0\n0.1,0.3\n0.2,0.2\n", (), 1, "accuracy on acc is 0: there is nothing to lose"),
        ("sparsity,acc\n0,0.5\n0.1,0.3\n0.2,0.2\n", ("--chance", "25"), 2, "--chance 25 is outside [0, 1)"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--law", "powr"), 2,
         "unknown law for perplexity 'powr'; did you mean power?"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--law", "best"), 1,
         "held-out errors, which takes three pruned points or more (there are 2)"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n0.3,9\n", ("--law", "phase"), 1,
         "3 pruned points cannot fit law 'phase' (4 constants: a, b, c, t)"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--at", "1.5"), 2, "--at: 1.5 is outside [0, 1)"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--at", "half"), 2, "--at half: numbers separated by commas"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--target-ppl", "1"), 2,
         "--target-ppl 1: a finite perplexity above 1 is needed"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--target-ppl", "inf"), 2,
         "--target-ppl inf: a finite perplexity above 1 is needed"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--target-acc", "0.5"), 2,
         "--target-acc does not go with the metric ppl: add --metric TASK"),
        ("sparsity,acc\n0,0.5\n0.1,0.4\n0.2,0.3\n", ("--target-acc", "50"), 2,
         "--target-acc 50: an accuracy in (0, 1] is needed"),
        ("sparsity,acc\n0,0.5\n0.1,0.4\n0.2,0.3\n", ("--target-ppl", "9"), 2,
         "has no column ppl (its columns: sparsity, acc)"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--target-ppl", "9", "--target-acc", "0.5"), 2,
         "give --target-ppl or --target-acc, not both"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--metric", "piqa"), 2, "has no column acc"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--where", "method=wanda"), 2, "--where chooses among records"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--where", "wanda"), 2, "--where wanda: write NAME=VALUE"),
        ("sparsity,ppl\n0,5\n0.1,6\n0.2,7\n", ("--plot", "plot.svg"), 2,
         "--plot plot.svg: the name of a .png file is needed"),
        ("s,perplexity\n0,5\n", (), 2,
         "is neither records (JSON lines) nor a CSV whose first line names a column sparsity: "
         "it starts with 's,perplexity'"),
        ("", (), 2, "it is empty"),
        ("\x89PNG\r\n", (), 2, "is neither records (JSON lines) nor a CSV"),
        ("{broken\n", (), 1, "line 1: not JSON"),
        ('{"command": "prune"}\n', (), 1, "no evaluations among 1 records (commands: prune): run 'secateur eval DIR'"),
    ],
)  # fmt: skip
def test_bad_input(text: str, more: tuple[str, ...], status: int, said: str, tmp_path: Path) -> None:
    found = refused(write_csv(tmp_path, text), *more)
    assert said in found[1]
    assert found[0] == status
    assert [path.name for path in tmp_path.iterdir()] == ["points.csv"]


def test_bad_files(sweep: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "none.csv") == (
        2,
        f"error: no file '{tmp_path / 'none.csv'}': give a records.jsonl, the folder that holds it, "
        "or a CSV with columns sparsity,ppl or sparsity,acc",
    )
    (tmp_path / "empty").mkdir()
    assert "no records in" in refused(tmp_path / "empty")[1]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read as text" in refused(tmp_path / "binary")[1]
    table = write_csv(tmp_path, csv_of({0.0: 5.0, 0.1: 6.0, 0.2: 7.0}))
    assert "is a CSV and was given with other files" in refused(sweep, table)[1]


def test_bad_records(sweep: Path, tmp_path: Path) -> None:
    assert "--metric piqa was not measured (allowed: ppl)" in refused(sweep, "--metric", "piqa")[1]
    assert (
        "no pruned record has method=wanda (there are method: slicegpt)" in refused(sweep, "--where", "method=wanda")[1]
    )
    no_dense = write_records(tmp_path, [record(s, paper(s)) for s in SWEEP], "pruned.jsonl")
    assert (
        "the dense model's ppl is not among the records: run 'secateur eval tiny' under the same protocol"
        in refused(no_dense)[1]
    )
    bad = write_records(tmp_path, [record(0.0, DENSE), record(0.1, 0.5), record(0.2, 7.0)], "bad.jsonl")
    assert "runs/0.1: perplexity 0.5 is not a finite number above 1" in refused(bad)[1]
    two = write_records(
        tmp_path, [record(0.0, DENSE), record(0.1, 6.0), record(0.1, 7.0, out="runs/b"), record(0.2, 8.0)], "two.jsonl"
    )
    assert "two values at sparsity 0.1: 6 (runs/0.1) and 7 (runs/b); keep one" in refused(two)[1]


# Plots


def test_the_plot_is_written_and_the_same_twice(sweep: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "plots" / "law.png", tmp_path / "again.png"
    assert ask(sweep, "--plot", first)["plot"] == str(first)
    ask(sweep, "--plot", second)
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() == second.read_bytes()
    other = tmp_path / "other.png"
    ask(sweep, "--plot", other, "--law", "power")
    assert other.read_bytes() != first.read_bytes()


@pytest.mark.parametrize(
    "law", ["ratio", "theory", "log-linear", "log-slope", "power", "quadratic", "exponential", "phase"]
)
def test_every_law_can_be_drawn(law: str, sweep: Path, tmp_path: Path) -> None:
    ask(sweep, "--law", law, "--plot", tmp_path / "law.png")
    assert (tmp_path / "law.png").stat().st_size > 10_000


def test_plots_without_points_and_of_accuracy(tmp_path: Path) -> None:
    ask(write_csv(tmp_path, "sparsity,ppl\n0,5\n"), "--plot", tmp_path / "none.png")
    ask(
        write_csv(tmp_path, csv_of({0.0: 0.8, 0.1: 0.7, 0.2: 0.6}, "acc"), "b.csv"),
        "--plot",
        tmp_path / "acc.png",
        "--chance",
        "0.25",
    )
    assert (tmp_path / "none.png").exists()
    assert (tmp_path / "acc.png").exists()


def test_a_plot_that_cannot_be_written(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write the plot to" in refused(sweep, "--plot", tmp_path / "file" / "law.png")[1]


def sliced(tmp_path: Path) -> Path:
    """Records of a narrower stream: the share removed is 1.2 s - 0.2 s^2 - 0.01, with adapters."""
    for s in (0.0, 0.1, 0.2, 0.3, 0.4):
        records.append(
            tmp_path / "records.jsonl",
            {
                "command": "eval",
                "model": "m",
                "method": "slicegpt" if s else None,
                "sparsity": s,
                "sparsity_measured": s,
                "pruning_ratio": 1.2 * s - 0.2 * s * s - 0.01 if s else 0.0,
                "ppl": 10 * math.exp(s),
                "out": f"/runs/{s}",
            },
        )
    return tmp_path


def test_a_share_of_the_parameters_is_turned_into_a_sparsity(tmp_path: Path) -> None:
    record = api.predict([sliced(tmp_path)], at=[0.3], params_removed=[0.2, 0.5])
    at, near, far = record["predictions"]
    assert at["params_removed"] == pytest.approx(1.2 * 0.3 - 0.2 * 0.09 - 0.01)
    for entry, wanted in ((near, 0.2), (far, 0.5)):
        s = entry["sparsity"]
        assert 1.2 * s - 0.2 * s * s - 0.01 == pytest.approx(wanted, abs=5e-3)
        assert entry["params_removed"] == pytest.approx(wanted, abs=1e-4)
    assert (near["extrapolated"], far["extrapolated"]) == (False, True)
    target = api.predict([tmp_path], target_ppl=12.0)["target"]
    s = target["sparsity"]
    assert target["params_removed"] == pytest.approx(1.2 * s - 0.2 * s * s - 0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (1.0, r"--params-removed 1 is outside \[0, 1\)"),
        (-0.1, r"--params-removed -0\.1 is outside"),
    ],
)
def test_shares_that_no_sparsity_removes(removed: float, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        api.predict([sliced(tmp_path)], params_removed=[removed])


def test_noisy_shares_are_followed_between_the_points(tmp_path: Path) -> None:
    """A curve through these three falls again; the answer stays between its neighbours."""
    for s, removed in ((0.0, 0.0), (0.25, 0.19), (0.3, 0.235), (0.35, 0.26)):
        about = {"command": "eval", "model": "m", "method": "x" if s else None, "sparsity_measured": s}
        records.append(tmp_path / "records.jsonl", {**about, "pruning_ratio": removed, "ppl": 10 * math.exp(s)})
    found = api.predict([tmp_path], params_removed=[0.2, 0.28])["predictions"]
    assert 0.25 < found[0]["sparsity"] < 0.3
    assert found[1]["sparsity"] > 0.35


def test_points_that_do_not_tell_the_share(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("sparsity,ppl\n0,10\n0.2,12\n0.4,16\n0.6,30\n")
    with pytest.raises(UsageError, match="these points do not tell how many parameters were removed"):
        api.predict([tmp_path / "points.csv"], params_removed=[0.2])
    assert api.predict([tmp_path / "points.csv"], at=[0.2])["predictions"][0]["params_removed"] is None


def test_the_answer_comes_before_the_laws(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["predict", str(sliced(tmp_path)), "--params-removed", "0.2"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("20.0% of the parameters removed (sparsity 0.181): perplexity ")
    assert "predicted ppl" not in result.stdout, "and it is said once"
    result = CliRunner().invoke(app, ["predict", str(tmp_path), "--target-ppl", "12"])
    said = "perplexity 12.00 or less: 20.6% of the parameters removed at most (sparsity 0.186 at most); other laws: "
    assert result.stdout.startswith(said), result.stdout
    result = CliRunner().invoke(app, ["predict", str(tmp_path), "--params-removed", "0,2"])
    assert (result.exit_code, "--params-removed: 2 is outside [0, 1)" in result.stderr) == (2, True), result.stderr
