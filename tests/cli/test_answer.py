"""What a command prints first: a few lines that answer it. The record is there with --verbose and --json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.cli.answer import answer

RECORD: dict[str, Any] = {
    "command": "prune",
    "model": "org/model",
    "method": "slicegpt",
    "sparsity_measured": 0.25,
    "sparsity_of": "width",
    "params_before": 134_515_008,
    "params_after": 100_886_256,
    "nonzero_after": 100_886_256,
    "bytes_before": 269_060_552,
    "bytes_after": 201_785_888,
    "stock": False,
    "seconds": 125.3,
    "out": "/runs/my model",
}


def run(*args: Any) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_prune_says_what_came_out_how_it_loads_and_what_is_next() -> None:
    assert answer(RECORD) == [
        "135 M -> 101 M parameters (25.0% removed), 269 MB -> 202 MB, 2 min 05 s",
        "slicegpt removed 25.0% of the residual width. Model and tokenizer load with trust_remote_code=True, or after "
        "import secateur.",
        "Next: secateur eval '/runs/my model' --no-shift --against org/model",
    ]
    zeros = {
        **RECORD,
        "method": "wanda",
        "sparsity_of": "weights",
        "sparsity_measured": 0.5,
        "params_after": 134_515_008,
        "nonzero_after": 81_428_544,
        "bytes_after": 269_060_552,
        "stock": True,
        "seconds": 3.2,
    }
    assert answer(zeros)[:2] == [
        "135 M parameters, 39.5% zeroed, 269 MB, 3.2 s",
        "wanda zeroed 50.0% of the weights of the targeted matrices. A stock model: it loads as the original does.",
    ]


def test_the_advice_to_heal_says_how_much_that_is() -> None:
    measured = {"ppl": 9.0, "ppl_protocol": {"spec": "wikitext2", "windows": 3, "seqlen": 2048}}
    lines = answer({**RECORD, "command": "eval", **measured})
    assert lines[-2:] == [
        "Next: secateur heal '/runs/my model' --out '/runs/my model-healed'",
        "      it trains for 1,000 steps; with --dry-run it only says how long that takes.",
    ]


def test_no_command_is_advised_that_cannot_work() -> None:
    """The name of a folder without its place, from a plan; an adapter without its model."""
    assert answer({**RECORD, "model": "lost"})[-1] == "Next: secateur eval '/runs/my model'"
    revision = {"model": "gpt2", "model_revision": "abc"}
    assert answer({**RECORD, **revision})[-1].endswith("--against gpt2 --against-revision abc")
    healed = {**RECORD, "command": "heal", "heal": {"keep_adapter": True}}
    assert not [line for line in answer(healed) if line.startswith("Next: ")]


def test_the_next_command_works_without_a_hub() -> None:
    """Where calibration was a file, the default text of an evaluation may be out of reach."""
    local = {**RECORD, "model": "lost", "calibration": {"spec": "a.txt", "file_sha256": "0"}}
    assert answer(local)[-2:] == [
        "Next: secateur eval '/runs/my model' --text TEXT_FILE",
        "      TEXT_FILE: text that was not used for calibration.",
    ]
    (*_, last) = answer({**local, "calibration": {"spec": "wikitext2"}})
    assert last == "Next: secateur eval '/runs/my model'"
    (*_, last) = answer({**local, "model": "bundled"})
    assert last == "Next: secateur eval '/runs/my model' --no-shift --against bundled"
    healed = {**local, "command": "heal", "heal": {"calibration": {"spec": "a.txt", "file_sha256": "0"}}}
    assert answer(healed)[-1] == "      TEXT_FILE: text that was not used for calibration or healing."
    measured = {"ppl": 9.0, "ppl_protocol": {"spec": "my text", "windows": 3, "seqlen": 256}}
    options = {"measured_with": {"text": "my text", "eval-seqlen": 256, "limit": 3}}
    (*_, last) = answer({**healed, **measured, **options})
    assert last == "Next: secateur eval '/runs/my model' --text 'my text' --eval-seqlen 256 --limit 3"


def test_an_evaluation_on_a_file_hands_the_file_on(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.touch()
    measured = {"ppl": 9.0, "ppl_protocol": {"spec": str(file), "windows": 3, "seqlen": 2048}}
    assert f" --text {file} --out " in answer({**RECORD, "command": "eval", **measured})[-2]


def test_healing_says_what_it_gained_on_its_own_rows() -> None:
    done = {**RECORD, "command": "heal", "heal": {"training_loss": [3.6457, 3.5952]}}
    assert "training loss 3.65 -> 3.60 on the same rows, in nats a token" in answer(done)


def test_a_dry_run_says_why_less_is_removed_than_asked_for() -> None:
    dry = {**RECORD, "dry_run": True, "sparsity": 0.5, "size_note": "its tied head gets weights of its own"}
    assert answer(dry)[1] == (
        "slicegpt would remove 50.0% of the residual width (its tied head gets weights of its own)."
    )
    assert answer({**dry, "seconds_estimated": 22.0})[-1] == (
        "Expected, about: 22 s on an idle machine. Nothing was written."
    )


@pytest.mark.parametrize(
    ("tied", "head", "why"),
    [
        (True, "own", "its tied head gets weights of its own, and adapters are added"),
        (True, "auto", "its head stays the embedding, a map before it and adapters are added"),
        (False, "auto", "adapters are added"),
    ],
)
def test_a_dry_slice_says_what_is_added(
    tied: bool, head: str, why: str, saved: Callable[..., Path], ids_file: str
) -> None:
    model = saved("llama", tied=tied)
    asked = ["prune", model, "--sparsity", 0.5, "--calibration", ids_file, "--dry-run", "--method"]
    assert f"of the residual width ({why})." in run(*asked, "slicegpt", "--set", "round=1", "--set", f"head={head}")
    assert "(" not in run(*asked, "magnitude").splitlines()[1]


def test_zeros_that_a_model_has_by_accident_are_not_called_zeroed() -> None:
    few = {**RECORD, "nonzero_after": RECORD["params_after"] - 300_000, "sparsity_of": "parameters"}
    assert "zeroed" not in " ".join(answer(few))
    assert "0.2% zeroed" in answer({**few, "sparsity_of": "weights"})[0]


def test_a_larger_result_is_not_called_smaller() -> None:
    (first, *_) = answer({**RECORD, "params_after": 140_000_000, "nonzero_after": 140_000_000})
    assert first.startswith("135 M -> 140 M parameters (4.1% added)")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "under 0.1 s"), (3.2, "3.2 s"), (89.0, "1 min 29 s"), (9000.0, "2 h 30 min")]
)
def test_times_are_in_the_unit_that_people_plan_by(seconds: float, words: str) -> None:
    assert answer({**RECORD, "seconds": seconds})[0].endswith(f", {words}")


@pytest.mark.parametrize("lost", ["seconds", "stock", "params_before", "params_after", "bytes_before"])
def test_a_record_without_a_number_has_its_table_instead(lost: str) -> None:
    assert answer({key: value for key, value in RECORD.items() if key != lost}) == []
    assert answer({"command": "eval", "out": "x", "shift": {"kl": None}}) == []


def test_studies_have_their_table_on_a_dry_run(saved: Callable[..., Path], ids_file: str) -> None:
    said = run("study", "disp-llm", saved("llama"), "--calibration", ids_file, "--text", ids_file, "--dry-run")
    assert "runs" in said
    assert "depends on the text" not in said


def test_commands_answer_and_print_the_record_when_it_is_asked_for(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense, out = saved("llama"), tmp_path / "out"
    prune = ["prune", dense, "--method", "magnitude", "--pattern", "rows", "--sparsity", 0.5]
    said = run(*prune, "--dry-run").splitlines()
    size, _, stored = said[0].partition("removed), ")
    assert stored.count(" kB") == 2
    assert said[1] == "magnitude would remove 50.0% of the weights of the targeted matrices, in whole units."
    assert said[2].endswith("Nothing was written.")
    done = run(*prune, "--out", out).splitlines()
    assert done[0].startswith(size), "the dry run told the truth"
    assert done[-1] == f"Next: secateur eval {out} --no-shift --against {dense}"
    measured = run("eval", out, "--text", ids_file, "--against", dense)
    record = json.loads(run("eval", out, "--text", ids_file, "--against", dense, "--json"))
    assert measured.startswith(f"perplexity {record['ppl_dense']:.2f} -> {record['ppl']:.2f} (ids.npy, 6 windows of 20")
    assert "Behaviour: the most likely token is the dense model's at" in measured
    assert "ppl_protocol" not in measured
    assert "sparsity_measured" not in measured
    assert "sparsity_measured" in run("eval", out, "--text", ids_file, "--verbose")
    healed = run(
        "heal",
        out,
        "--calibration",
        ids_file,
        "--text",
        ids_file,
        "--steps",
        1,
        "--samples",
        2,
        "--out",
        tmp_path / "h",
    )
    assert healed.startswith(f"perplexity {record['ppl']:.2f} -> ")
    assert (
        "magnitude removed 50.0% of the weights of the targeted matrices, in whole units, then healed with LoRA"
        in healed
    )


def _predicted(low: float, high: float | None, metric: str = "ppl") -> str:
    entry = {"sparsity": 0.5, "ppl": 21.0, "acc": 0.4, "low": low, "high": high, "extrapolated": False}
    record = {"command": "predict", "metric": metric, "dense": 11.0, "asked": True, "predictions": [entry]}
    return answer(record)[0]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (12.0, 40.0, "(95%: 12.00 to 40.00)"),
        (12.0, 1200.0, "(95%: 12.00 to 1,200)"),
        (11.98, 2.58e71, "(95%: 11.98 or more)"),
        (11.98, float("inf"), "(95%: 11.98 or more)"),
        (11.98, None, "(95%: 11.98 or more)"),
        (3.5, 2.58e71, "(too few points for an interval)"),
    ],
)
def test_an_interval_of_no_use_is_not_printed(low: float, high: float | None, words: str) -> None:
    assert _predicted(low, high) == f"sparsity 0.5: perplexity 21.00 {words}"


def test_an_accuracy_keeps_its_interval() -> None:
    assert _predicted(0.001, 0.5, "cloze") == "sparsity 0.5: accuracy on cloze 0.400 (95%: 0.001 to 0.500)"


def test_a_law_through_its_points_has_no_error_of_rounding(tmp_path: Path) -> None:
    two = tmp_path / "two.csv"
    two.write_text("sparsity,ppl\n0,10\n0.2,11.5\n0.3,14\n")
    record = json.loads(run("predict", two, "--json"))
    assert 0 < record["rmse"] < 1e-14, "the record keeps the number"
    said = " ".join(run("predict", two).split())
    assert "through" in said
    assert "both points" in said
    assert "e-16" not in said
    five = tmp_path / "five.csv"
    five.write_text("sparsity,ppl\n0,10\n0.1,11\n0.2,12\n0.3,14\n0.4,18\n")
    assert "through" not in run("predict", five)
