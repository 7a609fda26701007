"""A loss above 709 nats a token: the perplexity is infinite, and every command goes on.

Reports and laws leave such a point out and say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core import records
from secateur.core.errors import SecateurError
from secateur.evaluate.perplexity import Perplexity
from secateur.predict.read import read_points
from secateur.report.rows import collect


@pytest.fixture
def loud(saved: Callable[..., Path]) -> Path:
    """A model whose logits are far too large."""
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_past_the_largest_float_is_an_infinite_perplexity() -> None:
    assert Perplexity(709.7, 1, 1).ppl == pytest.approx(math.exp(709.7))
    assert Perplexity(709.8, 1, 1).ppl == math.inf
    assert Perplexity(709.8, 1, 1).facts == {"ppl": math.inf, "loss": 709.8}


def test_the_loss_stays_in_the_record_and_the_line_is_json(loud: Path, ids_file: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["eval", str(loud), "--text", ids_file, "--json", "--records", str(tmp_path / "r.jsonl")]
    )
    assert result.exit_code == 0, result.stderr

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    line = json.loads(result.stdout, parse_constant=refuse)
    assert line["ppl"] is None
    assert line["loss"] > 709.8
    (read,) = records.read([tmp_path / "r.jsonl"])
    assert read["ppl"] == math.inf, "read back as what it was"
    (row,) = collect([read])
    assert row.diverged


def test_a_sweep_and_its_resumption_go_on_and_report_and_laws_say_what_they_left_out(
    loud: Path, ids_file: str, tmp_path: Path
) -> None:
    sweep = [
        "sweep",
        str(loud),
        "--method",
        "magnitude",
        "--sparsity",
        "0.3,0.6",
        "--text",
        ids_file,
        "--out",
        str(tmp_path / "s"),
    ]
    for more in ([], ["--resume"]):
        result = CliRunner().invoke(app, [*sweep, *more])
        assert result.exit_code == 0, result.stderr
        assert result.stderr.count("ppl infinite") == 3
        assert "infinite" in result.stdout
    page = tmp_path / "report.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path / "s"), "--out", str(page)]).exit_code == 0
    assert "3 checkpoints with an infinite perplexity: in the table, left out of plots and laws" in page.read_text()
    card = (tmp_path / "s" / "magnitude-0.3" / "README.md").read_text()
    assert " predicted): infinite (" in card


def test_a_study_of_modules_goes_on_and_says_that_nothing_can_be_compared(
    loud: Path, ids_file: str, tmp_path: Path
) -> None:
    study = [
        "study",
        "modules",
        str(loud),
        "--method",
        "magnitude",
        "--kinds",
        "attention,mlp",
        "--sparsity",
        "0.3,0.6",
    ]
    result = CliRunner().invoke(app, [*study, "--text", ids_file, "--out", str(tmp_path / "s")])
    assert result.exit_code == 0, result.stderr
    assert "dense infinite" in " ".join(result.stdout.split())
    assert result.stdout.count("infinite") >= 5, "the dense model's, and that of each cell"
    assert "The dense model has an infinite perplexity, so no cell can be compared with it." in result.stdout
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "s"), "--out", str(page)])
    assert result.exit_code == 0, result.stderr
    assert "The dense model has an infinite perplexity" in page.read_text()
    assert "dense perplexity infinite" in page.read_text()


def test_laws_leave_an_infinite_perplexity_out_and_say_so(tmp_path: Path) -> None:
    def record(s: float, loss: float) -> dict[str, object]:
        about = {
            "command": "eval",
            "model": "m",
            "method": "wanda" if s else None,
            "sparsity": s,
            "sparsity_measured": s,
            "out": f"/runs/{s}",
        }
        return {**about, "ppl": math.exp(loss) if loss < 709 else math.inf, "loss": loss}

    for s, loss in ((0.0, 2.0), (0.2, 2.1), (0.4, 2.4), (0.6, 3.0), (0.9, 800.0)):
        records.append(tmp_path / "records.jsonl", record(s, loss))
    points = read_points([tmp_path])
    assert points.s.tolist() == [0.2, 0.4, 0.6]
    assert points.warnings == ("/runs/0.9: the perplexity is infinite, which no law can give; left out",)
    few = tmp_path / "few"
    for s, loss in ((0.0, 2.0), (0.2, 2.1), (0.9, 800.0)):
        records.append(few / "records.jsonl", record(s, loss))
    with pytest.raises(
        SecateurError, match=r"one pruned point \(1 more left out, the first: /runs/0.9: the perplexity is infinite"
    ):
        api.predict([few])


def test_healing_starts_from_an_infinite_perplexity(loud: Path, ids_file: str, tmp_path: Path) -> None:
    api.prune(api.Request(str(loud), "magnitude", sparsity=0.5), tmp_path / "out")
    request = api.HealRequest(str(tmp_path / "out"), ids_file, steps=2, rank=2, samples=2, text=ids_file, lr=1e-6)
    record = api.heal(request, tmp_path / "healed")
    assert record["ppl_before"] == math.inf
    assert record["loss_before"] > 709.8
    assert record["loss"] > 709.8
