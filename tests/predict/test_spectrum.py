"""The prediction from the spectrum against its parts, computed naively in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from secateur import api
from secateur.calibrate.stream import Stream
from secateur.cli import app
from secateur.models.canonical import canonical_view
from secateur.predict.spectrum import C_UNFITTED, Costs, head_fisher, measure_costs, place_costs
from tests.layouts import layout_of
from tests.tiny import BLOCKS, FAMILY_TYPES, HIDDEN, able, tiny_model


def request_for(folder: Path, ids_file: str) -> api.Request:
    return api.Request(str(folder), "slicegpt", sparsity=0.5, calibration=ids_file)


def final_states(model: Any, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input of the final norm [N, D], the next-token distribution [N, V], and the head times the gain [V, D]."""
    seen: list[Tensor] = []
    family = api.view_model(model).family
    norm = model.get_submodule(family.final_norm)
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = model(windows).logits
    handle.remove()
    hidden = seen[0].flatten(0, 1)
    head = model.get_submodule(family.head).weight * norm.weight
    centred = hidden - hidden.mean(1, keepdim=True) if family.norm.centred else hidden
    return centred, logits.flatten(0, 1).softmax(1), head


@pytest.mark.parametrize("model_type", able("slicegpt", FAMILY_TYPES))
@torch.no_grad()
def test_the_fisher_information_of_the_head(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view = canonical_view(api.view_model(model), model.dtype)
    stream = Stream(view, windows, device=torch.device("cpu"), dtype=torch.float64)
    halves = ("attention_half", "mlp_half")[: len(view.family.norms)]
    for index in range(BLOCKS):
        for half in halves:
            stream.advance_half(view.block(index), half, None, None)
    hidden_ND, p_NV, head_VD = final_states(model, windows)
    expected_DD = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    for x_D, p_V in zip(hidden_ND, p_NV, strict=True):
        expected_DD += (
            head_VD.T
            @ (p_V.diag() - p_V.outer(p_V))
            @ head_VD
            / (x_D.square().mean() + view.raw_config["pruned_residual"]["epsilon"])
        )
    torch.testing.assert_close(head_fisher(view, stream), expected_DD / len(hidden_ND), rtol=1e-5, atol=1e-8)


def test_the_cost_of_a_place_is_the_trace_of_what_is_discarded() -> None:
    draw = torch.Generator().manual_seed(0)
    root, other = (torch.randn(6, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    moment, fisher = root @ root.T, other @ other.T
    found = place_costs(moment, fisher)
    value, vector = np.linalg.eigh(moment.numpy())
    for width in range(7):
        weakest = vector[:, : 6 - width]
        discarded = weakest @ np.diag(value[: 6 - width]) @ weakest.T
        assert found[width] == pytest.approx(0.5 * np.trace(fisher.numpy() @ discarded), abs=1e-12)


@torch.no_grad()
def test_the_cost_is_the_divergence_that_small_noise_causes() -> None:
    """With small noise of a given second moment before the head, the mean divergence is K, to second order."""
    model = tiny_model("llama", dtype=torch.float64)
    windows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(5))
    hidden_ND, p_NV, head_VD = final_states(model, windows)
    rms_N1 = (hidden_ND.square().mean(1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    moment = 1e-4 * torch.diag(torch.arange(1.0, HIDDEN + 1, dtype=torch.float64))
    view = canonical_view(api.view_model(model), model.dtype)
    stream = Stream(view, windows, device=torch.device("cpu"), dtype=torch.float64)
    for index in range(BLOCKS):
        for half in ("attention_half", "mlp_half"):
            stream.advance_half(view.block(index), half, None, None)
    predicted = place_costs(moment, head_fisher(view, stream))[0]
    draw, divergences = torch.Generator().manual_seed(1), []
    for _ in range(200):
        noise_ND = torch.randn(hidden_ND.shape, dtype=torch.float64, generator=draw) * moment.diagonal().sqrt()
        q_NV = ((hidden_ND + noise_ND) / rms_N1 @ head_VD.T).log_softmax(1)
        divergences.append(float((p_NV * (p_NV.log() - q_NV)).sum(1).mean()))
    assert np.mean(divergences) == pytest.approx(predicted, rel=0.05)


def test_a_soft_cap_behind_the_head_is_refused(saved: Callable[..., Path], ids_file: str) -> None:
    prepared = api.prepare(request_for(saved("llama"), ids_file))
    view = prepared.job.view
    capped = replace(view, family=replace(view.family, logit_cap="hidden_size"))
    with pytest.raises(api.SecateurError, match=r"soft-cap \(hidden_size = 32\), which the prediction from"):
        measure_costs(replace(prepared, job=replace(prepared.job, view=capped)))


@pytest.mark.parametrize("model_type", able("slicegpt", FAMILY_TYPES))
def test_every_place_that_is_sliced_has_a_cost(saved: Callable[..., Path], model_type: str, ids_file: str) -> None:
    costs = measure_costs(api.prepare(request_for(saved(model_type), ids_file)))
    assert len(costs.places) == BLOCKS * layout_of(model_type).skips
    for values in costs.places.values():
        assert len(values) == HIDDEN + 1
        assert values[-1] == 0
        assert (np.diff(values) <= 1e-12).all()
    for s in (0.05, 0.3, 0.77):
        assert costs.inverse(costs.at(s)) == pytest.approx(s)
    assert costs.at(0.0) == 0
    assert costs.inverse(-1.0) is None


def records(folder: Path, points: dict[float, float]) -> Path:
    file = folder / "points.csv"
    file.write_text("sparsity,ppl\n" + "".join(f"{s},{ppl}\n" for s, ppl in points.items()))
    return file


def test_one_point_fixes_the_scale(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = request_for(saved("llama"), ids_file)
    costs = measure_costs(api.prepare(request))
    truth = {s: 20 * math.exp(1.7 * costs.at(s)) for s in (0.1, 0.25, 0.5)}
    points = records(tmp_path, {0: 20.0, 0.25: truth[0.25]})
    record = api.predict_from_spectrum(request, [points], at=[0.1, 0.5], target_ppl=truth[0.5])
    assert record["a"] == pytest.approx(1.7)
    assert [p["ppl"] for p in record["predictions"]] == pytest.approx([truth[0.1], truth[0.5]])
    assert record["target"]["sparsity"] == pytest.approx(0.5)
    assert record["heldout_rmse"] is None
    assert record["warnings"] == ["sparsity 0.5 is above 0.25, the largest that the scale rests on: extrapolated"]
    several = api.predict_from_spectrum(request, [records(tmp_path, {0: 20.0, **truth})])
    assert several["heldout_rmse"] == pytest.approx(0, abs=1e-9)
    assert several["rmse"] == pytest.approx(0, abs=1e-9)


def test_without_points_it_says_what_the_scale_is(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = request_for(saved("opt"), ids_file)
    record = api.predict_from_spectrum(request, dense_ppl=30.0, at=[0.2], target_ppl=33.0)
    (answer,) = record["predictions"]
    assert record["a"] == C_UNFITTED
    assert 30 < answer["low"] < answer["ppl"] < answer["high"]
    assert record["target"]["cautious"] < record["target"]["sparsity"]
    assert "no point is measured" in record["warnings"][0]
    bare = api.predict_from_spectrum(request, at=[0.2])["predictions"][0]
    assert bare["ppl_ratio"] == pytest.approx(answer["ppl"] / 30)


def test_points_of_something_else_are_refused(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = request_for(saved("llama"), ids_file)
    file = tmp_path / "records.jsonl"
    protocol = {"spec": "x", "seqlen": 8, "windows": 1, "tokens": 8, "bos": "each", "tail": "drop", "sha256": "0"}
    for name, said in (("model", "the points are of model 'other'"), ("method", "the points are of method 'wanda'")):
        facts = {
            "command": "eval",
            "model": request.model,
            "method": "slicegpt",
            **{name: "other" if name == "model" else "wanda"},
            "ppl_protocol": protocol,
        }
        rows = [facts | {"method": None, "sparsity": 0.0, "sparsity_measured": 0.0, "ppl": 10.0, "pruning_ratio": 0.0}]
        rows += [facts | {"sparsity": s, "sparsity_measured": s, "ppl": 10 + s} for s in (0.1, 0.2)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(api.SecateurError, match=said):
            api.predict_from_spectrum(request, [file])


def test_questions_past_the_points_are_reported(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = request_for(saved("llama"), ids_file)
    record = api.predict_from_spectrum(
        request, [records(tmp_path, {0: 10.0, 0.1: 9.99, 0.3: 11.0})], at=[0.2, 0.9], target_ppl=1e300
    )
    assert [p["extrapolated"] for p in record["predictions"]] == [False, True]
    assert any("0.9" in warning and "above 0.3" in warning for warning in record["warnings"])
    assert record["target"]["extrapolated"]
    assert record["target"]["sparsity"] == 1 - 1 / HIDDEN, "one direction is left"
    assert record["heldout_rmse"] is not None, "0.1 is predicted from 0.3; the other way there is nothing to scale by"


BAD: list[tuple[list[str], str]] = [
    (["--at", "1.5"], "--at: 1.5 is outside"),
    (["--dense-ppl", "0.5"], "--dense-ppl 0.5: a finite perplexity above 1"),
    (["--target-ppl", "20"], "--target-ppl needs the perplexity of the dense model"),
    (["--law", "ratio"], "--law does not go with --spectrum"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_is_refused(saved: Callable[..., Path], ids_file: str, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(
        app, ["predict", "--spectrum", str(saved("llama")), "--calibration", ids_file, *arguments]
    )
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_command_line(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    model = str(saved("llama"))
    result = CliRunner().invoke(
        app,
        ["predict", "--spectrum", model, "--calibration", ids_file, "--dense-ppl", "30", "--at", "0.1,0.2", "--json"],
    )
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert {"law", "a", "b", "rmse", "heldout_rmse", "points", "predictions", "target", "warnings"} <= record.keys()
    assert [p["sparsity"] for p in record["predictions"]] == [0.1, 0.2]
    flat = records(tmp_path, {0: 20.0, 0.25: 20.0})
    result = CliRunner().invoke(app, ["predict", str(flat), "--spectrum", model, "--calibration", ids_file])
    assert result.exit_code == 1
    assert "nothing to scale by" in result.stderr
    result = CliRunner().invoke(app, ["predict", "--dense-ppl", "3"])
    assert result.exit_code == 2
    assert "--dense-ppl belongs to --spectrum" in result.stderr
    result = CliRunner().invoke(app, ["predict"])
    assert result.exit_code == 2
    assert "POINTS are missing" in result.stderr


def test_costs_interpolate_between_whole_widths() -> None:
    costs = Costs(4, {"a": np.array([10.0, 6.0, 3.0, 1.0, 0.0])})
    assert costs.at(0.25) == 1.0
    assert costs.at(0.375) == 2.0
    assert costs.inverse(2.0) == pytest.approx(0.375)
    assert costs.inverse(99.0) == 0.75
