"""The dense model is measured once for each protocol, and its perplexity stands beside the pruned one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur import api
from secateur.core import records
from secateur.evaluate import evaluate as module


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that measured a perplexity."""
    calls: list[str] = []
    perplexity = module.perplexity

    def counted(*args: Any, **how: Any) -> Any:
        calls.append("measured")
        return perplexity(*args, **how)

    monkeypatch.setattr(module, "perplexity", counted)
    return calls


def test_sweeps_share_the_dense_model_and_a_second_eval_measures_again(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, measured: list[str]
) -> None:
    dense = saved("llama")
    request, measure = api.Request(str(dense), "magnitude"), api.EvalRequest("", text=ids_file)
    first, _ = api.sweep(request, [0.3], tmp_path / "a", measure)
    second, _ = api.sweep(request, [0.4], tmp_path / "b", measure)
    assert len(measured) == 3, "two pruned models, one dense one"
    assert (second["ppl"], second["key"], second["params_after"]) == (first["ppl"], first["key"], first["params_after"])
    assert records.read([tmp_path / "b"])[0]["ppl"] == first["ppl"], "it is in the records of each sweep"
    api.evaluate(replace(measure, model=str(dense)), records_file=tmp_path / "r.jsonl")
    assert len(measured) == 4, "who asks for it gets a measurement"


def test_other_weights_other_text_or_another_type_are_measured(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved("llama")
    measure = api.EvalRequest(str(dense), text=ids_file)

    def ask(request: api.EvalRequest) -> int:
        before = len(measured)
        module.evaluate(request, records_file=tmp_path / "r.jsonl", known=True)
        return len(measured) - before

    assert [ask(measure), ask(measure)] == [1, 0]
    assert ask(replace(measure, dtype="bfloat16")) == 1
    np.save(tmp_path / "other.npy", np.load(ids_file)[:3])
    assert ask(replace(measure, text=str(tmp_path / "other.npy"))) == 1
    os.utime(dense / "model.safetensors")
    assert ask(measure) == 1
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert ask(measure) == 1, "the same weights with another norm are another model"
    monkeypatch.chdir(tmp_path)
    assert ask(replace(measure, model=f"./{dense.name}")) == 0, "a folder by another name is the same folder"


def test_against_gives_the_dense_perplexity_beside_the_pruned_one(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, measured: list[str]
) -> None:
    dense = saved("llama")
    api.prune(api.Request(str(dense), "magnitude", sparsity=0.5), tmp_path / "out")
    record = api.evaluate(api.EvalRequest(str(tmp_path / "out"), text=ids_file, against=str(dense)))
    assert len(measured) == 2
    alone = api.evaluate(api.EvalRequest(str(dense), text=ids_file), records_file=tmp_path / "r.jsonl")
    assert (record["ppl_dense"], record["loss_dense"]) == (alone["ppl"], alone["loss"])
    assert record["ppl"] != record["ppl_dense"]
    api.evaluate(api.EvalRequest(str(tmp_path / "out"), text=ids_file, against=str(dense)))
    assert len(measured) == 4, "the dense model was known by then"
    before = len(measured)
    api.prune(api.Request(str(dense), "magnitude", sparsity=0.6), tmp_path / "more")
    for folder in ("more", "out"):
        api.evaluate(api.EvalRequest(str(tmp_path / folder), text=ids_file, against=str(dense)))
    assert len(measured) - before == 2, "what --against measured is kept too"


def test_a_cache_that_cannot_be_written_or_read_is_no_error(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    measure = api.EvalRequest(str(saved("llama")), text=ids_file)
    for _ in range(2):
        module.evaluate(measure, records_file=tmp_path / "r.jsonl", known=True)
    assert len(measured) == 2
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    module.evaluate(measure, records_file=tmp_path / "r.jsonl", known=True)
    for file in (tmp_path / "cache" / "dense").iterdir():
        file.write_text("{broken")
    module.evaluate(measure, records_file=tmp_path / "r.jsonl", known=True)
    assert len(measured) == 4


def test_without_the_shift_perplexities_alone_are_compared(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = saved("llama"), tmp_path / "out"
    api.prune(api.Request(str(dense), "magnitude", sparsity=0.5), out)
    asked = api.EvalRequest(str(out), text=ids_file)
    assert "ppl_dense" not in api.evaluate(asked)
    full = api.evaluate(replace(asked, against=str(dense)))
    alone = api.evaluate(replace(asked, against=str(dense), shift=False))
    assert (alone["ppl"], alone["ppl_dense"], "shift" in alone) == (full["ppl"], full["ppl_dense"], False)
    known = api.evaluate(asked)
    assert known["ppl_dense"] == full["ppl_dense"], "it was measured under this protocol"
    again = api.evaluate(replace(asked, against=str(dense)), resume=True)
    assert again["shift"] == full["shift"], "an evaluation without the shift does not stand for one with it"
