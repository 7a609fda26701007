"""The sentences that the report writes about a study of modules."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.core import records
from secateur.report import modules as told


def _record(kind: str, sparsity: float, ppl: float, size: int, tasks: dict[str, Any] | None = None) -> records.Record:
    about = {
        "command": "study",
        "study": "modules",
        "model": "m",
        "method": "wanda",
        "options": {},
        "pattern": "unstructured",
        "mode": "shared",
        "seed": 0,
    }
    where = {
        "kind": kind,
        "modules": f"{kind}={sparsity:g}",
        "sparsity": sparsity,
        "sparsity_measured": sparsity,
        "weights_removed": round(sparsity * size),
    }
    return {
        **about,
        **where,
        "ppl": ppl,
        "ppl_protocol": {"sha256": "x", "seqlen": 8},
        "calibration": None,
        "tasks": tasks or {},
    }


def test_the_verdict_is_what_the_numbers_say() -> None:
    """A small matrix that costs little by rate and most by weight; damage that comes at the end."""
    dense = {
        "command": "eval",
        "model": "m",
        "method": None,
        "ppl": 10.0,
        "ppl_protocol": {"sha256": "x", "seqlen": 8},
        "tasks": {"t": {"acc": 0.6}},
    }
    made = [_record("v", s, p, 100) for s, p in ((0.5, 11.0), (0.9, 12.0), (1.0, 30.0))]
    made += [_record("up", s, p, 1000) for s, p in ((0.5, 12.0), (0.9, 40.0), (1.0, 90.0))]
    for kind, size in (("attention", 200), ("mlp", 2000), ("all", 2200)):
        made += [
            _record(kind, s, 10 + 20 * s * size / 2200, size, {"t": {"acc": 0.5, "stderr": 0.1}}) for s in (0.5, 1.0)
        ]
    (study,) = told.read_studies([dense, *made])
    said = told.verdict(study)
    assert said[0].startswith(
        "Per sparsity, up is the most sensitive projection and v the least: "
        "at 90% of each, perplexity is up 4\N{MULTIPLICATION SIGN}, v 1.200\N{MULTIPLICATION SIGN}"
    )
    assert said[1].startswith("Per weight, v is the most sensitive and up the least: with 90 weights removed")
    assert study.loss_at("up", 100) == pytest.approx(0.2 * 0.1823, abs=1e-3)
    assert study.doubles_at("v") == pytest.approx(0.9 + 0.1 * (0.6931 - 0.1823) / (1.0986 - 0.1823), abs=1e-3)
    assert "83% (v)" in said[3]
    assert told.task_bars(study)[1]["t"]["attention"] == (0.5, 0.1)
    assert any("50% sparsity" in line and "uniform 0.500" in line for line in said)
