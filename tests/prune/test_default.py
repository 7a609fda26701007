"""A prune that names no method: what it takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur import api


@pytest.mark.parametrize(
    ("asked", "method", "options"),
    [
        ({"params_removed": 0.3}, "search", {}),
        ({"params_removed": 0.3, "stock_only": True}, "search", {"uniform": True}),
        ({"pattern": "2:4"}, "sparsegpt", {"refine": 2}),
        ({"pattern": "unstructured", "sparsity": 0.5}, "sparsegpt", {"refine": 2}),
        ({"pattern": "2:4", "options": {"refine": 0}}, "sparsegpt", {"refine": 0}),
    ],
)
def test_what_is_asked_for_tells_the_method(
    asked: dict[str, Any], method: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = api.with_method(api.Request("model", **asked))
    assert (found.method, found.options, found.reconstruct) == (method, options, True)
    said = capsys.readouterr().err
    assert f"no --method: {method}" in said
    assert all(f"--set {name}={str(value).lower()}" in said for name, value in options.items())
    assert ", then reconstruct" in said


@pytest.mark.parametrize("asked", [{}, {"sparsity": 0.5}, {"pattern": "rows", "params_removed": 0.3}])
def test_a_request_that_says_neither_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(
        api.UsageError,
        match=r"the method is missing .--method M.: name one .* or say what you want: --params-removed R",
    ):
        api.with_method(api.Request("model", **asked))


def test_several_processes_need_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(api.UsageError, match=r"the method is missing .--method M.: under torchrun name one"):
        api.with_method(api.Request("model", params_removed=0.3))


def test_a_method_that_is_named_stays() -> None:
    request = api.Request("model", "magnitude", params_removed=0.3)
    assert api.with_method(request) is request


def test_the_result_is_smaller_and_mended(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = api.Request(str(saved("llama")), params_removed=0.3, calibration=ids_file, samples=6)
    record = api.prune(request, tmp_path / "out")
    assert (record["command"], record["method"]) == ("reconstruct", "search")
    assert record["pruning_ratio"] == pytest.approx(0.3, abs=0.01)
    assert api.prune(request, tmp_path / "out", resume=True) == record
